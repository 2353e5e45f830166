"""Calibration text by name: a corpus, the model's own text, random tokens, or a sum of them that shares the windows out."""

import pytest
import torch

import nsvd
from nsvd.lab.calibration import begins_with_bos
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tools():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield tiny_model(), tiny_tokenizer()
    torch.set_default_dtype(before)


def test_a_sum_shares_the_windows_out_evenly(tools):
    """As many of every part, the model's own at half the length; each part is what it is alone."""
    model, tokenizer = tools
    parts = nsvd.domains("self+mini/encyclopedia+random", model, tokenizer, length=32, count=9, seed=3)
    assert [tuple(ids.shape) for ids in parts] == [(3, 16), (3, 32), (3, 32)]
    assert torch.equal(parts[0], nsvd.own_text(model, 3, 32, seed=3))
    assert torch.equal(parts[2], nsvd.random_tokens(300, 3, 32, seed=3))


def test_a_corpus_alone_is_its_windows(tools):
    model, tokenizer = tools
    (ids,) = nsvd.domains("mini/encyclopedia", model, tokenizer, length=32, count=5, seed=1)
    expected = nsvd.windows("mini/encyclopedia", tokenizer, split="calibration", length=32, count=5, seed=1)
    assert torch.equal(ids, expected)


def test_own_text_alone_is_what_the_recipe_takes(tools):
    """By default as many windows as where no text is given at all; as many as asked for else."""
    model, tokenizer = tools
    (ids,) = nsvd.domains("self", model, tokenizer, length=8)
    assert torch.equal(ids, nsvd.own_text(model, length=8))
    assert [len(nsvd.domains(name, model, tokenizer, length=8, count=5)[0]) for name in ("self", "random")] == [5, 5]


def test_a_file_with_a_plus_in_its_name_is_a_file(tools, tmp_path):
    """And no sum."""
    file = tmp_path / "a+self.txt"
    file.write_text("word " * 200, encoding="utf-8")
    (ids,) = nsvd.domains(str(file), *tools, length=32, count=2)
    assert ids.shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [("self+mini/encyclopedia", 1, "1 windows for the 2 parts"), ("self+prose", 4, "unknown corpus 'prose'")],
)
def test_what_cannot_be_had_is_said(name, count, message, tools):
    with pytest.raises(ValueError, match=message):
        nsvd.domains(name, *tools, length=16, count=count)


@pytest.mark.parametrize(("opening", "bos"), [(True, None), (False, True), (True, True)])
def test_every_part_begins_with_a_bos_as_the_tokenizer_does_or_as_asked_for(opening, bos, tools):
    """A corpus, random tokens and own text alike, none longer for it."""
    model, _ = tools
    tokenizer = tiny_tokenizer(bos=opening)
    parts = nsvd.domains("self+mini/encyclopedia+random", model, tokenizer, length=32, count=9, bos=bos)
    assert [tuple(ids.shape) for ids in parts] == [(3, 16), (3, 32), (3, 32)]
    assert all((ids[:, 0] == 0).all() and begins_with_bos(ids, tokenizer) for ids in parts)


def test_no_part_begins_with_a_bos_where_none_is_wanted(tools):
    """Own text is still sampled from it."""
    model, _ = tools
    parts = nsvd.domains(
        "self+mini/encyclopedia+random", model, tiny_tokenizer(bos=True), length=32, count=9, bos=False
    )
    assert [tuple(ids.shape) for ids in parts] == [(3, 16), (3, 32), (3, 32)]
    assert not any(begins_with_bos(ids, tiny_tokenizer(), model) for ids in parts)
    assert torch.equal(parts[0], nsvd.own_text(model, 3, 34)[:, 1:])


def test_own_text_begins_with_the_token_of_the_tokenizer_else_of_the_model(tools):
    """Where neither knows one, it is said."""
    _, tokenizer = tools
    (ids,) = nsvd.domains("self", tiny_model(bos_token_id=7), tokenizer, length=8, count=2)
    assert (ids[:, 0] == 7).all()
    assert begins_with_bos(ids, tokenizer, tiny_model(bos_token_id=7))
    (ids,) = nsvd.domains("self", tiny_model(bos_token_id=None), tiny_tokenizer(bos=True), length=8, count=2)
    assert (ids[:, 0] == 0).all()
    with pytest.raises(ValueError, match="names no token that begins a text"):
        nsvd.domains("self", tiny_model(bos_token_id=None), tokenizer, length=8, count=2)


@pytest.mark.parametrize("name", ["self", "random", "self+random", "mini/encyclopedia"])
@pytest.mark.parametrize("sizes", [{"count": 10**11, "length": 8}, {"count": 4, "length": 10**12}])
def test_far_too_much_is_refused_at_once(name, sizes, tools):
    """In a sentence that tells how much, and before memory is asked for."""
    with pytest.raises(ValueError, match=r"tokens are \d+ tokens, more than|too short|has learned"):
        nsvd.domains(name, *tools, **sizes)
