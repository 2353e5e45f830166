"""``compress_`` puts the factors of ``decompose`` where the layers were, reports what is there, or changes nothing."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nsvd
from nsvd import own_text
from nsvd.compression import compress
from nsvd.linalg import Method, rank_for_ratio
from nsvd.stored.files import fingerprint
from nsvd.walk.experts import experts_apart
from nsvd.walk.sampling import OPENING
from tests.linalg.reference import MATRIX
from tests.tiny import (
    DOWN,
    K1,
    K,
    Q,
    assert_refused,
    assert_same,
    compressed,
    logits,
    poison,
    state,
    statistics,
    tiny_model,
    token_ids,
)

OPTIONS = {"nsvd-1": {"k1": K1}, "nsvd-2": {"k1": K1}, "nid-1": {"k1": K1}, "nid-2": {"k1": K1}}
IDS = token_ids()


@pytest.fixture(scope="module")
def stats():
    """Moments and gradients of the tiny LLaMA, which every test builds anew."""
    return statistics(tiny_model(dtype=torch.float32), IDS)


def held(model: nn.Module) -> dict[str, nn.Module]:
    """What stands now where the targets were."""
    return {name: model.get_submodule(name) for name in nsvd.targets(tiny_model())}


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the low-rank layers."""
    return {name: t for name, t in model.state_dict().items() if ".down." in name or ".up." in name}


def assert_equal_tensors(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)


def relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    return (error.square().sum() / whole.square().sum()).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MATRIX)
def test_every_layer_holds_what_decompose_gives(method, dtype):
    """From the same W and moments, in float64, cast once to the model's dtype; biases are kept."""
    model = tiny_model(dtype=dtype)
    stats, options = statistics(model, IDS), OPTIONS.get(method, {})
    dense = copy.deepcopy(model)
    nsvd.compress_(model, stats, method=method, ratio=0.3, **options)
    for name, layer in nsvd.targets(dense).items():
        W, k = layer.weight.detach(), rank_for_ratio(*layer.weight.shape, 0.3)
        G, mean_abs, H = stats[name].G, stats[name].mean_abs, stats[name].H
        expected = nsvd.decompose(W, G, mean_abs=mean_abs, H=H, method=method, k=k, **options)
        new = model.get_submodule(name)
        assert new.rank == k
        assert torch.equal(new.up.weight, expected.left)
        assert torch.equal(new.down.weight, expected.right)
        assert torch.equal(new.up.bias, layer.bias)
        assert new.up.weight.dtype == dtype
        product = expected.left.float() @ expected.right.float()
        assert torch.equal(new.to_linear().weight, product.to(dtype))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_says_what_is_really_held(ratio, dtype, stats):
    """Parameters, bytes, ranks and the ratio are those of the tensors in the model; no less is removed than was asked."""
    model = tiny_model(dtype=dtype)
    before = sum(layer.weight.numel() for layer in nsvd.targets(model).values())
    report = nsvd.compress_(model, stats, method="asvd-1", ratio=ratio)
    weights = [p for layer in held(model).values() for name, p in layer.named_parameters() if "bias" not in name]
    assert report.params_before == before
    assert report.params_after == sum(p.numel() for p in weights) == report.table.params.sum()
    assert report.bytes_before == before * dtype.itemsize
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in weights)
    assert report.ratio == ratio
    assert report.ratio_reached == 1 - report.params_after / before >= ratio
    rows = report.table.set_index("layer")
    assert list(rows.index) == list(held(model))
    for name, layer in held(model).items():
        row = rows.loc[name]
        assert (row["rank"], row.d_out, row.d_in) == (layer.rank, layer.out_features, layer.in_features)
        assert row.params == layer.rank * (layer.out_features + layer.in_features)
        assert not row.dense


def test_the_reported_errors_are_those_of_the_factors(stats):
    """‖W − Ŵ‖ / ‖W‖ and ‖(W − Ŵ) X‖ / ‖W X‖, the latter here from the inputs themselves."""
    model, dense = tiny_model(), tiny_model()
    report = nsvd.compress_(model, stats, ratio=0.3, k1=K1)
    inputs: dict[str, list] = {Q: [], DOWN: []}
    for name, seen in inputs.items():
        dense.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        dense(input_ids=IDS)
    rows = report.table.set_index("layer")
    for name, seen in inputs.items():
        W = dense.get_submodule(name).weight.detach().double()
        error, X = W - held(model)[name].to_linear().weight.double(), seen[0].flatten(0, 1).mT.double()
        assert rows.loc[name].weight_error == pytest.approx(relative(error, W), rel=1e-4)
        assert rows.loc[name].calibration_error == pytest.approx(relative(error @ X, W @ X), rel=1e-4)


