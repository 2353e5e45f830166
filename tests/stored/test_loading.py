"""Folders that would run code, reach elsewhere, fill the memory or load as something else: one sentence each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import nsvd
from nsvd.stored import manifest
from tests.tiny import PIVOTED, Q, compressed, logits, tiny_model, tiny_tokenizer, token_ids

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense and two compressed models on disk, not to be changed; the last one in bfloat16."""
    place = tmp_path_factory.mktemp("folders")
    model = tiny_model()
    nsvd.save(model, tiny_tokenizer(), place / "dense")
    nsvd.save(compressed(model), tiny_tokenizer(), place / "low")
    nsvd.save(compressed(model, **PIVOTED).to(torch.bfloat16), tiny_tokenizer(), place / "half")
    return place


@pytest.fixture
def folder(request, folders, tmp_path):
    """A copy to change."""
    return shutil.copytree(folders / getattr(request, "param", "low"), tmp_path / "m")


both = pytest.mark.parametrize("folder", ["dense", "low"], indirect=True)


def edit(file, change) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    value = change(value) or value
    file.write_text(json.dumps(value), encoding="utf-8")


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_header(folder, change) -> None:
    """The header alone: the numbers keep their bytes."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def refused(folder, message: str, read=nsvd.load) -> None:
    """One sentence that names the folder and says so."""
    with pytest.raises(nsvd.CheckpointError, match=message) as caught:
        read(folder)
    assert read is not nsvd.load or str(folder) in str(caught.value)


def unseal(folder) -> None:
    (folder / manifest.NAME).unlink()


# --- sums


@both
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_one_byte_is_enough(file, folder):
    """Whichever file it is in; ``verify=False`` reads it as it is."""
    data = bytearray((folder / file).read_bytes())
    data[-20] ^= 1
    (folder / file).write_bytes(data)
    refused(folder, rf"{file} is not the file that nsvd_manifest\.json tells of; restore the file, or delete")
    if file == "model.safetensors":
        model, _ = nsvd.load(folder, device="cpu", verify=False)
        assert isinstance(model, torch.nn.Module)


def test_transformers_itself_sees_the_sums_of_a_compressed_folder(folder):
    """Of the weights and of config.json."""
    for name in ("model.safetensors", "config.json"):
        keep = (folder / name).read_bytes()
        changed = keep.replace(b"0.3", b"0.4") if name == "config.json" else keep[:-1] + bytes([keep[-1] ^ 1])
        (folder / name).write_bytes(changed)
        refused(folder, rf"{name} is not the file", AutoModelForCausalLM.from_pretrained)
        (folder / name).write_bytes(keep)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (
            lambda m: (m / "model-00002-of-00002.safetensors").write_bytes(b""),
            "00002.safetensors is not in nsvd_manifest",
        ),
        (lambda m: (m / "pytorch_model.bin").write_bytes(b""), r"pytorch_model\.bin is not in nsvd_manifest"),
        (lambda m: (m / "config.json").write_text("{}"), r"config\.json has another size"),
        (lambda m: (m / manifest.NAME).write_text("[]"), r"nsvd_manifest\.json holds \[\] where an object"),
        (lambda m: (m / manifest.NAME).write_text("{"), r"nsvd_manifest\.json is not JSON"),
        (lambda m: edit(m / manifest.NAME, lambda v: v.update(format_version=2)), "format 2 is newer"),
        (lambda m: edit(m / manifest.NAME, lambda v: v.update(format_version=-1)), "format_version is -1"),
        (lambda m: edit(m / manifest.NAME, lambda v: v.update(files={"../x": {}})), r"entry '\.\./x' is no file"),
        (lambda m: edit(m / manifest.NAME, lambda v: v.update(files=None)), "files must map file names to their sums"),
    ],
)
def test_what_is_missing_added_or_no_manifest_is_named(damage, message, folder):
    """Each file is held against its sum, each weight file has one."""
    damage(folder)
    refused(folder, message)


def test_a_folder_that_transformers_saved_into_says_how_to_go_on(folder):
    """The sums are those of before; without them, or saved by us, the folder is read again."""
    model, tokenizer = nsvd.load(folder, device="cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(folder)
    refused(folder, f"or delete {manifest.NAME} if another program changed the folder on purpose")
    unseal(folder)
    assert torch.equal(logits(nsvd.load(folder, device="cpu")[0]), logits(model))
    nsvd.save(model, tokenizer, folder)
    assert set(json.loads((folder / manifest.NAME).read_text())["files"]) == {
        file.name for file in folder.iterdir()
    } - {manifest.NAME, "README.md"}
    nsvd.load(folder, device="cpu")


def test_every_embedded_model_has_its_sums():
    """Those of the files that ship."""
    for folder in nsvd.embedded_models().values():
        assert (folder / manifest.NAME).is_file()
        manifest.check(folder)


# --- code and other folders


@both
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_not_run(where, folder, monkeypatch):
    """Nobody is asked on standard input; a kind of model that only its code knows is refused."""
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit(folder / where, lambda value: value.update(auto_map=code))
    unseal(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    nsvd.load(folder, device="cpu")  # transformers' own code for this kind of model or tokenizer
    if where == "config.json":
        edit(folder / where, lambda value: value.update(model_type="evil"))
        refused(folder, "model_type 'evil' is none that this transformers knows, and its own code .* is not run")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nest", [lambda key: {key: "a/b"}, lambda key: {"text_config": {key: {"": "a/b"}}}])
def test_attention_from_a_hub_is_refused(key, nest, folder):
    """Wherever config.json asks for it."""
    unseal(folder)
    edit(folder / "config.json", lambda config: config.update(nest(key)))
    refused(folder, f"{key}.* is 'a/b', code from a hub")


@both
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_not_read(name, folder):
    """Not even one that holds plain tensors."""
    unseal(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    refused(folder, f"{name} is a pickle, which is not read")


def sharded(folder):
    """The weights in two files and an index, no sums."""
    unseal(folder)
    (folder / "model.safetensors").unlink()
    model = tiny_model()
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
def test_shards_are_read(folder):
    """With the bits of the single file."""
    before = logits(nsvd.load(folder, device="cpu")[0])
    sharded(folder)
    assert torch.equal(logits(nsvd.load(folder, device="cpu")[0]), before)


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
@pytest.mark.parametrize(
    "name", ["../{}", "{folder}/{}", "sub/../{}", "..\\{}", "x.bin", "", ".", "none.safetensors", 5]
)
def test_an_index_names_files_of_its_folder(name, folder):
    """No path, absolute or relative, no other kind of file, none that is not there."""
    index = sharded(folder)

    def change(value):
        tensor, file = next(iter(value["weight_map"].items()))
        shutil.copy(folder / file, folder.parent / file)
        value["weight_map"][tensor] = name.format(file, folder=folder.parent) if isinstance(name, str) else name

    edit(index, change)
    refused(
        folder,
        r"index\.json: (.* is not the name of a safetensors file|none.safetensors is missing|weight_map must map)",
    )


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
def test_a_link_that_leaves_the_folder_is_refused(folder):
    """But for those of the hub's own cache."""
    sharded(folder)
    shard = next(folder.glob("model-*"))
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")
    refused(folder, f"{shard.name} is a link that leaves the folder")
    snapshot, blobs = folder.parent / "repo" / "snapshots" / "1", folder.parent / "repo" / "blobs"
    shutil.copytree(folder, snapshot, symlinks=True)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        (snapshot.parent.parent / "blobs" / file.name).write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(blobs / file.name)
    nsvd.load(snapshot, device="cpu")


