"""Layers compressed in order: where the target is measured, that it makes up for what is missing, what an error leaves."""

import copy
from contextlib import closing, nullcontext

import pytest
import torch
from torch import nn

import nsvd
from nsvd.compression import ordered as module
from nsvd.compression.measure import naming
from nsvd.compression.ordered import DENSE, OURS, followed
from nsvd.linalg import Moments
from nsvd.walk.decoder import Decoder, block_list, run_block, same
from nsvd.walk.hooks import evaluating, exchanged
from nsvd.walk.landmarks import landmark, value_at
from nsvd.walk.memory import Room
from nsvd.walk.moments import shared_inputs
from nsvd.walk.shelf import Shelf
from tests.tiny import FAMILIES, LATE_WINDOW, Q, assert_same, logits, state, tiny_model, token_ids

IDS = token_ids()
POSITIONS = [
    "llama",
    "gemma2",
    "opt",
    "gpt_neox",
    "phi",
]  # norms before, on both sides; learned positions; parallel blocks


def replace_in_order_(model, domains, names, replace, *, mu, batch=16, finish=None):
    """Exchange the layers for what ``replace`` makes of name, target and moments; ``finish`` gets every block before its step."""
    how = {"mu": mu, "batch": batch, "unsettled": finish is not None}
    with closing(followed(model, domains, names, **how)) as blocks:
        for block in blocks:
            for arrived in block.inputs():
                with naming(next(iter(arrived.dense))):
                    new = {name: replace(name, arrived.target(name), arrived.moments) for name in arrived.dense}
                for name, layer in new.items():
                    model.set_submodule(name, layer)
            if finish is not None:
                finish(block)
            block.step()


def exact(model: nn.Module, targets: dict):
    """Stand-ins that hold their targets as they are; the targets are noted."""

    def replace(name: str, target: torch.Tensor, moments: Moments) -> nn.Linear:
        layer, targets[name] = copy.deepcopy(model.get_submodule(name)), target
        layer.weight.data.copy_(target)
        return layer

    return replace


def singles(model: nn.Module, block: str) -> list[str]:
    """The layers of a block whose input no other layer reads."""
    leaders = shared_inputs(model, list(nsvd.targets(model)), IDS[:1])
    return [
        name for name, leader in leaders.items() if name.startswith(block) and list(leaders.values()).count(leader) == 1
    ]


def moved(block: nn.Module, layer: nn.Module, hidden, call, delta) -> list[tuple[nn.Module | None, torch.Tensor]]:
    """Every module of the block in the order they are called, the block itself as None at the end, with how its input
    (of None the output) moves when the layer's output moves by delta (tokens, d_out). Only inputs of that size are told."""

    def values() -> list:
        seen, handles = [], []
        for inner in block.modules():
            if inner is not block:
                hook = inner.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])) if args else None)
                handles.append(hook)
        out = run_block(block, hidden, call)
        for handle in handles:
            handle.remove()
        return [*seen, (None, out)]

    plain = values()
    handle = layer.register_forward_hook(lambda _m, _a, out: out + delta.view_as(out))
    changed = values()
    handle.remove()
    steps = [(m, (after - before).flatten(0, -2)) for (m, before), (_, after) in zip(plain, changed, strict=True)]
    return [(m, step) for m, step in steps if step.shape == delta.shape]


def entered(model, ids) -> module.Batch:
    """A batch before the first block."""
    found = Decoder(model).enter(ids)
    return module.Batch(0, 1.0, 0, found, Shelf(), Room(0, torch.device("cpu")))


@pytest.mark.parametrize("family", POSITIONS)
def test_the_landmark_is_the_last_place_that_moves_as_the_layer_s_output_does(family):
    """By its definition, with directions of our own: there by exactly δ for every δ, nowhere later."""
    model = tiny_model(family, dtype=torch.float64)
    prefix, blocks = block_list(model)
    for index, block in enumerate(blocks):
        with torch.no_grad(), evaluating(model):
            item = entered(model, IDS)
            for name in singles(model, f"{prefix}.{index}."):
                layer = model.get_submodule(name)
                place = landmark(block, layer, item.hidden[DENSE], item.calls[index])
                for seed in range(2):
                    torch.manual_seed(seed)
                    delta = torch.randn(IDS.numel(), layer.out_features, dtype=torch.float64)
                    steps = moved(block, layer, item.hidden[OURS], item.calls[index], delta)
                    same = [m for m, step in steps if torch.allclose(step, delta, atol=1e-9)]
                    assert place is (same[-1] if same else layer), name