def test_the_report_carries_what_made_it(stats):
    """Method, options with their defaults, versions, seconds by stage, peak memory; all but the table is JSON."""
    report = nsvd.compress_(tiny_model(), stats, method="ridge", ratio=0.3)
    assert (report.method, report.options) == ("ridge", {"mu": 0.1})
    assert {"nsvd", "torch", "transformers", "python"} <= report.versions.keys()
    assert {"decompose", "cut", "errors", "exchange"} <= report.seconds.keys()
    assert report.peak_memory > 0
    about = json.loads(json.dumps(report.as_dict()))
    assert about["ratio_reached"] == report.ratio_reached
    assert "table" not in about


def test_ratio_zero_leaves_every_layer_dense(stats):
    """Nothing to remove, nothing done: the model is what it was and can still be compressed."""
    model = tiny_model()
    before = state(model)
    report = nsvd.compress_(model, stats, ratio=0)
    assert_same(before, model)
    assert report.table.dense.all()
    assert report.table["rank"].isna().all()
    assert (report.ratio_reached, report.params_after) == (0, report.params_before)
    assert nsvd.compress_(model, stats, ratio=0.3, k1=K1).ratio_reached >= 0.3


def test_a_rank_above_break_even_stays_dense_and_is_reported_so(stats):
    """16 · (32 + 32) is no less than 32 · 32; one rank below is."""
    model, weight = tiny_model(), tiny_model().get_parameter(f"{Q}.weight")
    report = nsvd.compress_(model, stats, method="asvd-1", ranks={Q: 16, DOWN: 19})
    rows = report.table.set_index("layer")
    assert rows.dense.drop(DOWN).all()
    assert rows.loc[Q, "rank"] == 16
    assert not rows.dense[DOWN]
    assert torch.equal(model.get_submodule(Q).weight, weight)
    assert report.params_before - report.params_after == 32 * 48 - 19 * (32 + 48)
    assert report.ratio is None


def test_layers_that_are_not_named_stay_dense_and_need_no_statistics():
    """With ``ranks`` the moments of the named layers are enough."""
    model = tiny_model()
    stats = nsvd.calibrate(model, IDS, layers=[DOWN])
    nsvd.compress_(model, stats, method="asvd-1", ranks={DOWN: 5})
    assert [name for name, layer in held(model).items() if isinstance(layer, nsvd.LowRankLinear)] == [DOWN]
    with pytest.raises(ValueError, match=f"hold no layer {Q}"):
        nsvd.compress_(tiny_model(), stats, method="asvd-1", ratio=0.3)


def test_windows_stand_in_for_statistics(stats):
    """``windows=`` calibrates on the way; the seconds of that are told apart."""
    with_stats, with_windows = tiny_model(), tiny_model()
    nsvd.compress_(with_stats, stats, ratio=0.3, k1=K1)
    report = nsvd.compress_(with_windows, windows=IDS, ratio=0.3, k1=K1)
    assert_equal_tensors(factors(with_stats), factors(with_windows))
    assert report.seconds["calibrate"] > 0


def test_the_plain_svd_needs_neither_statistics_nor_text():
    """SVD does not look at the inputs; ASVD-III does, though its answer is the same."""
    model = tiny_model()
    report = nsvd.compress_(model, method="svd", ratio=0.3)
    assert "calibration_error" not in report.table
    with pytest.raises(ValueError, match="ASVD-III needs statistics"):
        nsvd.compress_(tiny_model(), method="asvd-3", ratio=0.3)


@pytest.mark.parametrize(
    ("outer", "method", "options"),
    [
        ("asvd-1", "asvd-1", {}),
        ("asvd-1", "nsvd-1", {"k1": 0.6}),
        ("asvd-1", "nsvd-1", {"k1": 0.8}),
        ("nsvd-1", "nid-1", {"k1": 0.8}),
        ("asvd-2", "nsvd-2", {"k1": 1.0}),
        ("svd", "svd", {}),
    ],
)
def test_one_preparation_serves_every_ratio_every_k1_and_every_inner_step(outer, method, options, stats):
    """What ``prepare`` returned gives the same bits as a decomposition from scratch."""
    prepared = nsvd.prepare(tiny_model(), stats, outer)
    for ratio in (0.2, 0.5):
        ours, theirs = tiny_model(), tiny_model()
        nsvd.compress_(ours, stats, method=method, ratio=ratio, prepared=prepared, **options)
        nsvd.compress_(theirs, stats, method=method, ratio=ratio, **options)
        assert_equal_tensors(factors(ours), factors(theirs))


