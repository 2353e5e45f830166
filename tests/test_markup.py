"""What a notebook and a terminal show of the values that the package returns: short texts, well-formed HTML."""

import copy
from html.parser import HTMLParser

import pytest

import nsvd
from nsvd import markup
from tests.tiny import Q, float32, tiny_model, token_ids  # noqa: F401


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order; notes the text."""

    def __init__(self):
        super().__init__()
        self.open, self.words = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def words(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return " ".join(parser.words)


@pytest.fixture(scope="module")
def values():
    """One of every kind, by name; and the report's layers."""
    model, ids = tiny_model(), token_ids(40, 9)
    stats = nsvd.calibrate(model, ids)
    found = {"statistics": stats, "mixed": nsvd.mix([stats, stats])}
    found["factors"] = nsvd.decompose(model.get_submodule(Q).weight.double(), stats[Q].G, method="asvd-1", k=5)
    found["sensitivity"] = nsvd.sensitivity(model, stats, ids[:3], method="asvd-1", kept=[0.3, 0.6])
    found["cache"] = nsvd.compress_kv_(copy.deepcopy(model), stats, cache_ratio=0.5)
    found["nothing"] = nsvd.compress_(copy.deepcopy(model), method="svd", ratio=0.0)
    found["report"] = nsvd.compress_(model, stats, method="nsvd-1", k1=0.8, ratio=0.3)
    return found


KINDS = ["statistics", "mixed", "factors", "sensitivity", "cache", "nothing", "report"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_repr_is_one_short_line(values, kind):
    """No tensor is printed."""
    assert len(repr(values[kind])) < 160
    assert "\n" not in repr(values[kind])
    assert "tensor" not in repr(values[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_an_html_repr_is_well_formed(values, kind):
    assert words(values[kind]._repr_html_())


def test_the_reprs_tell_what_matters(values):
    assert repr(values["factors"]) == "LowRank(32 × 32, rank 5, 320 parameters, 31.2% of the dense, float64)"
    assert repr(values["statistics"]) == (
        "Statistics(14 layers, 8 distinct inputs, of LlamaForCausalLM on 40 × 9 tokens)"
    )
    assert "40 × 9 tokens and 40 × 9 tokens" in repr(values["mixed"])
    assert "14 of 14 layers factored" in repr(values["report"])
    shown = words(values["report"]._repr_html_())
    assert all(layer in shown for layer in values["report"].table.layer)
    assert f"{values['report'].ratio_reached:.1%}" in shown
    assert "0.3" in words(values["sensitivity"]._repr_html_())


def test_cells_escape_what_is_in_them_and_bars_stay_in_their_cell():
    assert "<script>" not in markup.text("<script>")
    assert "100.0%, transparent 100.0%" in markup.bar(5.0, 1.0)
    assert "0.0%, transparent" in markup.bar(-1.0, 1.0)
    assert markup.bar(1.0, 0.0)
    assert markup.shaded(None, 1.0) == "<td></td>"
    assert [markup.size(n) for n in (10, 1536, 3 * 2**20, 5 * 2**40)] == [
        "10 bytes",
        "1.5 KiB",
        "3.0 MiB",
        "5,120.0 GiB",
    ]
