"""SoLA's sentences: neurons change places freely, the block sees its own inputs, the search keeps to its rules."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import relu, silu

from nsvd.linalg import METHODS, LowRank, Method, Moments, by_name, decompose, errors, matrix_method
from nsvd.linalg.sola import COLUMNS, ROWS, WHOLE, Block, accumulated, by_size, n_prime, overlap
from nsvd.linalg.sola_ranks import common, even, retained, search, stored
from tests.linalg.reference import law, layer, random_factors

NEURONS, PRIME = 12, 4


def order() -> torch.Tensor:
    return torch.randperm(NEURONS)


@st.composite
def problems(draw):
    """Blocks of three kinds in a few layers, with falling spectra, and a budget that a search can meet."""
    depth, sizes = draw(st.integers(1, 4)), [(24, 24), (40, 24), (24, 40)]
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shapes = {f"{i}.{kind}": size for i in range(depth) for kind, size in zip("abc", sizes, strict=True)}
    spectra = {
        name: (-torch.rand(1, generator=rng) * torch.arange(24)).exp() + 0.1 * torch.rand(1, generator=rng)
        for name in shapes
    }
    total = sum(o * i for o, i in shapes.values())
    return spectra, shapes, int(total * draw(st.floats(0.3, 0.95)))


def size(ranks, shapes) -> int:
    return sum(stored(shapes[name], k) for name, k in ranks.items())


def kinds(shapes) -> dict[str, str]:
    return {name: name.split(".")[1] for name in shapes}


def naive_search(spectra, shapes, budget, grid, floor):
    """The rules one by one, every layer looked at again before every step."""
    f = {n: [float(s[:r].square().sum() / s.square().sum()) for r in range(len(s) + 1)] for n, s in spectra.items()}
    ranks = {
        n: min(-(-min(r for r in range(len(c)) if c[r] >= 0.999) // grid) * grid, len(c) - 1) for n, c in f.items()
    }
    clamp, moves = 0.001, []
    while size(ranks, shapes) > budget:
        steps = []
        for n, k in ranks.items():
            below = (k - 1) // grid * grid
            if f[n][k] >= floor and below >= grid:
                drop = f[n][k] - f[n][below]
                steps.append((drop / ((k - below) * sum(shapes[n])), n, below, drop))
        allowed = [step for step in steps if step[3] <= clamp]
        if not steps:
            return None
        if not allowed:
            clamp += 0.0002
            continue
        _, n, below, _ = min(allowed)
        ranks[n] = below
        moves.append((n, below))
    return ranks, moves


def test_neurons_may_change_places_together_and_only_together():
    """W_down (act(P gate x) · P up x) with W_down Pᵀ is the feed-forward, gated or plain; gate permuted alone is another."""
    x, p = torch.randn(5, 20), order()
    gate, up, down = torch.randn(NEURONS, 5), torch.randn(NEURONS, 5), torch.randn(7, NEURONS)
    rows, columns = Block(p, PRIME, ROWS), Block(p, PRIME, COLUMNS)
    P = torch.eye(NEURONS)[p]
    assert torch.equal(rows.permute(gate), P @ gate)
    assert torch.equal(columns.permute(down), down @ P.mT)
    formula = down @ (silu(gate @ x) * (up @ x))
    hidden = silu(rows.permute(gate) @ x) * (rows.permute(up) @ x)
    torch.testing.assert_close(columns.permute(down) @ hidden, formula)
    torch.testing.assert_close(columns.permute(down) @ relu(rows.permute(up) @ x), down @ relu(up @ x))
    alone = silu(rows.permute(gate) @ x) * (up @ x)
    assert not torch.allclose(columns.permute(down) @ alone, formula, atol=0.1)


@pytest.mark.parametrize(("dim", "shape"), [(ROWS, (NEURONS, 9)), (COLUMNS, (9, NEURONS))])
def test_a_split_matrix_keeps_its_prime_neurons_and_at_full_rank_itself(dim, shape):
    """Ŵ, in the order of W, is W on the primes at any rank, and everywhere at the block's full rank."""
    W, block = torch.randn(*shape), Block(order(), PRIME, dim)
    k = min(block.shape(*shape))
    assert block.take(W).shape == block.shape(*shape)
    full = block.join(W, METHODS["svd"](block.take(W), None, k))
    torch.testing.assert_close(full.dense(), W)
    low = block.join(W, METHODS["svd"](block.take(W), None, k - 3))
    error = (low.dense() - W).square().sum(1 - dim)
    assert error[block.order[:PRIME]].max() == 0
    assert error[block.order[PRIME:]].min() > 0
    assert low.n_params == PRIME * 9 + low.rank * (NEURONS - PRIME + 9)


