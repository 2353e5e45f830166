"""Looking around in a model: every answer is what the theory says, and quick."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import nsvd
from nsvd.lab.explore import METRICS, Bench, panel, whole_text
from nsvd.linalg import rank_for_ratio

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bench():
    torch.set_default_dtype(torch.float32)
    return Bench("mini-llama", "mini/encyclopedia", "mini/reading_zh", count=8, length=64)


def test_a_spectrum_falls_from_one_to_nothing(bench):
    frame = bench.spectrum(Q)
    assert list(frame) == list(METRICS)
    assert frame.iloc[0].tolist() == pytest.approx([1.0] * len(METRICS))
    assert frame.iloc[-1].max() < 1e-12
    assert (frame.diff().dropna() <= 1e-15).all(axis=None)


def test_errors_fall_with_the_rank_and_asvd_is_best_at_home(bench):
    """No other method has a smaller error on the text that ASVD-I is fitted to."""
    asvd, svd = bench.errors(Q, "asvd-1"), bench.errors(Q, "svd")
    assert (asvd.diff().dropna().home < 1e-9).all()
    both = asvd.index.intersection(svd.index)
    assert (asvd.home[both] <= svd.home[both] + 1e-9).all()
    assert (svd.weight[both] <= asvd.weight[both] + 1e-9).all()


def test_the_error_is_that_of_decompose(bench):
    """At one rank, from the same statistics."""
    W, G = bench.layers[Q].weight.detach().double(), bench.stats[Q].G
    E = W - nsvd.decompose(W, G, method="nsvd-1", k=40, k1=0.8).dense()
    home = (((E @ G) * E).sum() / ((W @ G) * W).sum()) ** 0.5
    shown = bench.errors(Q, "nsvd-1", k1=0.8)
    near = shown.index[abs(shown.index - 40).argmin()]
    assert shown.home[near] == pytest.approx(home.item(), rel=0.15)


def test_no_point_of_the_trade_beats_the_ridge(bench):
    """Each μ makes its weighted sum of the two squared errors as small as can be; both errors are relative here."""
    frame = bench.pareto(Q, 0.3)
    nested, ridge = (frame[frame.method == name] for name in ("nsvd-1", "ridge"))
    assert len(nested) > 3
    for _, point in nested.iterrows():
        better = (ridge.home > point.home + 1e-9) & (ridge.weight > point.weight + 1e-9)
        assert not better.any()


def test_shares_sum_to_one_over_all_layers(bench):
    frame = bench.shares("asvd-1", 0.3)
    assert list(frame.layer) == list(bench.layers)
    assert frame.share.sum() == pytest.approx(1)
    assert (frame.rise > 0).all()
    assert bench.shares("asvd-1", 0.5).rise.sum() > frame.rise.sum()


def test_a_prompt_is_continued_by_both_and_a_compressed_model_is_kept(bench):
    told = bench.continued("The old town", "asvd-1", 0.2, new=5)
    assert list(told.index) == ["dense", "asvd-1, 20% removed"]
    assert bench.compressed("asvd-1", 0.2, 0.95) is bench.compressed("asvd-1", 0.2, 0.95)


def test_a_text_is_shown_whole():
    """A DataFrame would end it after fifty letters, and show the ends of lines as letters."""
    text = "word " * 30 + "\nlast"
    html = whole_text(pd.Series({"dense": text})).to_html()
    assert text in html
    assert "pre-wrap" in html


def test_a_figure_has_its_four_panels_and_a_layer_that_is_not_there_is_named(bench):
    figure = bench.figure(Q, ratio=0.4)
    assert [axis.get_title() for axis in figure.axes] == [
        "spectrum", "errors of NSVD-I", "the trade, 40% removed", "where the loss is"
    ]  # fmt: skip
    k = rank_for_ratio(*bench.layers[Q].weight.shape, 0.4)
    assert k in [line.get_xdata()[0] for line in figure.axes[0].lines]
    plt.close(figure)
    with pytest.raises(ValueError, match="no layer 'x' to look at"):
        bench.errors("x")


def test_the_panel_draws_at_every_change(bench):
    """A slider that is moved gives another figure; nothing is compressed unasked."""
    pytest.importorskip("ipywidgets")
    box = panel(bench)
    ratio, image = box.children[1].children[1], box.children[2]
    before, picture = bench.compressed.cache_info().misses, bytes(image.value)
    assert picture.startswith(b"\x89PNG")
    ratio.value = 0.5
    assert bytes(image.value).startswith(b"\x89PNG")
    assert bytes(image.value) != picture
    ratio.value = 0.3
    assert bytes(image.value) == picture
    assert bench.compressed.cache_info().misses == before
    assert not plt.get_fignums()


def test_the_panel_compresses_on_a_click_and_tells_what_it_cannot(bench):
    pytest.importorskip("ipywidgets")
    box = panel(bench, "The old town")
    (method, ratio), (words, go), told = (
        box.children[0].children[1:] + box.children[1].children[1:],
        box.children[3].children,
        box.children[4],
    )
    method.value, ratio.value = "asvd-1", 0.2
    go.click()
    assert "asvd-1, 20% removed" in told.value
    assert not go.disabled
    words.value = ""
    go.click()
    assert told.value == "<b>the prompt has no token to continue from</b>"


def test_the_panel_captures_no_output(bench):
    """Run by papermill, a cell whose output is captured by a widget may never end: nbclient misses the kernel's reply."""
    widgets = pytest.importorskip("ipywidgets")
    seen, rest = [], [panel(bench)]
    while rest:
        seen.append(one := rest.pop())
        rest += getattr(one, "children", ())
    assert len(seen) > 8
    assert not [one for one in seen if isinstance(one, widgets.Output)]
