"""SoLA on models: the split layers are the formula, whatever the family; what cannot be split is refused, and unchanged."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nsvd
from nsvd import cli
from nsvd.compression import sola
from nsvd.compression.ranks import SOLA_ALLOCATIONS
from nsvd.compression.sola_blocks import outer
from nsvd.stored.layers import LAYERS, SplitColumns, SplitRows
from nsvd.walk.roles import places, roles
from tests.tiny import FAMILIES, assert_same, compressed, logits, state, tiny_model, tiny_tokenizer, token_ids

ALL = {"keep_outer": 0, "compress_v": True, "o_from": 0.0}  # nothing is left out
SMALL = {"method": "sola", "grid": 1, "floor": 0.0, "keep_outer": 0}
LAST = {"opt": "fc2", "phi": "fc2", "gpt_neox": "dense_4h_to_h"}  # down_proj elsewhere
IDS = token_ids(40)


@pytest.fixture(scope="module")
def stats():
    """Moments of the tiny LLaMA, which every test builds anew."""
    return nsvd.calibrate(tiny_model(dtype=torch.float32), IDS)


def full_ranks(model: nn.Module, d_ff: int = 48, prime: int = 7) -> dict[str, int]:
    """The largest rank of every block."""
    shapes = {
        name: [n - prime * (n == d_ff) for n in layer.weight.shape] for name, layer in nsvd.targets(model).items()
    }
    return {name: min(shape) for name, shape in shapes.items()}


@pytest.fixture
def large_blocks_allowed(monkeypatch):
    """Factors are kept where they are larger than the block, too."""
    monkeypatch.setattr(sola, "saves_parameters", lambda *_: True)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_found_without_knowing_a_name(family):
    """The feed-forward's last layer and those before it; queries, keys and values before the output; values alone."""
    found = roles(tiny_model(family))
    short = {name.rsplit(".")[-1]: [n.rsplit(".")[-1] for n in first] for name, first in found.neurons.items()}
    first = {"fc2": ["fc1"], "dense_4h_to_h": ["dense_h_to_4h"]}.get(LAST.get(family), ["gate_proj", "up_proj"])
    assert short == {LAST.get(family, "down_proj"): first}
    assert len(found.neurons) == len(found.outputs) == 2
    assert {name.rsplit(".")[-1] for name in found.values} == (set() if family == "gpt_neox" else {"v_proj"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_neurons_are_found_in_every_precision(dtype):
    for family in ("llama", "opt"):
        assert roles(tiny_model(family, dtype=dtype)) == roles(tiny_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_split_model_is_the_dense_one(family, large_blocks_allowed):
    """All blocks at their largest rank: every feed-forward is split, the logits are the same to 1e-6."""
    model = tiny_model(family)
    said, neurons = logits(model), roles(model).neurons
    nsvd.compress_(model, nsvd.calibrate(model, IDS), method="sola", ranks=full_ranks(model), **ALL)
    for last, first in neurons.items():
        assert isinstance(model.get_submodule(last), SplitColumns)
        assert all(isinstance(model.get_submodule(name), SplitRows) for name in first)
    torch.testing.assert_close(logits(model), said, rtol=0, atol=1e-6)


def test_a_neuron_in_the_wrong_place_changes_the_model(large_blocks_allowed, stats):
    """… so that the test above can fail: one layer of a feed-forward in the old order."""
    model = tiny_model()
    said, ranks = logits(model), full_ranks(model)
    up = "model.layers.0.mlp.up_proj"
    before = copy.deepcopy(model.get_submodule(up))
    nsvd.compress_(model, stats, method="sola", ranks=ranks, **ALL)
    model.set_submodule(up, before)
    assert not torch.allclose(logits(model), said, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "gpt_neox", "phi", "qwen3", "gemma2"])
def test_the_split_model_is_the_formula_in_the_old_order(family):
    """Every block by ``decompose`` from its own moments, written into the dense model where its neurons were."""
    model = tiny_model(family)
    stats, neurons = nsvd.calibrate(model, IDS), roles(model).neurons
    expected, ranks = copy.deepcopy(model), {}
    for last, first in neurons.items():
        rest = stats[last].mean_abs.argsort(descending=True)[7:]
        for name in [*first, last]:
            W, G, ranks[name] = expected.get_submodule(name).weight.data, stats[name].G, 9
            if name == last:
                W[:, rest] = nsvd.decompose(W[:, rest], G[rest][:, rest], method="asvd-1", k=9).dense()
            else:
                W[rest] = nsvd.decompose(W[rest], G, method="asvd-1", k=9).dense()
    dense = logits(model)
    report = nsvd.compress_(model, stats, method="sola", ranks=ranks, keep_outer=0)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), dense, atol=1e-4)
    errors = report.table.set_index("layer").weight_error
    for name in ranks:
        W, new = tiny_model(family).get_submodule(name).weight, expected.get_submodule(name).weight
        assert errors[name] == pytest.approx(((W - new).norm() / W.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocation", SOLA_ALLOCATIONS)
def test_the_report_counts_what_is_stored(family, allocation, tmp_path):
    """Parameters are those of the tensors saved; at least ``ratio`` is removed; what is read again says the same."""
    model = tiny_model(family)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    names = list(nsvd.targets(model))
    report = nsvd.compress_(model, windows=IDS, ratio=0.3, allocation=allocation, **SMALL)
    assert report.allocation == allocation
    assert 0.3 <= report.ratio_reached < 0.4
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    stored = load_file(tmp_path / "low" / "model.safetensors")
    inside = model.state_dict()  # beside it lies what tells of the import
    ours = {k: t for k, t in stored.items() if any(k.startswith(f"{n}.") for n in names) and not k.endswith("bias")}
    ours = {k: t for k, t in ours.items() if k in inside}
    assert sum(t.numel() for t in ours.values()) == report.params_after == report.table.params.sum()
    again, _ = nsvd.load(tmp_path / "low", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert SplitColumns in {type(module) for module in again.modules()}
    plain = again.dequantize()
    assert all(type(plain.get_submodule(name)) is nn.Linear for name in names)
    assert {name for name, _ in plain.named_parameters() if name.endswith("bias")} == biases
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_without_primes_and_exclusions_uniform_ranks_are_the_inner_method(stats):
    """prime = 0 splits nothing: the very tensors of ASVD-I."""
    model, other = tiny_model(), tiny_model()
    nsvd.compress_(model, stats, method="sola", ratio=0.3, prime=0, allocation="uniform", **ALL)
    nsvd.compress_(other, stats, method="asvd-1", ratio=0.3)
    held = other.state_dict()
    assert model.state_dict().keys() == held.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[name])


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({}, {"*.v_proj"}),
        ({"o_from": 0.5}, {"*.v_proj", "*.o_proj"}),
        ({"compress_v": True}, set()),
        ({"compress_v": True, "keep_outer": 1}, {"0", "3"}),
    ],
)
def test_what_is_left_out_stays_dense(options, dense):
    """Values never, outputs from a ratio on, the outer blocks of the model: each by its argument."""
    model = tiny_model(num_hidden_layers=4)
    settings = {"method": "sola", "allocation": "uniform", "keep_outer": 0} | options
    report = nsvd.compress_(model, windows=IDS, ratio=0.3, **settings)
    left = report.table[report.table.dense].layer
    expected = [
        name
        for name in report.table.layer
        if re.search(r"\.(\d+)\.", name)[1] in dense or f"*.{name.rsplit('.')[-1]}" in dense
    ]
    assert left.tolist() == expected
    assert all(type(model.get_submodule(name)) is nn.Linear for name in left)


