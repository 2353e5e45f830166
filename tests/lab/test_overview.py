"""What ``nsvd info`` tells of a model."""

import json

import pytest

import nsvd
from nsvd.lab.overview import overview
from nsvd.stored.folder import CheckpointError
from nsvd.walk.targets import targets
from tests.tiny import DOWN, compressed, tiny_model, tiny_tokenizer

RANKS = {
    "model.layers.0.self_attn.q_proj": 5,
    "model.layers.1.self_attn.q_proj": 8,
    "model.layers.2.self_attn.q_proj": 6,
}


@pytest.fixture
def model():
    return compressed(tiny_model(num_hidden_layers=3), method="svd", ratio=None, ranks=RANKS)


def test_layers_of_one_kind_share_a_line(model):
    """Their smallest, median and largest rank, and what is kept: (5 + 8 + 6) · 64 of 3 · 1024. Dense ones are counted."""
    lines = list(overview(model, "m"))
    assert lines[2:4] == [
        "3 layers are compressed, to the ranks (smallest / median / largest):",
        "  model.layers.*.self_attn.q_proj  3 of 32 × 32, low-rank 5 / 6 / 8, 40% of the parameters kept",
    ]
    assert lines[4] == f"{len(targets(model))} layers are dense:"
    assert "  model.layers.*.mlp.down_proj: 3" in lines


def test_every_layer_is_told_when_asked(model):
    """One line a layer, and none of the kinds."""
    lines = list(overview(model, "m", every=True))
    assert lines[2:] == [f"  {name}: 32 × 32, rank {rank}" for name, rank in RANKS.items()]


def test_a_report_tells_why_layers_are_dense(model, tmp_path):
    """A rank was chosen and saves nothing, none was chosen, or the layer was left out."""
    up = "model.layers.1.mlp.up_proj"
    rows = [{"layer": DOWN, "rank": None, "dense": True}, {"layer": up, "rank": 31, "dense": True}]
    nsvd.save(model, tiny_tokenizer(), tmp_path / "m", report={"layers": rows, "left_alone": {"a": 1000, "b": 5}})
    lines = list(overview(model, str(tmp_path / "m")))
    assert "  model.layers.*.mlp.down_proj: 1, no rank was chosen" in lines
    assert "  model.layers.*.mlp.down_proj: 2, not among the layers to compress" in lines
    assert "  model.layers.*.mlp.up_proj: 1, factors of its rank save no parameters" in lines
    assert lines[-1] == "left alone a (1,000), b (5)"


def test_a_report_that_is_none_is_refused(model, tmp_path):
    (tmp_path / "nsvd_report.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"nsvd_report\.json holds"):
        list(overview(model, str(tmp_path)))


def test_a_model_that_is_not_compressed_is_dense():
    assert list(overview(tiny_model(), "m"))[1:] == ["dense"]