def test_prepare_takes_the_options_of_the_outer_step(stats):
    """α belongs to it, and a preparation with another α is another one."""
    prepared = nsvd.prepare(tiny_model(), stats, "asvd", alpha=1.0)
    ours, theirs, other = tiny_model(), tiny_model(), tiny_model()
    nsvd.compress_(ours, stats, method="asvd", ratio=0.3, alpha=1.0, prepared=prepared)
    nsvd.compress_(theirs, stats, method="asvd", ratio=0.3, alpha=1.0)
    nsvd.compress_(other, stats, method="asvd", ratio=0.3, alpha=0.5)
    assert_equal_tensors(factors(ours), factors(theirs))
    assert not torch.equal(factors(ours)[f"{Q}.up.weight"], factors(other)[f"{Q}.up.weight"])


@pytest.mark.parametrize(
    ("made", "used", "message"),
    [
        ({"method": "asvd-0"}, {"method": "asvd-1"}, "prepared is for step asvd_0, but ASVD-I asks for step asvd_1"),
        (
            {"method": "asvd"},
            {"method": "asvd", "alpha": 1.0},
            r"step asvd, alpha 0\.5, but ASVD asks for step asvd, alpha 1\.0",
        ),
        ({"method": "ridge"}, {"method": "kfac"}, "step ridge, mu 0.1, but K-FAC asks for step kfac"),
        ({"method": "sola", "keep_outer": 0}, {"method": "sola", "keep_outer": 1}, "keep_outer 0.* keep_outer 1"),
        ({"method": "asvd-1"}, {"method": "asvd-1", "allocation": "spectrum", "seed": 1}, "for other weights"),
        ({"method": "svd"}, {"method": "svd", "seed": 1}, "for other weights"),
        ({"method": "nsvd-1", "text": 5}, {"method": "nid-1"}, "for other statistics"),
        ({"method": "asvd-0", "text": 5}, {"method": "asvd-0", "allocation": "spectrum"}, "for other statistics"),
        (None, {"method": "asvd-1"}, r"prepared is a dict, but what prepare\(\) returns is wanted"),
    ],
)
def test_what_was_prepared_for_something_else_is_refused(made, used, message, stats):
    """Another outer step or option, other weights, other statistics: the model is as it was."""
    prepared, used = {}, dict(used)
    model = tiny_model(seed=used.pop("seed", 0))
    if made is not None:
        made = dict(made)
        source = statistics(tiny_model(), token_ids(seed=made.pop("text"))) if "text" in made else stats
        prepared = nsvd.prepare(tiny_model(), source, **made)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_(model, stats, ratio=0.2, prepared=prepared, **used)
    assert_same(before, model)
    if used["method"] == "asvd-1":
        with pytest.raises(ValueError, match=r"prepared (is|was made) "):
            nsvd.sensitivity(model, stats, IDS, method="asvd-1", prepared=prepared or nsvd.prepare(model, stats, "svd"))


