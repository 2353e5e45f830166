"""Streaming second moments: right, shared, and taken without a trace left on the model."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import nsvd
from nsvd.linalg import rank_for_ratio
from nsvd.linalg.worst_case import worst_case_weights
from nsvd.walk.hooks import watch_inputs
from nsvd.walk.moments import shared_inputs
from tests.tiny import DOWN, K, Q, assert_same, poison, state, tiny_model, token_ids

IDS = token_ids(7, 16)


class Toy(nn.Module):
    """Layers whose names tell nothing; ``between`` is what happens to the input before the second layer reads it."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.words, self.between = nn.Embedding(300, 8), between
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, input_ids, use_cache=False):
        x = self.words(input_ids)
        y = self.a(x)
        return self.b(self.between(x)), self.c(y)


def captured(model: nn.Module, layer: str, ids: torch.Tensor) -> torch.Tensor:
    """All inputs of a layer, (n, d_in), in float64, by a hook of our own."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


def groups(inputs: dict[str, str], block: str) -> list[set[str]]:
    """The sets of layers of a block that share an input, by their last names."""
    shared: dict[str, set[str]] = {}
    for name, leader in inputs.items():
        if name.startswith(block):
            shared.setdefault(leader, set()).add(name.removeprefix(block))
    return list(shared.values())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_queries_keys_and_values_share_a_moment_and_gate_and_up_another(family):
    """Four inputs for seven layers, found by watching the tensors."""
    stats = nsvd.calibrate(tiny_model(family), IDS)
    assert len(stats) == 14
    assert len(stats.moments) == 8
    assert groups(stats.inputs, "model.layers.1.") == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]
    assert stats[Q].G is stats[K].G


def test_families_with_parallel_attention_share_more():
    """In Phi attention and MLP read one input; in GPT-NeoX each has its own norm, and one layer for all of q, k and v."""
    phi = nsvd.calibrate(tiny_model("phi"), IDS)
    assert groups(phi.inputs, "model.layers.0.") == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"},
        {"self_attn.dense"},
        {"mlp.fc2"},
    ]
    neox = nsvd.calibrate(tiny_model("gpt_neox"), IDS)
    assert len(neox.moments) == len(neox) == 8


@pytest.mark.parametrize(
    ("between", "shared"),
    [
        (lambda x: x, True),
        (lambda x: x.clone(), False),  # equal numbers, another tensor
        (lambda x: x.mul_(2), False),  # the same memory, other numbers
        (lambda x: x[:, :4], False),  # the same address, a part of it
    ],
)
def test_an_input_is_shared_when_it_is_the_same_tensor_unchanged(between, shared):
    """Names play no part, nor do equal values, nor a common address."""
    model = Toy(between)
    inputs = shared_inputs(model, ["a", "b", "c"], IDS[:1])
    assert inputs == {"a": "a", "b": "a" if shared else "b", "c": "c"}


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_streaming_equals_one_shot(family, batch):
    """G = X Xᵀ / n and the mean of |X|, for every layer, whatever the batches."""
    model = tiny_model(family, dtype=torch.float64)
    stats = nsvd.calibrate(model, IDS, batch=batch)
    for name in nsvd.targets(model):
        X = captured(model, name, IDS).mT
        torch.testing.assert_close(stats[name].G, (X @ X.mT) / X.shape[1], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(stats[name].mean_abs, X.abs().mean(1), rtol=1e-5, atol=1e-9)
        assert stats[name].n == IDS.numel() == X.shape[1]


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_products_are_as_fine_as_the_model_and_float32_at_least(dtype, close):
    """The moments agree with float64 sums over the captured inputs, each entry in units of the two channels' sizes."""
    model = tiny_model(dtype=dtype)
    stats = nsvd.calibrate(model, IDS, batch=len(IDS))
    for name in (Q, DOWN):
        X = captured(model, name, IDS).mT
        size = X.square().mean(1).sqrt()
        assert ((stats[name].G - (X @ X.mT) / X.shape[1]).abs() <= close * size[:, None] * size).all()
        assert torch.equal(stats[name].G, stats[name].G.mT)
        torch.testing.assert_close(stats[name].mean_abs, X.abs().mean(1), rtol=close, atol=0)