@both
def test_an_adapter_beside_the_model_is_refused(folder):
    """It would be ignored where peft is not installed."""
    unseal(folder)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "an adapter .* lies beside the model; merge it first")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "torchao", "fp8", None])
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_weights_quantized_by_others_are_refused(method, place, folder):
    """In one sentence, without asking for their packages."""
    unseal(folder)
    section = {"quant_method": method} if method else {"load_in_8bit": True}
    change = {"text_config": {"quantization_config": section}} if place == "text_config" else {place: section}
    edit(folder / "config.json", lambda config: config.update(change))
    refused(folder, f"quantized by {method or 'a method it does not name'}; dequantize the model first")


@pytest.mark.parametrize("folder", ["dense"], indirect=True)
def test_eight_bit_floats_are_refused(folder):
    """Also where config.json does not tell of them."""
    unseal(folder)
    edit_tensors(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))
    refused(folder, f"{NORM} is stored as F8_E4M3; dequantize")


# --- what the weights hold


@pytest.mark.parametrize("read", [nsvd.load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", [NORM, f"{Q}.down.weight"])
@pytest.mark.parametrize("folder", ["half"], indirect=True)
def test_another_dtype_in_the_header_is_seen(read, name, folder):
    """The bytes fit, the numbers are noise."""
    unseal(folder)
    edit_header(folder, lambda header: header[name].update(dtype="F16"))
    refused(folder, f"{name} is stored as float16, the other weights as bfloat16", read)
    edit_header(folder, lambda header: header[name].update(dtype="I16"))
    refused(folder, f"{name} is stored as I16, where the model has torch.bfloat16", read)


CUT_READERS = [("dense", nsvd.load), ("low", nsvd.load), ("low", AutoModelForCausalLM.from_pretrained)]


@pytest.mark.parametrize(("folder", "read"), CUT_READERS, indirect=["folder"])
def test_the_shape_of_every_tensor_is_held_against_the_header(read, folder):
    """A norm cut to one number would be stretched by broadcasting."""
    unseal(folder)
    edit_tensors(folder, lambda tensors: tensors.update({NORM: tensors[NORM][:1].clone()}))
    refused(folder, rf"first {NORM}: \(1,\), expected \(32,\)", read)


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight"])
def test_a_number_that_is_none_is_named(name, value, folder):
    """In a norm, in a row that no text may use."""
    unseal(folder)
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    refused(folder, f"parameter {name} holds NaN or Inf")


def test_large_numbers_are_numbers():
    """Their sum alone overflows."""
    from nsvd.stored.skeleton import check_finite

    check_finite(torch.nn.Linear(9, 9).to(torch.float16).requires_grad_(False).apply(lambda m: m.weight.fill_(6e4)))


@pytest.mark.parametrize("folder", ["half"], indirect=True)
def test_an_order_is_a_permutation(folder):
    """Else the layer would say one output twice."""
    unseal(folder)
    edit_tensors(folder, lambda tensors: tensors[f"{Q}.order"].copy_(tensors[f"{Q}.order"].clamp(min=1)))
    refused(folder, f"{Q}.order is no order of 32 outputs")
    refused(folder, f"{Q}.order is no order", AutoModelForCausalLM.from_pretrained)


def test_a_tensor_that_the_compressed_model_has_not_is_named(folder):
    """A bias of which config.json does not tell would be left out."""
    unseal(folder)
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.up.scale": torch.ones(3)}))
    refused(folder, f"no tensor {Q}.up.scale, which is stored")


# --- what config.json asks for


@both
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 9_000},
        {"num_hidden_layers": -1},
        {"hidden_size": 1_000_000},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**7},
        {"num_labels": 10**9},
        {"hidden_size": "128"},
        {"hidden_size": -32},
        {"hidden_size": None},
        {"hidden_act": "x"},
        {"num_attention_heads": 0},
        {"model_type": 5},
        {"model_type": "none-such"},
        {"rope_parameters": 7},
        {"dtype": "float99"},
    ],
    ids=str,
)
def test_a_configuration_that_the_weights_do_not_bear_out_is_refused(change, folder):
    """Soon, and without the memory that it asks for."""
    unseal(folder)
    edit(folder / "config.json", lambda config: config.update(change))
    refused(folder, ".")


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "x"}, r"config\.json: hidden_act is 'x', which is not known"),
        ({"hidden_size": "128"}, "config.json cannot be read .*'hidden_size' expected int, got str"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but the files hold"),
        ({"num_hidden_layers": 9_000}, "asks for over [0-9,]+ (parameters|modules), the files hold"),
    ],
)
def test_the_field_is_named(change, message, folder, monkeypatch):
    """Also in a folder whose name is a letter of the message."""
    unseal(folder)
    edit(folder / "config.json", lambda config: config.update(change))
    monkeypatch.chdir(folder.parent)
    with pytest.raises(nsvd.CheckpointError, match=f"^m[:/].*{message}"):
        nsvd.load("m", device="cpu")