MOE = {"intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {
    "mixtral": MOE | {"num_local_experts": 4},
    "qwen3_moe": MOE
    | {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    "gpt_oss": MOE | {"num_local_experts": 4, "head_dim": 8},
    "llama": {},
}


@pytest.mark.parametrize("method", ["asvd-1", "kfac"])
@pytest.mark.parametrize("family", EXPERTS)
def test_the_report_tells_the_share_of_the_whole_model_and_what_was_left_alone(family, method):
    """Experts are not compressed where gradients are asked for: half of the layers may be a twentieth of the model."""
    model = tiny_model(family, **EXPERTS[family])
    before = model.num_parameters()
    with experts_apart(model) if method == "asvd-1" else nullcontext():
        layers = {id(p) for layer in nsvd.targets(model).values() for p in layer.parameters()}
        rest = sum(p.numel() for p in model.parameters() if id(p) not in layers)
    report = nsvd.compress_(model, windows=IDS, method=method, ratio=0.5)
    after = model.num_parameters()
    assert (report.model_params_before, report.model_params_after) == (before, after)
    assert report.model_ratio_reached == pytest.approx(1 - after / before)
    assert sum(report.left_alone.values()) == rest
    assert list(report.left_alone.values()) == sorted(report.left_alone.values(), reverse=True)
    if family != "llama" and method == "kfac":
        assert report.model_ratio_reached < 0.2 < 0.5 <= report.ratio_reached
        assert next(iter(report.left_alone)).startswith("model.layers.*.mlp.experts.")
    else:
        assert report.blocks_covered > 0.9
        assert not any(".experts." in name for name in report.left_alone)
    assert model.config.quantization_config.model_ratio_reached == report.model_ratio_reached


def test_the_report_tells_which_text_served_what(stats):
    """Given statistics say what they are of; the text that gradients, targets, search and distillation saw is told beside it."""
    sampled = nsvd.compress_(tiny_model(), nsvd.calibrate(tiny_model(), IDS), method="best", ratio=0.3)
    assert sampled.calibration["windows"] == list(IDS.shape)
    assert set(sampled.texts) == {"gradients", "targets"}
    assert {text["source"] for text in sampled.texts.values()} == {"sampled from the model"}
    assert sampled.texts["targets"]["windows"] == [[128, 32]]
    given = nsvd.compress_(tiny_model(), stats, method="kfac", ratio=0.3, windows=IDS, shifted=True, distill=1)
    assert set(given.texts) == {"targets", "distillation"}  # the statistics brought their gradients
    assert given.texts["targets"] == {
        "windows": [list(IDS.shape)],
        "fingerprints": [fingerprint([IDS])],
    }
    searched = nsvd.compress_(tiny_model(), stats, method="svd", ratio=0.3, windows=IDS, allocation="strs")
    assert set(searched.texts) == {"search"}
    assert nsvd.compress_(tiny_model(), stats, method="asvd-1", ratio=0.3).texts == {}
    json.dumps(sampled.as_dict())


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("best", {"distill": 1}),
        ("asvd-1", {"shifted": True, "refine": 1}),
        ("asvd-1", {"allocation": "strs"}),
        ("asvd-1", {"weights": "worst-case"}),
        ("sola", {}),
        ("svd", {}),
    ],
)
def test_nothing_to_remove_needs_no_text(method, more, monkeypatch):
    """Neither sampled nor read, whatever else is asked for: the model is what it was."""

    def costly(*_args, **_how):
        raise AssertionError("something was computed")

    for name in ("own_text", "take_statistics"):
        monkeypatch.setattr(compress, name, costly)
    model = tiny_model()
    before = state(model)
    report = nsvd.compress_(model, method=method, ratio=0, **more)
    assert_same(before, model)
    assert (report.ratio_reached, report.model_ratio_reached, report.table.dense.all()) == (0, 0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nsvd-9", "ratio": 0.3}, r"unknown method 'nsvd-9'; the methods are svd, .*nsvd-1"),
        ({"method": "asvd-1", "ratio": 0.3, "k1": 0.9}, r"ASVD-I has no option k1"),
        ({"ratio": 0.3, "alpha": 0.5}, r"NSVD-I has no option alpha \(its options: k1\)"),
        ({"ratio": 1.0}, r"ratio is 1\.0.*\[0, 1\)"),
        ({"ratio": -0.1}, r"ratio is -0\.1"),
        ({"ratio": float("nan")}, r"ratio is nan"),
        ({"ratio": 0.3, "k1": 1.5}, r"k1 is 1\.5"),
        ({"ratio": 0.3, "k1": -0.5}, r"k1 is -0\.5"),
        ({"ratio": 0.3, "k1": 0.01}, rf"layer {Q}: k1 = 0\.01 of rank 11 rounds k1 to 0"),
        ({"ratio": 0.3, "k1": 0.95}, rf"layer {K}: k1 = 0\.95 of rank 7 rounds k2 to 0"),  # q_proj had been done
        ({"ratio": 0.97}, rf"layer {Q}: ratio 0\.97 leaves rank 0"),
        ({"method": "ridge", "ratio": 0.3, "mu": -1.0}, r"mu is -1\.0, but a ridge is not negative"),
        ({}, r"either ratio or ranks"),
        ({"ratio": 0.3, "ranks": {Q: 3}}, r"either ratio or ranks"),
        ({"ranks": {"model.nothing": 3}}, r"no layer 'model\.nothing'.*the model has model\.layers\.0"),
        ({"ranks": {Q: 0}}, rf"layer {Q}: rank 0 is not in 1 … 32"),
        ({"ranks": {Q: 33}}, rf"layer {Q}: rank 33"),
        ({"ratio": 0.3, "weights": "best"}, r"unknown weights 'best'; there are uniform, worst-case, or a number"),
        ({"ratio": 0.3, "windows": [IDS, IDS], "weights": [1, 2, 3]}, r"2 domains and the weights \[1, 2, 3\]"),
        ({"ratio": 0.3, "windows": [IDS, IDS], "weights": [2, 1]}, r"statistics that are given are mixed already"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_changed(arguments, message, stats):
    """One ``ValueError`` that names the layer where there is one; tensors, layers, marks and hooks stay."""
    assert_refused(tiny_model(), stats, arguments, message)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model("opt"), r"hold no layer model\.layers\.0\.self_attn\.q_proj.*another model"),
        (lambda: tiny_model(num_hidden_layers=1), r"hold no layer model\.layers\.1"),
        (
            lambda: tiny_model(hidden_size=64),
            r"layer model\.layers\.0\.self_attn\.q_proj has 32 inputs, the statistics 64",
        ),
    ],
)
def test_statistics_of_another_model_are_refused(other, message):
    """By name or by size, whatever differs first."""
    model, stats = tiny_model(), nsvd.calibrate(other(), IDS)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_(model, stats, ratio=0.3, k1=K1)
    with pytest.raises(ValueError, match=message):
        nsvd.prepare(model, stats, "asvd-1")
    assert_same(before, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["svd", "nsvd-1"])