def test_a_dense_layer_beside_a_split_one_follows_its_neurons(stats):
    """Only ``down`` is factored: gate and up stay dense, in the new order, and the function is that of the old one."""
    model = tiny_model()
    down, gate = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    report = nsvd.compress_(model, stats, method="sola", ranks={down: 10}, keep_outer=0)
    assert report.table[~report.table.dense].layer.tolist() == [down]
    old, order = tiny_model().get_submodule(gate), stats[down].mean_abs.argsort(descending=True)
    assert torch.equal(model.get_submodule(gate).weight, old.weight[order])
    assert torch.equal(model.get_submodule(gate).bias, old.bias[order])
    expected = tiny_model()
    rest, W = order[7:], expected.get_submodule(down).weight.data
    W[:, rest] = nsvd.decompose(W[:, rest], stats[down].G[rest][:, rest], method="asvd-1", k=10).dense()
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("inner", ["svd", "nsvd-1", "ridge", "kfac"])
def test_another_method_factors_the_blocks(inner):
    """One that weighs outputs by the loss included: its gradients are those of the marginal neurons."""
    options = {"k1": 0.5} if inner == "nsvd-1" else {}
    model, ours = tiny_model(), compressed(tiny_model(), IDS, k1=0.5, **SMALL, inner="nsvd-1")
    report = nsvd.compress_(model, windows=IDS, ratio=0.3, inner=inner, **SMALL, **options)
    assert report.options["inner"] == inner
    assert torch.equal(logits(model), logits(ours)) == (inner == "nsvd-1")