@both
@pytest.mark.parametrize("text", ["null", "{}", "[]", "5", "", "[" * 3000, '{"a":' * 3000, "\xff", "{'a': 1}", '"x"'])
def test_a_config_that_is_no_object_is_refused(text, folder):
    """Whatever else it is."""
    unseal(folder)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, r"config\.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": 5}, "quantization_config.modules is 5"),
        ({"modules": {Q: 5}}, "quantization_config.modules is "),
        ({"modules": {Q: {"rank": -3}}}, f"layer {Q} .*rank -3"),
        ({"modules": {Q: {"rank": True}}}, f"layer {Q} .*whole number"),
        ({"modules": {Q: {"rank": "3"}}}, f"layer {Q} .*whole number"),
        ({"modules": {Q: {"rank": 3.5}}}, f"layer {Q} .*whole number"),
        ({"modules": {Q: {"rank": 3, "layer": []}}}, f"layer {Q}"),
        ({"modules": {Q: {"rank": 3, "more": 1}}}, f"layer {Q} .*'more'"),
        ({"format_version": -1}, "format_version is -1"),
        ({"format_version": "1"}, 'format_version is "1"'),
        ({"format_version": True}, "format_version is true"),
        ({"latent_cache": {"layers": None}}, "latent_cache.layers is null"),
        ({"latent_cache": []}, r"latent_cache.layers is \[\]"),
        ({"latent_cache": {"layers": {"model.layers.0.self_attn": {"rotated": -1, "joint": False}}}}, "latent cache"),
        ({"ratio_reached": "x"}, "quantization_config.ratio_reached is"),
        ({"model_ratio_reached": [None]}, "quantization_config.model_ratio_reached is"),
        ({"options": 5}, "quantization_config.options is 5"),
        ({"to_dict": 1}, "quantization_config.to_dict is 1"),
    ],
    ids=str,
)
def test_our_own_section_is_read_strictly(change, message, folder):
    """By nsvd and by transformers."""
    unseal(folder)
    edit(folder / "config.json", lambda config: config["quantization_config"].update(change))
    refused(folder, message)
    refused(folder, message, AutoModelForCausalLM.from_pretrained)