def test_a_block_without_neurons_is_the_whole_matrix():
    W, moments = torch.randn(6, 4), Moments(torch.eye(4))
    assert torch.equal(WHOLE.take(W), W)
    assert WHOLE.moments(moments) is moments
    value = WHOLE.join(W, LowRank(W, torch.eye(4)))
    assert (value.prime.numel(), value.n_params) == (0, 40)
    assert torch.equal(value.dense(), W)


def test_marginal_columns_are_factored_for_their_own_inputs():
    """‖(W − Ŵ) X‖² / n is the tail of the block's spectrum under its own moments; under another order's it is more."""
    x = layer(9, NEURONS, 3)
    block, other = Block(order(), PRIME, COLUMNS), Block(order(), PRIME, COLUMNS)
    rest = x.X[block.order[PRIME:]]
    own = block.moments(x.moments)
    torch.testing.assert_close(own.G, rest @ rest.mT / x.X.shape[1])
    torch.testing.assert_close(own.mean_abs, rest.abs().mean(1))
    best = METHODS["asvd-1"].prepare(block.take(x.W), own)
    for k in range(1, 6):
        loss = x.loss(block.join(x.W, best.truncate(k)).dense())
        assert loss == pytest.approx(errors.tail(best.s, k))
        wrong = METHODS["asvd-1"](block.take(x.W), other.moments(x.moments), k)
        assert loss < x.loss(block.join(x.W, wrong).dense())


def test_marginal_rows_are_factored_for_all_inputs_and_their_own_gradients():
    moments, block = replace(layer(NEURONS, 9, 3).moments, H=None), Block(order(), PRIME, ROWS)
    assert block.moments(moments) is moments
    H, rest = torch.randn(NEURONS, NEURONS), block.order[PRIME:]
    assert torch.equal(block.moments(replace(moments, H=H)).H, H[rest][:, rest])
    assert torch.equal(block.moments(replace(moments, H=H[0])).H, H[0, rest])
    assert block.moments(replace(moments, H=H)).G is moments.G


