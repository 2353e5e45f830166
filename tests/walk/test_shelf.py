"""What is put on a shelf comes back as it was, from memory or from files, in this process or a later one."""

import gc
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import nsvd
from nsvd.linalg import Moments
from nsvd.linalg.decomposition import Spectrum, from_metric, from_whitener
from nsvd.linalg.kfac import from_metrics
from nsvd.linalg.whiteners import spectral
from nsvd.walk.shelf import Shelf


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "b": torch.arange(5),
        "c": torch.ones(2).half(),
    }


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )


@pytest.fixture(params=["memory", "temporary", "lasting"])
def shelf(request, tmp_path):
    return {
        "memory": Shelf(),
        "temporary": Shelf(limit=0),
        "lasting": Shelf(tmp_path / "kept"),
    }[request.param]


def test_groups_come_back_to_the_bit_with_their_notes(shelf):
    """A group that is put again replaces the first; one that is dropped is gone."""
    shelf.put("x/1", tensors(), at=3, told={"name": [1, None]})
    shelf.put("x/2", {}, at=4)
    assert equal(shelf.get("x/1"), tensors())
    assert shelf.note("x/1") == {"at": 3, "told": {"name": [1, None]}}
    assert shelf.get("x/2") == {}
    assert shelf.keys("x") == ["x/1", "x/2"]
    shelf.put("x/1", tensors(1), at=5)
    assert equal(shelf.get("x/1"), tensors(1))
    assert shelf.note("x/1") == {"at": 5}
    shelf.drop("x/1")
    shelf.drop("x/1")
    assert "x/1" not in shelf
    assert "x/2" in shelf
    with pytest.raises(KeyError, match="nothing is kept under x/1"):
        shelf.get("x/1")
    shelf.clear()
    assert shelf.keys("x") == []


@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
def test_memory_is_used_up_to_the_limit_only(tmp_path, monkeypatch):
    """What comes later goes to files that have no name; room that is given back is used again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    size = sum(t.numel() * t.element_size() for t in tensors().values())
    for shelf in (Shelf(limit=2 * size), Shelf(tmp_path / "kept", limit=2 * size).scratch()):
        for number in range(4):
            shelf.put(f"x/{number}", tensors(number))
        assert mapped(tmp_path) == 2
        assert all(equal(shelf.get(f"x/{number}"), tensors(number)) for number in range(4))
        shelf.drop("x/0")
        shelf.put("x/4", tensors(4))
        assert mapped(tmp_path) == 2
        shelf.drop("x/2")
        gc.collect()
        assert mapped(tmp_path) == 1
        shelf.clear()
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
        del shelf
        gc.collect()
        assert mapped(tmp_path) == 0


def mapped(folder) -> int:
    """How many files of a folder are mapped into memory that have no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[5] for line in lines if str(folder) in line and line.endswith("(deleted)")})


def test_a_later_shelf_finds_what_was_kept(tmp_path):
    Shelf(tmp_path / "kept").put("x/1", tensors(), at=3)
    later = Shelf(tmp_path / "kept")
    assert equal(later.get("x/1"), tensors())
    assert later.note("x/1") == {"at": 3}
    assert later.begun()
    assert not later.begun("x/1")


@pytest.mark.parametrize("damage", ["a number", "the note", "cut off"])
def test_what_is_damaged_is_refused(damage, tmp_path):
    """By its sum, and by one sentence that names the file."""
    Shelf(tmp_path / "run" / "kept").put("x/1", tensors(), at=3)
    (file,) = tmp_path.rglob("1.safetensors")
    data = file.read_bytes()
    changed = {
        "a number": data[:-1] + bytes([data[-1] ^ 1]),
        "the note": data.replace(b'\\"at\\": 3', b'\\"at\\": 4'),
        "cut off": data[:-1],
    }[damage]
    assert changed != data
    file.write_bytes(changed)
    with pytest.raises(OSError, match=r"1\.safetensors is not what was written there; remove .*run to begin anew"):
        Shelf(tmp_path / "run" / "kept").get("x/1")


def values() -> list:
    W, X = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    G, H = X @ X.mT, torch.eye(6, dtype=torch.float64)
    return [
        G,
        Moments(G, X.abs().mean(1), 7),
        Moments(G),
        from_metric(W, G + torch.eye(4)),
        from_whitener(W, spectral(G)),  # singular: its right factors are others than its coordinates
        from_metrics(W, G + torch.eye(4), H),
        Spectrum(torch.arange(3.0)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_values_of_every_kind_come_back(index, shelf):
    """With their type, their numbers, and what is one tensor under two names."""
    value, kept = values()[index], shelf.kept("values")
    kept["model.layers.0"] = value
    found = kept["model.layers.0"]
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert torch.equal(found, value)
        return
    for name, part in vars(value).items():
        other = getattr(found, name)
        assert torch.equal(other, part) if isinstance(part, torch.Tensor) else other == part
    if hasattr(value, "right"):
        assert (found.right is found.coords) == (value.right is value.coords)


def test_it_is_a_mapping(shelf):
    kept = shelf.kept("values")
    kept["b"], kept["a"] = torch.ones(2), torch.zeros(3)
    assert list(kept) == ["a", "b"]
    assert len(kept) == 2
    assert "a" in kept
    assert "c" not in kept
    del kept["a"]
    assert list(kept) == ["b"]
    with pytest.raises(KeyError):
        kept["a"]
    assert kept.get("a") is None


def test_statistics_may_lie_on_a_shelf(tmp_path):
    """They are saved, compared and used as those in memory."""
    from tests.tiny import tiny_model, token_ids

    model, ids = tiny_model(), token_ids(6, 9)
    stats, kept = nsvd.calibrate(model, ids), Shelf(limit=0).kept("moments")
    kept.update(stats.moments)
    shelved = type(stats)(kept, stats.inputs, stats.origin)
    shelved.save(tmp_path / "shelved")
    again = type(stats).load(tmp_path / "shelved")
    assert all(torch.equal(again[name].G, stats[name].G) for name in stats)
    one, other = tiny_model(), tiny_model()
    nsvd.compress_(one, stats, method="asvd-1", ratio=0.3)
    nsvd.compress_(other, shelved, method="asvd-1", ratio=0.3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