def test_prepared_blocks_serve_every_ratio_and_allocation(stats):
    """One preparation, as for the other methods; the moves of the search are in the report."""
    prepared = nsvd.prepare(tiny_model(), stats, "sola", keep_outer=0)
    for ratio, allocation in [(0.2, "sola"), (0.4, "sola"), (0.4, "uniform")]:
        model, other = tiny_model(), tiny_model()
        how = {"ratio": ratio, "allocation": allocation, **SMALL}
        report = nsvd.compress_(model, stats, prepared=prepared, **how)
        nsvd.compress_(other, stats, **how)
        assert torch.equal(logits(model), logits(other))
        assert bool(report.moves) == (allocation == "sola")
        assert "moves" not in report.as_dict()


def test_kinds_get_one_rank_and_the_budget_is_met_from_below():
    """Never more parameters than asked, and not so few that a kind could have one grid step more."""
    report = nsvd.compress_(tiny_model(num_hidden_layers=4), windows=IDS, ratio=0.4, **SMALL | {"grid": 2})
    table = report.table[~report.table.dense].assign(kind=lambda t: t.layer.str.replace(r"\d+", "*", regex=True))
    room = 0.6 * report.params_before - report.params_after
    assert room >= 0
    for _, rows in table.groupby("kind"):
        assert rows["rank"].nunique() == 1
        assert rows["rank"].iloc[0] % 2 == 0
        rows_and_columns = rows.d_out + rows.d_in - rows.prime
        assert room < 2 * rows_and_columns.sum()


def test_nothing_is_exchanged_at_ratio_zero(stats):
    model = tiny_model()
    before = state(model)
    assert nsvd.compress_(model, stats, method="sola", ratio=0.0).ratio_reached == 0
    assert_same(before, model)


class Plain(nn.Module):
    """A feed-forward with something in the place of the activation."""

    def __init__(self, mix: nn.Module):
        super().__init__()
        self.embed, self.fc1, self.mix, self.fc2 = nn.Embedding(16, 8), nn.Linear(8, 12), mix, nn.Linear(12, 8)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        return self.fc2(self.mix(self.fc1(self.embed(input_ids))))


class AcrossTokens(nn.Module):
    def forward(self, y):
        return y.cumsum(1)


def uneven(size: int) -> nn.Module:
    norm = nn.LayerNorm(size)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("mix", [uneven(12), AcrossTokens(), nn.Linear(12, 12)], ids=lambda mix: type(mix).__name__)
def test_what_cannot_be_split_is_refused(mix):
    """Neurons of unequal standing, of several tokens, or mixed: one sentence, no change, no hook left."""
    model = Plain(mix).eval()
    before = state(model)
    with pytest.raises(ValueError, match="Plain has no feed-forward that can be split"):
        nsvd.compress_(model, windows=IDS[:, :8] % 16, method="sola", ratio=0.2)
    assert_same(before, model)


@pytest.mark.parametrize("mix", [nn.GELU(), nn.ReLU(), nn.LayerNorm(12, elementwise_affine=False)])
def test_the_same_model_with_equal_neurons_is_split(mix):
    """… so that the test above can fail."""
    assert roles(Plain(mix).eval()).neurons == {"fc2": ("fc1",)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.3}, r"out of reach: at most 0\.0000 can be removed; loosen keep_outer = 2"),
        (
            {"ratio": 0.5, "keep_outer": 0, "grid": 1, "floor": 0.99},
            r"out of reach: the search stops .* lower floor or loosen",
        ),
        ({"ratio": 0.9, "keep_outer": 0, "prime": 0.5, "allocation": "uniform"}, r"out of reach|leave no rank"),
        ({"ratio": 0.3, "keep_outer": -1}, "keep_outer is -1"),
        ({"ratio": 0.3, "prime": 1.0}, "prime is 1.0"),
        ({"ratio": 0.3, "keep_outer": 0, "grid": 0}, "grid is 0"),
        ({"ratio": 0.3, "allocation": "strs"}, "unknown allocation 'strs'"),
        ({"ratio": 0.3, "inner": "sola"}, "inner is 'sola'"),
        ({"ratio": 0.3, "inner": "kfac", "keep_outer": 0}, "K-FAC weighs the outputs"),
        ({"ratio": 0.3, "factors": "pivoted"}, "SoLA has no pivoted factors"),
        ({"ratio": 0.3, "shifted": True}, "SoLA has no shifted inputs"),
        ({"ratio": 0.3, "refine": 3}, "SoLA has no refinement"),
        ({"ratio": 0.3, "k1": 0.5}, "no option k1"),
        ({"ranks": {"model.layers.0.self_attn.v_proj": 4}, "keep_outer": 0}, "not one that SoLA compresses"),
        ({"ranks": {"nonsense": 4}}, "no layer 'nonsense'"),
    ],
)
def test_what_is_out_of_reach_says_what_to_loosen(options, message, stats):
    """… and leaves the model as it was."""
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_(model, stats, method="sola", **options)
    assert_same(before, model)