def test_mixed_domains_count_by_their_weight_and_not_by_their_size():
    """G = c Σ w_d G_d / mean(diag G_d), c = Σ w_d mean(diag G_d); mean absolute values alike, gradients averaged."""
    model, weights = tiny_model(), [3, 1]
    domains = [
        nsvd.calibrate(model, ids).with_gradients(nsvd.fisher(model, ids)) for ids in (IDS, token_ids(3, 9, seed=5))
    ]
    large = {name: nsvd.Moments(100 * m.G, 10 * m.mean_abs, m.n) for name, m in domains[1].moments.items()}
    small = domains[1]
    domains[1] = replace(small, moments=large)
    mixed = nsvd.mix(domains, weights)
    assert list(mixed) == list(domains[0])
    for name in (Q, DOWN):
        first, second = (d[name] for d in domains)
        sizes = [m.G.diagonal().mean() for m in (first, second)]
        c = 0.75 * sizes[0] + 0.25 * sizes[1]
        expected = c * (0.75 * first.G / sizes[0] + 0.25 * second.G / sizes[1])
        torch.testing.assert_close(mixed[name].G, expected, rtol=1e-12, atol=0)
        scales = [(c / size).sqrt() for size in sizes]
        expected = 0.75 * scales[0] * first.mean_abs + 0.25 * scales[1] * second.mean_abs
        torch.testing.assert_close(mixed[name].mean_abs, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(mixed[name].H, 0.75 * first.H + 0.25 * second.H, rtol=1e-12, atol=0)
        assert mixed[name].G.diagonal().mean() == pytest.approx(c.item())
        assert mixed[name].n == 7 * 16 + 3 * 9
        unscaled = nsvd.mix([domains[0], small], weights)[name].G
        torch.testing.assert_close(mixed[name].G / c, unscaled / unscaled.diagonal().mean(), rtol=1e-9, atol=0)
        pooled, before = 0.75 * first.G + 0.25 * second.G, 0.75 * first.G + 0.25 * small[name].G
        pooled, before = (G / G.diagonal().mean() for G in (pooled, before))
        assert (pooled - before).norm() > 0.01 * before.norm()  # in a plain average the size does count
    assert mixed.origin["weights"] == [0.75, 0.25]
    assert mixed.origin["mixed"] == [d.origin for d in domains]


def test_one_domain_mixed_is_itself_and_a_weight_of_zero_is_none():
    """Equal weights unless some are given; gradients only where every domain has them."""
    model = tiny_model()
    first, second = nsvd.calibrate(model, IDS), nsvd.calibrate(model, token_ids(3, 9, seed=5))
    for alone in (nsvd.mix([first]), nsvd.mix([first, second], [2, 0])):
        torch.testing.assert_close(alone[Q].G, first[Q].G, rtol=1e-12, atol=0)
        torch.testing.assert_close(alone[Q].mean_abs, first[Q].mean_abs, rtol=1e-12, atol=0)
    equal, given = nsvd.mix([first, second]), nsvd.mix([first, second], [0.5, 0.5])
    assert torch.equal(equal[DOWN].G, given[DOWN].G)
    assert nsvd.mix([first.with_gradients(nsvd.fisher(model, IDS)), second]).gradients == {}


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [1, -1], [0, 0], []])
def test_weights_that_mix_nothing_are_refused(weights):
    """One for each domain, none negative, not all zero."""
    stats = nsvd.calibrate(tiny_model(), IDS)
    with pytest.raises(ValueError, match="2 domains and the weights"):
        nsvd.mix([stats, stats], weights)
    with pytest.raises(ValueError, match="0 domains"):
        nsvd.mix([])


def test_domains_of_different_layers_do_not_mix():
    """Statistics of another model, or of some of the layers."""
    model = tiny_model()
    stats = nsvd.calibrate(model, IDS)
    for other in (nsvd.calibrate(tiny_model("opt"), IDS), nsvd.calibrate(model, IDS, layers=[Q, DOWN])):
        with pytest.raises(ValueError, match="not of the same layers"):
            nsvd.mix([stats, other])


def test_statistics_tell_what_they_were_taken_from():
    """The origin changes with the text; a layer that is not there is named with the model."""
    model = tiny_model()
    first, second = nsvd.calibrate(model, IDS), nsvd.calibrate(model, token_ids(7, 16, seed=5))
    assert first.origin["model"] == "LlamaForCausalLM"
    model.config._name_or_path = str(Path(__file__).parent)
    assert nsvd.calibrate(model, IDS).origin["model"] == Path(__file__).parent.name
    assert first.origin["windows"] == [7, 16]
    assert first.origin["sha256"] != second.origin["sha256"]
    with pytest.raises(KeyError, match=r"no layer 'lm_head'.*LlamaForCausalLM"):
        first["lm_head"]


