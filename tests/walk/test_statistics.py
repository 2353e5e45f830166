"""Statistics come back from their file as they were written, or are refused by name."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import nsvd
from tests.tiny import DOWN, K, Q, file_limit, tiny_model, token_ids

IDS = token_ids(7, 16)


def test_statistics_come_back_from_a_file_bit_by_bit(tmp_path):
    """Moments, counts, shared inputs, their order and where they came from."""
    stats = nsvd.calibrate(tiny_model(), IDS)
    stats.save(tmp_path / "new" / "stats.safetensors")
    again = nsvd.Statistics.load(tmp_path / "new" / "stats.safetensors")
    assert list(again) == list(stats)
    assert again.inputs == stats.inputs
    assert again.origin == stats.origin
    for name, ours in stats.items():
        assert torch.equal(again[name].G, ours.G)
        assert torch.equal(again[name].mean_abs, ours.mean_abs)
        assert again[name].n == ours.n
    assert again[Q].G is again[K].G  # stored once


def test_gradients_come_back_from_the_file_too(tmp_path):
    """H of every layer, beside moments that may be shared; an older file without any has none."""
    model = tiny_model()
    plain = nsvd.calibrate(model, IDS)
    stats = plain.with_gradients(nsvd.fisher(model, IDS, diagonal=True))
    assert plain.gradients == {}
    assert plain[Q].H is None
    stats.save(tmp_path / "stats")
    again = nsvd.Statistics.load(tmp_path / "stats")
    assert list(again.gradients) == list(stats)
    assert all(torch.equal(again[name].H, stats[name].H) for name in stats)
    assert again[Q].G is again[K].G
    assert not torch.equal(again[Q].H[:16], again[K].H)
    plain.save(tmp_path / "plain")
    assert nsvd.Statistics.load(tmp_path / "plain")[Q].H is None


def test_a_file_of_something_else_is_no_statistics(tmp_path):
    """Text, a cut-off file and a model's weights are refused with the file's name; a missing one is not found."""
    stats, text, cut = tmp_path / "stats", tmp_path / "text", tmp_path / "cut"
    nsvd.calibrate(tiny_model(), IDS).save(stats)
    text.write_text("not a tensor", encoding="utf-8")
    cut.write_bytes(stats.read_bytes()[:-100])
    tiny_model().save_pretrained(tmp_path / "model")
    for file in (text, cut, tmp_path / "model" / "model.safetensors"):
        with pytest.raises(ValueError, match=f"{file.name} is not a statistics file"):
            nsvd.Statistics.load(file)
    with pytest.raises(FileNotFoundError, match="no statistics file"):
        nsvd.Statistics.load(tmp_path / "nothing")


def rewritten(file, tensors=lambda _: None, about=lambda _: None) -> None:
    """A statistics file with something changed."""
    with safe_open(file, "pt") as stored:
        held = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it cannot be iterated)
        told = json.loads(stored.metadata()["nsvd_statistics"])
    tensors(held)
    told = about(told) or told
    save_file(held, file, metadata={"nsvd_statistics": told if isinstance(told, str) else json.dumps(told)})


@pytest.mark.parametrize("about", [
    lambda a: "{", lambda a: "[]", lambda a: "null", lambda a: "[" * 100_000, lambda a: a.pop("n") and None,
    lambda a: a.update(n=3), lambda a: a.update(n={Q: 0}), lambda a: a.update(n={Q: "7"}), lambda a: a.update(n={Q: True}),
    lambda a: a.update(inputs=5), lambda a: a.update(inputs={Q: "no.layer"}), lambda a: a.update(inputs={Q: [1]}),
    lambda a: a.update(origin=7), lambda a: a.update(gradients=7), lambda a: a.update(gradients=["no.layer"]),
])  # fmt: skip
def test_a_file_that_tells_nonsense_is_no_statistics(about, tmp_path):
    """Whatever its description is; one sentence with the file's name."""
    nsvd.calibrate(tiny_model(), IDS).save(tmp_path / "stats")
    rewritten(tmp_path / "stats", about=about)
    with pytest.raises(ValueError, match=r"stats is not a statistics file: "):
        nsvd.Statistics.load(tmp_path / "stats")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{Q}.G", lambda G: G[:, :3].contiguous(), rf"not a statistics file: layer {Q} has G of \(32, 3\)"),
        (f"{Q}.G", lambda G: G.long(), f"not a statistics file: layer {Q} has G"),
        (f"{Q}.mean_abs", lambda a: a[:3].contiguous(), rf"not a statistics file: layer {Q} .* mean_abs of \(3,\)"),
        (f"{Q}.H", lambda H: H[None].contiguous(), f"not a statistics file: layer {Q} has H"),
        (f"{Q}.G", lambda G: G * 1.001, "is damaged: it holds something else than was written"),
        (f"{Q}.mean_abs", lambda a: -a, "is damaged"),
    ],
)
def test_numbers_that_are_not_those_written_are_refused(name, change, message, tmp_path):
    """By their shape, their kind or their fingerprint."""
    model = tiny_model()
    nsvd.calibrate(model, IDS).with_gradients(nsvd.fisher(model, IDS)).save(tmp_path / "stats")
    rewritten(tmp_path / "stats", lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(ValueError, match=f"stats.*{message}"):
        nsvd.Statistics.load(tmp_path / "stats")


@pytest.mark.parametrize("about", [
    lambda a: a["n"].update({Q: 5}), lambda a: a["inputs"].update({DOWN: Q}), lambda a: a["origin"].update(bos=True),
    lambda a: a["gradients"].pop(), lambda a: a["inputs"].pop(Q) and None, lambda a: a.update(sum=None),
])  # fmt: skip
def test_what_is_told_of_the_numbers_is_theirs_too(about, tmp_path):
    """How many tokens, which layers, and from where, by the same sum; a file without a sum is an older one."""
    model = tiny_model()
    nsvd.calibrate(model, IDS).with_gradients(nsvd.fisher(model, IDS)).save(tmp_path / "stats")
    rewritten(tmp_path / "stats", about=lambda a: about(a) and None)
    with pytest.raises(ValueError, match="stats is damaged: it holds something else than was written"):
        nsvd.Statistics.load(tmp_path / "stats")
    rewritten(tmp_path / "stats", about=lambda a: {k: v for k, v in a.items() if k != "sum"})
    assert nsvd.Statistics.load(tmp_path / "stats")


def test_a_reshaped_tensor_is_not_what_was_written(tmp_path):
    """The numbers are the same, and a vector may stand in the place of H, too."""
    model = tiny_model()
    nsvd.calibrate(model, IDS).with_gradients(nsvd.fisher(model, IDS)).save(tmp_path / "stats")
    rewritten(tmp_path / "stats", lambda tensors: tensors.update({f"{Q}.H": tensors[f"{Q}.H"].flatten()}))
    with pytest.raises(ValueError, match="stats is damaged"):
        nsvd.Statistics.load(tmp_path / "stats")


@pytest.mark.parametrize("letter", ["G", "mean_abs", "H"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_loaded_moment_is_named(letter, value, tmp_path):
    """Saved with it, or changed in the file."""
    model, name = tiny_model(), f"{DOWN}.{letter}"
    stats = nsvd.calibrate(model, IDS).with_gradients(nsvd.fisher(model, IDS))
    stats.save(tmp_path / "changed")
    rewritten(tmp_path / "changed", lambda tensors: tensors[name].view(-1)[1:2].fill_(value))
    getattr(stats[DOWN], letter).view(-1)[1] = value
    stats.save(tmp_path / "saved")
    for file in ("changed", "saved"):
        with pytest.raises(FloatingPointError, match=f"{file}: {letter} of layer {DOWN} holds NaN or Inf"):
            nsvd.Statistics.load(tmp_path / file)


def test_statistics_on_a_full_disk_are_one_sentence(tmp_path):
    """The older file stays."""
    stats = nsvd.calibrate(tiny_model(), IDS)
    stats.save(tmp_path / "stats")
    before = (tmp_path / "stats").read_bytes()
    with file_limit(5000), pytest.raises(OSError, match=r"^cannot write .*stats: File too large$"):
        stats.save(tmp_path / "stats")
    assert (tmp_path / "stats").read_bytes() == before
