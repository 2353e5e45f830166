"""Multiple choice: likelihoods as one text after the other gives them, accuracies as lm-evaluation-harness defines them."""

import json
import runpy
import shutil
from collections import Counter

import pytest
import torch

import nsvd
from nsvd.lab import choices as module
from nsvd.lab.choices import EMBEDDED_TASKS, Question, accuracy_difference, measure_choices, multiple_choice, questions
from nsvd.lab.paths import data
from nsvd.lab.records import Records
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"question": "Which is it?", "choices": ["this", "that one", "another of them", "no"], "answer": 1},
    {"question": "The cat sat on the", "choices": ["mat", "roof of it"], "answer": 0},
    {"question": "Ann gave Bo a book, so _ was glad.", "choices": ["Ann", "Bo"], "answer": 1},
]


@pytest.fixture
def task(tmp_path):
    """Gives ``DIR:name`` for the rows that it writes."""

    def write(rows=ROWS, name="some") -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"{tmp_path}:{name}"

    return write


@torch.no_grad()
def likelihood(model, tokenizer, context: str, scored: str) -> float:
    """Of one text alone."""
    ids = tokenizer(context + scored, return_tensors="pt", add_special_tokens=False)["input_ids"]
    known = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[0, i]].item() for i in range(known, ids.shape[1]))


def test_a_task_is_read(task):
    """What is before each choice and what is scored: the choice after a space, or what follows a gap."""
    ask, bare, gap = questions(task([ROWS[0], ROWS[1] | {"choices": ["mat\u2028", "roof of it"]}, ROWS[2]]))
    assert ask == Question(
        ("Which is it?",) * 4, (" this", " that one", " another of them", " no"), tuple(ROWS[0]["choices"]), 1
    )
    assert bare.scored == (" mat\u2028", " roof of it")
    assert gap.contexts == ("Ann gave Bo a book, so Ann", "Ann gave Bo a book, so Bo")
    assert gap.scored == (" was glad.",) * 2
    assert questions(task(name="piqa"))[0].contexts[0] == "Question: Which is it?\nAnswer:"
    assert questions(task(name="openbookqa"))[0].contexts[0] == "Which is it?"


def test_likelihoods_are_those_of_every_text_alone(task):
    """However many texts of whatever length are read together."""
    model, tokenizer = tiny_model(max_position_embeddings=96), tiny_tokenizer(96)
    asked = questions(task())
    found = multiple_choice(model, tokenizer, asked)
    for i, q in enumerate(asked):
        likely = [likelihood(model, tokenizer, *pair) for pair in zip(q.contexts, q.scored, strict=True)]
        each = [value / len(text.strip()) for value, text in zip(likely, q.scored, strict=True)]
        assert found.plain[i] == (likely.index(max(likely)) == q.answer)
        assert found.normalized[i] == (each.index(max(each)) == q.answer)
    texts = [module._ids(tokenizer, *pair, None) for q in asked for pair in zip(q.contexts, q.scored, strict=True)]
    alone = [likelihood(model, tokenizer, *pair) for q in asked for pair in zip(q.contexts, q.scored, strict=True)]
    torch.testing.assert_close(
        torch.tensor(module._likelihoods(model, texts, False)), torch.tensor(alone), rtol=1e-5, atol=1e-4
    )
    assert found.chance == pytest.approx((1 / 4 + 1 / 2 + 1 / 2) / 3)


def test_accuracies_are_the_harnesss(monkeypatch):
    """The largest sum, and the largest sum for a character of the choice; here the one is wrong and the other right."""
    monkeypatch.setattr(module, "_likelihoods", lambda *_: [-4.0, -6.0])
    found = multiple_choice(
        tiny_model(), tiny_tokenizer(), [Question(("q", "q"), (" ab", " abcdef"), ("ab", "abcdef"), 1)]
    )
    assert (found.accuracy, found.accuracy_normalized) == (0.0, 1.0)


def test_a_gap_is_normalized_by_what_is_scored(monkeypatch):
    """The same after every choice, however long the choices are."""
    monkeypatch.setattr(module, "_likelihoods", lambda *_: [-4.0, -6.0])
    gap = Question(("ab", "abcdef"), (" end",) * 2, ("ab", "abcdef"), 0)
    found = multiple_choice(tiny_model(), tiny_tokenizer(), [gap])
    assert (found.accuracy, found.accuracy_normalized) == (1.0, 1.0)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", '{"question": "q", "choices": ["a"], "answer": 0}', '{"question": "q", "choices": ["a", "b"], "answer": 2}',
     '{"question": "q", "choices": ["a", "b"], "answer": true}', '{"question": "", "choices": ["a", "b"], "answer": 0}',
     '{"question": "q", "choices": ["a", " "], "answer": 0}', '{"question": "q", "choices": "ab", "answer": null}',
     '{"question": "q", "choices": {"a": 1, "b": 2}, "answer": 0}'],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(line, task):
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: expected"):
        questions(task([ROWS[0], line, ROWS[1]]))