@pytest.mark.parametrize("family", POSITIONS)
def test_what_is_added_to_the_residual_stream_is_measured_there(family):
    """Each block has two such layers: after the last the stream leaves the block; where a norm follows the layer, it is there."""
    model = tiny_model(family, dtype=torch.float64)
    prefix, blocks = block_list(model)
    with torch.no_grad(), evaluating(model):
        item = entered(model, IDS)
        own, stream, end = 0, 0, 0
        for name in singles(model, f"{prefix}.0."):
            layer, said = model.get_submodule(name), []
            if layer.out_features != model.config.hidden_size:
                continue
            handle = layer.register_forward_hook(lambda _m, _a, out, said=said: said.append(out))
            place = landmark(blocks[0], layer, item.hidden[DENSE], item.calls[0])
            there = value_at(place, blocks[0], item.hidden[OURS], item.calls[0])
            handle.remove()
            itself = place is layer or torch.allclose(there, said[0].view_as(there))
            own, stream, end = own + itself, stream + (not itself), end + (place is None)
    normed_after, parallel = family == "gemma2", family in ("gpt_neox", "phi")
    assert (own, stream) == ((2, 0) if normed_after else (0, 2))
    assert end == (0 if normed_after else 2 if parallel else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_calls_of_all_texts_of_a_shape_are_held_once(family):
    """And no block runs to find them."""
    model, others, runs = tiny_model(family, dtype=torch.float64), token_ids(seed=7), []
    with torch.no_grad(), evaluating(model):
        decoder = Decoder(model)
        for block in decoder.blocks:
            block.register_forward_hook(lambda *_: runs.append(1))
        first, alone = (decoder.enter(ids) for ids in (IDS, others))
        after, smaller = decoder.enter(others, like=first), decoder.enter(others[:, :5], like=first)
    assert not runs
    assert after.calls is first.calls
    assert smaller.calls is not first.calls
    assert all(same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(after.calls, alone.calls, strict=True))
    assert torch.equal(after.hidden, alone.hidden)


def test_masks_of_later_blocks_are_those_of_the_batch():
    """Where only the second block slides a window, and the first is called alike for every batch; the last of them is smaller."""
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    said, ids = logits(model), token_ids(11, 16)
    with torch.no_grad(), evaluating(model):
        whole, rest = (Decoder(model).enter(some) for some in (ids[:4], ids[8:]))
    assert not same(whole.calls[1].kwargs, whole.calls[0].kwargs)
    assert not same(rest.calls[1].kwargs, whole.calls[1].kwargs)
    replace_in_order_(model, [ids], list(nsvd.targets(model)), exact(model, {}), mu=0.1, batch=4)
    assert (logits(model) - said).abs().max() <= 1e-6 * said.abs().max()


def test_every_block_is_called_with_its_own_arguments():
    """Inputs behind blocks that look less far back than the first are those of the model itself, where nothing has changed."""
    model, seen = tiny_model("qwen2", **LATE_WINDOW), {}

    def same_layer(name: str, _target: torch.Tensor, moments: Moments) -> nn.Module:
        seen[name] = moments
        return model.get_submodule(name)

    replace_in_order_(model, [IDS], list(nsvd.targets(model)), same_layer, mu=0.1)
    stats = nsvd.calibrate(model, IDS)
    for name, moments in seen.items():
        torch.testing.assert_close(moments.G, stats[name].G, rtol=1e-5, atol=1e-7)


def test_what_depends_on_the_text_is_taken_from_it():
    """Blocks that are told something of the tokens are told that of their own batch."""
    model, told = tiny_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: told.append(args[0].sum()))
    model.model.rotary_emb.register_forward_hook(lambda _m, _a, out: (out[0] + 1e-6 * told[-1], out[1]))
    with torch.no_grad():
        decoder = Decoder(model)
        first = decoder.enter(IDS)
        after = decoder.enter(token_ids(seed=7), like=first)
    cosines = [entered.calls[1].kwargs["position_embeddings"][0] for entered in (first, after)]
    told_apart = 1e-6 * (token_ids(seed=7).sum() - IDS.sum())
    assert told_apart
    torch.testing.assert_close(cosines[1] - cosines[0], torch.full_like(cosines[0], told_apart))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_exact_stand_ins_nothing_is_missing(family):
    """Full-rank copies: every target is the layer's own weight, in forward order, and the model says what it said."""
    model, targets = tiny_model(family), {}
    said, names = logits(model), list(nsvd.targets(model))
    weights = {name: layer.weight.detach().double() for name, layer in nsvd.targets(model).items()}
    replace_in_order_(model, [IDS, token_ids(seed=7)], names, exact(model, targets), mu=0.1, batch=5)
    assert targets.keys() == set(names)
    assert list(dict.fromkeys(name.split("layers.")[1][0] for name in targets)) == ["0", "1"]
    for name, target in targets.items():
        assert (target - weights[name]).norm() <= 1e-6 * weights[name].norm()
    assert (logits(model) - said).abs().max() <= 1e-6 * said.abs().max()