def test_statistics_are_needed(stats):
    with pytest.raises(ValueError, match="SoLA needs statistics"):
        nsvd.compress_(tiny_model(), method="sola", ratio=0.3)
    with pytest.raises(ValueError, match="SoLA splits the feed-forwards"):
        nsvd.compress_kv_(tiny_model(), stats, method="sola")


def test_where_matrices_are_asked_for_it_is_refused(stats):
    """The table of STRS and the cache take one matrix after the other; the model is as it was."""
    model = tiny_model()
    before = state(model)
    for ask in (
        lambda: nsvd.sensitivity(model, stats, IDS, method="sola"),
        lambda: nsvd.compress_kv_(model, stats, method="sola"),
    ):
        with pytest.raises(ValueError, match="SoLA splits the feed-forwards of a model and has no answer"):
            ask()
    assert_same(before, model)


def test_the_outer_blocks_are_counted_from_both_ends():
    """By the numbers in the list of blocks, which is not always the first number of a name."""
    stage = nn.Module()
    stage.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(11))
    model = nn.Sequential(nn.Linear(2, 2), stage)
    layers = ["0", *(f"1.blocks.{i}.{part}" for i in (0, 1, 2, 10) for part in ("a", "b"))]
    found = places(model, layers)
    assert found["1.blocks.10.b"] == (10, "b")
    assert "0" not in found
    assert outer(found, 0) == set()
    assert outer(found, 1) == {"1.blocks.0.a", "1.blocks.0.b", "1.blocks.10.a", "1.blocks.10.b"}
    assert outer(found, 5) == set(layers) - {"0"}
    assert places(nn.Linear(2, 2), [""]) == {}


@pytest.mark.parametrize(("name", "shape"), [("split-rows", (6, 4)), ("split-columns", (4, 6))])
def test_a_split_layer_that_cannot_be_is_refused(name, shape):
    layer = nn.Linear(*reversed(shape))
    assert LAYERS[name].like(layer, prime=2, rank=4).spec() == {"prime": 2, "rank": 4}
    for spec in ({"prime": 0, "rank": 2}, {"prime": 6, "rank": 2}, {"prime": 2, "rank": 5}, {"prime": 2, "rank": 0}):
        with pytest.raises(ValueError, match=r"prime neurons of 6|rank \d of a"):
            LAYERS[name].like(layer, **spec)


def test_the_command_line_compresses_and_tells(tmp_path, capsys):
    """``--method sola`` with its options; ``info`` shows primes and ranks; the report has the moves of the search."""
    nsvd.save(tiny_model(num_hidden_layers=3), tiny_tokenizer(), tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), str(tmp_path / "low"), "--method", "sola"]
    command += ["--calibration", "mini/encyclopedia", "--ratio", "0.1"]
    options = [
        "--grid",
        "1",
        "--keep-outer",
        "1",
        "--prime",
        "0.25",
        "--inner",
        "ridge",
        "--mu",
        "0.5",
        "--floor",
        "0.0",
    ]
    assert cli.main([*command, *options, "--compress-v", "--o-from", "0.0", "--count", "8", "--length", "32"]) == 0
    assert "SoLA, 1" in capsys.readouterr().out
    assert cli.main(["info", str(tmp_path / "low"), "--layers"]) == 0
    told = capsys.readouterr().out
    assert "compressed by sola" in told
    assert re.search(r"model\.layers\.1\.mlp\.down_proj: 32 × 48, layer split-columns, prime 12, rank \d+", told)
    assert '"moves": [' in (tmp_path / "low/nsvd_report.json").read_text()
    assert cli.main([*command[:-1], "0.9"]) == 2
    assert "loosen keep_outer = 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mini-llama", "mini-mistral", "mini-opt"])
@pytest.mark.parametrize("ratio", [0.2, 0.3])
def test_the_reference_models_are_split_to_the_target(name, ratio):
    """From below, within one step of the grid of the largest kind; the tensors held are those that are counted."""
    model, tokenizer = nsvd.load(name, dtype="float32", device="cpu")
    windows = nsvd.windows("mini/encyclopedia", tokenizer, split="calibration", length=256, count=12)
    report = nsvd.compress_(model, windows=windows, method="sola", ratio=ratio, keep_outer=0, grid=4, floor=0.0)
    step = 4 * max(report.table.d_out + report.table.d_in) * model.config.num_hidden_layers
    assert 0 <= (report.ratio_reached - ratio) * report.params_before < step
    held = [model.get_submodule(layer) for layer in report.table.layer]
    assert report.params_after == sum(p.numel() for m in held for n, p in m.named_parameters() if "bias" not in n)
    assert nsvd.perplexity(model, windows) < len(tokenizer)