def test_hooks_are_gone_and_the_mode_is_kept():
    """Calibration leaves tensors, hooks and training mode as they were, in either mode; a user's own hook stays."""
    for training in (False, True):
        model = tiny_model().train(training)
        model.get_submodule(Q).register_forward_pre_hook(lambda *_: None)
        before = state(model)
        nsvd.calibrate(model, IDS)
        assert_same(before, model)


def test_hooks_are_gone_even_after_an_error():
    """When the forward pass raises, its own error comes through and nothing is left on the model."""
    model = tiny_model().train()

    def broken(*_):
        raise KeyError("in the middle of the pass")

    model.get_submodule(DOWN).register_forward_pre_hook(broken)
    before = state(model)
    with pytest.raises(KeyError, match="in the middle"):
        nsvd.calibrate(model, IDS)
    assert_same(before, model)


def test_a_half_finished_registration_is_undone():
    """A name that does not exist leaves no hook on the layers before it."""
    model = tiny_model()
    before = state(model)
    with pytest.raises(AttributeError), watch_inputs(model, [Q, "model.nothing"], lambda *_: None):
        pass
    assert_same(before, model)


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj"),
        ("model.layers.0.mlp.up_proj.bias", "model.layers.0.mlp.down_proj"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_an_activation_names_the_first_layer_that_reads_it(parameter, first, value):
    """… and the parameter it came from; the model is as it was."""
    model = tiny_model()
    poison(model, parameter, ..., value)
    before = state(model)
    with pytest.raises(FloatingPointError, match=rf"layer {first} holds NaN or Inf.*parameter {parameter}"):
        nsvd.calibrate(model, IDS)
    assert_same(before, model)


def test_nan_that_only_some_text_meets_is_found_where_it_is_met():
    """A broken word is no matter until the calibration text holds it."""
    model, ids = tiny_model(), IDS.clone()
    ids[ids == 77] = 78
    poison(model, "model.embed_tokens.weight", row=77)
    assert len(nsvd.calibrate(model, ids)) == 14
    ids[-1, -1] = 77
    with pytest.raises(FloatingPointError, match="q_proj"):
        nsvd.calibrate(model, ids)


def test_layers_that_never_run_raise_and_can_be_left_out():
    """A layer the forward pass does not reach has no moments; the others can be measured alone."""
    model = tiny_model()
    model.model.layers[0].spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"1 of 15 layers saw no input, first model\.layers\.0\.spare"):
        nsvd.calibrate(model, IDS)
    rest = [name for name in nsvd.targets(model) if not name.endswith("spare")]
    assert list(nsvd.calibrate(model, IDS, layers=rest)) == rest


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (8,), (1, 2, 3)])
def test_windows_are_a_table_of_token_ids(shape):
    """No window, no token, or another number of axes is refused with the shape."""
    with pytest.raises(ValueError, match=r"\(count, length\)"):
        nsvd.calibrate(tiny_model(), torch.zeros(shape, dtype=torch.long))


def test_calibration_is_repeatable():
    """The same model and text give the same bits; a copy of the model is the same model."""
    model = tiny_model()
    first, second = nsvd.calibrate(model, IDS), nsvd.calibrate(copy.deepcopy(model), IDS)
    assert all(torch.equal(first[name].G, second[name].G) for name in first)


def test_worst_case_weights_are_those_of_the_model_s_layers_at_the_ratio():
    """The mix by name is the mix by the weights that the mathematics finds for all layers; alike domains get equal ones."""
    model, domains = tiny_model(), [nsvd.calibrate(tiny_model(), ids) for ids in (IDS, token_ids(2, 5, seed=5))]
    found = nsvd.mix(domains, "worst-case", model=model, ratio=0.3)
    layers = [
        (layer.weight.detach(), [d[name].G for d in domains], rank_for_ratio(*layer.weight.shape, 0.3))
        for name, layer in nsvd.targets(model).items()
    ]
    given = worst_case_weights(layers).weights
    assert found.origin["weights"] == given == found.shares(2)
    assert abs(given[0] - 0.5) > 0.01
    torch.testing.assert_close(found[DOWN].G, nsvd.mix(domains, given)[DOWN].G, rtol=1e-12, atol=0)
    alike = nsvd.mix([domains[0]] * 2, "worst-case", model=model, ratio=0.3)
    assert alike.origin["weights"] == pytest.approx([0.5, 0.5])
    assert nsvd.mix(domains, "uniform").origin["weights"] == [0.5, 0.5]


def test_worst_case_weights_need_a_model_with_parameters_removed():
    """Another name is refused with those that there are."""
    stats = nsvd.calibrate(tiny_model(), IDS)
    with pytest.raises(ValueError, match="unknown weights 'best'; there are uniform, worst-case, or a number"):
        nsvd.mix([stats, stats], "best")
    for missing in ({"ratio": 0.3}, {"model": tiny_model()}):
        with pytest.raises(ValueError, match="give model and ratio"):
            nsvd.mix([stats, stats], "worst-case", **missing)