def test_nan_in_a_weight_names_the_layer_and_changes_nothing(method, value, stats):
    """Also when the statistics are sound, and before any text is run through the model."""
    model = tiny_model()
    poison(model, f"{DOWN}.weight", value=value)
    before = state(model)
    for source in ({"stats": stats}, {"windows": IDS}):
        with pytest.raises(ValueError, match=f"weight of layer {DOWN} holds NaN or Inf"):
            nsvd.compress_(model, method=method, ratio=0.3, **source)
    with pytest.raises(ValueError, match=DOWN):
        nsvd.prepare(model, stats, method)
    assert_same(before, model)


@pytest.mark.parametrize("method", ["svd", "asvd-1", "sola", "best"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", f"{Q}.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_any_parameter_is_named(name, method, value):
    """In a norm, in the row of a token that no text holds, in a bias: before any work, and the model is as it was."""
    model = tiny_model(hidden_size=64)
    poison(model, name, -1, value)
    before = state(model)
    with pytest.raises(ValueError, match=f"the parameter {name} holds NaN or Inf"):
        nsvd.compress_(model, windows=IDS, method=method, ratio=0.3)
    assert_same(before, model)


@pytest.mark.parametrize("letter", ["G", "mean_abs", "H"])
@pytest.mark.parametrize("method", ["asvd-1", "asvd-0", "nsvd-1", "ridge", "kfac", "svd", "sola"])
def test_nan_in_a_moment_is_named(method, letter):
    """Of every layer that is compressed, whatever the method looks at: what is not computed with is reported."""
    model = tiny_model()
    found = statistics(model, IDS)
    {"G": found.moments[Q].G, "mean_abs": found.moments[Q].mean_abs, "H": found.gradients[Q]}[letter][3] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=f"{letter} of layer {Q} in the statistics holds NaN or Inf"):
        nsvd.compress_(model, found, method=method, ratio=0.3)
    assert_same(before, model)


@pytest.mark.parametrize("method", ["svd", "asvd-1", "sola"])
def test_factors_that_overflow_the_model_s_dtype_are_named(method):
    """Weights near the end of float16 are finite; their plain factors, √n times as large, are not."""
    model = tiny_model(dtype=torch.float16, hidden_size=64)
    model.get_submodule(K).weight.data.fill_(6e4)
    model.model.layers[0].input_layernorm.weight.data.zero_()  # so that the dense model itself is sound
    before, found = state(model), statistics(tiny_model(hidden_size=64), IDS)
    how = {"keep_outer": 0, "grid": 1} if method == "sola" else {}
    with pytest.raises(FloatingPointError, match=f"layer {K}: down.weight of its low-rank factors.* in float16"):
        nsvd.compress_(model, found, method=method, ratio=0.3, **how)
    assert_same(before, model)


def test_nan_in_a_buffer_is_named():
    """A mask may hold Inf, nothing may hold NaN."""
    model = tiny_model()
    model.model.rotary_emb.inv_freq[0] = float("nan")
    with pytest.raises(ValueError, match=r"the buffer model\.rotary_emb\.inv_freq holds NaN"):
        nsvd.compress_(model, method="svd", ratio=0.3)


@pytest.mark.parametrize("source", [{"method": "svd"}, {"method": "asvd-1", "windows": IDS}])
def test_inf_in_the_output_of_the_last_layer_is_named(source):
    """No layer reads it, and all weights are finite."""
    model = tiny_model()
    model.get_submodule(DOWN).weight.data[3] = 3e38
    model.get_submodule(DOWN.replace("down", "up")).weight.data *= 1e4
    before = state(model)
    with pytest.raises(FloatingPointError, match=f"it begins in the output of {DOWN}"):
        nsvd.compress_(model, ratio=0.3, **source)
    assert_same(before, model)


def test_nan_in_an_activation_changes_nothing():
    """Not on the eight tokens that are tried before any work, but on the ``windows``: the error of ``calibrate``."""
    model = tiny_model()
    norm = model.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda _m, _args, y: y * float("nan") if y.shape[1] == IDS.shape[1] else y)
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"layer model\.layers\.1\.self_attn\.q_proj"):
        nsvd.compress_(model, windows=IDS, ratio=0.3, k1=K1)
    assert_same(before, model)


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_a_layer_of_zeros_is_met_exactly(factors, stats):
    """Its errors are 0, whatever the ranks come from."""
    for how in (
        {"method": "svd"},
        {"method": "asvd-1", "allocation": "spectrum"},
        {"method": "kfac", "allocation": "fisher"},
    ):
        model = tiny_model()
        model.get_submodule(DOWN).weight.data.zero_()
        report = nsvd.compress_(model, stats, ratio=0.3, factors=factors, windows=IDS, **how)
        row = report.table.set_index("layer").loc[DOWN]
        assert row.get("weight_error", 0.0) == 0 or row.dense
        assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    "part", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
