"""Blocks that stay in their files: whatever is computed is what the model in memory gives, to the bit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nsvd
from nsvd.stored import manifest
from nsvd.stored.layers import LowRankLinear, PivotedLinear
from nsvd.walk.decoder import Decoder, block_list
from nsvd.walk.folder import WholeOnly, open_folder
from nsvd.walk.lazy import as_first, held, is_lazy, places, read_from, rebase, revert, settle, weight_of
from nsvd.walk.moments import mix
from nsvd.walk.roles import roles
from nsvd.walk.soundness import check_values
from tests.tiny import FAMILIES, GROUPED, compressed, logits, tiny_model, tiny_tokenizer, token_ids

HEADS = GROUPED | {"head_dim": 8}
COUNTED = {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 64}
OPENS = {family: {} for family in FAMILIES} | {
    "gemma3_text": HEADS,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED,
    "smollm3": GROUPED,
    "starcoder2": GROUPED,
    "cohere": GROUPED,
    "glm4": HEADS,
    "bloom": {"n_head": 4, "n_layer": 2},
    "gptj": COUNTED,  # what it computes of its positions depends on the dtype
    "gpt2": {},
}
WHOLE = {  # why the others do not
    "mixtral": (GROUPED | {"num_local_experts": 4}, "as it is in the model"),  # the experts are stored one by one
    "falcon": ({}, "FalconLinear"),
    "rwkv": ({"attention_hidden_size": 32}, "float32"),
}
GATE = "mlp.gate_proj"


def saved(folder, family="llama", *, shard=None, **changes):
    """A model as a folder, and the same in memory, read from there."""
    model, folder = tiny_model(family, **changes), folder / "model"
    if shard is None:
        nsvd.save(model, tiny_tokenizer(), folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(folder)
    return folder, nsvd.load(folder, device="cpu")[0]


def lazy(folder, **options):
    return open_folder(folder, device="cpu", **options)[0]


def is_dropped(model) -> bool:
    """No number of a block is in memory."""
    inside = [p for block in block_list(model)[1] for p in block.parameters()]
    return bool(inside) and all(p.is_meta for p in inside)


def in_memory(block: nn.Module) -> int:
    """Bytes of parameters that are in memory."""
    return sum(p.nbytes for p in block.parameters() if not p.is_meta)


def stand_in(layer: nn.Linear, kind=LowRankLinear, rank: int = 5) -> nn.Module:
    """A layer of this kind with random numbers; the bias is the layer's."""
    new = kind.like(layer, rank=rank)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(layer.bias)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    if kind is PivotedLinear:
        new.order.copy_(torch.randperm(layer.out_features, generator=generator))
    return new


# --- the same model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OPENS)
def test_a_lazy_model_is_the_model_in_memory(family, dtype, tmp_path):
    """Logits, buffers, dtypes and configurations are equal; before and after, no block is in memory."""
    folder, whole = saved(tmp_path, family, dtype=dtype, **OPENS[family])
    model = lazy(folder)
    assert is_lazy(model)
    assert not is_lazy(whole)
    assert is_dropped(model)
    assert torch.equal(logits(model), logits(whole))
    assert is_dropped(model)
    assert [(n, p.dtype, p.shape) for n, p in model.named_parameters()] == [
        (n, p.dtype, p.shape) for n, p in whole.named_parameters()
    ]
    found = dict(model.named_buffers())
    for name, buffer in whole.named_buffers():
        assert found[name].is_meta or (torch.equal(found[name], buffer) and found[name].dtype == buffer.dtype)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert (model.name_or_path, model.training, model.dtype) == (whole.name_or_path, False, whole.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float64])
