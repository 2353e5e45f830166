"""From a model to a recommendation."""

import copy
import json

import pytest
import torch

import nsvd
from nsvd.cli import main
from nsvd.compression.strs import losses_with
from nsvd.lab.advise import Advice
from tests.tiny import float32, tiny_model, tiny_tokenizer  # noqa: F401

ROWS = [{"ratio": r, "removed": r / 2, "perplexity": 10 * (1 + rise), "rise": rise} for r, rise in
        ((0.0, 0.0), (0.1, 0.02), (0.2, 0.08), (0.3, 0.3), (0.4, 0.05))]  # fmt: skip


def advice(limit):
    return Advice(ROWS, limit, "self", [torch.zeros(12, 8)], [torch.zeros(4, 8)])


def test_the_largest_ratio_before_the_first_rise_above_the_limit_is_recommended():
    """Also where a larger one happens to be below it again; none where the first is above."""
    assert advice(0.1).ratio == 0.2
    assert advice(1.0).ratio == 0.4
    assert advice(0.01).ratio == 0.0
    assert "no ratio tried" in advice(0.01).sentence()
    shown = str(advice(0.1))
    assert [line for line in shown.splitlines() if "recommended" in line] == [
        "   0.2               10.0%       10.80    +8.0%  <- recommended"
    ]
    assert shown.startswith("Perplexity on 4 windows of the model's own text that did not calibrate:\n")
    assert "of the whole model" in shown
    assert "These numbers are of kfac." in shown.splitlines()[-1]
    html = advice(0.1)._repr_html_()
    assert "<table>" in html
    assert "the model&#x27;s own text" in html
    assert "\n" not in repr(advice(0.1))


def test_what_is_measured_is_what_a_compressed_model_does():
    """On the windows that were held out, at the same ranks; and the model is what it was."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before, told = copy.deepcopy(model.state_dict()), []
    found = nsvd.advise(
        model, tokenizer, calibration="random", ratios=[0.5, 0.2], count=32, length=16, tell=told.append
    )
    assert [row["ratio"] for row in found.rows] == [0.0, 0.2, 0.5]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "passes over" in told[0]
    assert "3 times" in told[0]
    (ids,) = nsvd.domains("random", model, tokenizer, count=32, length=16)
    used, held = ids[[i for i in range(32) if i % 4 != 3]], ids[3::4]
    assert found.windows == len(held)
    assert torch.equal(found.held[0], held)
    assert torch.equal(found.used[0], used)
    stats = nsvd.calibrate(model, used).with_gradients(nsvd.fisher(model, used))
    how = {"method": "kfac", "allocation": "fisher", "factors": "pivoted", "ratio": 0.5}
    report = nsvd.compress_(model, stats, **how)
    assert found.rows[2]["removed"] == pytest.approx(report.model_ratio_reached)
    assert found.rows[2]["perplexity"] == pytest.approx(nsvd.perplexity(model, held), rel=0.02)
    assert found.perplexity(model) == pytest.approx(nsvd.perplexity(model, held))
    assert found.rows[0]["perplexity"] == pytest.approx(
        torch.tensor(losses_with(tiny_model(), {}, held)).double().mean().exp().item()
    )


def test_how_long_a_model_writes_is_told_before_it_writes():
    """With the number of windows and of tokens, which are half of what is asked for."""
    told = []
    nsvd.advise(tiny_model(), tiny_tokenizer(), ratios=[0.5], count=8, length=32, tell=told.append)
    assert told[0].split(",")[0] == "first the model writes 8 windows of 16 tokens"
    assert told[0].endswith(", some 1 second")
    assert "passes over" in told[1]
    assert told[2].startswith("to compress by best afterwards: ")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"ratios": []}, "no ratio to try"),
        ({"ratios": [0.0]}, "ratio 0 removes nothing"),
        ({"ratios": [1.2]}, "ratio is 1.2"),
        ({"limit": 0.0}, "the limit is 0.0"),
        ({"count": 1}, "gives one window"),
    ],
)
def test_what_cannot_be_advised_on_is_refused(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        nsvd.advise(tiny_model(), tiny_tokenizer(), **{"calibration": "random", "count": 8, "length": 16} | how)


def test_a_copy_that_rises_above_the_limit_is_told(tmp_path, capsys, monkeypatch):
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    monkeypatch.setattr(Advice, "perplexity", lambda *_: 1e9)
    given = ["advise", str(tmp_path / "m"), "--calibration", "random", "--count", "8", "--length", "16"]
    assert main([*given, "--ratios", "0.2", "--rise", "5", "--out", str(tmp_path / "out")]) == 0
    assert "that is more than the 500% accepted" in capsys.readouterr().out


def test_the_command_line_tells_the_cost_first_and_writes_what_it_recommends(tmp_path, capsys):
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    given = ["advise", str(tmp_path / "m"), "--calibration", "random", "--count", "8", "--length", "16"]
    assert main([*given, "--ratios", "0.2", "--rise", "5", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "passes over" in err.splitlines()[0]
    assert "ratio 0.2" in out
    assert "compressed by best at ratio 0.2; perplexity" in out
    assert "on the same windows" in out
    assert "more than the" not in out
    small, _ = nsvd.load(tmp_path / "out")
    model, tokenizer = nsvd.load(tmp_path / "m")
    (ids,) = nsvd.domains("random", model, tokenizer, count=8, length=16)
    nsvd.compress_(model, method="best", ratio=0.2, windows=ids[[0, 1, 2, 4, 5, 6]])
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())
    assert small.config.quantization_config.to_dict()["method"] == "best"
    about = json.loads((tmp_path / "out/nsvd_report.json").read_text(encoding="utf-8"))
    assert about["calibration"]["windows"] == [[6, 16]]
    assert main([*given, "--ratios", "0.9", "--rise", "1e-9", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_a_figure_shows_the_curve_and_what_was_reached():
    figure = advice(0.1).figure(0.05)
    (axis,) = figure.axes
    curve, star, limit = axis.lines
    assert list(curve.get_xdata()) == [0.0, 10.0, 20.0, pytest.approx(30.0), 40.0]
    assert list(star.get_xdata()) == [20.0]
    assert list(star.get_ydata()) == [5.0]
    assert limit.get_ydata()[0] == 10.0
    assert len(advice(0.1).figure().axes[0].lines) == 2
    assert axis.get_ylim()[1] > 30
    assert not axis.get_title()
    (cut,) = advice(0.02).figure().axes
    assert cut.get_ylim()[1] == pytest.approx(10.5)
    assert cut.get_title() == "rises above 10 % are not shown"


def test_the_command_line_draws_and_a_run_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch):
    """What was measured to write the model is kept; the table is made again."""
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    given = [
        "advise",
        str(tmp_path / "m"),
        "--calibration",
        "random",
        "--count",
        "8",
        "--length",
        "16",
        "--ratios",
        "0.2",
    ]
    given += ["--rise", "5", "--out", str(tmp_path / "out"), "--figure", str(tmp_path / "trade.png")]

    def full(*_args, **_how):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(nsvd.lab.compress, "save", full)
        assert main(given) == 2
    assert (tmp_path / "trade.png").is_file()
    assert not (tmp_path / "out").exists()
    assert main(given) == 0
    assert "an earlier run is taken up where it was stopped" in capsys.readouterr().err
    assert nsvd.load(tmp_path / "out")
    assert main([*given[:-1], str(tmp_path / "trade.txt")]) == 2
    assert "a figure ends in .png, .pdf or .svg" in capsys.readouterr().err