def test_prime_neurons_are_the_largest():
    """Descending, of equals the first; the fraction is rounded, and has to leave something."""
    assert by_size(torch.tensor([1.0, 3.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]
    assert (n_prime(344, 0.15), n_prime(10, 0.0)) == (52, 0)
    for prime in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"prime is .*\[0, 1\)"):
            n_prime(10, prime)
    with pytest.raises(ValueError, match="leaves none"):
        n_prime(10, 0.99)


def test_accumulated_energy_is_a_concave_curve_up_to_one():
    """Sums of the largest values; a straight line only if all are equal."""
    values = torch.rand(9)
    curve = accumulated(values)
    top = sorted(values.tolist(), reverse=True)
    torch.testing.assert_close(curve, torch.tensor([sum(top[: i + 1]) / sum(top) for i in range(9)]))
    assert (curve > accumulated(torch.ones(9)))[:-1].all()


def test_overlap_counts_common_primes():
    rising = torch.arange(10.0)
    assert overlap(rising, rising, 0.3) == 1
    assert overlap(rising, -rising, 0.3) == 0
    assert overlap(rising, torch.tensor([0.0, 9, 8, 0, 0, 0, 0, 0, 0, 7]), 0.3) == pytest.approx(1 / 3)


@law
@given(problem=problems(), grid=st.sampled_from([1, 3, 4]), floor=st.sampled_from([0.0, 0.7, 0.9]))
def test_the_search_is_the_rules_one_by_one(problem, grid, floor):
    """The same moves as the naive search, or the same refusal; the budget is met, one move before it was not."""
    spectra, shapes, budget = problem
    expected = naive_search(spectra, shapes, budget, grid, floor)
    if expected is None:
        with pytest.raises(ValueError, match="floor"):
            search(spectra, shapes, budget, grid=grid, floor=floor)
        return
    ranks, moves = search(spectra, shapes, budget, grid=grid, floor=floor)
    assert (ranks, [(m.layer, m.rank) for m in moves]) == expected
    assert size(ranks, shapes) <= budget
    assert [m.params for m in moves[-1:]] == [size(ranks, shapes)][: len(moves)]
    assert all(m.params > budget for m in moves[:-1])
    assert [m.clamp for m in moves] == sorted(m.clamp for m in moves)


@law
@given(problem=problems(), grid=st.sampled_from([1, 3, 4]))
def test_common_ranks_meet_the_budget_within_one_step(problem, grid):
    """One rank a kind, a multiple of the grid; never over the budget, and one step more of any kind would be."""
    spectra, shapes, budget = problem
    budget = max(budget, size(dict.fromkeys(shapes, grid), shapes))
    ranks = common(
        search(spectra, shapes, budget, grid=grid, floor=0.0)[0], kinds(shapes), spectra, shapes, budget, grid=grid
    )
    assert size(ranks, shapes) <= budget
    for kind in "abc":
        of_kind = {k for name, k in ranks.items() if kinds(shapes)[name] == kind}
        assert len(of_kind) == 1
        more = {name: k + grid * (kinds(shapes)[name] == kind) for name, k in ranks.items()}
        assert size(more, shapes) > budget or size(more, shapes) == size(ranks, shapes)
        assert all(k % grid == 0 for name, k in ranks.items() if stored(shapes[name], k) < 24 * max(shapes[name]))


def test_the_search_itself_gives_layers_of_a_kind_different_ranks():
    """… so that the test above can fail, and takes from the layer with the steeper spectrum."""
    i = torch.arange(24)
    spectra, shapes = {"0.a": (-0.5 * i).exp(), "1.a": (-0.05 * i).exp()}, {"0.a": (24, 24), "1.a": (24, 24)}
    ranks, _ = search(spectra, shapes, 800, grid=1)
    assert ranks["0.a"] < ranks["1.a"]


def test_the_clamp_makes_a_steep_step_wait():
    """The large layer's step is the cheaper one for each parameter, but drops more than the clamp: the small one goes first."""
    spectra = {"large": torch.tensor([0.94, 0.03, 0.03]).sqrt(), "small": torch.tensor([0.95, 0.0492, 0.0008]).sqrt()}
    shapes = {"large": (1000, 3), "small": (5, 3)}
    _, moves = search(spectra, shapes, 2100, grid=1, start=0.9999)
    assert [(m.layer, m.rank) for m in moves] == [("small", 2), ("large", 2)]
    assert moves[0].clamp == 0.001
    assert moves[1].clamp == pytest.approx(0.03, abs=0.0002 + 1e-9)
    _, moves = search(spectra, shapes, 2100, grid=1, start=0.9999, clamp=1.0)
    assert moves[0].layer == "large"


def test_the_least_rank_of_the_inner_method_is_kept():
    spectra, shapes = {"a": torch.tensor([1.0, 0.1, 0.1, 0.1, 0.1, 0.1])}, {"a": (6, 6)}
    with pytest.raises(ValueError, match="rank 4"):
        search(spectra, shapes, 24, grid=2, least=3, floor=0.0)
    assert search(spectra, shapes, 24, grid=2, floor=0.0)[0] == {"a": 2}
    with pytest.raises(ValueError, match="grid is 0"):
        search(spectra, shapes, 24, grid=0)


def test_even_ranks_take_the_same_share_of_every_layer():
    """k = ⌊(share · whole − primes) / (d_out + d_in)⌋; primes that leave no rank are named."""
    shapes, whole = {"a": (20, 10), "b": (30, 30)}, {"a": 300, "b": 900}
    assert even(shapes, whole, 840) == {"a": (210 - 100) // 30, "b": 630 // 60}
    with pytest.raises(ValueError, match="layer a"):
        even(shapes, whole, 420)


def test_a_block_that_sees_nothing_loses_nothing():
    assert retained(torch.zeros(3)) == [1.0] * 4
    assert retained(torch.tensor([2.0, 1.0])) == [0.0, 0.8, 1.0]


def test_a_single_matrix_is_refused():
    with pytest.raises(ValueError, match=r"SoLA splits the feed-forwards of a model .*compress_"):
        decompose(torch.randn(4, 4), torch.eye(4), method="sola", k=2)


def test_sola_is_no_method_of_matrices():
    """It divides a model: it can neither prepare nor cut, and only its inner method can."""
    sola = by_name("sola")
    assert not isinstance(sola, Method)
    assert not any(hasattr(sola, name) for name in ("prepare", "cut", "__call__", "outer"))
    assert [name for name, method in METHODS.items() if not isinstance(method, Method)] == ["sola"]
    assert matrix_method("asvd-1") is by_name("asvd-1") is sola.inner({})[0]
    with pytest.raises(ValueError, match="no answer for a single matrix"):
        matrix_method("sola")


def test_options_are_those_of_sola_and_of_the_inner_method():
    sola = METHODS["sola"]
    assert sola.resolve({}) == sola.options
    assert sola.resolve({"inner": "nsvd-1", "prime": 0.2})["k1"] == 0.95
    for options, message in [
        ({"k1": 0.5}, "no option k1"),
        ({"inner": "ridge", "alpha": 1.0}, "no option alpha .*mu"),
        ({"inner": "sola"}, "inner is 'sola'"),
        ({"inner": "nonsense"}, "unknown method"),
    ]:
        with pytest.raises(ValueError, match=message):
            sola.resolve(options)


def test_factors_of_another_shape_are_refused():
    with pytest.raises(RuntimeError):
        Block(order(), PRIME, ROWS).join(torch.randn(NEURONS, 9), random_factors(8, 8, 2)).dense()