def test_what_is_no_task_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'hellaswag'; use mini/completion_en"):
        questions("hellaswag")
    with pytest.raises(FileNotFoundError, match="no file"):
        questions(f"{tmp_path}:absent")
    with pytest.raises(ValueError, match="has 3 questions; 4 asked for"):
        questions(task(), count=4)
    with pytest.raises(ValueError, match="has 3 questions; 0 asked for"):
        questions(task(), count=0)
    (tmp_path / "some" / "test.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="has 0 questions; 1 asked for"):
        questions(f"{tmp_path}:some")
    model = tiny_model("opt")
    with pytest.raises(ValueError, match="the model has learned 64 positions"):
        multiple_choice(model, tiny_tokenizer(), task([ROWS[0] | {"question": "long " * 20}]))
    assert [q.answer for q in questions(task(), count=2, seed=1)] == [
        q.answer for q in questions(task(), count=2, seed=1)
    ]


def test_the_difference_is_paired():
    """Of a model that is right on one more question in ten: the interval holds the difference; of equal models it is nothing."""
    base = (torch.arange(400) % 2).double()
    more = base.clone()
    more[::20] = 1
    difference, low, high = accuracy_difference([more, more], [base, base])
    assert difference == pytest.approx(0.05)
    assert 0.03 < low < 0.05 < high < 0.07
    assert accuracy_difference([base], [base]) == (0, 0, 0)
    assert all(value != value for value in accuracy_difference([], []))


def test_measurements_are_recorded(task, tmp_path):
    """And a model that is recorded is not built again."""
    model, tokenizer, records = (
        tiny_model(max_position_embeddings=96),
        tiny_tokenizer(96),
        Records(tmp_path / "r.jsonl"),
    )
    asked = {"some": questions(task())}
    first = measure_choices(lambda: model, tokenizer, asked, records, {"model": "m"})
    again = measure_choices(lambda: pytest.fail("built again"), tokenizer, asked, records, {"model": "m"})
    assert first == again
    assert first[0]["accuracy"] == pytest.approx(sum(first[0]["right"]) / 3)


def test_the_embedded_questions_are_what_their_program_writes(tmp_path, monkeypatch):
    """Four different choices each; the right one is anywhere."""
    corpora = data() / "corpora"
    shutil.copytree(corpora, tmp_path / "corpora")
    for task in EMBEDDED_TASKS:
        (tmp_path / "corpora" / task.removeprefix("mini/") / "test.jsonl").unlink()
    runpy.run_path(str(tmp_path / "corpora" / "completions.py"), run_name="__main__")
    for task in EMBEDDED_TASKS:
        name = task.removeprefix("mini/")
        written = (tmp_path / "corpora" / name / "test.jsonl").read_bytes()
        assert written == (corpora / name / "test.jsonl").read_bytes()
        asked = questions(task)
        assert all(len(set(q.choices)) == 4 for q in asked)
        assert min(Counter(q.answer for q in asked).values()) > len(asked) / 8
    assert sum(len(questions(task)) for task in EMBEDDED_TASKS) == 320


def test_a_mini_model_answers_better_than_a_guess():
    """A guess of 60 questions is right 15 times, and 25 times once in 500."""
    model, tokenizer = nsvd.load("mini-llama", dtype="float32", device="cpu")
    assert multiple_choice(model, tokenizer, "mini/completion_en", count=60).plain.sum() > 25


@pytest.mark.slow
def test_accuracies_agree_with_lm_evaluation_harness(tmp_path, monkeypatch):
    """To half a point of every embedded task, with and without a space before the choices."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_default_dtype(torch.float32)
    for task in EMBEDDED_TASKS:
        name = task.removeprefix("mini/")
        about = {
            "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(data() / "corpora" / name / "test.jsonl")}},
            "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer",
            "target_delimiter": "" if name in module.UNSPACED else " ",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(about), encoding="utf-8")
    model, tokenizer = nsvd.load("mini-llama", dtype="float32", device="cpu")
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu"),
        tasks=[task.removeprefix("mini/") for task in EMBEDDED_TASKS],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )["results"]  # fmt: skip
    for task in EMBEDDED_TASKS:
        ours, told = multiple_choice(model, tokenizer, task), theirs[task.removeprefix("mini/")]
        assert ours.accuracy == pytest.approx(told["acc,none"], abs=0.005)
        assert ours.accuracy_normalized == pytest.approx(told["acc_norm,none"], abs=0.005)