@both
@pytest.mark.parametrize("text", ["", "{}", "null", '{"model": {}}', "<html>", "[" * 3000])
def test_a_damaged_tokenizer_is_told_apart(text, folder):
    """The model itself may be whole."""
    unseal(folder)
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "holds a model but no tokenizer that can be read")


def test_a_fault_of_ours_is_no_damaged_folder(folder, monkeypatch):
    """What transformers calls back is not its own error."""
    from nsvd.stored import checkpoint

    monkeypatch.setattr(checkpoint.guard, "expect", lambda *_: None + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        nsvd.load(folder, device="cpu")


@pytest.mark.parametrize("device", ["meta", "hpu", "nowhere", "cuda:99"])
def test_a_device_without_numbers_is_refused(device, folder):
    """Before anything is read."""
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        nsvd.load(folder, device=device)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bool", "complex64", "Tensor", "", None, torch.int8])
def test_a_dtype_that_layers_do_not_compute_with_is_refused(dtype, folder):
    """Those that they do are listed."""
    with pytest.raises(ValueError, match=r"unknown dtype .*; use auto, float32, bfloat16, float16, float64"):
        nsvd.load(folder, dtype=dtype)


# --- what is read


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_a_compressed_model_is_cast_like_any_other(cast, folder):
    """Fresh and read again."""
    for model in (nsvd.load(folder, device="cpu")[0], compressed(tiny_model())):
        expected = {"float": torch.float32, "half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
        assert getattr(model, cast)() is model
        assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("folder", ["low", "half"], indirect=True)
def test_the_model_without_its_head_is_read(folder, tmp_path):
    """``AutoModel`` gives the hidden states of the whole one, and is saved and read again."""
    whole, bare = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    expected = whole.model(token_ids()).last_hidden_state
    assert torch.equal(bare(token_ids()).last_hidden_state, expected)
    bare.save_pretrained(tmp_path / "bare")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare")(token_ids()).last_hidden_state, expected)


@pytest.mark.parametrize("blocks", [0, 1])
def test_blocks_that_config_json_does_not_count_are_told(blocks, tmp_path):
    """A model of fewer blocks would run, and be another one."""
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    folder = tmp_path / "m"
    (folder / manifest.NAME).unlink()
    file = folder / "config.json"
    told = json.loads(file.read_text()) | {"num_hidden_layers": blocks, "layer_types": None}
    file.write_text(json.dumps(told))
    with pytest.raises(nsvd.CheckpointError, match=rf"{blocks} model.layers, the files hold model.layers.{blocks}\."):
        nsvd.load(folder)
