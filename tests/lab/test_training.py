"""The training of a reference model can be stopped at any time and ends in the same bytes."""

import gzip
import json
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import nsvd
from nsvd.lab import training
from nsvd.lab.training import Recipe, documents, train

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
SHAPE = {"vocabulary": 300, "window": 16, "batch": 3, "warmup": 2}
TOY = Recipe("toy", ARCHITECTURE, {"prose": 0.7, "verse": 0.3}, tokens=8 * 16 * 3, tokenizer_characters=2000, **SHAPE)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two sources of random words, gzipped JSON lines."""
    folder, words = tmp_path_factory.mktemp("text"), random.Random(0)
    for name in TOY.text:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            for i in range(20):
                body = " ".join("".join(words.choices("abcdeé", k=4)) for _ in range(25))
                lines.write(json.dumps({"text": f"{name} {i}: {body}"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """(folder, curve) of a run that was never stopped."""
    place = tmp_path_factory.mktemp("whole")
    return place / "model", run(text, place)


def run(text, place, **options) -> list[dict]:
    """Train under the default dtype of a user."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return train(TOY, text, place / "work", place / "model", device="cpu", **({"every": 2} | options))
    finally:
        torch.set_default_dtype(before)


def timeless(curve: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in curve]


def stored_curve(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stops", [(4,), (5,), (1, 3, 7)])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(stops, text, whole, tmp_path):
    """At a checkpoint, between two, or again and again: weights, tokenizer and loss curve are those of an unbroken run."""
    for stop in stops:
        run(text, tmp_path, stop=stop)
        assert not (tmp_path / "model").exists()
    curve = run(text, tmp_path)
    folder, expected = whole
    assert timeless(curve) == timeless(expected)
    for name in ("model.safetensors", "tokenizer.json", "recipe.json"):
        assert (tmp_path / "model" / name).read_bytes() == (folder / name).read_bytes()
    assert timeless(stored_curve(tmp_path / "model")) == timeless(expected)


def test_an_error_is_as_good_as_a_stop(text, whole, tmp_path, monkeypatch):
    """Resuming after a crash between two checkpoints forgets the steps after the last one."""
    draw = training.Batches.__getitem__

    def crashes(self, step):
        if step == 5:
            raise OSError("disk gone")
        return draw(self, step)

    with monkeypatch.context() as then:
        then.setattr(training.Batches, "__getitem__", crashes)
        with pytest.raises(OSError, match="disk gone"):
            run(text, tmp_path)
    run(text, tmp_path)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_a_line_that_a_kill_cut_short_is_written_again(text, whole, tmp_path):
    """The step it tells of is taken again, too."""
    run(text, tmp_path, stop=5)
    with (tmp_path / "work" / "training.jsonl").open("a") as log:
        log.write('{"step": 6, "tok')
    assert timeless(run(text, tmp_path)) == timeless(whole[1])
    assert timeless(stored_curve(tmp_path / "model")) == timeless(whole[1])


def test_the_finished_model_is_one_that_can_be_loaded(whole):
    """In bfloat16, with the tokenizer, the recipe and the curve beside it."""
    folder, curve = whole
    model, tokenizer = nsvd.load(folder, device="cpu")
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.decode(tokenizer("é deed")["input_ids"], skip_special_tokens=True) == "é deed"
    assert Recipe.load(folder / "recipe.json") == TOY
    assert [row["step"] for row in curve] == [2, 4, 6, 8]
    assert curve[-1]["tokens"] == TOY.tokens
    assert stored_curve(folder) == curve
    assert len(nsvd.targets(model)) == 7


def test_training_lowers_the_loss(whole):
    """From that of a blind guess among 300 tokens."""
    losses = [row["loss"] for row in whole[1]]
    assert losses[0] == pytest.approx(5.7, abs=0.2)
    assert losses[-1] < losses[0] - 0.1


def test_a_loss_that_is_nan_stops_the_run(text, tmp_path, monkeypatch):
    """At the next line of the curve, without a checkpoint of it."""
    monkeypatch.setattr(Recipe, "rate", lambda self, step: float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        run(text, tmp_path)
    assert not (tmp_path / "work" / "checkpoint.safetensors").exists()


def test_the_rates_warm_up_stay_and_fall_to_zero():
    """Linearly both times; the step after the last would have none."""
    recipe = Recipe("r", ARCHITECTURE, {"a": 1}, tokens=100 * 16 * 3, decay=0.4, **(SHAPE | {"warmup": 10}))
    rates = [recipe.rate(step) for step in range(101)]
    assert recipe.steps == 100
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:61] == [1.0] * 51
    assert rates[60:] == pytest.approx([1 - i / 40 for i in range(41)])


def test_windows_depend_on_seed_and_step_alone(text, tmp_path):
    """So a resumed run needs no state of a random generator; ids start each document with the start token."""
    tokenizer = training.train_tokenizer(TOY, text)
    first, again = (training.Batches(TOY, text, tmp_path, tokenizer) for _ in range(2))
    assert first[3].shape == (3, 16)
    assert torch.equal(first[3], again[3])
    assert not torch.equal(first[3], first[4])
    assert int((first.sources[0] == 0).sum()) == 20


def test_documents_come_in_seeded_order_up_to_a_limit(text):
    """All of them, or the first that fill it."""
    everything = documents(text, "prose", TOY)
    assert len(everything) == len(set(everything)) == 20
    assert documents(text, "prose", TOY) == everything
    short = Recipe("r", ARCHITECTURE, TOY.text, tokens=0, max_characters=300)
    assert documents(text, "prose", short) == everything[:3]
    assert documents(text, "prose", Recipe("r", ARCHITECTURE, TOY.text, tokens=0, seed=1)) != everything


def test_a_text_that_ships_is_found_where_the_folder_lacks_it(text):
    """The folder's own file comes first; one that is nowhere is named."""
    assert len(documents(text, "instructions", TOY)) > 20
    with pytest.raises(FileNotFoundError, match=r"recipe .* needs .*nothing\.jsonl\.gz"):
        documents(text, "nothing", TOY)


def test_the_recipe_of_the_embedded_model_is_the_one_that_ships():
    """Every field of the JSON file is one the program knows, and the architectures agree."""
    recipe = Recipe.load(nsvd.embedded_models()["mini-llama"].parents[1] / "recipes" / "mini-llama.json")
    config = nsvd.load("mini-llama", device="cpu")[0].config
    assert recipe.vocabulary == config.vocab_size
    assert all(getattr(config, key) == value for key, value in recipe.architecture.items())


def test_a_recipe_can_go_on_from_an_embedded_model(text, tmp_path):
    """With its tokenizer and its weights, and text that ships with the project where the folder has none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        known = json.loads((nsvd.embedded_models()["mini-llama"] / "recipe.json").read_text())["architecture"]
        tuned = Recipe(
            "tuned",
            known,
            {"instructions": 1.0},
            2 * 16 * 2,
            "mini-llama",
            window=16,
            batch=2,
            lr_matrix=0.0,
            lr_rest=0.0,
        )
        train(tuned, text, tmp_path / "work", tmp_path / "model", device="cpu")
    finally:
        torch.set_default_dtype(before)
    (old, words), (new, same) = nsvd.load("mini-llama", device="cpu"), nsvd.load(tmp_path / "model", device="cpu")
    assert all(torch.equal(p, new.get_parameter(name)) for name, p in old.named_parameters())
    assert words.get_vocab() == same.get_vocab()


def test_missing_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe toy needs .*prose\.jsonl\.gz"):
        documents(tmp_path, "prose", TOY)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_deepened_model_runs_through_the_blocks_again_and_again(copies):
    """Each pass over all of them, weights their own from then on: gradients reach every block."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(ARCHITECTURE | {"num_hidden_layers": 2}), vocab_size=300)
    shallow = AutoModelForCausalLM.from_config(config).double()
    deep = training.deepened(shallow, 2 * copies).double()
    assert deep.config.num_hidden_layers == len(deep.model.layers) == 2 * copies
    ids = torch.randint(300, (2, 9))
    states = shallow.model.embed_tokens(ids)
    rotation = shallow.model.rotary_emb(states, torch.arange(9)[None])
    mask = torch.full((9, 9), float("-inf")).triu(1).double()[None, None]
    for _ in range(copies):
        for block in shallow.model.layers:
            states = block(states, attention_mask=mask, position_embeddings=rotation)
    torch.testing.assert_close(deep(ids).logits, shallow.lm_head(shallow.model.norm(states)))
    deep(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.norm() > 0 for block in deep.model.layers for p in block.parameters())
    assert all(p.grad is None for p in shallow.parameters())


def test_a_run_can_only_be_deepened_by_whole_copies():
    """Neither to a depth between, nor to a smaller one."""
    shallow = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**(ARCHITECTURE | {"num_hidden_layers": 2}), vocab_size=300)
    )
    for blocks in (1, 3):
        with pytest.raises(ValueError, match=f"{blocks} blocks are not a multiple of the 2"):
            training.deepened(shallow, blocks)
