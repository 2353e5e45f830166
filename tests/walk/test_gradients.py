"""The gradients of the loss at every layer's output: right, of the model's own labels, and taken without a trace."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import nsvd
from nsvd.walk.gradient_sums import clipped_tokens
from nsvd.walk.gradients import drawn_labels
from tests.tiny import DOWN, LATE_WINDOW, Q, assert_same, poison, state, tiny_model, token_ids

IDS = token_ids(5, 8)


def naive(model, names, windows, labels) -> dict[str, torch.Tensor]:
    """Σ g gᵀ / tokens by autograd, one window and one token at a time: g is what a nudge of that token's output gets."""
    sums = {name: 0.0 for name in names}
    for ids, wanted in zip(windows, labels, strict=True):
        for name in names:
            layer = model.get_submodule(name)
            nudge = torch.zeros(len(ids), layer.out_features, dtype=model.dtype, requires_grad=True)
            handle = layer.register_forward_hook(lambda _m, _a, out, nudge=nudge: out + nudge)
            loss = cross_entropy(model(input_ids=ids[None]).logits[0].float(), wanted, reduction="sum")
            handle.remove()
            (gradient,) = torch.autograd.grad(loss, nudge)
            for g in gradient.double():
                sums[name] = sums[name] + torch.outer(g, g)
    return {name: total / windows.numel() for name, total in sums.items()}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt_neox", {}), ("qwen2", LATE_WINDOW)])
@pytest.mark.parametrize("batch", [2, 8])
def test_it_is_the_second_moment_of_the_gradients_token_by_token(family, changes, batch):
    """Equal to a plain loop with the same labels, whatever the batches and the blocks' masks; the diagonal is its diagonal."""
    model = tiny_model(family, dtype=torch.float64, **changes)
    names = list(nsvd.targets(model))[:3] + list(nsvd.targets(model))[-1:]
    expected = naive(model, names, IDS, drawn_labels(model, IDS, seed=7))
    full = nsvd.fisher(model, IDS, layers=names, seed=7, batch=batch)
    diagonal = nsvd.fisher(model, IDS, layers=names, seed=7, batch=batch, diagonal=True)
    other = nsvd.fisher(model, IDS, layers=names, seed=8, batch=batch)
    assert list(full) == names
    for name in names:
        size = expected[name].norm()
        assert (full[name] - expected[name]).norm() <= 1e-5 * size  # the logits are of float32
        torch.testing.assert_close(diagonal[name], full[name].diagonal(), rtol=1e-9, atol=0)
        assert (other[name] - expected[name]).norm() > 1e-2 * size


def test_the_labels_are_the_model_s_own_not_the_text_s():
    """With the next tokens as labels the moments are others: those of the empirical Fisher."""
    model = tiny_model(dtype=torch.float64)
    said = nsvd.fisher(model, IDS, layers=[DOWN])[DOWN]
    text = naive(model, [DOWN], IDS, torch.cat([IDS[:, 1:], IDS[:, :1]], dim=1))[DOWN]
    assert (said - text).norm() > 0.1 * text.norm()


def test_labels_are_drawn_from_what_the_model_predicts():
    """Over many windows of one text, every token comes as often as the model says; each window has draws of its own."""
    model = tiny_model(dtype=torch.float64)
    labels = drawn_labels(model, IDS[:1].expand(4000, -1))
    with torch.no_grad():
        p = model(input_ids=IDS[:1]).logits[0, -1].softmax(-1)
    share = labels[:, -1].bincount(minlength=len(p)) / 4000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-12).all()


def test_labels_depend_on_the_seed_and_the_window_alone():
    """Not on the batches, nor on which windows are read beside it; another seed or number draws others."""
    model = tiny_model()
    labels = drawn_labels(model, IDS, seed=3)
    assert torch.equal(labels, drawn_labels(model, IDS, seed=3, batch=1))
    assert torch.equal(labels[2:], drawn_labels(model, IDS[2:], seed=3, first=2))
    assert not torch.equal(labels, drawn_labels(model, IDS, seed=4))
    assert not torch.equal(labels[2:], drawn_labels(model, IDS[2:], seed=3))