def test_what_a_layer_gets_is_what_those_before_it_have_made():
    """The moments are those of the compressed model's inputs; the target of a lone spoilt layer's successor makes up for it."""
    model, dense, moments, scales = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64), {}, {}

    def replace(name, target, seen):
        layer, moments[name], scales[name] = copy.deepcopy(model.get_submodule(name)), seen.G, seen.mean_abs
        assert seen.n == IDS.numel()
        layer.weight.data.copy_(target)
        if name == Q:
            layer.weight.data.mul_(3)
        return layer

    names = list(nsvd.targets(model))
    replace_in_order_(model, [IDS], names, replace, mu=1e-9)
    after = nsvd.calibrate(model, IDS)
    scale = {name: G.diagonal().mean() / after[name].G.diagonal().mean() for name, G in moments.items()}
    for name, G in moments.items():
        torch.testing.assert_close(G, scale[name] * after[name].G, rtol=1e-6, atol=1e-9)
        assert abs(scale[name] - 1) < 1e-6
        torch.testing.assert_close(scales[name], after[name].mean_abs, rtol=1e-6, atol=1e-9)
    o_proj = Q.replace("q_proj", "o_proj")
    was = nsvd.calibrate(dense, IDS)[o_proj].mean_abs
    assert (scales[o_proj] - was).norm() > 1e-4 * was.norm()  # far more than what is tolerated above
    change = (model.get_submodule(o_proj).weight - dense.get_submodule(o_proj).weight).norm()
    assert change > 1e-2 * dense.get_submodule(o_proj).weight.norm()
    spoilt = copy.deepcopy(dense)
    spoilt.get_submodule(Q).weight.data.mul_(3)
    assert final_error(model, dense) < 0.9 * final_error(spoilt, dense)


def final_error(model: nn.Module, dense: nn.Module, ids: torch.Tensor = IDS) -> float:
    """Squared distance of the final hidden states on a text."""
    with torch.no_grad():
        ours, theirs = (m.base_model(input_ids=ids).last_hidden_state for m in (model, dense))
    return (ours - theirs).double().square().sum().item()