def test_one_statistics_alone_are_not_mixed():
    """They are a mapping: its keys would be taken for domains."""
    with pytest.raises(ValueError, match="mix takes a list of statistics"):
        nsvd.mix(nsvd.calibrate(tiny_model(), IDS))


def test_statistics_say_what_they_were_mixed_with():
    """As many weights as domains, equal ones where another number of domains was mixed, or none."""
    stats = nsvd.calibrate(tiny_model(), IDS)
    mixed = nsvd.mix([stats, stats], [3, 1])
    assert mixed.shares(2) == [0.75, 0.25]
    assert mixed.shares(1) == [1]
    with pytest.raises(ValueError, match="mixed of 2 domains of text, but the windows are of 4"):
        mixed.shares(4)
    assert stats.shares(1) == [1]


class Experts(nn.Module):
    """A feed-forward of experts that are linear layers, one to a token: the token's own number says which."""

    def __init__(self, count: int = 4):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(32, 48) for _ in range(count))
        self.gate = nn.ModuleList(nn.Linear(32, 48) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(48, 32) for _ in range(count))
        self.ids = None

    def forward(self, x):
        out = torch.zeros_like(x)
        for i in range(len(self.up)):
            mine = (self.ids // 64).clamp(max=len(self.up) - 1) == i
            if mine.any():
                y = x[mine]
                out[mine] = self.down[i](self.up[i](y) * self.gate[i](y).relu())
        return out


def with_experts() -> nn.Module:
    """A model whose first feed-forward is routed; the first eight tokens of a text seldom reach all experts."""
    model = tiny_model()
    experts = model.model.layers[0].mlp = Experts().eval()
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: setattr(experts, "ids", kwargs["input_ids"]), with_kwargs=True
    )
    return model


def test_experts_that_few_tokens_reach_are_measured():
    """The probe of eight tokens reaches some; the text reaches all, and each has the moments of its own tokens."""
    model, ids = with_experts(), torch.arange(2, 258).reshape(16, 16)
    stats = nsvd.calibrate(model, ids, batch=2)
    name = "model.layers.0.mlp.up.3"
    assert stats[name].n == int((ids >= 192).sum())
    assert stats["model.layers.0.mlp.up.0"].n == int((ids < 64).sum())
    assert stats.inputs["model.layers.0.mlp.gate.3"] == stats.inputs[name]
    report = nsvd.compress_(with_experts(), windows=ids, method="asvd-1", ratio=0.3)
    assert report.ratio_reached >= 0.3


def test_experts_that_the_text_does_not_reach_are_named():
    """There is nothing to compress them for."""
    with pytest.raises(
        ValueError, match=r"3 of 23 layers saw no input, first model\.layers\.0\.mlp\.up\.3: take a text"
    ):
        nsvd.calibrate(with_experts(), torch.arange(2, 130).reshape(8, 16))


def test_experts_cannot_be_followed():
    """Each stream may send its tokens another way."""
    model, ids = with_experts(), torch.arange(2, 258).reshape(16, 16)
    before = state(model)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.up\.\d sees \d of 8 tokens, as experts do"):
        nsvd.compress_(model, windows=ids, method="asvd-1", ratio=0.3, shifted=True)
    assert_same(before, model)


@pytest.mark.parametrize("method", ["asvd-1", "best", "sola"])
def test_everything_works_in_inference_mode(method):
    """As in the usual mode, to the bit; what is made is no tensor of that mode."""
    ours, theirs = tiny_model(hidden_size=64), tiny_model(hidden_size=64)
    how = {"method": method, "ratio": 0.3} | ({"keep_outer": 0, "grid": 1} if method == "sola" else {})
    nsvd.compress_(theirs, windows=IDS, **how)
    with torch.inference_mode():
        stats = nsvd.calibrate(ours, IDS)
        nsvd.compress_(ours, None if method == "best" else stats, windows=IDS, **how)
    assert not any(p.is_inference() for p in ours.parameters())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_inf_behind_the_last_layer_is_named():
    """On the text, if not on eight tokens."""
    model = tiny_model()
    norm = model.model.norm
    norm.register_forward_hook(lambda _m, _args, y: y / 0 if y.shape[1] == IDS.shape[1] else y)
    with pytest.raises(FloatingPointError, match=r"on the calibration text; it begins in the output of model\.norm"):
        nsvd.calibrate(model, IDS)