def test_labels_may_be_those_of_another_model():
    """The moments are those of the labels that are given; its own labels, given, change nothing."""
    model, other = (tiny_model(dtype=torch.float64, seed=seed) for seed in (0, 1))
    labels = drawn_labels(other, IDS, seed=7)
    expected = naive(model, [DOWN], IDS, labels)[DOWN]
    taught = nsvd.fisher(model, IDS, layers=[DOWN], labels=labels)[DOWN]
    assert (taught - expected).norm() <= 1e-5 * expected.norm()
    own = nsvd.fisher(model, IDS, layers=[DOWN], seed=7)[DOWN]
    assert (taught - own).norm() > 1e-2 * own.norm()
    same = nsvd.fisher(model, IDS, layers=[DOWN], labels=drawn_labels(model, IDS, seed=7))[DOWN]
    torch.testing.assert_close(same, own)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)])
def test_every_layer_gets_a_semidefinite_moment_in_float64(dtype, rounding):
    """Symmetric, no negative eigenvalue but for rounding, on the CPU, in a bfloat16 model too; of the seed alone."""
    model = tiny_model(dtype=dtype)
    moments, again = nsvd.fisher(model, IDS), nsvd.fisher(model, IDS)
    assert list(moments) == list(nsvd.targets(model))
    for name, layer in nsvd.targets(model).items():
        H = moments[name]
        assert H.shape == (layer.out_features, layer.out_features)
        assert H.dtype == torch.float64
        assert torch.equal(H, again[name])
        assert torch.equal(H, H.mT)
        assert torch.linalg.eigvalsh(H).min() >= -rounding * H.norm()


@pytest.mark.parametrize("training", [False, True])
def test_gradients_leave_no_trace(training):
    """Mode, hooks, what is trained and what is not, and gradients that were there: all as before, within no_grad too."""
    model = tiny_model().train(training)
    frozen = model.get_submodule(Q).weight.requires_grad_(False)
    model.get_submodule(DOWN).weight.grad = torch.ones(32, 48)
    before = state(model)
    with torch.no_grad():
        nsvd.fisher(model, IDS)
    assert_same(before, model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [f"{Q}.weight"]
    assert not frozen.requires_grad
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == [f"{DOWN}.weight"]
    assert torch.equal(grads[f"{DOWN}.weight"], torch.ones(32, 48))


def test_nothing_needs_to_be_trained():
    """A model without a single trainable parameter has the same gradients at its outputs."""
    model, frozen = tiny_model(), tiny_model().requires_grad_(False)
    ours, theirs = nsvd.fisher(frozen, IDS), nsvd.fisher(model, IDS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_hooks_and_flags_are_restored_after_an_error():
    """The error of the forward pass comes through; a layer that is not there is one, too."""
    model = tiny_model().train()
    model.get_submodule(Q).weight.requires_grad_(False)

    def broken(*_):
        raise KeyError("in the middle of the pass")

    model.get_submodule(DOWN).register_forward_pre_hook(broken)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    for error, layers in ((KeyError, None), (ValueError, [Q, "model.nothing"])):
        with pytest.raises(error):
            nsvd.fisher(model, IDS, layers=layers)
        assert_same(before, model)
        assert [p.requires_grad for p in model.parameters()] == flags


def test_nan_names_the_layer():
    """The first that is met on the way back."""
    model = tiny_model()
    poison(model, "model.norm.weight")
    before = state(model)
    with pytest.raises(FloatingPointError, match=f"gradient at layer {Q.replace('.0.', '.1.')} holds NaN or Inf"):
        nsvd.fisher(model, IDS)
    assert_same(before, model)


def test_a_layer_that_no_gradient_reaches_is_named():
    """One that never runs has no moment; one outside the blocks cannot be reached in their order."""
    model = tiny_model()
    model.model.layers[1].spare = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"no gradient reached layer model\.layers\.1\.spare"):
        nsvd.fisher(model, IDS)
    del model.model.layers[1].spare
    model.model.spare = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"layer model\.spare is in none of the blocks model\.layers"):
        nsvd.fisher(model, IDS, layers=["model.spare"])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (8,)])