@pytest.mark.parametrize("method", ["asvd-1", "ridge", "kfac"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_in_order_the_final_hidden_states_are_closer(family, method):
    """Same ranks, same text: smaller error at the end of the model than with every layer for the dense model's inputs."""
    ids, errors = token_ids(24, 32), []
    for shifted in (False, True):
        model = tiny_model(family, num_hidden_layers=3)
        nsvd.compress_(model, windows=ids, method=method, ratio=0.3, shifted=shifted)
        errors.append(final_error(model, tiny_model(family, num_hidden_layers=3), ids[::2]))
    assert errors[1] < 0.97 * errors[0]


def test_every_domain_counts_the_same():
    """However many windows it has: doubled, one of two domains moves no target."""
    answers = []
    for domains in ([IDS, token_ids(seed=7)], [IDS, torch.cat([token_ids(seed=7)] * 2)], [torch.cat([IDS] * 2)]):
        model, targets = tiny_model(dtype=torch.float64), {}

        def replace(name, target, moments, model=model, targets=targets):
            layer, targets[name] = copy.deepcopy(model.get_submodule(name)), target
            layer.weight.data.copy_(nsvd.decompose(target, moments.G, method="asvd-1", k=8).dense())
            return layer

        replace_in_order_(model, domains, list(nsvd.targets(model)), replace, mu=0.1)
        answers.append(targets)
    last = list(answers[0])[-1]
    torch.testing.assert_close(answers[1][last], answers[0][last], rtol=1e-6, atol=1e-9)
    assert (answers[2][last] - answers[0][last]).norm() > 1e-3 * answers[0][last].norm()


def test_several_domains_are_measured_as_they_are_mixed():
    """Second moments and mean absolute values are those of ``mix`` of the domains, calibrated on the compressed model."""
    model, domains, seen = tiny_model(dtype=torch.float64), [IDS, token_ids(4, 9, seed=7)], {}

    def replace(name, target, moments):
        seen[name] = moments
        layer = copy.deepcopy(model.get_submodule(name))
        layer.weight.data.copy_(target).mul_(3 if name == Q else 1)
        return layer

    replace_in_order_(model, domains, list(nsvd.targets(model)), replace, mu=0.1)
    mixed = nsvd.mix([nsvd.calibrate(model, ids) for ids in domains])
    for name, moments in seen.items():
        torch.testing.assert_close(moments.G, mixed[name].G, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(moments.mean_abs, mixed[name].mean_abs, rtol=1e-6, atol=1e-9)


def test_both_streams_follow_the_weights_that_the_statistics_were_mixed_with():
    """Whether given with the windows or by mixed statistics; all weight on one domain is that domain alone, others are not."""
    domains, how = [IDS, token_ids(seed=7)], {"method": "kfac", "shifted": True, "ratio": 0.3}

    def factors(stats=None, **more):
        model = tiny_model(dtype=torch.float64)
        nsvd.compress_(model, stats and stats(model), **how, **more)
        return torch.cat([p.flatten() for p in model.parameters()])

    def mixed(weights):
        return lambda model: nsvd.mix([nsvd.calibrate(model, ids) for ids in domains], weights)

    alone = factors(windows=domains[0])
    torch.testing.assert_close(factors(windows=domains, weights=[2, 0]), alone, rtol=1e-5, atol=1e-7)
    for weights in ([3, 1], [1, 1]):
        given = factors(windows=domains, weights=weights)
        assert torch.equal(given, factors(mixed(weights), windows=domains))
        assert (given - alone).norm() > 1e-3 * alone.norm()
    assert torch.equal(given, factors(windows=domains))


@pytest.mark.parametrize("method", ["asvd-1", "kfac"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(method):
    """NaN in an activation of block 1, after block 0 was exchanged: the layer is named, all are put back, no hook stays."""
    model = tiny_model().train()
    stats = nsvd.calibrate(model, IDS).with_gradients(nsvd.fisher(model, IDS))
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    norm.register_forward_hook(lambda _m, _args, y: y * float("nan") if y.shape[1] == IDS.shape[1] else y)  # no others
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.gate_proj holds NaN or Inf"):
        nsvd.compress_(model, stats, windows=IDS, method=method, ratio=0.3, shifted=True)
    assert_same(before, model)


def test_an_interrupt_in_the_middle_does_too(monkeypatch):
    """Whatever is raised, wherever."""
    model, cut, cuts = tiny_model(), nsvd.linalg.Method.cut, []

    def interrupted(self, *args, **options):
        cuts.append(args)
        if len(cuts) == 9:
            raise KeyboardInterrupt
        return cut(self, *args, **options)

    monkeypatch.setattr(nsvd.linalg.Method, "cut", interrupted)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3, shifted=True)
    assert_same(before, model)


@pytest.mark.parametrize("method", ["asvd-1", "nsvd-1", "kfac"])
def test_fewer_tokens_than_channels_leave_no_target_open(method):
    """Every method's targets have a ridge, so that they stay near the weight where nothing was seen; without one they need not."""
    options, ids = {"k1": 0.8} if method == "nsvd-1" else {}, token_ids(1, 8)
    model, dense, targets = tiny_model(), tiny_model(), {}
    nsvd.compress_(model, windows=ids, method=method, ratio=0.3, shifted=True, **options)
    for name, layer in nsvd.targets(dense).items():
        assert model.get_submodule(name).to_linear().weight.norm() < 1.2 * layer.weight.norm()
    with pytest.raises(torch.linalg.LinAlgError, match=r"model\.layers\.0\.self_attn\.q_proj.*singular"):
        replace_in_order_(zero_input(dense), [ids], [Q], exact(dense, targets), mu=0.0)


def zero_input(model: nn.Module) -> nn.Module:
    """The model, its first channel silenced at the first layers."""
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = 0
    return model


def test_layers_outside_the_blocks_are_left_alone():
    """OPT's projections around its blocks are no targets; in the blocks all are compressed, in their order or at once."""
    for how in ({"method": "best"}, {"method": "asvd-1"}):
        model = tiny_model("opt", word_embed_proj_dim=16)
        outside = {
            name: model.get_submodule(f"model.decoder.{name}").weight.clone() for name in ("project_in", "project_out")
        }
        nsvd.compress_(model, windows=IDS, ratio=0.5, **how)
        assert logits(model).isfinite().all()
        assert all(torch.equal(model.get_submodule(f"model.decoder.{n}").weight, W) for n, W in outside.items())
    with pytest.raises(ValueError, match=r"no layer 'model\.decoder\.project_in' to compress"):
        nsvd.compress_(tiny_model("opt", word_embed_proj_dim=16), method="svd", ranks={"model.decoder.project_in": 3})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_that_end_inside_the_block_are_told(family):
    """Where a norm follows the last layer its output is not what the block gives out."""
    model = tiny_model(family)
    names = list(nsvd.targets(model))
    with torch.no_grad(), closing(followed(model, [IDS], names, mu=0.1)) as blocks:
        block = next(blocks)
        next(block.inputs())
        last = [name for name in names if name.startswith("model.layers.0.")][-1]
        assert (last in block.within) == (family == "gemma2")


def test_a_layer_of_zeros_has_the_landmark_of_any_other():
    """Its output is moved by something else than itself."""
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            item = entered(model, IDS)
            here = model.model.layers[0], layer, item.hidden[DENSE], item.calls[0]
            before = landmark(*here)
            for parameter in layer.parameters():
                parameter.zero_()
            assert landmark(*here) is before


def test_stand_ins_are_in_the_mode_of_their_layers():
    """A model that is being trained is so afterwards, with all its parts."""
    model = tiny_model().train()
    nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3, shifted=True)
    assert all(module.training for module in model.modules())


def test_a_model_without_blocks_is_refused():
    """There is no order to go in."""
    with pytest.raises(ValueError, match="no list of blocks"):
        block_list(nn.Sequential(nn.Linear(3, 3)))


def test_shifted_inputs_need_a_text():
    """Statistics alone do not say what the next layer gets."""
    model = tiny_model()
    stats, before = nsvd.calibrate(model, IDS), state(model)
    with pytest.raises(ValueError, match="pass windows="):
        nsvd.compress_(model, stats, method="asvd-1", ratio=0.3, shifted=True)
    assert_same(before, model)


@pytest.mark.parametrize("family", POSITIONS)
def test_parts_that_are_done_run_no_more_and_nothing_changes(family, monkeypatch):
    """The same targets as when every part runs every time, or again after its last layer; fewer passes through the attention."""

    def run():
        model, passes, answers = tiny_model(family, dtype=torch.float64), [], {}
        for name, part in model.named_modules():
            if name.endswith(("attn", "attention")):
                part.register_forward_hook(lambda *_: passes.append(1))
        doubled = exact(model, answers)

        def replace(name, target, moments):
            layer = doubled(name, target, moments)
            layer.weight.data.mul_(1.1)  # an error, so that the streams part
            return layer

        replace_in_order_(model, [IDS, token_ids(4, 9, seed=7)], list(nsvd.targets(model)), replace, mu=0.1)
        return answers, len(passes)

    completed, fewest = run()
    monkeypatch.setattr(module, "completion", lambda *_: nullcontext([]))
    remembered, few = run()
    monkeypatch.setattr(module, "settled_parts", lambda *_: [])
    plain, many = run()
    assert fewest < few < many
    for name, target in plain.items():
        torch.testing.assert_close(remembered[name], target, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(completed[name], target, rtol=1e-9, atol=1e-12)


def test_landmarks_are_found_in_float32(monkeypatch):
    """In bfloat16 rounding hides that two tensors move alike: the same places as in float32; all bits stay."""
    found = {}

    def note(block, layer, hidden, call):
        place = landmark(block, layer, hidden, call)
        names = {m: name for name, m in block.named_modules()} | {None: None}
        found[dtype].append(names[place])
        return place

    monkeypatch.setattr(module, "landmark", note)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(num_hidden_layers=3, dtype=dtype)
        with torch.no_grad():
            for layer in model.model.layers:  # outputs that are small beside the stream they are added to
                layer.self_attn.o_proj.weight.mul_(0.02)
                layer.self_attn.o_proj.bias.zero_()
        found[dtype], before = [], state(model)
        replace_in_order_(
            model, [IDS], list(nsvd.targets(model)), lambda name, *_, m=model: m.get_submodule(name), mu=0.1
        )
        assert_same(before, model)
    assert found[torch.bfloat16] == found[torch.float32]
    assert set(found[torch.float32]) >= {None}


def inputs_of_layers(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The inputs (d_in, n) of layers on ``IDS``."""
    found, handles = {}, []
    for name in names:
        layer = model.get_submodule(name)
        hook = lambda _m, args, name=name: found.update({name: args[0].detach().reshape(-1, args[0].shape[-1]).mT})  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return found


def test_a_layer_that_stays_dense_gets_the_best_weight_for_its_inputs():
    """By normal equations: min ‖W X − B X'‖² / n + λ ‖W − B‖², λ = μ mean(diag G'); where it ends in itself. No parameter more."""
    model, mu = tiny_model("llama", dtype=torch.float64), 0.02
    before = {name: layer.weight.clone() for name, layer in nsvd.targets(model).items()}
    X = inputs_of_layers(model, list(before))
    how = {"method": "ridge", "mu": mu, "shifted": True, "allocation": "spectrum"}
    report = nsvd.compress_(model, windows=IDS, ratio=0.4, **how)
    dense = [
        row.layer for row in report.table.itertuples() if row.dense and not row.layer.endswith(("o_proj", "down_proj"))
    ]
    assert [name for name in dense if ".1." in name]
    Y = inputs_of_layers(model, list(before))
    for name in dense:
        W, x, y = before[name], X[name], Y[name]
        n = x.shape[1]
        G = y @ y.mT / n
        ridge = mu * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
        best = (W @ x @ y.mT / n + W @ ridge) @ torch.linalg.inv(G + ridge)
        torch.testing.assert_close(model.get_submodule(name).weight, best, rtol=1e-8, atol=1e-10)
        assert ".1." not in name or (best - W).abs().max() > 1e-8


def test_layers_that_the_ranks_leave_out_stay_as_they_are():
    model = tiny_model("llama")
    before = {name: layer.weight.clone() for name, layer in nsvd.targets(model).items()}
    nsvd.compress_(model, windows=IDS, method="ridge", ranks={Q: 4}, shifted=True)
    for name, weight in before.items():
        assert name == Q or torch.equal(model.get_submodule(name).weight, weight)


def test_with_the_dense_layers_fitted_the_model_is_closer():
    """At the end of the blocks, on another text than the calibration's."""
    errors, other = [], token_ids(40, seed=11)
    for left_out in (False, True):
        model = tiny_model("llama", dtype=torch.float64)
        dense = logits_of(model, other)
        how = {"method": "kfac", "windows": token_ids(200, seed=5), "shifted": True}
        report = nsvd.compress_(model, ratio=0.15, allocation="fisher", **how)
        if left_out:
            model = tiny_model("llama", dtype=torch.float64)
            ranks = {row.layer: int(row.rank) for row in report.table.itertuples() if not row.dense}
            assert len(ranks) < len(report.table)
            nsvd.compress_(model, ranks=ranks, **how)
        errors.append((logits_of(model, other) - dense).square().mean().item())
    assert errors[0] < errors[1]


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_where_the_last_check_fails_the_fitted_layers_are_put_back_too(monkeypatch):
    model, other = tiny_model("llama"), tiny_model("llama")
    how = {"windows": IDS, "method": "ridge", "shifted": True, "allocation": "spectrum", "ratio": 0.4}
    report = nsvd.compress_(other, **how)
    dense = [row.layer for row in report.table.itertuples() if row.dense]
    assert any(not torch.equal(other.get_submodule(n).weight, model.get_submodule(n).weight) for n in dense)
    before = state(model)

    def fails(*_args):
        raise FloatingPointError("at the end")

    monkeypatch.setattr("nsvd.compression.whole_layers.check_exchanged", fails)
    with pytest.raises(FloatingPointError, match="at the end"):
        nsvd.compress_(model, **how)
    assert_same(before, model)


def test_the_teacher_of_a_distillation_is_the_dense_model(monkeypatch):
    """Fitted layers are put back for it, too."""
    model, taught = tiny_model("llama"), []
    wanted = logits(model)

    def distilled(model, layers, *_args, **_how):
        with exchanged(model, layers):
            taught.append(logits(model))
        return [0.0]

    monkeypatch.setattr("nsvd.compression.exchange.distill_", distilled)
    how = {"windows": IDS, "method": "ridge", "shifted": True, "allocation": "spectrum", "ratio": 0.4}
    nsvd.compress_(model, distill=1, **how)
    torch.testing.assert_close(taught[0], wanted)
