"""A model opened in its folder: all is read but its blocks, which read themselves when they run or are held."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nsvd.stored import guard
from nsvd.stored.folder import CONFIG, INDEX, SINGLE, Stored
from nsvd.stored.foreign import quiet, reading
from nsvd.stored.loading import looked_at, read_tokenizer, skeleton, usable_device, usable_dtype
from nsvd.stored.section import section_of
from nsvd.stored.skeleton import check_blocks, check_finite, renamed
from nsvd.walk.decoder import block_list, place_in
from nsvd.walk.lazy import Place, Slot, Source, filled, held, make_lazy, read, slots

SHARD_BYTES = 2**29  # of an output file, and in memory while it is written


class WholeOnly(ValueError):
    """A model that cannot be read block by block; it may be loaded whole."""


def open_folder(
    folder: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "auto", verify: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) as ``nsvd.load`` gives them, but for the blocks: these are ``LazyBlock``, and stay in the files.

    Arguments and errors are those of ``load``; that all values of a block are finite is checked when it is read for the first time.
    No parameter of a block is to be trained. The files must stay as they are while the model is in use.

    Raises:
        CheckpointError: as ``load``.
        WholeOnly: if the model is compressed already, has no list of blocks, or tensors of its blocks are shared, or stand in
            the files in another form.
        ValueError: if there is no such dtype or device.
    """
    folder = Path(folder)
    where, dtype = torch.device(usable_device(device)), usable_dtype(dtype)
    told, stored = looked_at(folder, verify=verify)
    if told.get("quantization_config") is not None:
        raise WholeOnly(f"{folder} cannot be read block by block: it is compressed already")
    try:
        model = _built(folder, dtype, stored, told)
        name, blocks = _checked_blocks(model)
        found, unexpected = _placed(model, stored)
        _read_outside(model, found, f"{name}.")
    except WholeOnly as error:
        raise WholeOnly(f"{folder} cannot be read block by block: {error}") from error
    for index, block in enumerate(blocks):
        path = f"{name}.{index}"
        inside = {key.removeprefix(f"{path}."): place for key, place in found.items() if key.startswith(f"{path}.")}
        make_lazy(block, Source(path, inside, where))
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(where))
    with reading(folder):
        check_blocks(model, unexpected)
        check_finite(model)
    return model.eval(), read_tokenizer(folder)


def _built(folder: Path, dtype, stored: Mapping[str, Stored], told: dict) -> PreTrainedModel:
    """The model without its numbers, but for buffers that are computed: these are made as ``from_pretrained`` makes them."""
    model = skeleton(folder, dtype, stored, told)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with reading(folder, f"model of {CONFIG}", told):
        model.initialize_weights()
    if model.can_generate():
        with suppress(OSError), quiet():  # where there is none, the model has one made of config.json
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _checked_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The blocks and their name; raises ``WholeOnly`` if there are none, or they hold what is more than numbers of their own."""
    try:
        name, blocks = block_list(model)
    except ValueError as error:
        raise WholeOnly(str(error)) from error
    for path, module in blocks.named_modules(prefix=name):
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            raise WholeOnly(f"whether {path} ({type(module).__name__}) computes W x + b is only seen with its weight")
    every = dict(model.named_parameters(remove_duplicate=False))
    times = Counter(map(id, every.values()))
    shared = next((key for key in every if key.startswith(f"{name}.") and times[id(every[key])] > 1), None)
    if shared is not None:
        raise WholeOnly(f"its parameter {shared} stands in two places")
    return name, blocks


def _placed(model: PreTrainedModel, stored: Mapping[str, Stored]) -> tuple[dict[str, Place], set[str]]:
    """Where every tensor of the model lies, tied ones that no file holds left out, and the names of what the files hold beside.

    Raises ``WholeOnly`` if transformers makes a tensor of the model from others, or from none.
    """
    state, found, others = model.state_dict(), {}, set()
    for key, name, source in renamed(model, stored):
        if name not in state and key in state:
            name, source = key, None
        if source is None and name in state and name not in found and stored[key].shape == tuple(state[name].shape):
            found[name] = Place(stored[key].file, key)
        else:
            others.add(name)
    absent = state.keys() - model.all_tied_weights_keys.keys() - found.keys()
    if wrong := sorted(absent | (others & state.keys())):
        raise WholeOnly(f"no file holds {wrong[0]} as it is in the model")
    for part in sorted({*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}):
        if kept := next((name for name in found if re.search(part.replace("*", ".*"), name)), None):
            raise WholeOnly(f"{kept} may be kept in float32 where the rest is not")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return found, {name for name in others if not any(pattern.search(name) for pattern in ignored)}


def _read_outside(model: PreTrainedModel, found: Mapping[str, Place], begin: str) -> None:
    """Read what is no block's. Tied parameters are one in the model, and stay one.

    Raises ``WholeOnly`` if the files hold other numbers for a parameter that is tied, or none.
    """
    groups: dict[int, dict[str, Slot]] = {}
    for name, slot in slots(model).items():
        if not name.startswith(begin):
            groups.setdefault(id(slot.tensor), {})[name] = slot
    for group in groups.values():
        empty = next(iter(group.values())).tensor
        wanted = {name: found[name] for name in group if name in found}
        values = list(read(wanted, dict.fromkeys(wanted, empty), torch.device("cpu")).values())
        if not values or not all(torch.equal(value, values[0]) for value in values[1:]):
            raise WholeOnly(f"{' and '.join(group)} are tied, and the files hold {len(values)} tensors for them")
        value = filled(empty, values[0])
        for slot in group.values():
            slot.put(value)


def write_folder(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and weights as ``save_pretrained`` does, the blocks one after the other.

    ``SHARD_BYTES`` are in memory at most, or one tensor. Raises ``CheckpointError`` as ``held``.
    """
    config = model.config
    config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]
    with quiet():
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    told = section_of(model)
    beside, about = (guard.tensors(told.modules), guard.metadata(told)) if told else ({}, {})
    shards = _shards(model)
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": keys for i, keys in enumerate(shards, start=1)}
    if len(files) == 1:
        files = {SINGLE: shards[0]}
    total = 0
    for file, keys in files.items():
        tensors = _gathered(model, keys)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if keys is shards[-1]:
            tensors |= beside
        save_file(tensors, folder / file, metadata={"format": "pt"} | about)
        guard.sort_metadata(folder / file)
    if len(files) > 1:
        where = {key: file for file, keys in files.items() for key in keys} | dict.fromkeys(beside, file)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _shards(model: PreTrainedModel) -> list[list[str]]:
    """The names of what is stored, in order, in groups of ``SHARD_BYTES`` at most; tied tensors are stored once."""
    shards, size = [[]], 0
    for key, value in model.state_dict().items():
        if key not in model.all_tied_weights_keys:
            size += value.numel() * value.element_size()
            if shards[-1] and size > SHARD_BYTES:
                shards, size = [*shards, []], value.numel() * value.element_size()
            shards[-1].append(key)
    return shards


def _gathered(model: PreTrainedModel, keys: list[str]) -> dict[str, torch.Tensor]:
    """These tensors of a state dict, on the CPU; blocks are read for it."""
    (name, blocks), found = block_list(model), {}
    for place, some in groupby(keys, lambda key: (place_in(name, key) or (None,))[0]):
        with nullcontext() if place is None else held(blocks[place]):
            now = slots(model)
            found |= {key: now[key].tensor.detach().to("cpu", copy=True).contiguous() for key in some}
    return found
