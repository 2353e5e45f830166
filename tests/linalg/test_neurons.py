"""Neurons that go one by one, and what the others do in their place."""

from itertools import combinations

import pytest
import torch

from nsvd.linalg.neurons import Neurons


def problem(n=9, d_out=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4 * n, generator=generator, dtype=torch.float64)
    X = torch.randn(n, n, generator=generator, dtype=torch.float64) @ X
    D = torch.randn(d_out, n, generator=generator, dtype=torch.float64)
    g = torch.randn(d_out, 4 * d_out, generator=generator, dtype=torch.float64)
    return D, X @ X.T / X.shape[1], g @ g.T / g.shape[1]


def metric(G, mu):
    return G + mu * G.diagonal().diag()


def loss(D, B, G, H):
    return float(0.5 * torch.trace(H @ (D - B) @ G @ (D - B).T))


def widened(B_S, kept, n):
    B = B_S.new_zeros(len(B_S), n)
    B[:, kept] = B_S
    return B


def test_the_refitted_layer_is_the_minimum():
    D, G, H = problem()
    kept = torch.tensor([0, 2, 3, 5, 8])
    B = Neurons(D, G, H, mu=0.1).refitted(kept)
    at = loss(D, widened(B, kept, 9), metric(G, 0.1), H)
    for seed in range(5):
        step = 1e-3 * torch.randn(B.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss(D, widened(B + step, kept, 9), metric(G, 0.1), H) > at
    assert loss(D, widened(D[:, kept], kept, 9), metric(G, 0.1), H) > 1.05 * at  # to refit is worth something


def test_the_losses_are_those_of_the_refitted_layers():
    D, G, H = problem(n=40)
    neurons = Neurons(D, G, H, mu=0.05)
    order, losses = neurons.removal(30)
    assert losses[0] == 0
    assert (losses.diff() >= 0).all()
    assert len(order.unique()) == 30
    for gone in (1, 7, 30):
        kept = torch.tensor([i for i in range(40) if i not in order[:gone]])
        B = widened(neurons.refitted(kept), kept, 40)
        assert losses[gone] == pytest.approx(loss(D, B, metric(G, 0.05), H), rel=1e-9)


def test_the_first_neuron_is_the_cheapest_of_all_and_the_greedy_pair_near_the_best_pair():
    D, G, H = problem()
    neurons, M = Neurons(D, G, H, mu=0.1), metric(G, 0.1)

    def cost(gone):
        kept = torch.tensor([i for i in range(9) if i not in gone])
        return loss(D, widened(neurons.refitted(kept), kept, 9), M, H)

    order, losses = neurons.removal(2)
    assert losses[1] == pytest.approx(min(cost((i,)) for i in range(9)))
    assert int(order[0]) == min(range(9), key=lambda i: cost((i,)))
    best = min(cost(pair) for pair in combinations(range(9), 2))
    assert best <= losses[2] * (1 + 1e-9) <= 1.5 * best


def test_of_two_neurons_that_go_together_one_is_kept():
    D, G, H = problem(n=200, d_out=20)
    G[1], G[:, 1] = G[0].clone(), G[:, 0].clone()
    G[1, 1] = G[0, 0]
    D[:, :2] *= 10  # large, but each stands in for the other
    order, _losses = Neurons(D, G, H, mu=1e-3).removal(100)
    assert len({0, 1} & set(order.tolist())) == 1


def test_one_giant_neuron_does_not_decide_the_ridge_of_the_others():
    D, G, H = problem(n=30)
    scale = torch.ones(30, dtype=torch.float64)
    scale[4] = 1e4
    plain = Neurons(D, G, H, mu=0.1).removal(20)
    giant = Neurons(D / scale, scale[:, None] * G * scale, H, mu=0.1).removal(20)
    assert plain.order.tolist() == giant.order.tolist()
    assert torch.allclose(plain.losses, giant.losses)


def test_a_neuron_that_was_never_seen_goes_first_and_a_diagonal_metric_is_taken():
    D, G, H = problem()
    G[3], G[:, 3] = 0, 0
    diagonal = H.diagonal().clone()
    order, losses = Neurons(D, G, diagonal, mu=0.1).removal(4)
    assert order[0] == 3
    assert losses[1] == 0
    assert torch.allclose(losses, Neurons(D, G, diagonal.diag(), mu=0.1).removal(4).losses)
    kept = torch.arange(9)
    assert torch.allclose(Neurons(D, G, diagonal, mu=0.1).refitted(kept), D)


def test_without_a_ridge_it_is_refused():
    D, G, H = problem()
    with pytest.raises(ValueError, match="positive ridge"):
        Neurons(D, G, H, mu=0.0)


def test_a_layer_that_the_loss_does_not_see_costs_nothing():
    """Which of its neurons go is told as if all outputs counted alike."""
    D, G, H = problem()
    unseen, alike = (Neurons(D, G, metric, mu=0.1).removal(5) for metric in (0 * H, torch.eye(5, dtype=torch.float64)))
    assert torch.equal(unseen.order, alike.order)
    assert not unseen.losses.any()
    assert alike.losses[-1] > 0
