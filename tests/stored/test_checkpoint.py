"""Folders that are read as what they say, or refused by name; nothing half-written under the final name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import nsvd
from nsvd.stored import manifest
from tests.tiny import K1, PIVOTED, K, Q, compressed, logits, tiny_model, tiny_tokenizer, token_ids

FACTOR = f"{Q}.up.weight"
READERS = [nsvd.load, AutoModelForCausalLM.from_pretrained]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A compressed tiny model on disk, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "low"
    nsvd.save(compressed(tiny_model(dtype=torch.float32)), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage, without the sums that would tell of it first."""
    return unsealed(saved, tmp_path / "low")


@pytest.fixture(scope="module")
def saved_pivoted(tmp_path_factory):
    """The same with pivoted factors."""
    folder = tmp_path_factory.mktemp("saved") / "low"
    nsvd.save(compressed(tiny_model(dtype=torch.float32), **PIVOTED), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def pivoted_folder(saved_pivoted, tmp_path):
    return unsealed(saved_pivoted, tmp_path / "pivoted")


def unsealed(folder, target):
    shutil.copytree(folder, target)
    (target / manifest.NAME).unlink()
    return target


def edit_tensors(folder, edit) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder, edit) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    edit(config["quantization_config"])
    file.write_text(json.dumps(config), encoding="utf-8")


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_config_json_is_the_plain_list_of_compressed_layers(saved):
    """Format, method, options and ratios, and a rank for every layer; tensors as safetensors and no pickle."""
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("nsvd", 1)
    assert (config["method"], config["options"], config["ratio"]) == ("nsvd-1", {"k1": K1}, 0.3)
    assert config["ratio_reached"] >= 0.3
    assert len(config["modules"]) == 14
    assert config["modules"][Q] == {"rank": 11}
    stored = load_file(saved / "model.safetensors")
    assert {name for name in stored if name.startswith(f"{Q}.")} == {f"{Q}.down.weight", FACTOR, f"{Q}.up.bias"}
    assert {file.suffix for file in saved.iterdir()} == {".json", ".safetensors", ".md"}