def test_a_layer_of_zeros_does_not_stop_the_best_recipe(part):
    """Its neighbours see no input, or the loss does not see their outputs: they and the layer take the smallest rank."""
    model = tiny_model(attention_bias=False, mlp_bias=False)
    zero = f"model.layers.0.{part}"
    model.get_submodule(zero).weight.data.zero_()
    report = nsvd.compress_(model, method="best", ratio=0.3, windows=IDS)
    row = report.table.set_index("layer").loc[zero]
    assert (row["rank"], row.weight_error) == (1, 0)
    assert report.ratio_reached >= 0.3


def test_a_failure_in_the_last_layer_leaves_the_first_one_alone(stats, monkeypatch):
    """All layers are decomposed before one is exchanged: whatever is raised, even an interrupt."""
    model, cut, cuts = tiny_model(), Method.cut, []

    def interrupted(self, *args, **options):
        cuts.append(args)
        if len(cuts) == 14:
            raise KeyboardInterrupt
        return cut(self, *args, **options)

    monkeypatch.setattr(Method, "cut", interrupted)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        nsvd.compress_(model, stats, ratio=0.3, k1=K1)
    assert_same(before, model)


def test_compressing_twice_is_refused(stats):
    """A compressed model says so, read again or not; dequantised it is a dense model like any other."""
    model = compressed(tiny_model())
    before = state(model)
    with pytest.raises(ValueError, match=r"compressed already; dequantize\(\)"):
        nsvd.compress_(model, stats, ratio=0.5, k1=K1)
    assert_same(before, model)
    report = nsvd.compress_(model.dequantize(), stats, ratio=0.5, k1=K1)
    assert report.ratio_reached >= 0.5


def test_full_rank_compression_leaves_the_outputs_unchanged(stats):
    """Factors of rank min(d_out, d_in) are W itself, for every method; the layer's mode and gradients are kept."""
    model = tiny_model()
    said = logits(model)
    for method in MATRIX:
        full = copy.deepcopy(model)
        full.get_submodule(Q).weight.requires_grad_(False)
        full.get_submodule(DOWN).train()
        for name, layer in nsvd.targets(full).items():
            k, moments = min(layer.weight.shape), stats[name]
            options = {"k1": 0.5} if name.endswith("q_proj") and method in OPTIONS else {}
            value = nsvd.decompose(
                layer.weight.detach(), moments.G, mean_abs=moments.mean_abs, H=moments.H, method=method, k=k, **options
            )
            full.set_submodule(name, nsvd.LowRankLinear.from_factors(layer, value))
        torch.testing.assert_close(logits(full), said, rtol=0, atol=1e-5)
        assert not full.get_submodule(Q).up.weight.requires_grad
        assert full.get_submodule(K).up.weight.requires_grad
        assert full.get_submodule(DOWN).training


def test_a_lower_rank_does_change_the_outputs(stats):
    """… so that the test above can fail."""
    assert not torch.allclose(logits(compressed(tiny_model(), ratio=0.3)), logits(tiny_model()), atol=1e-2)


def test_a_float64_model_is_dequantised_in_float64():
    """Nothing is rounded to float32 on the way."""
    model = compressed(tiny_model(dtype=torch.float64))
    said = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), said, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_counts_the_pivoted_tensors_that_are_saved(ratio, dtype, stats, tmp_path):
    """Of every layer k (d_out + d_in − k) numbers: what lies in the file, biases and the order of the outputs left out."""
    model = tiny_model(dtype=dtype)
    report = nsvd.compress_(model, stats, method="asvd-1", ratio=ratio, factors="pivoted")
    nsvd.save(model, None, tmp_path / "low")
    stored = load_file(tmp_path / "low" / "model.safetensors")
    weights = {name: t for name, t in stored.items() if name.endswith((".up.weight", ".down.weight"))}
    assert report.params_after == sum(t.numel() for t in weights.values()) == report.table.params.sum()
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in weights.values())
    assert report.ratio_reached >= ratio
    for row in report.table.itertuples():
        assert row.params == row.rank * (row.d_out + row.d_in - row.rank)
        assert row.rank == rank_for_ratio(row.d_out, row.d_in, ratio, "pivoted")
    plain = nsvd.compress_(tiny_model(), stats, method="asvd-1", ratio=ratio)
    more = report.table["rank"] > plain.table["rank"]
    assert more.any()
    assert more.all() or ratio == 0.8  # k² is little where k is
    assert (report.table.weight_error < plain.table.weight_error)[more].all()


