"""The command line: what it writes, and one line for everything that cannot be done."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat import v4
from safetensors.torch import load_file, save_file

import nsvd
from nsvd.cli import main
from tests.tiny import K1, Q, compressed, file_limit, float32, poison, tiny_model, tiny_tokenizer  # noqa: F401

MINI, SHORT = "mini-llama", ["--device", "cpu", "--count", "3", "--length", "32"]
NSVD = ["--method", "nsvd-1", "--ratio", "0.3", "--calibration", "mini/encyclopedia"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models, sound and broken, by name."""
    folder = tmp_path_factory.mktemp("models")

    def put(name, model):
        nsvd.save(model, tiny_tokenizer(), folder / name)
        return folder / name

    single = {"dtype": torch.float32}
    put("dense", tiny_model(**single))
    low = put("low", compressed(tiny_model(**single)))
    for name, spoiled in {"nan": f"{Q}.weight", "nan-norm": "model.norm.weight"}.items():
        bad = shutil.copytree(folder / "dense", folder / name)
        (bad / "nsvd_manifest.json").unlink()
        tensors = load_file(bad / "model.safetensors")
        tensors[spoiled][0] = torch.nan
        save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    missing, cut, empty = (shutil.copytree(low, folder / name) for name in ("missing", "cut", "no-config"))
    for damaged in (missing, cut):
        (damaged / "nsvd_manifest.json").unlink()
    tensors = load_file(missing / "model.safetensors")
    del tensors[f"{Q}.up.weight"]
    save_file(tensors, missing / "model.safetensors", metadata={"format": "pt"})
    (cut / "model.safetensors").write_bytes((low / "model.safetensors").read_bytes()[:5000])
    (empty / "config.json").unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden or not."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def said(capsys, *arguments) -> str:
    """What a command that succeeds prints; nothing on standard error but what ``compress`` tells of its way."""
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("nsvd compress: ") for line in err.splitlines())
    return out


def refused(capsys, here, *arguments) -> str:
    """The one line a command leaves that cannot be done: exit code 2, nothing printed, nothing written."""
    before, command = contents(here), str(arguments[0])
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *plan, line = err.splitlines(keepends=True)  # what is told before the work begins comes before
    assert all(re.match(r"nsvd compress: \d+\.\d passes over", sentence) for sentence in plan)
    assert line.startswith(f"nsvd {command}: ")
    assert line.endswith("\n")
    assert contents(here) == before
    return line


