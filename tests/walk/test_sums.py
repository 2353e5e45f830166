"""Sums over tokens: as fine as float32 products allow, symmetric, and whatever the user has allowed."""

import warnings

import pytest
import torch

from nsvd.linalg.decomposition import from_metric
from nsvd.linalg.errors import calibration_loss
from nsvd.walk import sums as module
from nsvd.walk.sums import Half, Sums, finite
from tests.pretend import pretending


def inputs(n: int, d: int, dtype=torch.float32, *, outliers: float = 1.0) -> torch.Tensor:
    """Correlated inputs (n, d), of which every tenth channel is larger."""
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) / d**0.5
    x[:, ::10] *= outliers
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [5, 300])
def test_they_are_those_of_float64_copies(dtype, d, monkeypatch):
    """In parts and in strips, with a last chunk of its own size; the cross moment is of y and x in this order."""
    monkeypatch.setattr(module, "CHUNK", 64)
    x, y, close = inputs(200, d, dtype), inputs(200, 7, dtype), 1e-14 if dtype == torch.float64 else 1e-6
    ours = Sums()
    ours.add(x[:90].view(3, 30, d), y[:90].view(3, 30, 7))
    ours.add(x[90:], y[90:])
    X, Y = x.double(), y.double()
    lengths, others = X.norm(dim=0), Y.norm(dim=0)
    assert ours.n == 200
    assert ours.outer.dtype == ours.cross.dtype == ours.absolute.dtype == torch.float64
    assert torch.equal(ours.outer, ours.outer.mT)
    assert ((ours.outer - X.mT @ X).abs() <= close * lengths[:, None] * lengths).all()
    assert ((ours.cross - Y.mT @ X).abs() <= close * others[:, None] * lengths).all()
    torch.testing.assert_close(ours.absolute, X.abs().sum(0), rtol=close, atol=0)
    G = ours.outer / 200
    assert torch.equal(ours.result().G, G)


def test_no_input_is_no_sum_and_an_empty_one_is_zero():
    """An expert that no token of a batch reaches adds nothing."""
    ours = Sums()
    assert ours.outer is ours.cross is ours.absolute is None
    ours.add(torch.zeros(0, 4))
    assert ours.n == 0
    assert torch.equal(ours.outer, torch.zeros(4, 4, dtype=torch.float64))


def test_a_loss_is_that_of_float64_moments_with_channels_a_thousand_times_as_large():
    """ASVD-I at 30 % removed: the loss that is told, and the true loss of what is chosen, to 1e-6."""
    x, W = inputs(3000, 96, outliers=1000.0), torch.randn(64, 96, dtype=torch.float64)
    ours = Sums()
    for part in x.split(700):
        ours.add(part)
    G, k = x.double().mT @ x.double() / len(x), 27
    best, chosen = (from_metric(W, metric).truncate(k).dense() for metric in (G, ours.outer / ours.n))
    loss = calibration_loss(W, best, G)
    assert calibration_loss(W, chosen, G) == pytest.approx(loss, rel=1e-6)
    assert calibration_loss(W, chosen, ours.result().G) == pytest.approx(loss, rel=1e-6)


def test_a_matrix_may_be_added_up_with_weights():
    x = inputs(50, 260, torch.float64)
    total = Half(260, x.device)
    total.add_(x[:20], 0.5)
    total.add_(x[20:], 2.0)
    torch.testing.assert_close(total.whole(), 0.5 * x[:20].mT @ x[:20] + 2 * x[20:].mT @ x[20:])


ALLOWED = {
    "nothing": lambda: None,
    "legacy": lambda: torch.set_float32_matmul_precision("medium"),
    "legacy, one backend": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "every backend": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "one backend": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.fixture
def settings():
    """The user's settings, put back afterwards."""
    places = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    yield lambda: [place.fp32_precision for place in places]
    torch.set_float32_matmul_precision("highest")
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_the_user_allows_makes_them_no_coarser(allowed, settings, monkeypatch):
    """TF32 and bfloat16 are off for the products, in the older settings and the newer ones; afterwards all is as it was."""
    ALLOWED[allowed]()
    before, seen, mm = settings(), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **how: seen.append(settings()[1:]) or mm(*args, **how))
    Sums().add(inputs(10, 4))
    assert seen == [["ieee", "ieee"]]
    assert settings() == before


def test_numbers_in_bfloat16_are_multiplied_as_such_and_summed_as_exactly(settings, monkeypatch):
    x, seen, mm = inputs(600, 40).bfloat16(), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **how: seen.append(settings()[2]) or mm(*args, **how))
    ours = Sums()
    ours.add(x, x[:, :7])
    assert set(seen) == {"bf16"}
    X = x.double()
    torch.testing.assert_close(ours.outer, X.mT @ X, rtol=1e-6, atol=1e-6 * X.square().sum(0).max().item())
    torch.testing.assert_close(ours.cross, X[:, :7].mT @ X, rtol=1e-6, atol=1e-6 * X.square().sum(0).max().item())


def test_autocast_makes_them_no_coarser():
    x = inputs(100, 6)
    alone, within = Sums(), Sums()
    alone.add(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within.add(x)
    assert torch.equal(alone.outer, within.outer)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_they_lie_where_the_inputs_do_or_where_there_is_float64(device):
    """And the averages on the CPU."""
    x, y = inputs(10, 4), inputs(10, 3)
    with pretending(device), warnings.catch_warnings(action="error"):
        ours = Sums()
        ours.add(x.to(device), y.to(device))
        assert {t.device.type for t in (ours.outer, ours.cross)} == {"cpu" if device == "mps" else device}
        assert ours.result().G.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype, value):
    """Beside another infinity, too; numbers whose sum is too large for their own dtype are finite."""
    x = torch.full((300, 400), 60_000.0).to(dtype)
    assert finite(x)
    x[7, 9] = value
    assert not finite(x)
    x[8, 8] = float("inf")
    assert not finite(x)