def test_the_dtype_is_as_asked_for(dtype, tmp_path):
    folder, _ = saved(tmp_path, dtype=torch.bfloat16)
    whole, _ = nsvd.load(folder, device="cpu", dtype=dtype)
    model = lazy(folder, dtype=dtype)
    assert model.dtype == whole.dtype
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_many_files_of_a_folder(family, tmp_path):
    folder, whole = saved(tmp_path, family, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert torch.equal(logits(lazy(folder)), logits(whole))


@pytest.mark.parametrize("family", WHOLE)
def test_other_models_are_to_be_loaded_whole(family, tmp_path):
    changes, reason = WHOLE[family]
    folder, _ = saved(tmp_path, family, **changes)
    with pytest.raises(WholeOnly, match=f"{folder} cannot be read block by block: .*{reason}"):
        lazy(folder)


def test_a_compressed_model_is_to_be_loaded_whole(tmp_path):
    nsvd.save(compressed(tiny_model()), tiny_tokenizer(), tmp_path / "low")
    with pytest.raises(WholeOnly, match="low cannot be read block by block: it is compressed already"):
        lazy(tmp_path / "low")


# --- what the package does with it


def test_statistics_are_those_of_the_model_in_memory(tmp_path):
    folder, whole = saved(tmp_path, dtype=torch.bfloat16)
    model, ids = lazy(folder), token_ids()
    check_values(model)
    ours, theirs = nsvd.calibrate(model, ids), nsvd.calibrate(whole, ids)
    assert ours.inputs == theirs.inputs
    assert all(torch.equal(ours[name].G, theirs[name].G) for name in theirs)
    ours, theirs = nsvd.fisher(model, ids), nsvd.fisher(whole, ids)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert is_dropped(model)


def test_what_is_decided_in_float32_is_decided_alike(tmp_path):
    """A block that is read while all is cast up is read in float32, and afterwards in its own dtype."""
    folder, whole = saved(tmp_path, dtype=torch.bfloat16)
    model = lazy(folder)
    assert roles(model) == roles(whole)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert is_dropped(model)
    assert torch.equal(logits(model), logits(whole))


def test_it_is_not_saved_as_a_model_in_memory(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(ValueError, match=r"low: the parameter model\.layers\.0\.\S+ is on the device meta"):
        nsvd.save(lazy(folder), tiny_tokenizer(), tmp_path / "low")
    assert not (tmp_path / "low").exists()


def test_it_writes_the_same_text(tmp_path):
    folder, whole = saved(tmp_path)
    assert torch.equal(nsvd.sample(lazy(folder), 3, 12), nsvd.sample(whole, 3, 12))


def test_the_worst_case_reads_one_weight_after_the_other(tmp_path):
    folder, whole = saved(tmp_path)
    model = lazy(folder)
    domains = [nsvd.calibrate(whole, token_ids(seed=seed)) for seed in (1, 2)]
    ours, theirs = (mix(domains, weights="worst-case", model=m, ratio=0.3).origin["weights"] for m in (model, whole))
    assert ours == theirs
    assert is_dropped(model)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(weight_of(model, name), whole.get_submodule(name).weight)


def test_gradients_go_through_a_block_that_is_dropped(tmp_path):
    """The graph keeps the numbers for itself, inside of a hold and without one."""
    folder, whole = saved(tmp_path)
    found = []
    for decoder in (Decoder(whole), Decoder(lazy(folder))):
        entered = decoder.enter(token_ids(2, 8))
        gradient = torch.ones_like(entered.hidden)
        found.append(decoder.pull(0, entered.hidden, entered.calls[0], gradient))
        with decoder.held(0):
            found.append(decoder.pull(0, entered.hidden, entered.calls[0], gradient))
    assert all(torch.equal(other, found[0]) for other in found)


def test_a_block_that_was_read_under_inference_can_be_part_of_a_graph(tmp_path):
    folder, _ = saved(tmp_path)
    decoder = Decoder(lazy(folder))
    with torch.no_grad():
        entered = decoder.enter(token_ids(2, 8))
    with torch.inference_mode(), decoder.held(0), torch.inference_mode(False):
        decoder.pull(0, entered.hidden, entered.calls[0], torch.ones_like(entered.hidden))


# --- what is in memory


@pytest.mark.once
def test_one_block_is_in_memory_at_a_time(tmp_path):
    """Of forty, whatever runs."""
    folder, whole = saved(tmp_path, num_hidden_layers=40, dtype=torch.bfloat16)
    model = lazy(folder)
    blocks, most = block_list(model)[1], []
    for module in model.modules():
        module.register_forward_hook(lambda *_: most.append(in_memory(blocks)))
    logits(model)
    nsvd.calibrate(model, token_ids(4, 8))
    nsvd.fisher(model, token_ids(4, 8))
    assert max(most) == in_memory(block_list(whole)[1][0])
    assert in_memory(blocks) == 0
    assert in_memory(model) == in_memory(whole) - in_memory(block_list(whole)[1])


def test_holds_are_counted(tmp_path):
    folder, _ = saved(tmp_path)
    model = lazy(folder)
    block = model.model.layers[0]
    with held(block):
        first = block.mlp.gate_proj.weight
        with held(block):
            logits(model)
            assert block.mlp.gate_proj.weight is first
        assert not first.is_meta
        assert block.mlp.gate_proj.weight is first
    assert is_dropped(model)
    with held(nn.Linear(2, 2)):  # in memory anyway
        pass


def test_a_block_is_dropped_whatever_is_raised(tmp_path):
    folder, _ = saved(tmp_path)
    model = lazy(folder)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert is_dropped(model)
    logits(model)


def test_a_copy_reads_for_itself(tmp_path):
    folder, whole = saved(tmp_path)
    model = lazy(folder)
    other = copy.deepcopy(model)
    with held(model.model.layers[0]):
        assert is_dropped(other)
        assert torch.equal(logits(other), logits(whole))
    assert is_dropped(model)


# --- layers that are exchanged


@pytest.mark.parametrize("kind", [LowRankLinear, PivotedLinear])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_settled_is_read_again(family, kind, tmp_path):
    """The same logits as the model in memory gives with the same layers; reverted, those of the dense model."""
    folder, whole = saved(tmp_path, family)
    dense = logits(whole)
    model, layer = lazy(folder), list(nsvd.targets(whole))[-1]
    name, blocks = block_list(model)
    block, inside = blocks[1], layer.removeprefix(f"{name}.1.")
    before = block.get_submodule(inside)
    with held(block):
        new = stand_in(before, kind)
        block.set_submodule(inside, new)
        whole.set_submodule(layer, copy.deepcopy(new))
        settle(block, tmp_path / "block.safetensors")
        assert not new.down.weight.is_meta
    said = logits(whole)
    assert not torch.equal(said, dense)
    assert is_dropped(model)
    assert before.weight.is_meta
    assert kind is not PivotedLinear or new.order.is_meta
    assert torch.equal(logits(model), said)
    found = places(block)
    assert found[f"{inside}.down.weight"] == (tmp_path / "block.safetensors", f"{inside}.down.weight")
    assert f"{inside}.weight" not in found
    assert places(blocks[0])[f"{inside}.weight"].file.parent == folder

    revert(block, {inside: before})
    assert is_dropped(model)
    assert torch.equal(logits(model), dense)
    assert places(block)[f"{inside}.weight"].file.parent == folder


def test_a_block_is_reverted_while_it_is_held(tmp_path):
    folder, whole = saved(tmp_path)
    model = lazy(folder)
    block = model.model.layers[1]
    before = block.get_submodule(GATE)
    for times in (0, 1):
        with held(block):
            block.set_submodule(GATE, stand_in(before))
            if times:
                settle(block, tmp_path / "block.safetensors")
            revert(block, {GATE: before})
            assert torch.equal(before.weight, whole.model.layers[1].mlp.gate_proj.weight)
            assert torch.equal(logits(model), logits(whole))
        assert is_dropped(model)


def test_layers_for_good_and_those_of_the_first_files(tmp_path):
    """Smaller layers in a file of their own: ``revert`` goes back to them, ``as_first`` to what was there before them."""
    folder, whole = saved(tmp_path)
    model, dense, parts = lazy(folder), logits(whole), [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    block, same = model.model.layers[1], whole.model.layers[1]
    first = {name: block.get_submodule(name) for name in parts}
    for name in parts:
        size = (40, 32) if name == parts[2] else (32, 40)
        new = nn.Linear(*size, same.mlp.gate_proj.bias is not None)
        same.set_submodule(name, new)
        save_file(new.state_dict(), tmp_path / f"{name}.safetensors")
        rebase(block, name, copy.deepcopy(new).to("meta"), tmp_path / f"{name}.safetensors")
    small = {name: block.get_submodule(name) for name in parts}
    said = logits(whole)
    assert not torch.equal(said, dense)
    assert torch.equal(logits(model), said)
    with as_first(block, first):
        assert torch.equal(logits(model), dense)
    with held(block):
        weight, about = small[GATE].weight, in_memory(block)
        with as_first(block, first):
            assert torch.equal(logits(model), dense)
        assert all(layer.weight.is_meta for layer in first.values())
        assert block.get_submodule(GATE).weight is weight
        assert in_memory(block) == about
        block.set_submodule(GATE, stand_in(small[GATE]))
        settle(block, tmp_path / "block.safetensors")
    assert is_dropped(model)
    revert(block, {GATE: small[GATE]})
    assert torch.equal(logits(model), said)
    for name, layer in first.items():
        rebase(block, name, layer)
    assert is_dropped(model)
    assert torch.equal(logits(model), dense)


def test_what_is_not_settled_stays_in_memory(tmp_path):
    """It lies nowhere else."""
    folder, whole = saved(tmp_path)
    model = lazy(folder)
    block = model.model.layers[1]
    with held(block):
        new = stand_in(block.get_submodule(GATE))
        block.set_submodule(GATE, new)
    whole.model.layers[1].set_submodule(GATE, copy.deepcopy(new))
    assert in_memory(block) == in_memory(new)
    assert torch.equal(logits(model), logits(whole))


def test_a_settled_file_is_found_again(tmp_path):
    """By a model that is opened later, with layers of the same kinds and sizes in their places."""
    folder, _ = saved(tmp_path)
    first, second, file = lazy(folder), lazy(folder), tmp_path / "block.safetensors"
    block = first.model.layers[1]
    with held(block):
        block.set_submodule(GATE, stand_in(block.get_submodule(GATE)))
        settle(block, file)
    other = second.model.layers[1]
    other.set_submodule(GATE, LowRankLinear.like(other.get_submodule(GATE), rank=5))
    read_from(other, file)
    assert is_dropped(second)
    assert torch.equal(logits(second), logits(first))


def test_nothing_is_settled_of_a_model_in_memory(tmp_path):
    model = tiny_model()
    block, said = model.model.layers[0], logits(model)
    before = block.get_submodule(GATE)
    block.set_submodule(GATE, stand_in(before))
    settle(block, tmp_path / "block.safetensors")
    assert not list(tmp_path.iterdir())
    revert(block, {GATE: before})
    assert torch.equal(logits(model), said)


def test_a_block_is_settled_while_it_is_held(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(RuntimeError, match=r"model\.layers\.0 is settled, but not held"):
        settle(lazy(folder).model.layers[0], tmp_path / "block.safetensors")


# --- folders that are not whole


def sentence(read) -> str:
    with pytest.raises(nsvd.CheckpointError) as caught:
        read()
    return str(caught.value)


def edit(folder, change) -> None:
    (folder / manifest.NAME).unlink()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_byte(folder) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-20] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def cut_off(folder) -> None:
    (folder / manifest.NAME).unlink()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])


def one_block_less(folder) -> None:
    (folder / manifest.NAME).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "one byte": one_byte,
    "cut off": cut_off,
    "missing": lambda folder: edit(folder, lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
    "missing outside": lambda folder: edit(folder, lambda t: t.pop("model.norm.weight")),
    "misshaped": lambda folder: edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
    "NaN": lambda folder: edit(folder, lambda t: t["model.norm.weight"].fill_(float("nan"))),
    "one block less": one_block_less,
    "no tokenizer": lambda folder: [(folder / manifest.NAME).unlink(), (folder / "tokenizer.json").unlink()],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_is_refused_as_the_model_in_memory_is(fault, tmp_path):
    folder, _ = saved(tmp_path)
    FAULTS[fault](folder)
    assert sentence(lambda: lazy(folder)) == sentence(lambda: nsvd.load(folder, device="cpu"))


def test_a_block_with_nan_is_named_when_it_is_read(tmp_path):
    folder, _ = saved(tmp_path)
    edit(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"][3].fill_(float("nan")))
    model = lazy(folder)
    wanted = sentence(lambda: nsvd.load(folder, device="cpu"))
    assert sentence(lambda: logits(model)) == wanted
    assert "model.layers.1.mlp.down_proj.weight holds NaN or Inf" in wanted
    assert is_dropped(model)


def test_files_that_change_meanwhile_are_named(tmp_path):
    folder, _ = saved(tmp_path)
    model = lazy(folder)
    edit(folder, lambda t: t.update({"model.layers.1.mlp.down_proj.weight": torch.ones(32, 7)}))
    assert "down_proj.weight has another shape" in sentence(lambda: logits(model))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in sentence(lambda: logits(model))
    assert is_dropped(model)


def test_tied_weights_that_differ_are_no_ones(tmp_path):
    folder, _ = saved(tmp_path)
    edit(folder, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    with pytest.raises(WholeOnly, match=r"lm_head\.weight are tied, and the files hold 2 tensors"):
        lazy(folder)
