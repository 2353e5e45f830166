"""Weights of several domains for the sake of the worst: what is promised, and what is not."""

import pytest
import torch

from nsvd.linalg.moments import mixing
from nsvd.linalg.worst_case import worst_case_weights


def moment(decay: float, seed: int, d: int = 12) -> torch.Tensor:
    """A second moment with axes of its own, its condition number 10^decay."""
    rng = torch.Generator().manual_seed(seed)
    P = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    return (P * torch.logspace(0, -decay, d, dtype=torch.float64)) @ P.mT


def layers(*scales: float):
    """A wide and a tall layer; of their domains the first is the hardest, having the flattest spectrum."""
    W = [torch.randn(m, 12, generator=torch.Generator().manual_seed(m), dtype=torch.float64) for m in (8, 20)]
    return [(w, [c * moment(1.0 + i, 10 * n + i) for i, c in enumerate(scales)], 4) for n, w in enumerate(W)]


def losses(problem, approximations) -> torch.Tensor:
    """L_d, written out: ‖(W − Ŵ) X_d‖² / n over mean(diag G_d), in units of the layer's mean output energy, over layers."""
    total = torch.zeros(len(problem[0][1]), dtype=torch.float64)
    for (W, moments, _), value in zip(problem, approximations, strict=True):
        raw = torch.stack([torch.trace((W - value) @ G @ (W - value).mT) * len(G) / torch.trace(G) for G in moments])
        energy = torch.stack([torch.trace(W @ G @ W.mT) * len(G) / torch.trace(G) for G in moments]).mean()
        total += raw / energy
    return total


def truncated(problem, weights) -> list[torch.Tensor]:
    """Ŵ = [W S]_k S⁻¹ for S Sᵀ = Σ w_d G_d / mean(diag G_d), literally."""
    found = []
    for W, moments, k in problem:
        S = torch.linalg.cholesky(sum(w * G * len(G) / torch.trace(G) for w, G in zip(weights, moments, strict=True)))
        U, s, Vh = torch.linalg.svd(W @ S, full_matrices=False)
        found.append((U[:, :k] * s[:k]) @ Vh[:k] @ torch.linalg.inv(S))
    return found


def test_a_mixed_metric_counts_domains_by_weight_and_keeps_the_average_size():
    """Σ a_d G_d has c Σ w_d = c on its diagonal's mean, each domain a share w_d of it, however large it is."""
    G, weights = [moment(1, 1), 50 * moment(2, 2), 0.01 * moment(3, 3)], [0.5, 0.3, 0.2]
    scales = mixing([g.diagonal().mean() for g in G], weights)
    parts = [(a * g).diagonal().mean() for a, g in zip(scales, G, strict=True)]
    c = sum(w * g.diagonal().mean() for w, g in zip(weights, G, strict=True))
    torch.testing.assert_close(torch.stack(parts) / c, torch.tensor(weights, dtype=torch.float64))
    plain = torch.stack([w * g.diagonal().mean() for w, g in zip(weights, G, strict=True)])
    assert (plain / plain.sum() - torch.tensor(weights, dtype=torch.float64)).abs().max() > 0.1  # not without them


def test_the_worst_domain_fares_better_than_under_uniform_weights():
    """The largest loss falls clearly, losses are those of the literal truncation, weights are a distribution."""
    problem = layers(1, 1, 1)
    found = worst_case_weights(problem)
    uniform = losses(problem, truncated(problem, [1 / 3] * 3))
    torch.testing.assert_close(found.losses, losses(problem, truncated(problem, found.weights)), rtol=1e-9, atol=0)
    assert found.losses.max() < 0.95 * uniform.max()
    assert found.losses.mean() > uniform.mean()  # for which the average pays
    assert sum(found.weights) == pytest.approx(1)
    assert min(found.weights) >= 0
    assert max(found.weights) == found.weights[uniform.argmax()]
    assert worst_case_weights(problem, rounds=1).weights == pytest.approx([1 / 3] * 3)


def test_nothing_of_that_rank_has_a_worst_case_below_the_bound():
    """Truncations under any weights, and random perturbations of them; the weights found come near it."""
    problem = layers(1, 1, 1)
    found, rng = worst_case_weights(problem), torch.Generator().manual_seed(0)
    assert found.bound <= found.losses.max() < 1.02 * found.bound
    for draw in range(50):
        w = torch.rand(3, generator=rng, dtype=torch.float64)
        values = truncated(problem, w / w.sum() if draw else found.weights)
        assert losses(problem, values).max() >= found.bound
        moved = []
        for value, (_, _, k) in zip(values, problem, strict=True):
            U, s, Vh = torch.linalg.svd(value + 1e-3 * torch.randn(value.shape, generator=rng, dtype=torch.float64))
            moved.append((U[:, :k] * s[:k]) @ Vh[:k])
        assert losses(problem, moved).max() >= found.bound


def test_between_rank_one_matrices_no_weights_need_reach_the_best_worst_case():
    """Two orthogonal domains, W the identity: every truncation drops one of them; half of each would lose less of the worst."""
    G = [torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 0.0], [0.0, 1.0])]
    problem = [(torch.eye(2, dtype=torch.float64), G, 1)]
    found, half = worst_case_weights(problem), [torch.full((2, 2), 0.5, dtype=torch.float64)]
    assert losses(problem, half).max() < found.losses.max()
    assert found.bound <= losses(problem, half).max()


def test_domains_that_are_alike_have_equal_weights():
    """The same moments in every layer, of whatever size."""
    for sizes in ((1.0, 1.0), (1.0, 30.0, 0.2)):
        problem = [(W, [c * G[0] for c in sizes], k) for W, G, k in layers(1)]
        assert worst_case_weights(problem).weights == pytest.approx([1 / len(sizes)] * len(sizes), rel=1e-9)


def test_the_size_of_a_domain_does_not_count():
    """A thousand times the second moment, the same weights; the domain is what counts: in another order they go with it."""
    plain = worst_case_weights(layers(1, 1, 1)).weights
    assert worst_case_weights(layers(1, 1000, 1e-3)).weights == pytest.approx(plain, rel=1e-9)
    turned = [(W, G[::-1], k) for W, G, k in layers(1, 1, 1)]
    assert worst_case_weights(turned).weights == pytest.approx(plain[::-1], rel=1e-9)


def test_one_domain_has_all_the_weight_and_none_is_refused():
    """Nothing to weigh is no error, nothing at all is; a weight that is kept whole loses nothing under any weights."""
    assert worst_case_weights(layers(1)).weights == [1.0]
    whole = worst_case_weights([(W, G, min(W.shape)) for W, G, _ in layers(1, 1)])
    assert sum(whole.weights) == pytest.approx(1)
    assert whole.losses.abs().max() < 1e-12
    for nothing in ([], layers()):
        with pytest.raises(ValueError, match="a layer and a domain"):
            worst_case_weights(nothing)
