"""A model without its numbers, held against what the weight files say they hold, before memory is taken for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from nsvd.stored.folder import CheckpointError, Stored
from nsvd.stored.quantized import is_quantized

FLOATS = ("BF16", "F16", "F32", "F64")
SPARE_TENSORS, SPARE_BYTES = 2_000, 2**30  # beyond what the files hold: fused and tied weights; masks and rotations
TAIL = 4  # parts of a name, the number of a block among them


@contextmanager
def limited(stored: Mapping[str, Stored]) -> Iterator[None]:
    """Models built within have no more parameters and modules than could come from these tensors.

    Raises ``CheckpointError`` as soon as there are more, whatever field of the configuration asks for them.
    """
    most, built, ours = 2 * len(stored) + SPARE_TENSORS, {"parameters": 0, "modules": 0}, get_ident()

    def count(kind: str, allowed: int) -> None:
        built[kind] += get_ident() == ours  # the hooks see what other threads build, too
        if built[kind] > allowed:
            raise CheckpointError(f"config.json asks for over {allowed:,} {kind}, the files hold {len(stored)} tensors")

    hooks = (
        register_module_parameter_registration_hook(lambda *_: count("parameters", most)),
        register_module_module_registration_hook(lambda *_: count("modules", 8 * most)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def matched(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, tuple[Tensor, Stored | None]]:
    """Every tensor that the model loads, with its entry in the files; None where no entry has its name.

    transformers adds or drops the prefix of the base model, and renames tensors; all of these names are found. It also gives parts
    of models that see other places: an entry that no tensor has the name of is taken where it alone ends like the tensor's name, in
    ``TAIL`` parts at least. Tied tensors that no file holds are left out.
    """
    prefix = f"{model.base_model_prefix}."
    tied = model.all_tied_weights_keys
    found, others = {}, {name: stored[key] for key, name, source in renamed(model, stored) if source is None}
    for key, tensor in model.state_dict().items():
        entry = next((stored[name] for name in (key, prefix + key, key.removeprefix(prefix)) if name in stored), None)
        entry = others.get(key) if entry is None else entry
        if entry is not None or key not in tied:
            found[key] = tensor, entry
    used = {id(entry) for _, entry in found.values()}
    tails: dict[str, list[Stored]] = {}
    for name, entry in stored.items():
        for tail in _tails(name) if id(entry) not in used else ():
            tails.setdefault(tail, []).append(entry)
    for key, (tensor, entry) in found.items():
        longest = next((tails[tail] for tail in _tails(key) if tail in tails), ()) if entry is None else ()
        if len(longest) == 1:
            found[key] = tensor, longest[0]
    return found


def renamed(model: PreTrainedModel, stored: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Every name in the files, what ``from_pretrained`` calls it, and the pattern by which it makes that of several tensors.

    In the order in which it reads them; the pattern is None where it takes the tensor as it is.
    """
    rules, state = get_model_conversion_mapping(model), model.state_dict()
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    for key in sorted(stored, key=dot_natural_key):
        yield key, *rename_source_key(key, renamings, converters, model.base_model_prefix, state)


def _tails(name: str) -> list[str]:
    """The ends of a dotted name that have ``TAIL`` parts or more, the longest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - TAIL + 1)]


def check_fits(model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
    """Raise ``CheckpointError`` unless the tensors of the files are those that the model asks for.

    Tensors that transformers converts on loading have other names in the files; of those only the number of elements is held
    against what is left over.
    """
    found = matched(model, stored)
    for key, (tensor, entry) in found.items():
        if entry is not None and (entry.dtype in FLOATS) != tensor.is_floating_point():
            raise CheckpointError(f"{entry.file}: {key} is stored as {entry.dtype}, where the model has {tensor.dtype}")
    pairs = {key: (entry.shape, tuple(tensor.shape)) for key, (tensor, entry) in found.items() if entry}
    wrong = sorted(key for key, (stored_shape, shape) in pairs.items() if stored_shape != shape)
    if wrong:
        stored_shape, shape = pairs[wrong[0]]
        raise CheckpointError(
            f"{len(wrong)} tensors missing or misshaped, first {wrong[0]}: {stored_shape}, expected {shape}"
        )
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["(?!)"]))
    absent = {key: tensor.numel() for key, (tensor, entry) in found.items() if entry is None}
    used = {id(entry) for _, entry in found.values()}
    left = sum(torch.Size(entry.shape).numel() for entry in stored.values() if id(entry) not in used)
    missing = sorted(key for key in absent if not optional.search(key))
    if (missing and not left) or sum(absent.values()) > left + SPARE_BYTES // 8:
        first = (missing or sorted(absent))[0]
        raise CheckpointError(f"{len(absent)} tensors missing or misshaped, first {first}: not in the files")
    derived = sum(tensor.nbytes for tensor in _derived(model))
    if derived > SPARE_BYTES + 8 * sum(torch.Size(entry.shape).numel() for entry in stored.values()):
        raise CheckpointError(f"config.json asks for {derived / 2**30:,.0f} GiB of masks and rotations")


def _derived(model: nn.Module) -> Iterator[Tensor]:
    """Buffers that are computed, not stored."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                yield buffer


def check_dtypes(config: Mapping, stored: Mapping[str, Stored]) -> None:
    """Raise ``CheckpointError`` if floats of two bytes are of two kinds, or of another than config.json tells.

    The dtype in a header can be changed to another of the same width without any other trace; what is read is then noise.
    """
    halves = {"BF16": "bfloat16", "F16": "float16"}
    told = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    seen = told if told in halves.values() else None
    for key, entry in stored.items():
        if kind := halves.get(entry.dtype):
            if seen not in (None, kind):
                raise CheckpointError(f"{entry.file}: {key} is stored as {kind}, the other weights as {seen}")
            seen = kind


def check_blocks(model: nn.Module, unexpected: Iterable[str]) -> None:
    """Raise ``CheckpointError`` if tensors that the model has not are of blocks beyond its own.

    A model of fewer blocks than were stored runs, and is another one.
    """
    modules = dict(model.named_modules())
    for key in sorted(unexpected):
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", key):
            blocks = modules.get(key[: number.start() - 1])
            if isinstance(blocks, nn.ModuleList) and int(number[0]) >= len(blocks):
                raise CheckpointError(
                    f"config.json asks for {len(blocks)} {key[: number.start() - 1]}, the files hold {key}"
                )


@torch.no_grad()
def check_finite(model: nn.Module, prefix: str = "") -> None:
    """Raise ``CheckpointError`` naming the first parameter that holds NaN or Inf, with a prefix before its name."""
    for name, parameter in model.named_parameters():
        if (
            parameter.is_meta
            or not parameter.is_floating_point()
            or is_quantized(parameter)
            or parameter.sum().isfinite()
        ):
            continue
        if not parameter.isfinite().all():  # else the sum alone overflows
            raise CheckpointError(f"parameter {prefix}{name} holds NaN or Inf")