def test_a_rank_too_large_for_plain_factors_may_fit_pivoted_ones(stats):
    """Rank 20 of 32 × 32: 1280 numbers in two factors, 880 in the pivoted form."""
    model = tiny_model()
    report = nsvd.compress_(model, stats, method="asvd-1", ranks={Q: 20, DOWN: 32}, factors="pivoted")
    rows = report.table.set_index("layer")
    assert isinstance(model.get_submodule(Q), nsvd.PivotedLinear)
    assert rows.loc[Q, "params"] == 880
    assert rows.dense.drop(Q).all()
    assert nsvd.compress_(tiny_model(), stats, method="asvd-1", ranks={Q: 20}).table.dense.all()


def test_the_best_recipe_is_its_ingredients():
    """``best`` on a text is ``kfac``, ``fisher``, ``pivoted``, ``shifted`` and ``neurons``, to the bit; the report says so."""
    ours, theirs = tiny_model(), tiny_model()
    report = nsvd.compress_(ours, method="best", ratio=0.3, windows=IDS)
    how = {"allocation": "fisher", "factors": "pivoted", "shifted": True, "neurons": 0.45, "mu": 0.3}
    spelt = nsvd.compress_(theirs, method="kfac", ratio=0.3, windows=IDS, **how)
    assert_equal_tensors(ours.state_dict(), theirs.state_dict())
    told = ("allocation", "factors", "shifted", "neurons", "options", "ratio_reached")
    assert [getattr(report, name) for name in told] == [getattr(spelt, name) for name in told]
    assert (report.method, spelt.method) == ("best", "kfac")
    assert (report.allocation, report.factors, report.shifted) == ("fisher", "pivoted", True)
    assert (report.neurons, report.options) == (0.45, {"mu": 0.3, "eta": 0.03})
    about = ours.config.quantization_config.to_dict()
    assert [about[name] for name in ("method", "allocation", "factors", "shifted")] == [
        "best",
        "fisher",
        "pivoted",
        True,
    ]
    assert {"calibrate", "gradients", "decompose", "search", "follow", "cut", "errors"} <= report.seconds.keys()
    assert "sample" not in report.seconds
    assert json.loads(json.dumps(report.as_dict()))["shifted"] is True


@pytest.mark.parametrize(
    "change",
    [{"allocation": "uniform"}, {"factors": "plain"}, {"shifted": False}, {"neurons": 0.0}, {"mu": 0.1}, {"eta": 0.5}],
)
def test_every_ingredient_of_a_recipe_can_be_changed(change):
    """One at a time: the report says it, and the model is another."""
    best, other = tiny_model(), tiny_model()
    nsvd.compress_(best, method="best", ratio=0.3, windows=IDS)
    report = nsvd.compress_(other, method="best", ratio=0.3, windows=IDS, **change)
    ((name, value),) = change.items()
    assert (report.options[name] if name in report.options else getattr(report, name)) == value
    assert report.ratio_reached >= 0.3
    assert not torch.equal(logits(other), logits(best))


def test_a_recipe_with_given_ranks_does_not_search():
    """The ranks are those given, everything else is the recipe's."""
    model = tiny_model()
    report = nsvd.compress_(model, method="best", ranks={Q: 9, DOWN: 9}, windows=IDS)
    assert (report.allocation, report.factors, report.shifted, report.ratio) == ("given", "pivoted", True, None)
    assert [name for name, layer in held(model).items() if isinstance(layer, nsvd.PivotedLinear)] == [Q, DOWN]


def test_the_best_recipe_needs_no_text_and_follows_the_seed():
    """It samples its own from the model; the same seed gives the same bits, another seed another model."""
    said = []
    for seed in (0, 0, 1):
        model = tiny_model()
        report = nsvd.compress_(model, method="best", ratio=0.3, seed=seed)
        assert report.seconds["sample"] > 0
        assert report.ratio_reached >= 0.3
        said.append(logits(model))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_the_model_s_own_windows_fit_it():
    """As many as asked for, half as long as the model allows."""
    assert own_text(tiny_model(), count=3).shape == (3, 32)
    assert own_text(tiny_model(max_position_embeddings=8), count=2).shape == (2, 4)
    said = nsvd.sample(tiny_model(), 3, 32, opening=OPENING, seed=5)
    assert torch.equal(own_text(tiny_model(), count=3, seed=5), said)


