"""From folder to folder: the model that compression in memory gives, and on from where a run was stopped."""

import json
import os
import re

import gguf
import pytest
import torch

import nsvd
from nsvd.compression import exchange, ordered, whole_layers
from nsvd.lab import compress as module
from nsvd.stored.locks import locked
from nsvd.walk import calibrate, stream
from tests.stored.test_gguf import plain_model, write
from tests.tiny import GROUPED, tiny_model, tiny_tokenizer

GEMMA4 = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "head_dim": 8}
GEMMA4 |= {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2}
TEXT = " ".join(f"word {n} of {n * n} words" for n in range(2500))
SOLA = {"method": "sola", "grid": 1, "floor": 0.0, "keep_outer": 0}
WAYS = {
    "svd": {"method": "svd"},
    "asvd-1": {"method": "asvd-1"},
    "nsvd-1, spectrum": {"method": "nsvd-1", "k1": 0.8, "allocation": "spectrum"},
    "ridge, fisher, pivoted": {"method": "ridge", "allocation": "fisher", "factors": "pivoted"},
    "asvd-1, zero-sum": {"method": "asvd-1", "allocation": "zero-sum"},
    "kfac, zero-sum, shifted": {"method": "kfac", "allocation": "zero-sum", "shifted": True},
    "asvd-1, shifted, refined": {"method": "asvd-1", "shifted": True, "refine": 3},
    "sola": SOLA,
    "best": {"method": "best"},
    "best, neurons": {"method": "best", "neurons": 0.5},
}


