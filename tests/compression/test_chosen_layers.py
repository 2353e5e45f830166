"""``layers=`` and ``exclude=``: names and patterns say which layers are compressed; the ratio is theirs."""

import pytest
import torch
from torch import nn

import nsvd
from nsvd.stored.layers import CompressedLayer
from tests.tiny import SIZES, Q, assert_refused, assert_same, logits, state, tiny_model, tiny_tokenizer, token_ids

IDS = token_ids()
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}


def compressed_names(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, CompressedLayer)}


@pytest.mark.parametrize(
    ("chosen", "last"),
    [
        ({"layers": Q}, {"q_proj"}),
        ({"layers": "q_proj"}, {"q_proj"}),
        ({"layers": ["self_attn.*"]}, set(ATTENTION)),
        ({"layers": ["*.mlp.*", "o_proj"]}, {"gate_proj", "up_proj", "down_proj", "o_proj"}),
        ({"exclude": "mlp.*"}, set(ATTENTION)),
        ({"layers": "self_attn.?_proj", "exclude": ("[qk]_proj",)}, {"v_proj", "o_proj"}),
    ],
)
def test_targets_are_chosen_by_name_or_pattern(chosen, last):
    """Whole names, their ends after a dot, and the patterns of a shell; in the order of the model."""
    model = tiny_model()
    found = list(nsvd.targets(model, **chosen))
    assert {name.rpartition(".")[2] for name in found} == last
    assert found == [name for name in nsvd.targets(model) if name in found]
    assert len(found) == (1 if chosen == {"layers": Q} else 2 * len(last))


@pytest.mark.parametrize(
    "how",
    [
        {"method": "svd"},
        {"method": "asvd-1"},
        {"method": "asvd", "allocation": "strs"},
        {"method": "asvd-1", "allocation": "spectrum"},
        {"method": "asvd-1", "allocation": "lems"},
        {"method": "asvd-1", "allocation": "zero-sum"},
        {"method": "best", "refine": 2},
    ],
)
def test_only_the_chosen_layers_are_compressed(how):
    """By every way to find ranks; the ratio is that of the layers taken, the others keep their bits."""
    model, dense = tiny_model(), tiny_model()
    report = nsvd.compress_(model, windows=IDS, ratio=0.3, layers="mlp.*", exclude="0.mlp.up_proj", **how)
    assert list(report.table.layer) == list(nsvd.targets(dense, "mlp.*", "0.mlp.up_proj"))
    assert compressed_names(model) <= set(report.table.layer)
    assert 0.3 <= report.ratio_reached < 0.36
    assert report.params_before == 5 * 32 * 48
    assert report.blocks_covered == pytest.approx(5 * 32 * 48 / sum(p.numel() for p in dense.model.layers.parameters()))
    for name in nsvd.targets(dense, "self_attn.*"):
        assert (model.get_submodule(name).weight == dense.get_submodule(name).weight).all()