def test_config_json_tells_pivoted_layers_apart(saved_pivoted):
    """Their kind beside the rank, and a tensor more: the order of the outputs, as whole numbers."""
    config = json.loads((saved_pivoted / "config.json").read_text())["quantization_config"]
    assert (config["factors"], config["shifted"]) == ("pivoted", False)
    assert config["modules"][Q] == {"layer": "pivoted", "rank": 14}  # 14 · (64 − 14) ≤ 0.7 · 32² < 15 · 49
    stored = load_file(saved_pivoted / "model.safetensors")
    found = {name.removeprefix(f"{Q}."): t for name, t in stored.items() if name.startswith(f"{Q}.")}
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    assert shapes == {"down.weight": (14, 32), "up.weight": (18, 14), "order": (32,), "bias": (32,)}
    assert found["order"].dtype == torch.int64


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("tensor", ["order", "down.weight", "up.weight", "bias"])
def test_a_missing_part_of_a_pivoted_layer_is_named(read, tensor, pivoted_folder):
    """Without its order a layer would be a permutation of itself."""
    edit_tensors(pivoted_folder, lambda tensors: tensors.pop(f"{K}.{tensor}"))
    with pytest.raises(nsvd.CheckpointError, match=f"factor {K}.{tensor} is missing"):
        read(pivoted_folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("rank", [0, 16, 17])
def test_a_rank_that_no_pivoted_layer_has_is_refused(read, rank, pivoted_folder):
    """Of a 16 × 32 matrix: 1 to 15."""
    edit_config(pivoted_folder, lambda config: config["modules"].update({K: {"layer": "pivoted", "rank": rank}}))
    with pytest.raises(nsvd.CheckpointError, match=rf"layer {K} .*: rank {rank} of a 16 × 32 matrix"):
        read(pivoted_folder)


def test_an_unknown_kind_of_layer_is_refused(folder):
    """One that a later version stores."""
    edit_config(folder, lambda config: config["modules"].update({Q: {"layer": "sparse", "rank": 3}}))
    with pytest.raises(nsvd.CheckpointError, match=f"layer {Q} .*'sparse'"):
        nsvd.load(folder, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_order_is_no_number_to_be_rounded(dtype, saved_pivoted):
    """Read in another precision, factors are cast and whole numbers are not; the model runs."""
    model, _ = nsvd.load(saved_pivoted, dtype=dtype, device="cpu")
    layer = model.get_submodule(Q)
    assert layer.down.weight.dtype == getattr(torch, dtype)
    for cast in (model, model.to(torch.float64)):
        assert cast.get_submodule(Q).order.dtype == torch.int64
        assert sorted(layer.order.tolist()) == list(range(32))
        assert logits(cast).isfinite().all()


@pytest.mark.parametrize("kind", ["saved", "saved_pivoted"])
def test_a_model_read_again_can_be_saved_again(kind, tmp_path, request):
    """With the same bits, and the same words about where it came from."""
    saved = request.getfixturevalue(kind)
    model, tokenizer = nsvd.load(saved, device="cpu")
    nsvd.save(model, tokenizer, tmp_path / "again")
    assert torch.equal(logits(nsvd.load(tmp_path / "again", device="cpu")[0]), logits(model))
    first, second = (json.loads((place / "config.json").read_text()) for place in (saved, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]


def test_what_a_later_version_adds_to_the_config_is_kept(folder, tmp_path):
    """An unknown key is no error, and is written back."""
    edit_config(folder, lambda config: config.update(allocation="by spectrum"))
    model, tokenizer = nsvd.load(folder, device="cpu")
    nsvd.save(model, tokenizer, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["allocation"] == "by spectrum"


def test_a_partly_compressed_model_comes_back_so(tmp_path):
    """Dense layers between low-rank ones are read as dense."""
    model = tiny_model()
    nsvd.compress_(model, method="svd", ranks={Q: 5})
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    again, _ = nsvd.load(tmp_path / "low", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert len(nsvd.targets(again)) == 13


def test_the_tokenizer_is_stored_beside_the_weights(saved):
    """It cuts text as before."""
    _, tokenizer = nsvd.load(saved, device="cpu")
    assert tokenizer("häé")["input_ids"] == tiny_tokenizer()("häé")["input_ids"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("low", [False, True])
def test_every_dtype_that_a_model_may_have_is_read_again(dtype, low, tmp_path):
    """Dense or compressed."""
    model = compressed(tiny_model()) if low else tiny_model()
    nsvd.save(model.to(getattr(torch, dtype)), tiny_tokenizer(), tmp_path / "x")
    again, _ = nsvd.load(tmp_path / "x", device="cpu")
    assert again.dtype == getattr(torch, dtype)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_precision_is_had_by_asking(saved):
    """``dtype="auto"`` keeps the stored one."""
    assert nsvd.load(saved, device="cpu")[0].dtype == torch.float32
    assert nsvd.load(saved, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'float17'"):
        nsvd.load(saved, dtype="float17")
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        nsvd.load(saved, device="nowhere")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("factor", [FACTOR, f"{Q}.down.weight", f"{Q}.up.bias"])
def test_a_missing_factor_is_named(read, factor, folder):
    """transformers alone would fill it with random numbers."""
    edit_tensors(folder, lambda tensors: tensors.pop(factor))
    with pytest.raises(nsvd.CheckpointError, match=f"factor {factor} is missing"):
        read(folder)


@pytest.mark.parametrize("read", READERS)
def test_a_misshaped_factor_is_named_with_both_shapes(read, folder):
    """A rank in the file that is not the rank in config.json."""
    edit_tensors(folder, lambda tensors: tensors.update({FACTOR: tensors[FACTOR][:, :5].contiguous()}))
    with pytest.raises(nsvd.CheckpointError, match=rf"factor {FACTOR} has shape \(32, 5\), expected \(32, 11\)"):
        read(folder)


@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_a_truncated_file_is_damaged(kept, folder):
    """Empty, cut in the header, in the middle or by one byte."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(nsvd.CheckpointError, match="weight file is damaged"):
        nsvd.load(folder, device="cpu")


@pytest.mark.parametrize("change", ["missing", "misshaped"])
@pytest.mark.parametrize("compress", [True, False])
def test_a_missing_or_misshaped_dense_tensor_is_named(change, compress, tmp_path):
    """In a compressed model and in a dense one."""
    model, name = tiny_model(), "model.norm.weight" if compress else f"{Q}.weight"
    nsvd.save(compressed(model) if compress else model, tiny_tokenizer(), tmp_path / "model")

    (tmp_path / "model" / manifest.NAME).unlink()

    def edit(tensors):
        tensor = tensors.pop(name)
        if change == "misshaped":
            tensors[name] = tensor[:3].contiguous()

    edit_tensors(tmp_path / "model", edit)
    with pytest.raises(nsvd.CheckpointError, match=f"1 tensors missing or misshaped, first {name}"):
        nsvd.load(tmp_path / "model")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda config: config["modules"].update({"model.layers.7.mlp": {"rank": 3}}),
            r"compressed layer model\.layers\.7\.mlp",
        ),
        (lambda config: config["modules"].update({"model.norm": {"rank": 3}}), r"compressed layer model\.norm"),
        (lambda config: config["modules"].update({Q: {}}), rf"layer {Q} {{}}: .*'rank'"),
        (lambda config: config.update(format_version=2), r"format 2 is newer"),
    ],
)
def test_a_config_that_cannot_be_true_is_refused(read, edit, message, folder):
    """A layer the model has not, one that is not linear, one without a rank; a format from the future."""
    edit_config(folder, edit)
    with pytest.raises(nsvd.CheckpointError, match=message):
        read(folder)


def test_a_checkpoint_is_not_written_over_a_file(tmp_path):
    """The file stays."""
    file = tmp_path / "precious"
    file.write_text("text", encoding="utf-8")
    with pytest.raises(FileExistsError, match="precious: it is a file"):
        nsvd.save(tiny_model(), tiny_tokenizer(), file)
    with pytest.raises(OSError):
        nsvd.save(tiny_model(), tiny_tokenizer(), file / "below")
    assert contents(tmp_path) == {"precious": b"text"}


def test_a_failed_save_leaves_nothing_and_keeps_the_old_folder(folder, monkeypatch):
    """Whatever was written before the error is removed again."""
    before = contents(folder.parent)
    write = PreTrainedModel.save_pretrained

    def breaks(self, place, **options):
        write(self, place, **options)
        raise OSError("no space left")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", breaks)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="no space left"):
            nsvd.save(tiny_model(), tiny_tokenizer(), target)
    assert contents(folder.parent) == before
    assert [place.name for place in folder.parent.iterdir()] == ["low"]


def test_a_report_that_is_no_json_is_a_failed_save(tmp_path):
    """It is written last; the folder does not appear without it."""
    with pytest.raises(TypeError):
        nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "low", report={"model": object()})
    assert list(tmp_path.iterdir()) == []


def test_saving_again_exchanges_the_folder(folder):
    """Nothing of the compressed model is left beside the dense one."""
    (folder / "nsvd_report.json").write_text("{}", encoding="utf-8")
    nsvd.save(tiny_model(), tiny_tokenizer(), folder)
    assert "nsvd_report.json" not in contents(folder)
    assert torch.equal(logits(nsvd.load(folder, device="cpu")[0]), logits(tiny_model()))
    assert [place.name for place in folder.parent.iterdir()] == ["low"]


def test_the_report_lies_beside_the_weights(tmp_path):
    """As JSON, in parents that are made on the way."""
    model = tiny_model()
    report = nsvd.compress_(model, windows=token_ids(), ratio=0.3, k1=K1)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "a" / "b", report=report.as_dict())
    stored = json.loads((tmp_path / "a" / "b" / "nsvd_report.json").read_text(encoding="utf-8"))
    assert stored["params_after"] == report.params_after
    assert stored["options"] == {"k1": K1}


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    """``replacing`` exchanges like for like."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old").write_text("old", encoding="utf-8")
    with pytest.raises(IsADirectoryError), nsvd.replacing(tmp_path / "results") as part:
        part.write_text("new", encoding="utf-8")
    assert contents(tmp_path) == {"results/old": b"old"}


def test_loading_says_nothing(saved, capfd):
    """No progress bar, no loading report; and transformers speaks as before afterwards."""
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    nsvd.load(saved, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path):
    """Somebody's results would be gone."""
    model = tiny_model("llama")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "numbers.txt").write_text("1")
    with pytest.raises(FileExistsError, match="results: it holds something that is not a model"):
        nsvd.save(model, None, tmp_path / "results")
    assert (tmp_path / "results" / "numbers.txt").read_text() == "1"


@pytest.mark.parametrize("extra", ["notes.txt", "LICENSE", "results.json", "training.py", "runs/1.json"])
def test_a_model_with_something_beside_it_is_not_replaced(extra, folder):
    """Only what ``save`` itself writes is exchanged; the first thing that would be lost is named."""
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_text("mine", encoding="utf-8")
    before = contents(folder)
    with pytest.raises(FileExistsError, match=f"beside a model it holds {extra.partition('/')[0]}"):
        nsvd.save(tiny_model(), tiny_tokenizer(), folder)
    assert contents(folder) == before


def test_the_folder_this_runs_in_is_known_by_any_name(folder, monkeypatch):
    """Also through a symbolic link, whichever of the two is one."""
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    for here, there in ((folder, link), (link, folder), (folder, "."), (folder, folder)):
        monkeypatch.chdir(here)
        with pytest.raises(FileExistsError, match="the folder this runs in"):
            nsvd.save(tiny_model(), tiny_tokenizer(), there)


def test_a_link_to_an_older_model_stays_one(folder):
    """What it points to is replaced."""
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    nsvd.save(tiny_model(), tiny_tokenizer(), link)
    assert link.is_symlink()
    assert torch.equal(logits(nsvd.load(folder, device="cpu")[0]), logits(tiny_model()))
    assert sorted(place.name for place in folder.parent.iterdir()) == ["link", "low"]


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    """In place of a hint at libraries that would not help."""
    nsvd.save(tiny_model("llama"), None, tmp_path / "bare")
    with pytest.raises(nsvd.CheckpointError, match="no tokenizer"):
        nsvd.load(tmp_path / "bare")


def test_a_folder_reached_through_one_that_is_not_there_is_looked_into(folder, tmp_path, monkeypatch):
    """What would be lost is refused there, too."""
    monkeypatch.chdir(tmp_path)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"beside a model it holds notes\.txt"):
        nsvd.save(tiny_model(), tiny_tokenizer(), f"new/../{folder.name}")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("compress", [True, False])
def test_what_load_would_refuse_is_not_saved(compress, folder):
    """A good model is not replaced by one of NaN, or by a wrapper."""
    before = (folder / "model.safetensors").read_bytes()
    model = compressed(tiny_model()) if compress else tiny_model()
    with pytest.raises(ValueError, match=r"DataParallel is a wrapper of a model: .* module \(LlamaForCausalLM\)"):
        nsvd.save(torch.nn.DataParallel(model), tiny_tokenizer(), folder)
    name, parameter = list(model.named_parameters())[-1]
    parameter.data.view(-1)[0] = torch.nan
    with pytest.raises(nsvd.CheckpointError, match=f"parameter {name} holds NaN or Inf"):
        nsvd.save(model, tiny_tokenizer(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