@pytest.fixture
def dense(tmp_path):
    nsvd.save(tiny_model(num_hidden_layers=3), tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "dense"


def cut(dense) -> dict:
    return {"calibration": str(dense.parent / "text.txt"), "length": 32, "count": 24}


@pytest.mark.parametrize(("way", "whole"), [("asvd-1", True), ("asvd-1, shifted, refined", False)])
def test_experts_that_lie_in_files_are_taken_apart_in_memory(way, whole, dense):
    """What leaves them dense reads them block by block; either gives the model of compression in memory."""
    out, told = dense.parent / "out", []
    nsvd.save(tiny_model("gemma4_text", **GROUPED, **GEMMA4), tiny_tokenizer(), dense)
    nsvd.compress(dense, out, ratio=0.3, tell=told.append, **WAYS[way], **cut(dense))
    assert ("the model is loaded whole: its experts are one tensor, and are taken apart in memory" in told) == whole
    model, tokenizer = nsvd.load(dense, device="cpu")
    windows = nsvd.windows(str(dense.parent / "text.txt"), tokenizer, split="calibration", length=32, count=24)
    nsvd.compress_(model, ratio=0.3, windows=[windows], **WAYS[way])
    found, wanted = nsvd.load(out, device="cpu")[0].state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert any(".experts.0.gate_up.down" in name for name in found) == whole
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def numbers(folder) -> dict[str, bytes]:
    """All files but those that hold seconds, and the sums of these."""
    return {
        f.name: f.read_bytes() for f in folder.iterdir() if f.name not in ("nsvd_report.json", "nsvd_manifest.json")
    }


@pytest.mark.parametrize("way", ["asvd-1", "asvd-1, shifted, refined", "best", "best, neurons"])
def test_transposed_weights_are_read_from_their_files(way, dense):
    """GPT-2's, as they lie there."""
    out, sizes = dense.parent / "out", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    nsvd.save(tiny_model("gpt2", **sizes), tiny_tokenizer(), dense)
    nsvd.compress(dense, out, ratio=0.3, **WAYS[way], **cut(dense))
    model, tokenizer = nsvd.load(dense, device="cpu")
    windows = nsvd.windows(str(dense.parent / "text.txt"), tokenizer, split="calibration", length=32, count=24)
    nsvd.compress_(model, ratio=0.3, windows=[windows], **WAYS[way])
    found = nsvd.load(out, device="cpu")[0].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_compression_in_memory_gives(way, dense):
    """Every tensor to the bit, every row of the report; nothing is left beside the folder."""
    out = dense.parent / "out"
    report = nsvd.compress(dense, out, ratio=0.3, **WAYS[way], **cut(dense))
    model, tokenizer = nsvd.load(dense, device="cpu")
    windows = nsvd.windows(str(dense.parent / "text.txt"), tokenizer, split="calibration", length=32, count=24)
    told = nsvd.compress_(model, ratio=0.3, windows=[windows], **WAYS[way])
    found = nsvd.load(out, device="cpu")[0].state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert report.table.equals(told.table)
    assert report.calibration == told.calibration
    assert sorted(os.listdir(dense.parent)) == ["dense", "out", "text.txt"]


class Stopped(BaseException):
    """As an interrupt."""


@pytest.mark.once
@pytest.mark.parametrize("way", ["asvd-1", "asvd-1, shifted, refined", "sola", "best", "best, neurons"])
def test_a_run_that_is_stopped_goes_on_and_ends_in_the_same_bytes(way, dense, monkeypatch):
    """Stopped after every single thing that it keeps, one after the other; finished blocks are not factored again."""
    if way.startswith("best"):  # it keeps much of every block
        nsvd.save(tiny_model(num_hidden_layers=2), tiny_tokenizer(), dense)
    whole, out, said = dense.parent / "whole", dense.parent / "out", []
    how = {"ratio": 0.3, "tell": said.append} | WAYS[way] | cut(dense)
    counted = _counting(monkeypatch, None)
    nsvd.compress(dense, whole, **how)
    once, puts = counted["cuts"], counted["puts"]
    counted |= {"cuts": 0, "stops": 0}
    for _ in range(puts):
        counted |= {"puts": 0, "stop": 2}  # one more is kept, then it ends
        try:
            nsvd.compress(dense, out, **how)
        except Stopped:
            counted["stops"] += 1
            assert not out.exists()
            continue
        break
    assert numbers(out) == numbers(whole)
    assert counted["stops"] >= 3
    assert once <= counted["cuts"] <= 2 * once  # that of a block may be lost with its stop
    assert "an earlier run is taken up where it was stopped" in said
    assert sorted(os.listdir(dense.parent)) == ["dense", "out", "text.txt", "whole"]


@pytest.mark.once
@pytest.mark.parametrize("way", ["asvd-1", "nsvd-1, spectrum", "best"])
def test_of_a_long_text_some_borders_are_kept(way, dense, monkeypatch):
    """Behind every second block here; what comes after the last one is done again, and ends in the same bytes."""
    nsvd.save(tiny_model(num_hidden_layers=5), tiny_tokenizer(), dense)
    whole, out, how = dense.parent / "whole", dense.parent / "out", {"ratio": 0.3} | WAYS[way] | cut(dense)
    nsvd.compress(dense, whole, **how)
    monkeypatch.setattr(stream, "KEPT", 24 * 32 // 2)
    borders, put = [], module.Shelf.put
    monkeypatch.setattr(module.Shelf, "put", lambda self, key, *a, **b: (borders.append(key), put(self, key, *a, **b)))
    nsvd.compress(dense, out, **how)
    kept = [int(key.split("/")[-1]) for key in borders if key.startswith((calibrate.STREAM, ordered.STREAMS))]
    assert kept == ([2, 4] if way != "best" else [1, 2, 3, 4, 5, 2, 4])  # half of the text for moments, all in order
    assert numbers(out) == numbers(whole)
    counted = _counting(monkeypatch, None)
    nsvd.compress(dense, out, **how)
    stops = range(1, counted["puts"], 2) if way != "best" else range(counted["puts"] - 12, counted["puts"], 4)
    for stop in stops:
        begun = dense.parent / f"out-{stop}"
        counted |= {"puts": 0, "stop": stop}
        with pytest.raises(Stopped):
            nsvd.compress(dense, begun, **how)
        counted["stop"] = None
        nsvd.compress(dense, begun, **how)
        assert numbers(begun) == numbers(whole)
    assert len(stops) >= 3


def _counting(monkeypatch, stop) -> dict:
    """Counts what is put on a lasting shelf, and ends the run at a certain one; counts the layers that are cut."""
    counted = {"puts": 0, "stop": stop, "cuts": 0}
    put, cut_layer = module.Shelf.put, exchange.Exchange._cut

    def counting_put(self, key, *args, **note):
        new = self.lasting and key not in self
        put(self, key, *args, **note)
        counted["puts"] += new
        if self.lasting and new and counted["puts"] == counted["stop"]:
            raise Stopped

    def counting_cut(self, *args):
        counted["cuts"] += self.stage == "final"
        return cut_layer(self, *args)

    monkeypatch.setattr(module.Shelf, "put", counting_put)
    monkeypatch.setattr(exchange.Exchange, "_cut", counting_cut)
    return counted


@pytest.mark.parametrize("changed", ["model", "text", "arguments", "code"])
def test_a_run_of_another_kind_is_not_taken_up(changed, dense, monkeypatch):
    """What changed is said, and the end is that of a run which begins anew."""
    out, said = dense.parent / "out", []
    how = {"method": "asvd-1", "ratio": 0.3, "tell": said.append} | cut(dense)
    counted = _counting(monkeypatch, 6)
    with pytest.raises(Stopped):
        nsvd.compress(dense, out, **how)
    assert (dense.parent / ".out.progress").is_dir()
    counted["stop"] = None
    if changed == "model":
        nsvd.save(tiny_model(num_hidden_layers=3, seed=5), tiny_tokenizer(), dense)
    elif changed == "text":
        (dense.parent / "text.txt").write_text(TEXT.replace("word", "world"), encoding="utf-8")
    elif changed == "arguments":
        how["ratio"] = 0.4
    else:
        monkeypatch.setattr(module, "origin", lambda: {"code": "another"})
    nsvd.compress(dense, out, **how)
    (sentence,) = (sentence for sentence in said if "not taken up" in sentence)
    assert f"{changed} " in sentence
    monkeypatch.undo()
    nsvd.compress(dense, dense.parent / "fresh", **how)
    assert numbers(out) == numbers(dense.parent / "fresh")


def test_what_was_kept_and_is_damaged_is_refused(dense, monkeypatch):
    """A flipped byte in what an earlier run measured."""
    how = {"method": "best", "ratio": 0.3} | cut(dense)
    _counting(monkeypatch, 9)
    with pytest.raises(Stopped):
        nsvd.compress(dense, dense.parent / "out", **how)
    monkeypatch.undo()
    for file in (dense.parent / ".out.progress" / "kept").rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises((OSError, ValueError), match=r"is not what was written|damaged"):
        nsvd.compress(dense, dense.parent / "out", **how)


def test_smaller_layers_that_were_kept_and_are_damaged_are_refused(dense, monkeypatch):
    """Blocks read them from there, one number changed or not."""
    how = {"method": "best", "neurons": 0.5, "ratio": 0.3} | cut(dense)
    place = dense.parent / ".out.progress" / "kept" / "narrow-layers"
    put_in = whole_layers.put_narrow

    def stop(job):
        put_in(job)
        raise Stopped

    monkeypatch.setattr(whole_layers, "put_narrow", stop)
    with pytest.raises(Stopped):
        nsvd.compress(dense, dense.parent / "out", **how)
    monkeypatch.undo()
    file = next(place.iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match=f"{file.name} is not what was written there"):
        nsvd.compress(dense, dense.parent / "out", **how)


def test_bad_input_leaves_nothing(dense):
    """Whatever is refused after the folder of progress was made."""
    for wrong in (
        {"calibration": str(dense.parent / "nothing.txt")},
        {"k1": 2.0, "method": "nsvd-1"},
        {"length": 10**9},
    ):
        with pytest.raises((ValueError, OSError)):
            nsvd.compress(dense, dense.parent / "out", **{"method": "asvd-1", "ratio": 0.3} | cut(dense) | wrong)
        assert sorted(os.listdir(dense.parent)) == ["dense", "text.txt"]


def test_what_is_wrong_with_any_text_is_said_before_one_is_taken(dense, monkeypatch):
    """The model's own takes long to write."""
    monkeypatch.setattr(module, "domains", lambda *_args, **_how: pytest.fail("a text was taken"))
    for wrong, said in (
        ({"neurons": 1.5}, "neurons is 1.5"),
        ({"neurons": 0.5, "allocation": "uniform"}, "neurons are left out by what the loss rises by"),
        ({"refine": 3, "shifted": False}, "refine goes with shifted=True"),
        ({"factors": "thin"}, "thin"),
    ):
        with pytest.raises(ValueError, match=said):
            nsvd.compress(dense, dense.parent / "out", **{"method": "best", "ratio": 0.3} | wrong)
        assert sorted(os.listdir(dense.parent)) == ["dense", "text.txt"]


def test_two_runs_do_not_share_a_folder(dense):
    folder = dense.parent / ".out.progress"
    folder.mkdir()
    with locked(folder / "lock"), pytest.raises(FileExistsError, match="another run is at it"):
        nsvd.compress(dense, dense.parent / "out", method="svd", ratio=0.3)


def test_own_text_is_written_once(dense, monkeypatch):
    """It takes most of the time of a short run."""
    how = {"method": "best", "ratio": 0.3, "length": 32, "count": 16}
    counted, written = _counting(monkeypatch, 4), []
    own = module.own_text
    monkeypatch.setattr(module, "own_text", lambda *args, **more: written.append(1) or own(*args, **more))
    with pytest.raises(Stopped):
        nsvd.compress(dense, dense.parent / "out", **how)
    counted["stop"] = None
    nsvd.compress(dense, dense.parent / "out", **how)
    assert len(written) == 1


def test_what_needs_the_whole_model_says_so(dense):
    """And is the same as in memory."""
    out, said = dense.parent / "out", []
    nsvd.compress(dense, out, method="asvd-1", ratio=0.3, distill=2, tell=said.append, **cut(dense))
    assert said[0] == "the model is loaded whole: distillation changes all factors at once"
    assert len(said) == 2
    assert " passes over " in said[1]
    assert json.loads((out / "nsvd_report.json").read_text())["distill"] == 2


def test_a_folder_of_several_files(dense, monkeypatch):
    """Blocks larger than a file's limit are written one after the other, and load as one model."""
    from nsvd.walk import folder

    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    out = dense.parent / "out"
    nsvd.compress(dense, out, method="svd", ratio=0.3)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    monkeypatch.undo()
    nsvd.compress(dense, dense.parent / "one", method="svd", ratio=0.3)
    one, several = (nsvd.load(dense.parent / name, device="cpu")[0].state_dict() for name in ("one", "out"))
    assert all(torch.equal(one[name], value) for name, value in several.items())


def test_what_it_will_take_is_told_before_it_begins(dense):
    """Passes, tokens, memory, disk and time, in one sentence; more text takes more of all."""
    said = []
    for count, out in ((16, "few"), (64, "many")):
        nsvd.compress(
            dense, dense.parent / out, method="asvd-1", ratio=0.3, tell=said.append, **cut(dense) | {"count": count}
        )
    few, many = said
    assert few.startswith("1.0 passes over 512 tokens; ")
    assert many.startswith("1.0 passes over 2,048 tokens; ")
    assert re.search(r"up to \d+ MB of memory, \d+ MB of disk beside the output; some \d+ seconds?", few)


def test_a_text_that_nothing_tells_of_any_more_is_not_trusted(dense, monkeypatch):
    """As after a kill while what was kept was removed: what is left was measured on another text."""
    how = {"method": "asvd-1", "ratio": 0.3} | cut(dense)
    counted, out = _counting(monkeypatch, 6), dense.parent / "out"
    with pytest.raises(Stopped):
        nsvd.compress(dense, out, **how)
    counted["stop"] = None
    (dense.parent / ".out.progress" / "kept" / "windows.safetensors").unlink()
    (dense.parent / "text.txt").write_text(TEXT.replace("word", "world"), encoding="utf-8")
    nsvd.compress(dense, out, **how)
    nsvd.compress(dense, dense.parent / "fresh", **how)
    assert numbers(out) == numbers(dense.parent / "fresh")


def test_a_finished_block_that_changed_is_refused(dense, monkeypatch):
    counted, out = _counting(monkeypatch, 3), dense.parent / "out"
    with pytest.raises(Stopped):
        nsvd.compress(dense, out, method="svd", ratio=0.3)
    counted["stop"] = None
    (file,) = (dense.parent / ".out.progress" / "kept" / "final-block").glob("0.*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match=r"0\.safetensors is not what was written there"):
        nsvd.compress(dense, out, method="svd", ratio=0.3)


def test_a_file_that_cannot_be_read_for_a_moment_costs_nothing(dense, monkeypatch):
    """What was kept stays; the next run goes on there."""
    from nsvd.walk import lazy

    how, out, said = {"method": "asvd-1", "ratio": 0.3} | cut(dense), dense.parent / "out", []
    counted = _counting(monkeypatch, 6)
    with pytest.raises(Stopped):
        nsvd.compress(dense, out, **how)
    counted["stop"] = None

    def broken(*_args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(lazy, "safe_open", broken)
        with pytest.raises(ValueError, match="Input/output error"):
            nsvd.compress(dense, out, **how)
    nsvd.compress(dense, out, **how, tell=said.append)
    assert "an earlier run is taken up where it was stopped" in said


def test_where_there_are_no_locks_it_runs_without(dense, monkeypatch):
    from nsvd.stored import locks

    monkeypatch.setattr(locks, "fcntl", None)
    nsvd.compress(dense, dense.parent / "out", method="svd", ratio=0.3)
    assert (dense.parent / "out" / "config.json").is_file()


def test_a_gguf_file_is_compressed_like_the_folder_of_its_weights(tmp_path, monkeypatch):
    """Block by block, in the dtype asked for; a run that was stopped goes on, and the folder of the dense weights is gone."""
    write(plain_model(), tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    model, tokenizer = nsvd.load(tmp_path / "m.gguf", dtype="bfloat16")
    nsvd.save(model, tokenizer, tmp_path / "dense")
    said = []
    how = {"method": "best", "ratio": 0.3, "count": 8, "length": 32, "tell": said.append}
    nsvd.compress(tmp_path / "dense", tmp_path / "whole", **how)
    _counting(monkeypatch, 6)
    with pytest.raises(Stopped):
        nsvd.compress(tmp_path / "m.gguf", tmp_path / "out", dtype="bfloat16", **how)
    assert sorted(os.listdir(tmp_path)) == [".out.progress", "dense", "m.gguf", "whole"]
    nsvd.compress(tmp_path / "m.gguf", tmp_path / "out", dtype="bfloat16", **how)
    assert "an earlier run is taken up where it was stopped" in said
    assert not any("whole" in sentence for sentence in said)
    out, whole = (nsvd.load(tmp_path / name, device="cpu")[0].state_dict() for name in ("out", "whole"))
    assert out.keys() == whole.keys()
    assert all(torch.equal(out[name], value) for name, value in whole.items())  # the folders name other sources
    assert sorted(os.listdir(tmp_path)) == ["dense", "m.gguf", "out", "whole"]


def test_a_damaged_gguf_file_leaves_nothing(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(nsvd.CheckpointError, match=r"m\.gguf"):
        nsvd.compress(tmp_path / "m.gguf", tmp_path / "new" / "out", method="svd", ratio=0.3)
    assert os.listdir(tmp_path) == ["m.gguf"]