def test_compress_info_evaluate(here, capsys):
    """The embedded model is compressed into a folder, described, and evaluated beside the dense one."""
    line = said(capsys, "compress", MINI, "low", *NSVD, *SHORT)
    assert line.startswith("low: NSVD-I, 3")
    assert line.count("\n") == 1
    report = json.loads((here / "low" / "nsvd_report.json").read_text(encoding="utf-8"))
    assert report["ratio_reached"] >= 0.3
    assert report["options"] == {"k1": 0.95}
    asked = {"corpus": "mini/encyclopedia", "seed": 0, "windows": [[3, 32]]}
    assert report["calibration"] | asked == report["calibration"]
    assert {layer["layer"] for layer in report["layers"]} == set(nsvd.targets(nsvd.load(MINI, device="cpu")[0]))
    assert contents(here).keys() == {"low", *(f"low/{file.name}" for file in (here / "low").iterdir())}

    described = said(capsys, "info", "low", "--layers").splitlines()
    assert "LlamaForCausalLM" in described[0]
    assert described[1].startswith("compressed by nsvd-1 {'k1': 0.95}, 3")
    assert len(described) == 2 + len(report["layers"])
    assert "rank" in described[2]

    corpora = ["mini/newswire", "mini/web"]
    printed = said(capsys, "evaluate", MINI, "low", "--data", *corpora, *SHORT, "--json", "out/numbers.json")
    results = json.loads((here / "out" / "numbers.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["corpus"]) for row in results["results"]] == [
        (m, c) for m in (MINI, "low") for c in corpora
    ]
    assert {"nsvd", "torch", "commit", "code"} <= results["origin"].keys()
    for row in results["results"]:
        model, tokenizer = nsvd.load(row["model"], dtype="float32", device="cpu")
        windows = nsvd.windows(row["corpus"], tokenizer, count=3, length=32)
        assert row["perplexity"] == pytest.approx(nsvd.perplexity(model, windows))
        assert f"{row['perplexity']:.3f}" in printed
        assert row["bits_per_byte"] > 0
        assert row["standard_error"] > 0


def test_evaluate_tells_accuracies(here, models, capsys):
    """A row a model and task, of files and of embedded questions; what does not go together is one line."""
    (here / "some").mkdir()
    rows = [{"question": f"{n} and", "choices": ["one more", "no more"], "answer": n % 2} for n in range(6)]
    (here / "some" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dense, low = str(models / "dense"), str(models / "low")
    printed = said(capsys, "evaluate", dense, low, "--tasks", ".:some,some", "--count", "5", "--json", "numbers.json")
    results = json.loads((here / "numbers.json").read_text(encoding="utf-8"))["results"]
    assert [(row["model"], row["task"]) for row in results] == [(m, ".:some") for m in (dense, low) for _ in range(2)]
    for row in results:
        model, tokenizer = nsvd.load(row["model"], dtype="float32", device="cpu")
        found = nsvd.multiple_choice(model, tokenizer, ".:some", count=5)
        assert (row["acc"], row["acc_norm"]) == (found.accuracy, found.accuracy_normalized)
        assert (row["chance"], row["questions"]) == (0.5, 5)
        assert f"{row['acc']:.3f}" in printed
    command = ("evaluate", dense, "--tasks", ".:some")
    assert "not both" in refused(capsys, here, *command, "--data", "mini/web")
    assert "--length goes with --data" in refused(capsys, here, *command, "--length", "8")
    assert "unknown task 'mini/some'" in refused(capsys, here, "evaluate", dense, "--tasks", "mini/some")
    assert "no file absent/test.jsonl" in refused(capsys, here, "evaluate", dense, "--tasks", ".:absent")


def test_the_command_line_does_what_python_does(here, models, capsys):
    """The same model, text, method and options give the same tensors."""
    (here / "text.txt").write_text("some words to calibrate on, " * 100, encoding="utf-8")
    options = ["--k1", K1, "--calibration", "text.txt", "--count", 5, "--length", 24, "--seed", 3, "--device", "cpu"]
    said(capsys, "compress", models / "dense", "low", *NSVD, *options)
    model, tokenizer = nsvd.load(models / "dense", device="cpu")
    windows = nsvd.windows("text.txt", tokenizer, split="calibration", count=5, length=24, seed=3)
    nsvd.compress_(model, windows=windows, method="nsvd-1", ratio=0.3, k1=K1)
    ours, theirs = model.state_dict(), nsvd.load("low", device="cpu")[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_so_it_does_with_all_that_goes_into_best(here, models, capsys):
    """Two texts, their weights, ranks searched for, layers in order, both last steps; without a text its own."""
    (here / "text.txt").write_text("some words to calibrate on, " * 100, encoding="utf-8")
    model, tokenizer = nsvd.load(models / "dense", device="cpu")
    text = nsvd.windows("text.txt", tokenizer, split="calibration", count=6, length=24)
    last = ["--refine", 2, "--distill", 2]
    best = ["--method", "best", "--ratio", 0.3, "--length", 24, "--device", "cpu"]
    worst = ["--weights", "worst-case", *last]
    said(capsys, "compress", models / "dense", "both", *best, "--calibration", "self+text.txt", "--count", 12, *worst)
    said(capsys, "compress", models / "dense", "none", *best, "--count", 8)
    both = {"windows": [nsvd.own_text(model, 6, 24), text], "weights": "worst-case", "refine": 2, "distill": 2}
    none = {"windows": nsvd.own_text(model, 8, 24)}
    said(capsys, "compress", models / "dense", "neurons", *best, "--count", 8, "--neurons", 0.5)
    for out, how in (("both", both), ("none", none), ("neurons", none | {"neurons": 0.5})):
        ours = nsvd.load(models / "dense", device="cpu")[0]
        report = nsvd.compress_(ours, method="best", ratio=0.3, **how)
        ours, theirs = ours.state_dict(), nsvd.load(out, device="cpu")[0].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        told = json.loads((here / out / "nsvd_report.json").read_text(encoding="utf-8"))
        assert told["calibration"]["statistics"] == report.calibration
        assert (told["refine"], told["distill"], told["seed"]) == (report.refine, report.distill, 0)


@pytest.mark.parametrize("how", [("best",), ("asvd-1", "--shifted"), ("asvd-1", "--allocation", "strs")])
def test_nothing_to_remove_needs_no_text_there_either(how, here, models, capsys, monkeypatch):
    """No text is sampled or read, and what is written is the dense model."""

    def costly(*_args, **_how):
        raise AssertionError("a text was taken")

    monkeypatch.setattr("nsvd.lab.compress.domains", costly)
    said(capsys, "compress", models / "dense", "low", "--method", *how, "--ratio", 0)
    report = json.loads((here / "low" / "nsvd_report.json").read_text(encoding="utf-8"))
    assert (report["ratio_reached"], report["calibration"], report["texts"]) == (0, None, {})
    assert said(capsys, "info", "low").splitlines()[1:] == ["dense"]


def test_the_parts_of_a_sum_can_be_weighed_for_the_worst(here, models, capsys):
    """The report says with which weights; by default they are equal."""
    how = ["--method", "asvd-1", "--ratio", 0.3, "--calibration", "self+random", "--count", 8, "--length", 32]
    said(capsys, "compress", models / "dense", "equal", *how)
    said(capsys, "compress", models / "dense", "worst", *how, "--weights", "worst-case")
    equal, worst = (
        json.loads((here / out / "nsvd_report.json").read_text())["calibration"]["statistics"]["weights"]
        for out in ("equal", "worst")
    )
    assert equal == [0.5, 0.5]
    assert worst != equal
    assert sum(worst) == pytest.approx(1)


def test_gradients_allocate_the_ranks_of_any_method(here, capsys):
    """A method that looks at no input still gets the text that the gradients come from."""
    line = said(capsys, "compress", MINI, "low", "--method", "svd", "--ratio", 0.2, "--allocation", "fisher", *SHORT)
    assert line.startswith("low: SVD, 20.")


@pytest.mark.parametrize("method", ["asvd-1", "svd"])
def test_ranks_are_searched_on_request(method, here, capsys):
    """The embedded model by STRS on two windows, and by spectrum: target met, the allocation in report and config."""
    tiny = ["--method", method, "--ratio", 0.2, *SHORT]
    for allocation in ("strs", "spectrum"):
        search = ["--search-count", 2] if allocation == "strs" else []
        line = said(capsys, "compress", MINI, allocation, *tiny, "--allocation", allocation, *search)
        assert line.startswith(f"{allocation}: ")
        report = json.loads((here / allocation / "nsvd_report.json").read_text(encoding="utf-8"))
        assert 0.2 <= report["ratio_reached"] < 0.201
        assert report["allocation"] == allocation
        assert len({layer["rank"] for layer in report["layers"]}) > 3
        assert nsvd.load(allocation, device="cpu")[0].config.quantization_config.allocation == allocation
    strs = json.loads((here / "strs" / "nsvd_report.json").read_text(encoding="utf-8"))
    assert strs["search_tokens"] == 2 * 32 * 9 * len(strs["layers"])
    assert strs["calibration"]["search_windows"] == [[2, 32]]


def test_the_published_allocations_are_there(here, capsys):
    """By their names, on the embedded model: target met, what is read is told; LEMS alone takes the model whole."""
    tiny = ["--method", "asvd-1", "--ratio", 0.2, *SHORT]
    for allocation, more in (("lems", ["--search-count", 2]), ("zero-sum", []), ("svd-llm-v2", [])):
        assert main([str(a) for a in ("compress", MINI, allocation, *tiny, "--allocation", allocation, *more)]) == 0
        assert ("loaded whole: lems tries every layer" in capsys.readouterr().err) == (allocation == "lems")
        report = json.loads((here / allocation / "nsvd_report.json").read_text(encoding="utf-8"))
        assert 0.2 <= report["ratio_reached"] < 0.21
        assert report["allocation"] == allocation
        assert (report["search_tokens"] > 0) == (allocation != "svd-llm-v2")


def test_a_dense_model_is_described_as_dense(models, capsys):
    """Kind, parameters, size, precision."""
    first, second = said(capsys, "info", models / "dense").splitlines()
    assert "LlamaForCausalLM" in first
    assert f"{tiny_model().num_parameters():,} parameters" in first
    assert "torch.float32" in first
    assert second == "dense"


def test_an_existing_checkpoint_is_exchanged(here, models, capsys):
    """Method and precision of the second call stand; options have the methods' defaults."""
    said(capsys, "compress", models / "dense", "low", "--method", "svd", "--ratio", 0.3)
    said(capsys, "compress", models / "dense", "low", "--method", "svd", "--ratio", 0.5, "--dtype", "bfloat16")
    assert "compressed by svd , 5" in said(capsys, "info", "low")
    assert nsvd.load("low", device="cpu")[0].dtype == torch.bfloat16
    assert json.loads((here / "low" / "nsvd_report.json").read_text())["calibration"] is None
    assert [place.name for place in here.iterdir()] == ["low"]


def test_the_cache_is_compressed_alone_or_beside_the_weights(here, models, capsys):
    """``--ratio`` is not needed then; ``info`` tells the bytes of a token before and after."""
    cache = ["--method", "svd", "--cache-ratio", 0.5]
    line = said(capsys, "compress", models / "dense", "low", *cache, "--joint")
    assert line.startswith("low: SVD, KV cache of 128 bytes a token (256 dense)")
    assert said(capsys, "info", "low").splitlines()[1] == "KV cache compressed by svd : 256 → 128 bytes a token"
    said(capsys, "compress", models / "dense", "both", *cache, "--ratio", 0.3)
    assert len(said(capsys, "info", "both", "--layers").splitlines()) == 4 + 14  # two lines of the cache
    report = json.loads((here / "both" / "nsvd_report.json").read_text())
    assert (report["ratio"], report["cache"]["cache_ratio"], len(report["cache"]["layers"])) == (0.3, 0.5, 2)


def test_numbers_that_are_none_are_null_in_json(here, models, capsys):
    """One window has no standard error, and JSON no NaN."""
    said(capsys, "evaluate", models / "low", "--data", "mini/web", "--count", 1, "--length", 16, "--json", "one.json")
    strict = json.loads((here / "one.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["results"][0]["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nsvd-9", "--ratio", 0.3], "unknown method 'nsvd-9'; the methods are svd, "),
        (["--method", "nsvd-1", "--ratio", "1.0"], "ratio is 1.0"),
        (["--method", "nsvd-1", "--ratio", "-0.1"], "ratio is -0.1"),
        (["--method", "nsvd-1", "--ratio", "nan"], "ratio is nan"),
        ([*NSVD, "--k1", "2.0"], "k1 is 2.0"),
        ([*NSVD, "--k1", "0.01"], f"layer {Q}: k1 = 0.01 of rank 11 rounds k1 to 0"),
        (["--method", "asvd-1", "--ratio", 0.3, "--k1", 0.9], "ASVD-I has no option k1"),
        (["--method", "svd"], "give ratio, cache_ratio or both"),
        (["--method", "svd", "--cache-ratio", 1.5], "cache ratio is 1.5"),
        ([*NSVD, "--alpha", 0.5], "NSVD-I has no option alpha"),
        (["--method", "svd", "--ratio", 0.97], f"layer {Q}: ratio 0.97 leaves rank 0"),
        ([*NSVD, "--calibration", "mini/nothing"], "mini/nothing"),
        ([*NSVD, "--calibration", "nothing"], "unknown corpus 'nothing'"),
        ([*NSVD, "--calibration", "nothing.txt"], "no file nothing.txt"),
        ([*NSVD, "--calibration", "mini/web"], "corpus mini/web"),
        ([*NSVD, "--calibration", "latin1.txt"], "codec"),
        ([*NSVD, "--count", 10**6], "too short"),
        ([*NSVD, "--count", 0], "0 windows"),
        ([*NSVD, "--allocation", "strs", "--search-count", -1], "search_count is -1"),
        ([*NSVD, "--search-count", 8], "goes with allocation 'strs'"),
        ([*NSVD, "--length", 1], "2 tokens at least"),
        ([*NSVD, "--refine", -1], "refine is -1"),
        *[
            (["--method", method, "--ratio", 0.3, f"--{option}", value], f"{option} is {value}, but")
            for method, option, value in (
                ("asvd", "alpha", "nan"),
                ("asvd", "alpha", "inf"),
                ("asvd", "alpha", "-1000.0"),
                ("ridge", "mu", "inf"),
                ("kfac", "eta", "nan"),
                ("best", "mu", "nan"),
                ("nsvd-1", "k1", "nan"),
                ("sola", "prime", "nan"),
            )
        ],
        ([*NSVD, "--distill", -2], "distill is -2"),
        (
            ["--method", "asvd-1", "--cache-ratio", 0.5, "--weights", "worst-case"],
            "weights 'worst-case' go with a ratio",
        ),
        ([*NSVD, "--joint"], "joint goes with a cache ratio"),
        ([*NSVD, "--neurons", 0.5], "neurons are left out by what the loss rises by"),
        (["--method", "best", "--ratio", 0.3, "--neurons", 1.5], "neurons is 1.5"),
        (["--method", "best", "--cache-ratio", 0.5, "--neurons", 0.5], "neurons goes with a ratio"),
        (["--method", "svd", "--cache-ratio", 0.5, "--factors", "pivoted"], "factors goes with a ratio"),
        (
            [*NSVD, "--allocation", "strs", "--calibration", "self+mini/encyclopedia", "--count", 4],
            "windows of one length",
        ),
        ([*NSVD, "--device", "nowhere"], "device 'nowhere' cannot be used"),
        ([*NSVD, "--dtype", "float17"], "unknown dtype 'float17'"),
    ],
)
def test_what_compress_cannot_do_is_one_line(arguments, message, here, models, capsys):
    """Unknown names, numbers out of range, options of another method, text that is not there; no folder appears."""
    (here / "latin1.txt").write_bytes("é".encode("latin1") * 100)
    line = refused(capsys, here, "compress", models / "dense", "low", *arguments)
    assert message in line


@pytest.mark.parametrize("command", [["info"], ["evaluate"], ["compress"]])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "no-such-model",
            "no model 'no-such-model': pass a local folder or a .gguf file, or use an embedded model (mini-llama",
        ),
        ("./no/such/folder", "no model './no/such/folder'"),
        ("{models}/no-config", "without config.json"),
        ("{models}/missing", f"factor {Q}.up.weight is missing"),
        ("{models}/cut", "a weight file is damaged"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_line(command, model, message, here, models, capsys):
    """Missing or corrupt, for every command."""
    rest = ["low", *NSVD] if command == ["compress"] else []
    line = refused(capsys, here, *command, model.format(models=models), *rest)
    assert message in line


def test_a_model_of_somebody_else_is_calibrated_on_a_text_that_is_named(here, models, capsys):
    """The embedded encyclopedia is for the embedded models; a method that reads nothing needs none."""
    for more in ([], ["--allocation", "strs"], ["--shifted"]):
        line = refused(capsys, here, "compress", models / "dense", "low", "--method", "asvd-1", "--ratio", 0.3, *more)
        assert "is no embedded model: name a text to calibrate it on, --calibration CORPUS, or self" in line
    said(capsys, "compress", models / "dense", "low", "--method", "svd", "--ratio", 0.3)
    said(capsys, "compress", MINI, "own", "--method", "asvd-1", "--ratio", 0.3, *SHORT)
    report = json.loads((here / "own" / "nsvd_report.json").read_text(encoding="utf-8"))
    assert report["calibration"]["corpus"] == "mini/encyclopedia"


@pytest.mark.parametrize(
    ("flag", "own", "begin"), [([], True, False), (["--no-bos"], False, False), (["--bos"], True, True)]
)
def test_windows_begin_with_a_bos_as_the_tokenizer_does_or_as_asked_for(flag, own, begin, here, capsys):
    """Own text as the configuration does, where the tokenizer puts none. Report and results tell it, part by part."""
    part = ["--calibration", "self+mini/encyclopedia", "--count", 4, "--length", 32]
    said(capsys, "compress", MINI, "low", "--method", "asvd-1", "--ratio", 0.3, *part, *flag)
    report = json.loads((here / "low" / "nsvd_report.json").read_text(encoding="utf-8"))
    assert report["calibration"]["bos"] == [own, begin]
    said(capsys, "evaluate", MINI, "--data", "mini/web", *SHORT, *flag, "--json", "x.json")
    (row,) = json.loads((here / "x.json").read_text(encoding="utf-8"))["results"]
    model, tokenizer = nsvd.load(MINI, dtype="float32", device="cpu")
    windows = nsvd.windows("mini/web", tokenizer, count=3, length=32, bos=begin)
    assert row["bos"] is begin
    assert row["perplexity"] == pytest.approx(nsvd.perplexity(model, windows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mini-opt", "--data", "mini/web", "--length", 512, "--count", 1], "the model has learned 256 positions"),
        ([MINI, "--data", "mini/web", "--length", 10**12], "too short"),
        ([MINI, "--data", "mini/web", "--count", 10**12], "too short"),
        ([MINI, "--data", "half.jsonl", "--length", 8], "half.jsonl, line 1: the text holds \\ud83d"),
        ([MINI, "--data", "deep.jsonl", "--length", 8], "deep.jsonl, line 1: expected"),
        ([MINI, "--data", "folder.txt", "--length", 8], "folder.txt is a folder"),
        ([MINI, "--data", "zipped.txt", "--length", 8], "zipped.txt is not UTF-8 text"),
        (["small", "--data", "mini/web", "--length", 8], "the model's vocabulary has 100 tokens"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line(arguments, message, here, models, capsys):
    """By the model, by the tokenizer, or at all."""
    nsvd.save(tiny_model(vocab_size=100), tiny_tokenizer(), here / "small")
    (here / "half.jsonl").write_text('{"text": "x \\ud83d y"}\n', encoding="utf-8")
    (here / "deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    (here / "folder.txt").mkdir()
    (here / "zipped.txt").write_bytes(b"\x1f\x8b\x08\0")
    assert message in refused(capsys, here, "evaluate", *arguments)


@pytest.mark.parametrize("calibration", ["random", "self", "mini/encyclopedia", "self+random"])
def test_more_text_than_there_can_be_is_one_line(calibration, here, models, capsys):
    """At once, and before memory is asked for."""
    how = ["--method", "asvd-1", "--ratio", 0.3, "--calibration", calibration, "--count", 99999999999]
    line = refused(capsys, here, "compress", models / "dense", "low", *how)
    assert "more than the 134217728 that are made at a time" in line or "too short" in line


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, "one"])
def test_a_seed_is_a_number_that_a_generator_takes(seed, capsys):
    with pytest.raises(SystemExit) as error:
        main(["evaluate", MINI, "--seed", str(seed)])
    assert error.value.code == 2
    assert "argument --seed: a whole number of 64 bits is needed" in capsys.readouterr().err


def test_a_nan_is_one_line_with_the_layer(here, models, capsys):
    """In a weight, with statistics or without; in the activations; in what the model says."""
    for method in ("nsvd-1", "svd"):
        line = refused(capsys, here, "compress", models / "nan", "low", *NSVD, "--method", method)
        assert f"{Q}" in line
    model = nsvd.load(models / "dense", device="cpu")[0]
    poison(model, "model.layers.1.input_layernorm.weight", value=torch.finfo(torch.float32).max)
    nsvd.save(model, tiny_tokenizer(), "nan-inside")
    line = refused(capsys, here, "compress", "nan-inside", "low", *NSVD)
    assert "the model predicts NaN or Inf for 8 tokens; it begins in the output of" in line
    assert "model.layers.1." in line
    line = refused(capsys, here, "evaluate", models / "nan-norm", "--data", "mini/web", *SHORT, "--json", "x.json")
    assert "NaN or Inf" in line


@pytest.mark.parametrize("corpus", ["nothing", "none.jsonl", "bad.jsonl", "mini/nothing", "no/dir:name"])
def test_a_corpus_that_cannot_be_read_is_one_line(corpus, here, models, capsys):
    """Evaluation has no result then, and no file."""
    (here / "bad.jsonl").write_text('{"text": "good"}\nbad\n', encoding="utf-8")
    line = refused(capsys, here, "evaluate", models / "dense", "--data", "mini/web", corpus, *SHORT, "--json", "x.json")
    assert ("bad.jsonl, line 2" if corpus == "bad.jsonl" else corpus.split(":")[0]) in line


def test_an_output_that_cannot_be_written_is_one_line_before_the_work(here, models, capsys, monkeypatch):
    """Below a regular file, in the place of one, or a file in the place of a folder: the model is not even loaded."""
    (here / "file").write_text("text", encoding="utf-8")
    (here / "folder" / "inside").mkdir(parents=True)
    monkeypatch.setattr(nsvd, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    for out in ("file/low", "file/deeper/low", "file"):
        assert f"cannot write {out}" in refused(capsys, here, "compress", models / "dense", out, *NSVD)
    for out in ("file/numbers.json", "folder"):
        assert f"cannot write {out}" in refused(capsys, here, "evaluate", models / "dense", "--json", out)


def test_a_model_is_not_compressed_over_itself(here, models, capsys, monkeypatch):
    """Its dense weights would be gone: by the same name, another one, a link, or when files of it are links into OUT."""
    keep = shutil.copytree(models / "dense", here / "keep")
    (here / "link").symlink_to(keep, target_is_directory=True)
    linked = here / "linked"
    linked.mkdir()
    for file in keep.iterdir():
        (linked / file.name).symlink_to(file)
    monkeypatch.setattr(nsvd, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    for source, out in (
        ("keep", "keep"), ("keep", "./keep/"), (keep, "../here/keep"), ("keep", "link"), ("link", "keep"), ("linked", "keep"),
        ("keep", "new/../keep"),
    ):  # fmt: skip
        line = refused(capsys, here, "compress", source, out, *NSVD)
        assert f"cannot write {out}: the model {source} itself lies there" in line
    own = nsvd.embedded_models()[MINI]
    monkeypatch.setattr("nsvd.stored.checkpoint.MODEL_FILES", ("*",))
    assert f"the model {MINI} itself" in refused(capsys, here, "compress", MINI, own, *NSVD)


def test_a_model_of_links_can_be_exchanged(here, models, capsys):
    """The links go; what they point to stays."""
    keep, linked = shutil.copytree(models / "dense", here / "keep"), here / "linked"
    linked.mkdir()
    for file in keep.iterdir():
        (linked / file.name).symlink_to(file)
    before = contents(keep)
    said(capsys, "compress", "keep", "linked", "--method", "svd", "--ratio", 0.3)
    assert contents(keep) == before
    assert "compressed by svd" in said(capsys, "info", "linked")


def test_numbers_go_into_a_pipe(here, models, capsys):
    """``--json`` to a reader that waits for it."""
    os.mkfifo(here / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append(json.loads((here / "pipe").read_text())))
    reader.start()
    said(capsys, "evaluate", models / "dense", "--data", "mini/web", "--count", 1, "--length", 16, "--json", "pipe")
    reader.join()
    assert got[0]["results"][0]["corpus"] == "mini/web"
    assert [place.name for place in here.iterdir()] == ["pipe"]
    assert "pipe: it is a device or a pipe" in refused(capsys, here, "compress", models / "dense", "pipe", *NSVD)


def test_a_full_disk_is_one_line(here, models, capsys):
    """Nothing is left of the new model; of an older one everything. What was factored by then is taken up by the next run."""
    svd = ["--method", "svd", "--ratio"]
    with file_limit(20_000):
        line = refused(capsys, here, "compress", models / "dense", "low", *svd, 0.3)
    assert re.fullmatch(r"nsvd compress: cannot write \S+low\S*: File too large\n", line)
    said(capsys, "compress", models / "dense", "low", *svd, 0.3)
    before = contents(here / "low")
    with file_limit(20_000):
        assert main(["compress", str(models / "dense"), "low", *svd, "0.5"]) == 2
    assert contents(here / "low") == before
    assert (here / ".low.progress").is_dir()
    said(capsys, "compress", models / "dense", "low", *svd, 0.5)
    assert contents(here / "low") != before
    assert not (here / ".low.progress").exists()


def notebook(file: Path, *code: str) -> Path:
    """A notebook with the parameter ``size``."""
    cells = [v4.new_code_cell("size: int = 3  # how many", metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells + [v4.new_code_cell(c) for c in code], metadata=kernel), file)
    return file


def test_notebooks_run_and_their_failures_are_code_1(here, capsys):
    """A line for each; parameters are read as YAML."""
    good, bad = notebook(here / "good.ipynb", "assert size == 4"), notebook(here / "bad.ipynb", "size / 0")
    assert main(["run", str(good), str(bad), "-p", "size", "4", "--out", "out", "--jobs", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["done    out/good.ipynb", "failed  out/bad.failed.ipynb"]
    assert "ZeroDivisionError" in lines[2]
    assert sorted(file.name for file in (here / "out").iterdir()) == ["bad.failed.ipynb", "good.ipynb"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "sise", "3"], "sise: no parameter of one; declared are size"),
        (["-p", "size", "[3"], "not YAML"),
        (["--preset", "none.yaml"], "no preset file none.yaml"),
        (["--shard", "3/2"], "expected i/n"),
        (["--jobs", "0"], "0 jobs"),
        (["another"], "no notebook 'another'"),
    ],
)
def test_what_run_cannot_do_is_one_line(arguments, message, here, capsys):
    """A misspelt parameter, a missing file: nothing is executed."""
    notebook(here / "one.ipynb", "1 / 0")
    line = refused(capsys, here, "run", "one.ipynb", *arguments, "--out", "out")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nsvd: the following arguments are required: COMMAND; nsvd --help tells more"),
        (["fly"], "nsvd: argument COMMAND: invalid choice: 'fly' (choose from "),
        (["info"], "nsvd info: the following arguments are required: MODEL; nsvd info --help tells more"),
        (["evaluate"], "nsvd evaluate: the following arguments are required: MODEL"),
        (["compress", MINI, "low"], "nsvd compress: the following arguments are required: --method"),
        (
            ["compress", MINI, "low", "--method", "svd", "--ratio", "much"],
            "nsvd compress: argument --ratio: invalid float value: 'much'",
        ),
        (["compress", MINI, "low", *NSVD, "--speed", "9\n8"], "nsvd: unrecognized arguments: --speed 9 8; nsvd --help"),
        (["run", "all", "--shard", "first"], "nsvd run: argument --shard: 'first' is not i/n, two whole numbers"),
        (["run", "all", "-p", "alone"], "nsvd run: argument -p: expected 2 arguments"),
        (["evaluate", MINI, "--seed", "one"], "nsvd evaluate: argument --seed: a whole number of 64 bits is needed"),
    ],
)
def test_a_command_that_is_no_command_is_one_line(arguments, message, here, capsys):
    """What is wrong with the arguments, and where the usage stands; exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(message)
    assert line.endswith("--help tells more\n")
    assert line.count("\n") == 1
    assert contents(here) == {}


def test_help_names_every_command_and_option(capsys):
    """``--help`` is the manual."""
    for arguments, words in (
        (["--help"], ["run", "compress", "evaluate", "info"]),
        (
            ["compress", "--help"],
            ["--method", "--ratio", "--k1", "--calibration", "--allocation", "--count", "--length", "--seed"],
        ),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def test_a_fresh_process_reads_what_another_one_wrote(models, tmp_path):
    """``python -m nsvd.cli``: exit codes and streams are those of a program."""

    def program(*arguments, stdout=subprocess.PIPE):
        return subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", "import sys; from nsvd.cli import main; sys.exit(main())"]
            + [str(a) for a in arguments],
            stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip

    done = program("info", models / "low", "--layers")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{Q}: 32 × 32, rank 11" in done.stdout
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = program("info", models / "low", stdout=full)
        assert done.returncode == 2
        assert done.stderr == "nsvd info: [Errno 28] No space left on device\n"


NOISY = """
import sys, warnings
from nsvd import cli
def info(chosen):
    from transformers.utils import logging
    from huggingface_hub.utils import logging as hub
    logging.get_logger("transformers.x").warning("noise")
    hub.get_logger("huggingface_hub.x").warning("noise")
    warnings.warn_explicit("noise", FutureWarning, "x.py", 1, module="torch.nn")
    raise ValueError("bad\\nmodel")
cli.info = info
sys.exit(cli.main(["info", "m"]))
"""


def test_libraries_say_nothing_before_the_one_line():
    """Log lines and warnings of theirs stay away from standard error."""
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "nsvd info: bad model\n")


def test_compress_and_info_tell_the_share_of_the_whole_model(tmp_path, capsys):
    """Experts of another form stay dense: half of the layers is less of the model, and what was left alone is named."""
    experts = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
    nsvd.save(
        tiny_model("llama4_text", **experts, head_dim=8, intermediate_size_mlp=48), tiny_tokenizer(), tmp_path / "m"
    )
    assert main(["compress", str(tmp_path / "m"), str(tmp_path / "low"), "--method", "svd", "--ratio", "0.5"]) == 0
    told = capsys.readouterr().out
    share = re.search(
        r"5\d\.\d% of the layers' 15,360 parameters removed .*; (1\d\.\d%) of the whole model's [\d,]+ removed, ", told
    )
    assert "left alone model.layers.*.feed_forward.experts.gate_up_proj (24,576), " in told
    assert main(["info", str(tmp_path / "low")]) == 0
    assert f", {share[1]} of the whole model's" in capsys.readouterr().out


def test_compress_takes_the_layers_that_are_named(models, here, capsys):
    """By pattern, some of them left out; what matches nothing is refused."""
    asked = [models / "dense", "some", "--method", "svd", "--ratio", "0.3", "--layers"]
    said(capsys, "compress", *asked, "mlp.*", "--exclude", "*down_proj")
    report = json.loads((here / "some" / "nsvd_report.json").read_text(encoding="utf-8"))
    layers = {layer["layer"] for layer in report["layers"]}
    assert layers == {name for name in nsvd.targets(tiny_model()) if re.search(r"mlp\.(gate|up)_proj", name)}
    assert "nowhere" in refused(capsys, here, "compress", *asked, "nowhere")