def test_windows_are_a_table_of_token_ids(shape):
    """No window, no token, or another number of axes is refused with the shape."""
    with pytest.raises(ValueError, match=r"\(count, length\)"):
        nsvd.fisher(tiny_model(), torch.zeros(shape, dtype=torch.long))


def divergence(model, other, ids) -> float:
    """Mean KL divergence of the predictions, in nats a token."""
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_it_predicts_what_a_small_change_of_one_layer_does_to_the_predictions():
    """½ tr(H ΔW G ΔWᵀ) is the KL divergence to second order, were tokens independent: on average over the layers within a third."""
    model, ids = tiny_model(dtype=torch.float64), token_ids(48, 16)
    H, stats = nsvd.fisher(model, ids), nsvd.calibrate(model, ids)
    ratios, plain = [], []
    torch.manual_seed(0)
    for name, layer in nsvd.targets(model).items():
        for _ in range(2):
            change = 1e-3 * torch.randn(layer.weight.shape, dtype=torch.float64)
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_submodule(name).weight += change
            said = 0.5 * torch.trace(H[name] @ change @ stats[name].G @ change.mT).item()
            measured = divergence(model, other, ids)
            ratios.append(said / measured)
            plain.append(0.5 * torch.trace(change @ stats[name].G @ change.mT).item() / measured)
    logs, unweighted = torch.tensor(ratios).log(), torch.tensor(plain).log()
    assert abs(logs.mean().item()) < 0.3
    assert logs.std() < 0.5 * unweighted.std()  # without H the layers' changes are not even comparable


@pytest.mark.parametrize("cut", [(slice(None), slice(1, None)), (slice(1, None), slice(None))])
def test_labels_of_another_shape_are_refused(cut):
    """A label for every token of every window, or a sentence with both shapes."""
    model, ids = tiny_model(), token_ids()
    with pytest.raises(ValueError, match="every token has one"):
        nsvd.fisher(model, ids, labels=ids[cut])


def test_clipped_gradients_are_those_of_a_plain_loop():
    """KFAC-SVD: labels of the text, no edges of windows, norms of tokens within a tenth and ten times their mean."""
    model, ids = tiny_model(dtype=torch.float64), token_ids(4, 17, seed=3)
    inputs, labels, seen = ids[:, :-1], ids[:, 1:], []
    layer = model.get_submodule(DOWN)
    handle = layer.register_forward_hook(lambda _m, _a, out: out.register_hook(seen.append) and None)
    cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    handle.remove()
    H = torch.zeros(32, 32, dtype=torch.float64)
    for window in seen[0][:, 2:14]:
        norms = [g.norm().item() for g in window]
        mean = sum(norms) / 12
        for g, norm in zip(window, norms, strict=True):
            g = g * (min(max(norm, 0.1 * mean), 10 * mean) / norm)
            H += torch.outer(g, g) / (4 * 12)
    found = nsvd.fisher(model, inputs, layers=[DOWN], labels=labels, clipped=True)[DOWN]
    torch.testing.assert_close(found, H, rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="clipped gradients are"):
        clipped_tokens(torch.zeros(5, 8))


def test_norms_are_clipped_on_both_sides_and_nothing_stays_nothing():
    """A loud token has ten times the mean, a quiet one a tenth of it, each in its own direction; a zero is no NaN."""
    g = torch.ones(1, 48, 2)
    g[0, 20], g[0, 21], g[0, 22] = 1e6, 1e-6, 0.0
    found = clipped_tokens(g)[0]
    norms = found.norm(dim=-1)
    mean = g[0, 6:42].norm(dim=-1).mean()
    torch.testing.assert_close(norms[[14, 15, 16]] / mean, torch.tensor([10.0, 0.1, 0.0]))
    assert len(found) == 36
