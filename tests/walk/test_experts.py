"""Moments of experts: of the tokens that are routed to each, filled up where these are too few."""

import pytest
import torch

import nsvd
from nsvd.compression import whole_layers
from nsvd.compression.measure import statistics_of
from nsvd.walk.calibrate import _whole
from nsvd.walk.experts import experts_apart
from nsvd.walk.targets import targets
from tests.architectures import built
from tests.tiny import assert_same, state, tiny_model, tiny_tokenizer, token_ids

IDS = token_ids()
EXPERTS = "model.layers.0.mlp.experts"
ALONE = 3  # the expert that no token of the first block reaches


def routed(model, ids=IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the experts of the first block, and which of them each token goes to."""
    seen = []
    hook = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda _m, args: seen.append(args[:2]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return seen[0]


def silence(model) -> None:
    """No token of the first block is routed to the last expert from here on, but to one that it does not go to already."""

    def other(_module, _args, out):
        *rest, index = out
        index = torch.where(index == ALONE, (index.sum(-1, keepdim=True) - 2) % 3, index)
        return (*rest, index)

    model.model.layers[0].mlp.gate.register_forward_hook(other)


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double() / len(x)


def hidden(model, number: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert makes of x before its last layer."""
    experts = model.get_submodule(EXPERTS)
    gate, up = (x @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
    return (experts.act_fn(gate) * up).detach()


@pytest.mark.parametrize("by_block", [True, False])
def test_each_expert_has_the_moments_of_its_own_tokens(by_block):
    """And of all that enter, where it has too few: own ones count as many as they are, the others up to the number of inputs."""
    model = built("mixtral")
    silence(model)
    x, index = routed(model)
    if by_block:
        stats = nsvd.calibrate(model, IDS)
    else:
        with experts_apart(model):
            stats = _whole(model, IDS, list(targets(model)), None, False)
    own = [int((index == number).any(-1).sum()) for number in range(4)]
    assert own[ALONE] == 0
    assert min(own[:ALONE]) > 32
    for number in range(4):
        mine = x[(index == number).any(-1)]
        for layer, values, every in (
            ("gate_up", mine, x),
            ("down", hidden(model, number, mine), hidden(model, number, x)),
        ):
            found, d = stats[f"{EXPERTS}.{number}.{layer}"], every.shape[1]
            share = min(len(values) / d, 1.0)
            wanted = (1 - share) * moment(every) + (share * moment(values) if share else 0)
            torch.testing.assert_close(found.G, wanted, rtol=1e-5, atol=1e-9)
            mean_abs = (1 - share) * every.abs().mean(0) + (share * values.abs().mean(0) if share else 0)
            torch.testing.assert_close(found.mean_abs, mean_abs.double(), rtol=1e-5, atol=1e-9)
            assert found.n == max(len(values), d)


@pytest.mark.parametrize("by_block", [True, False])
def test_experts_that_no_token_reaches_are_counted(by_block):
    """One of four of the first block; the report of a compression says so in words."""
    model = built("mixtral")
    silence(model)
    with experts_apart(model):
        stats = nsvd.calibrate(model, IDS) if by_block else _whole(model, IDS, list(targets(model)), None, False)
    assert stats.origin["experts"] == {"count": 4 * len(model.model.layers), "unreached": 1}
    report = nsvd.compress_(built("mixtral"), stats, method="asvd-1", ratio=0.3)
    assert report.unreached == f"1 of {4 * len(model.model.layers)} experts saw no token; they use the shared moment"


def test_a_model_that_overflows_is_told_of_before_experts_that_no_token_reaches():
    """The text is not to blame."""
    model = built("mixtral")
    silence(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    with experts_apart(model), pytest.raises(FloatingPointError, match="what the model gives out holds NaN or Inf"):
        _whole(model, IDS, list(targets(model)), None, False)


def test_a_short_text_fills_up_both():
    """Eight tokens are fewer than the inputs of any expert: a little of its own, most of all that enter."""
    model = built("mixtral")
    ids = IDS[:1, :8]
    x, index = routed(model, ids)
    stats = nsvd.calibrate(model, ids)
    mine = x[(index == 0).any(-1)]
    assert 0 < len(mine) < 8
    share = len(mine) / 32
    wanted = share * moment(mine) + (1 - share) * moment(x)
    torch.testing.assert_close(stats[f"{EXPERTS}.0.gate_up"].G, wanted, rtol=1e-5, atol=1e-9)


def test_a_layer_is_decomposed_for_the_moment_of_all_where_no_token_reaches_its_expert():
    """What ``decompose`` makes of the weight and that moment stands in the model."""
    model = built("mixtral")
    silence(model)
    x, _ = routed(model)
    W = model.get_submodule(EXPERTS).gate_up_proj[ALONE].detach().clone()
    stats, model = nsvd.calibrate(model, IDS), built("mixtral")
    report = nsvd.compress_(model, stats, method="asvd-1", ratio=0.3, layers="*.experts.*")
    layer = f"{EXPERTS}.{ALONE}.gate_up"
    k = next(row["rank"] for row in report.rows if row["layer"] == layer)
    wanted = nsvd.decompose(W.double(), moment(x), method="asvd-1", k=k).dense()
    torch.testing.assert_close(model.get_submodule(layer).dense().double(), wanted, rtol=0, atol=1e-4)


def test_shared_layers_beside_experts_keep_their_moments():
    """What enters the experts enters the shared expert too, every token once."""
    model = built("qwen2_moe")
    x, _ = routed(model)
    stats = nsvd.calibrate(model, IDS)
    shared = stats["model.layers.0.mlp.shared_expert.gate_proj"]
    assert stats.inputs["model.layers.0.mlp.shared_expert.gate_proj"] == "model.layers.0.mlp.shared_expert.gate_proj"
    assert shared.n == IDS.numel()
    torch.testing.assert_close(shared.G, moment(x), rtol=1e-5, atol=1e-9)


def test_statistics_given_are_those_taken():
    """``calibrate`` before, and windows: the same model, to the bit. ``prepare`` decomposes the experts, too."""
    made = []
    for how in ("windows", "stats", "prepared"):
        model = built("qwen3_moe")
        stats = None if how == "windows" else nsvd.calibrate(model, IDS)
        more = {"windows": IDS} if stats is None else {}
        more |= {"prepared": nsvd.prepare(model, stats, "asvd-1")} if how == "prepared" else {}
        nsvd.compress_(model, stats, method="asvd-1", ratio=0.3, **more)
        made.append(model.state_dict())
    for other in made[1:]:
        assert other.keys() == made[0].keys()
    assert all(torch.equal(value, made[0][key]) for key, value in made[1].items())
    for key, value in made[2].items():
        torch.testing.assert_close(value, made[0][key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("allocation", ["spectrum", "strs"])
def test_ranks_are_found_for_experts_of_two_texts(allocation):
    """Moments of both are mixed, and every expert gets a rank of its own."""
    texts = [IDS, token_ids(4, 16, seed=5)]
    model = built("mixtral")
    report = nsvd.compress_(model, windows=texts, method="asvd-1", allocation=allocation, ratio=0.3)
    ranks = {row["rank"] for row in report.rows if ".experts." in row["layer"]}
    assert report.ratio_reached >= 0.3
    assert report.blocks_covered > 0.9
    assert len(ranks) > 1


@pytest.mark.parametrize("options", [{"method": "best"}, {"method": "kfac"}, {"method": "asvd-1", "shifted": True}])
def test_what_follows_inputs_or_asks_for_gradients_leaves_experts_dense(options):
    """And says so: the share of the blocks, and what was left alone."""
    model = built("mixtral")
    kept = model.get_submodule(EXPERTS).gate_up_proj
    report = nsvd.compress_(model, windows=IDS, ratio=0.3, **options)
    assert model.get_submodule(EXPERTS).gate_up_proj is kept
    assert report.blocks_covered < 0.2
    assert next(iter(report.left_alone)) == "model.layers.*.mlp.experts.gate_up_proj"


def test_experts_are_what_they_were_when_something_raises(monkeypatch):
    """The parameters themselves."""
    model = built("mixtral")
    before, kept = state(model), dict(model.named_parameters())

    def fail(*_):
        raise ValueError("not this one")

    monkeypatch.setattr(whole_layers, "check_exchanged", fail)
    with pytest.raises(ValueError, match="not this one"):
        nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3)
    assert_same(before, model)
    assert all(p is kept[name] for name, p in model.named_parameters())


def test_worst_case_weights_of_statistics_are_those_of_the_request():
    """``mix`` looks at the experts, too, of a model in which they are whole."""
    texts = [IDS, token_ids(seed=5)]
    model = built("mixtral")
    each = [nsvd.calibrate(model, ids) for ids in texts]
    told = nsvd.mix(each, "worst-case", model=model, ratio=0.4).origin["weights"]
    asked = statistics_of(model, texts, "worst-case", ratio=0.4).origin["weights"]
    assert told == pytest.approx(asked, abs=1e-6)
    with experts_apart(model):
        assert nsvd.mix(each, "worst-case", model=model, ratio=0.4).origin["weights"] == pytest.approx(told, abs=1e-6)


def test_a_folder_with_experts_takes_a_cache_of_latents_and_weights(tmp_path):
    """The statistics that serve both hold the experts; the weights are those of the texts that are given."""
    nsvd.save(built("mixtral"), tiny_tokenizer(), tmp_path / "m")
    texts = [IDS, token_ids(seed=5)]
    how = {"method": "asvd-1", "ratio": 0.4, "windows": texts, "weights": [1.0, 2.0]}
    report = nsvd.compress(tmp_path / "m", tmp_path / "low", **how)
    both = nsvd.compress(tmp_path / "m", tmp_path / "both", cache_ratio=0.5, **how)
    assert report.blocks_covered > 0.9
    assert both.blocks_covered > 0.9
    for wrong in (IDS[0], [IDS, IDS[0]]):
        with pytest.raises(ValueError, match="windows"):
            nsvd.compress(tmp_path / "m", tmp_path / "none", method="asvd-1", ratio=0.4, windows=wrong)
    assert not (tmp_path / "none").exists()


def test_a_model_without_experts_is_not_touched():
    """Not a module, not a hook, not a number; each block reads the text once for its moments."""
    model = tiny_model()
    before, kept, calls = state(model), dict(model.named_parameters()), []
    with experts_apart(model):
        assert_same(before, model)
        assert all(p is kept[name] for name, p in model.named_parameters())
    model.model.layers[0].register_forward_hook(lambda _m, args, _out: calls.append(args[0].shape[0]))
    nsvd.calibrate(model, IDS)
    assert calls.count(len(IDS)) == 1