def test_several_domains_are_mixed_and_not_pooled():
    """A list of one is the windows themselves; of two it is the mix of their statistics, however many windows each has."""
    domains = [IDS, token_ids(4, 9, seed=5)]
    one, alone, ours, theirs, pooled = (tiny_model() for _ in range(5))
    nsvd.compress_(one, windows=IDS, method="asvd-1", ratio=0.3)
    nsvd.compress_(alone, windows=[IDS], method="asvd-1", ratio=0.3)
    assert_equal_tensors(factors(one), factors(alone))
    nsvd.compress_(ours, windows=domains, method="asvd-1", ratio=0.3)
    mixed = nsvd.mix([nsvd.calibrate(theirs, ids) for ids in domains])
    nsvd.compress_(theirs, mixed, method="asvd-1", ratio=0.3)
    assert_equal_tensors(factors(ours), factors(theirs))
    nsvd.compress_(pooled, windows=torch.cat([IDS[:, :9], domains[1]]), method="asvd-1", ratio=0.3)
    assert not torch.equal(factors(pooled)[f"{Q}.up.weight"], factors(ours)[f"{Q}.up.weight"])
    report = nsvd.compress_(tiny_model(), method="best", windows=domains, ratio=0.3)
    assert report.ratio_reached >= 0.3


@pytest.mark.parametrize("method", ["asvd-1", "svd"])
def test_worst_case_weights_are_found_for_the_ratio(method):
    """By name as by the statistics mixed so, for a method that asks for no moments, too; ranks alone do not fix them."""
    domains, ours, theirs = [IDS, token_ids(2, 5, seed=5)], tiny_model(), tiny_model()
    how = {"method": method, "windows": domains, "shifted": True}
    nsvd.compress_(ours, ratio=0.3, weights="worst-case", **how)
    each = [nsvd.calibrate(theirs, ids) for ids in domains]
    nsvd.compress_(theirs, nsvd.mix(each, "worst-case", model=theirs, ratio=0.3), ratio=0.3, **how)
    assert_equal_tensors(factors(ours), factors(theirs))
    equal = tiny_model()
    nsvd.compress_(equal, ratio=0.3, **how)
    assert not torch.equal(factors(equal)[f"{DOWN}.up.weight"], factors(ours)[f"{DOWN}.up.weight"])
    with pytest.raises(ValueError, match="found for a ratio"):
        nsvd.compress_(tiny_model(), ranks={Q: 3}, weights="worst-case", **how)


def test_gradients_are_taken_from_the_text_only_where_they_are_missing(stats):
    """Statistics that have them are used as they are; those without get them from the windows."""
    given, found, seconds = tiny_model(), tiny_model(), []
    for model, source in ((given, stats), (found, nsvd.calibrate(tiny_model(), IDS))):
        seconds.append(nsvd.compress_(model, source, windows=IDS, method="kfac", ratio=0.3).seconds)
    assert "gradients" in seconds[1]
    assert not {"gradients", "calibrate"} & seconds[0].keys()
    assert torch.equal(
        factors(given)[f"{Q}.up.weight"], factors(found)[f"{Q}.up.weight"]
    )  # of so few windows all are taken


def test_a_metric_of_the_loss_without_gradients_names_the_layer(stats):
    """Or with those of another model; the model is unchanged."""
    model, before = tiny_model(), state(tiny_model())
    plain = nsvd.calibrate(model, IDS)
    for source, message in (
        (plain, f"layer {Q} by the loss: pass windows="),
        (None, "K-FAC needs statistics"),
        (plain.with_gradients({name: H[:8, :8] for name, H in stats.gradients.items()}), f"layer {Q} has 32 outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            nsvd.compress_(model, source, method="kfac", ratio=0.3)
        with pytest.raises(ValueError, match=message):
            nsvd.prepare(model, source, "kfac")
        assert_same(before, model)


def test_a_recipe_that_fails_leaves_the_model_as_it_was():
    """NaN in the predictions, on all but eight tokens: there is no text; NaN on the given text; nothing to start a text from."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _m, _args, y: y * float("nan") if y.shape[1] != 8 else y)
    before = state(model)
    with pytest.raises(FloatingPointError, match="no text can be sampled"):
        nsvd.compress_(model, method="best", ratio=0.3)
    with pytest.raises(FloatingPointError, match=r"gradient at layer model\.layers\.1\.self_attn\.q_proj"):
        nsvd.compress_(model, method="best", ratio=0.3, windows=IDS)
    assert_same(before, model)
    model = tiny_model(bos_token_id=None)
    before = state(model)
    with pytest.raises(ValueError, match="names no token that begins a text"):
        nsvd.compress_(model, method="best", ratio=0.3)
    assert_same(before, model)