def test_what_was_prepared_for_some_layers_serves_these():
    """``prepare`` takes the same choice; for other layers it is refused."""
    model = tiny_model()
    stats = nsvd.calibrate(model, IDS)
    prepared = nsvd.prepare(model, stats, "asvd-1", layers="mlp.*")
    with pytest.raises(ValueError, match="prepared was made for other"):
        nsvd.compress_(model, stats, method="asvd-1", ratio=0.3, prepared=prepared)
    how = {"method": "asvd-1", "ratio": 0.3, "layers": "mlp.*"}
    nsvd.compress_(model, stats, prepared=prepared, **how)
    plain = tiny_model()
    nsvd.compress_(plain, stats, **how)
    assert (logits(model) == logits(plain)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "query"}, "no layer is called 'query'; the model has model.layers.0.self_attn.q_proj,"),
        ({"layers": "q_proj", "exclude": "lm_head"}, "no layer is called 'lm_head'"),
        ({"layers": "q_proj", "exclude": "self_attn.*"}, "leaves no layer to compress"),
        ({"layers": []}, r"layers are chosen by names or patterns, not by \[\]"),
        ({"exclude": 3}, "layers are chosen by names or patterns, not by 3"),
        ({"method": "sola", "layers": "mlp.*"}, "SoLA has no choice of layers"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(arguments, message):
    """Also one that a part of fits no layer: a misspelt name does not go by in silence."""
    assert_refused(tiny_model(), None, {"method": "asvd-1", "windows": IDS, "ratio": 0.3} | arguments, message)


def test_layers_that_are_read_but_never_called_can_be_left_out():
    """Methods that need inputs name them, and say how to leave them out."""
    model = tiny_model("mamba", state_size=4)
    how = {"method": "asvd-1", "windows": IDS, "ratio": 0.3}
    assert_refused(
        model, None, how, r"saw no input, first backbone\.layers\.0\.mixer\.dt_proj: .*leave them out: exclude="
    )
    assert len(nsvd.compress_(model, exclude="dt_proj", **how).table) == 6
    assert not any(name.endswith("dt_proj") for name in compressed_names(model))


def test_the_report_tells_how_little_of_a_mixture_of_experts_is_touched():
    """Methods that use gradients leave the experts dense: the layers taken hold a small part of the blocks."""
    model = tiny_model("mixtral", **EXPERTS)
    report = nsvd.compress_(model, method="kfac", windows=IDS, ratio=0.3)
    assert report.blocks_covered == pytest.approx(0.14, abs=0.01)
    assert next(iter(report.left_alone)) == "model.layers.*.mlp.experts.gate_up_proj"
    assert report.model_ratio_reached < 0.04
    for whole in (tiny_model(), tiny_model("mixtral", **EXPERTS)):
        assert nsvd.compress_(whole, method="svd", ratio=0.3).blocks_covered > 0.95


def test_from_folder_to_folder(tmp_path):
    """The same choice, block by block, and the same bits; a choice without a ratio has no meaning."""
    folder, model = tmp_path / "m", tiny_model()
    nsvd.save(model, tiny_tokenizer(), folder)
    report = nsvd.compress(folder, tmp_path / "low", method="svd", ratio=0.3, exclude="mlp.*")
    nsvd.compress_(model, method="svd", ratio=0.3, layers=ATTENTION)
    assert set(report.table.layer) == compressed_names(model)
    assert (logits(nsvd.load(tmp_path / "low", device="cpu")[0]) == logits(model)).all()
    with pytest.raises(ValueError, match="layers goes with a ratio"):
        nsvd.compress(folder, tmp_path / "none", method="svd", cache_ratio=0.5, layers="q_proj")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [False, True])
def test_a_model_cast_as_a_whole(dtype, back, monkeypatch):
    """``model.half()`` casts the frequencies of rotary embeddings, too, which no file holds: the model read again gets its own."""
    monkeypatch.setattr("nsvd.walk.soundness.CLOSE", 0.0)
    model = tiny_model()
    whole, model = model.model.rotary_emb.inv_freq.clone(), model.to(dtype)
    model = model.float() if back else model
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), whole)
    assert not nsvd.compress_(model, method="svd", ratio=0.3).table.empty


class Test_a_model_that_would_be_another_once_it_is_read_again:
    """It is tried before anything is returned; nothing is changed."""

    def refused(self, model, message):
        before = state(model)
        with pytest.raises(ValueError, match=message):
            nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3)
        assert_same(before, model)

    def test_a_layer_of_another_size_than_the_configuration_tells(self):
        """As after pruning by hand."""
        model = tiny_model()
        mlp = model.model.layers[1].mlp
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
        self.refused(model, r"LlamaForCausalLM could not be read again once it is saved: .*layers\.1\.mlp")

    def test_a_number_that_no_file_holds(self):
        """As the constant of a norm that was set by hand."""
        model = tiny_model()
        model.model.norm.variance_epsilon = 1.0
        self.refused(model, "LlamaForCausalLM says something else once it is saved and read again")

    def test_parameters_that_change_while_the_model_runs(self):
        """RWKV divides weights when it is first run in evaluation mode, and again when it is read."""
        sizes = SIZES | {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64}
        model = tiny_model("rwkv", **sizes)
        with pytest.raises(ValueError, match="RwkvForCausalLM changes its own parameters while it runs"):
            nsvd.compress_(model, method="svd", ratio=0.3)


@pytest.mark.parametrize("pattern", ["*experts*", "experts.0.gate_up"])
def test_a_method_that_leaves_experts_dense_says_why(pattern, tmp_path):
    """In memory, and from folder to folder; one that reaches them compresses these alone."""
    model, why = tiny_model("mixtral", **EXPERTS), "names layers of experts, and these stay dense here: shifted inputs,"
    with pytest.raises(ValueError, match=why):
        nsvd.compress_(model, windows=IDS, method="best", ratio=0.3, layers=pattern)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "m")
    with pytest.raises(ValueError, match=why):
        nsvd.compress(tmp_path / "m", tmp_path / "low", method="best", ratio=0.3, layers=[pattern])
    nsvd.compress_(model, windows=IDS, method="asvd-1", ratio=0.3, layers=pattern)
    assert all(".experts." in name for name in compressed_names(model))
