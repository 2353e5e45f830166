"""What the cache holds are latents, and nobody who reads the tokens can tell."""

import copy
import functools
import inspect
import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import nsvd
from nsvd.cache import absorption
from nsvd.cache import latent as latent_module
from nsvd.cache.attention import examine, key_value_layers
from nsvd.cache.latent import DIGITS, bytes_per_token, decode_positions, encode_positions, latent_layers
from nsvd.cache.pairs import share_out
from tests.linalg.reference import MATRIX
from tests.tiny import GROUPED, K1, K, assert_same, logits, poison, state, tiny_model, tiny_tokenizer, token_ids

WINDOW = {"sliding_window": 8}  # shorter than the text
SUPPORTED = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "gemma2": WINDOW,  # sliding and full layers in turn
    "gemma3_text": WINDOW | {"head_dim": 8, "intermediate_size": 48, "num_key_value_heads": 2},  # two rotations
    "opt": {},  # no rotation
    "phi": {"qk_layernorm": True},  # half of the channels rotated
    "olmo2": {"intermediate_size": 48},  # one norm over all heads
    "smollm3": {"intermediate_size": 48, "num_key_value_heads": 2},  # some layers not rotated
}
IDS = token_ids(3, 20, seed=3)
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0  # left padding
OPTIONS = {name: {"k1": 0.5} for name, method in nsvd.METHODS.items() if "k1" in method.options}  # of ranks near 5


def latent(family: str = "llama", *, dtype=torch.float32, blocks: int = 3, method: str = "asvd-1", **options):
    """A random model whose attention is not uniform, its cache compressed."""
    model = tiny_model(family, dtype=dtype, num_hidden_layers=blocks, **SUPPORTED[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "dense" in name:
                parameter.mul_(4)
    nsvd.compress_kv_(model, windows=token_ids(), method=method, **(OPTIONS.get(method, {}) | options))
    return model


def generate(model, *, length: int = 24, **options):
    how = {
        "attention_mask": MASK,
        "max_new_tokens": length,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    how |= {"output_logits": True, "return_dict_in_generate": True}
    how |= {"input_ids": IDS}
    return model.generate(**(how | options))


def assert_same_text(one, other) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for ours, theirs in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def absorbing(model, yes: bool | str = True):
    """The model with the choice of all latent layers changed."""
    for layer in latent_layers(model).values():
        layer.absorb = yes
    return model


@pytest.fixture
def lifts(monkeypatch):
    """How often attention has run over latents in place of values."""
    calls, lift = [], absorption.lift
    monkeypatch.setattr("nsvd.cache.latent.lift", lambda attention, u: calls.append(u.shape) or lift(attention, u))
    return calls


def held(cache) -> set[int]:
    """Widths of what the layers of a cache hold."""
    return {layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.every
@pytest.mark.parametrize("family", SUPPORTED)
def test_greedy_tokens_and_logits_are_those_without_a_cache(family, joint):
    """For a batch with left padding, and windows shorter than the text; and the cache really holds latents."""
    model = latent(family, joint=joint)
    cached, without = generate(model), generate(model, use_cache=False)
    assert_same_text(cached, without)
    dense, ours = bytes_per_token(model)
    assert ours <= dense / 2
    assert max(held(cached.past_key_values)) * len(latent_layers(model)) * 4 == dense / 2  # float32


@pytest.mark.parametrize("cache_ratio", [0.5, 0.9])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.every
@pytest.mark.parametrize("family", SUPPORTED)
def test_attention_over_latents_is_attention_over_values(family, joint, cache_ratio, lifts):
    """Logits of a step and greedy text to rounding: latents narrower and wider than a head, biases, grouped queries."""
    model = latent(family, joint=joint, cache_ratio=cache_ratio, absorb=True)
    wide = any(layer.attention.v_proj.rank > layer.attention.head_dim for layer in latent_layers(model).values())
    assert wide or not (joint and cache_ratio > 0.5)
    step = []
    for absorb in (False, True):
        assert not lifts
        with torch.no_grad():
            past = absorbing(model, absorb)(input_ids=IDS[:1, :-1], use_cache=True).past_key_values
            step.append(model(input_ids=IDS[:1, -1:], past_key_values=past).logits)
    assert len(lifts) == len(latent_layers(model))
    torch.testing.assert_close(step[1], step[0], rtol=0, atol=1e-5 * step[0].abs().max().item())
    one = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    for prompts in ({}, one):  # in a batch wide latents are not absorbed
        texts = [generate(absorbing(model, absorb), **prompts) for absorb in (True, False)]
        assert_same_text(*texts)


@pytest.mark.every
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("family", SUPPORTED)
def test_as_on_a_gpu_latents_are_attended_to_in_one_product(family, joint, lifts, monkeypatch):
    """A step after prompts, one of them padded, is the same to rounding; families without ``sdpa`` keep their own function."""
    thin = 0.12 if joint and family in ("opt", "phi", "olmo2") else 0.25  # latents no wider than a head
    model, calls, steps = latent(family, cache_ratio=thin, joint=joint, absorb=True), [], []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        absorption.OURS,
        lambda *args, **how: calls.append(1) or absorption.attend(*args, **how),
    )
    for slow in (False, True):
        monkeypatch.setattr(latent_module, "slow_at_latents", lambda _device, slow=slow: slow)
        assert not calls
        with torch.no_grad():
            how = {"attention_mask": MASK[:, :-1], "use_cache": True}
            past = absorbing(model, True)(input_ids=IDS[:, :-1], **how).past_key_values
            steps.append(model(input_ids=IDS[:, -1:], attention_mask=MASK, past_key_values=past).logits)
    assert lifts
    assert len(calls) == (len(lifts) / 2 if model.config._attn_implementation == "sdpa" else 0)
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=1e-5 * steps[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "allowed", "added"])
def test_attention_in_one_product_is_that_of_transformers(dtype, mask, monkeypatch):
    """Grouped heads, wide values, small and large scores, to the rounding of the dtype; a row that sees nothing stays finite.

    What else is asked for is left to transformers.
    """
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    for size in (0.3, 3.0, 24.0):
        query, key = size * torch.randn(2, 6, 1, 16), size * torch.randn(2, 2, 9, 16)
        value = torch.randn(2, 1, 9, 40).expand(-1, 2, -1, -1)
        allowed = torch.rand(2, 1, 1, 9) > 0.3
        allowed[..., -1] = True
        given = {None: None, "allowed": allowed, "added": torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)}[
            mask
        ]
        q, k, v = (t.to(dtype) for t in (query, key, value))
        wanted, _ = sdpa_attention_forward(module, q.double(), k.double(), v.double(), _as_double(given), scaling=0.2)
        found, _ = absorption.attend(module, q, k, v, given, scaling=0.2)
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps * float(value.abs().max())
        )
    blind = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    assert absorption.attend(module, q, k, v, blind)[0].isfinite().all()
    monkeypatch.setattr(absorption, "sdpa_attention_forward", lambda *args, **how: (args, how))
    args, how = absorption.attend(module, q, k, v, given, softcap=30.0, dropout=0.0)
    assert [a is b for a, b in zip(args, (module, q, k, v, given), strict=True)] == 5 * [True]
    assert how == {"scaling": None, "position_bias": None, "softcap": 30.0, "dropout": 0.0}


def _as_double(mask):
    return mask if mask is None or mask.dtype == torch.bool else mask.double()


def test_values_are_absorbed_only_where_that_is_cheaper(lifts):
    """Not for a whole prompt, nor for wide latents of several texts, which would be copied for every head, nor under dropout."""
    thin, wide = latent(cache_ratio=0.4), latent(cache_ratio=0.9)
    heads = [next(iter(latent_layers(model).values())).attention for model in (thin, wide)]
    assert heads[0].v_proj.rank <= heads[0].head_dim < heads[1].v_proj.rank
    for attention, several in zip(heads, (True, False), strict=True):
        z = torch.zeros(1, 1, 100, attention.v_proj.rank)
        assert absorption.pays(attention, z, 1)
        assert absorption.pays(attention, z.expand(2, -1, -1, -1), 1) == several
        assert not absorption.pays(attention, z[:, :, :3], 3)
        assert not absorption.pays(attention.train(), z, 1)
        attention.eval()
        d, r, heads_, n = attention.head_dim, attention.v_proj.rank, 4, 2
        for q, s in [(1, 2), (1, 4), (2, 9), (3, 20), (10, 30), (40, 60)]:
            rebuilt, absorbed = s * n * d * r + q * heads_ * s * d, q * heads_ * s * r + q * heads_ * d * r
            assert absorption.pays(attention, torch.zeros(1, 1, s, r), q) == (absorbed < rebuilt)


def test_an_adapter_on_the_up_projection_is_obeyed(lifts):
    """Where it is no plain matrix, values are rebuilt through it."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = latent(absorb=True)
    for layer in latent_layers(model).values():
        layer.attention.v_proj.up.__class__ = Adapted
    assert_same_text(generate(model, length=4), generate(model, length=4, use_cache=False))
    assert not lifts


NOT_ABSORBED = {
    "bitnet": GROUPED,  # a norm before the output projection
    "diffllama": GROUPED,  # a difference of two sums
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1} | GROUPED,  # sinks
}


@pytest.mark.every
@pytest.mark.parametrize("family", NOT_ABSORBED)
def test_absorption_is_refused_where_more_lies_between_values_and_output(family):
    """By name when it is demanded, and else left alone; the latent cache works without."""
    model = tiny_model(family, **NOT_ABSORBED[family])
    with torch.no_grad():
        [p.normal_() for name, p in model.named_parameters() if "sinks" in name]
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn \(\w+\): the values' up-projection cannot be absorbed"):
        nsvd.compress_kv_(model, method="svd", absorb=True)
    assert_same(before, model)
    nsvd.compress_kv_(model, method="svd")
    assert not any(layer.absorb for layer in latent_layers(model).values())


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_hold_when_several_tokens_arrive_in_a_full_cache(family):
    """A sliding cache gives back more than it keeps: chunks of 3 after a prompt longer than the window."""
    model, cache, ids = latent(family), None, token_ids(2, 30, seed=4)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([10, 3, 1, 3, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_beams_and_samples_are_those_without_a_cache(family):
    """Reordering the cache reorders latents and positions; sampling draws the same tokens from the same seed."""
    model = latent(family)
    beams = {"num_beams": 3, "output_logits": False, "output_scores": True}
    one, other = generate(model, **beams), generate(model, use_cache=False, **beams)
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(one.sequences_scores, other.sequences_scores, rtol=0, atol=1e-4)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(generate(model, do_sample=True, use_cache=use_cache))
    assert_same_text(*texts)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
def test_a_static_cache_holds_latents_too(family, joint):
    """Allocated once for all tokens, as wide as the latents."""
    model = latent(family, joint=joint)
    cached = generate(model, cache_implementation="static")
    assert isinstance(cached.past_key_values, StaticCache)
    assert_same_text(cached, generate(model, use_cache=False))
    assert held(cached.past_key_values) == held(generate(model).past_key_values)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("joint", [False, True])
def test_every_method_is_a_metric(method, joint):
    """Whichever chose the factors, cached text is uncached text."""
    model = latent("qwen2", method=method, joint=joint)
    assert_same_text(generate(model, length=6), generate(model, length=6, use_cache=False))


def test_keys_and_values_are_each_weighed_by_their_own_gradients():
    """The answer of ``decompose`` with each layer's own H, not with that of the keys for both."""
    model, dense = tiny_model("qwen2"), tiny_model("qwen2")
    stats = nsvd.calibrate(dense, IDS).with_gradients(nsvd.fisher(dense, IDS))
    nsvd.compress_kv_(model, stats, method="kfac")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
        W, new = dense.get_submodule(name).weight.detach(), model.get_submodule(name)
        expected = nsvd.decompose(W, stats[name].G, H=stats[name].H, method="kfac", k=new.rank)
        torch.testing.assert_close(new.to_linear().weight, expected.dense(), rtol=0, atol=1e-6)


def test_a_model_of_pivoted_layers_is_welcome():
    """What is factored for the cache is the product of the pivoted factors."""
    model = tiny_model()
    nsvd.compress_(model, windows=token_ids(), method="asvd-1", ratio=0.2, factors="pivoted")
    before = copy.deepcopy(model).dequantize()
    nsvd.compress_kv_(model, windows=token_ids(), cache_ratio=1.0)
    with torch.no_grad():
        ours, theirs = (m(input_ids=IDS, use_cache=False).logits for m in (model, before))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()
    assert_same_text(generate(model, length=6), generate(model, length=6, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_survive_every_dtype(dtype):
    """Far beyond 256, to which bfloat16 counts, and below zero; one number would not do."""
    positions = torch.tensor([[-1, 0, 1, 127, 128, 255, 256, 257, 4097, 65535, 65536, 131071, 2**24 - 1]])
    assert torch.equal(decode_positions(encode_positions(positions, dtype)), positions)
    assert not torch.equal(positions.to(torch.bfloat16).long(), positions)


def test_keys_far_in_a_bfloat16_text_are_rotated_by_their_own_position():
    """Beyond 256 tokens the difference to the text without a cache does not grow."""
    model, ids = latent(dtype=torch.bfloat16), token_ids(1, 600, seed=6)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :-8], use_cache=True).past_key_values
        last = torch.cat([model(input_ids=one, past_key_values=cache).logits for one in ids[:, -8:].split(1, 1)], dim=1)
    assert torch.equal(decode_positions(cache.layers[0].keys[..., -DIGITS:])[0, 0], torch.arange(600))
    torch.testing.assert_close(last, whole[:, -8:], rtol=0, atol=0.05 * whole.std().item())


def test_positions_are_kept_once_for_each_kind_of_layer():
    """By the first layer that slides and the first that does not; by nobody where nothing is rotated."""
    assert [layer.owns_positions for layer in latent_layers(latent(blocks=4)).values()] == [True, False, False, False]
    assert [layer.owns_positions for layer in latent_layers(latent("gemma2", blocks=4)).values()] == [
        True,
        True,
        False,
        False,
    ]
    assert not any(layer.owns_positions for layer in latent_layers(latent("opt")).values())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("cache_ratio", [0.3, 0.5, 0.8])
def test_the_bytes_held_are_those_promised(cache_ratio, joint):
    """At 2048 tokens, positions included, by the storages of the cache's tensors."""
    model = latent(blocks=2, cache_ratio=cache_ratio, joint=joint, method="svd")
    ids = token_ids(1, 2048)
    with torch.no_grad():
        ours, dense = (net(input_ids=ids, use_cache=True).past_key_values for net in (model, tiny_model()))
    assert nsvd.cache_bytes(dense) == 2048 * bytes_per_token(model)[0] == 2048 * bytes_per_token(tiny_model())[0]
    assert nsvd.cache_bytes(ours) == 2048 * bytes_per_token(model)[1]
    assert cache_ratio - 0.1 < nsvd.cache_bytes(ours) / nsvd.cache_bytes(dense) <= cache_ratio


def test_a_share_is_split_in_the_best_way():
    """By trying all ranks of three matrices; the share is used up, and each gets something."""
    spectra = [c * torch.rand(n).sort(descending=True).values for c, n in ((1, 4), (2, 6), (3, 5))]
    tails = [[(s[r:] ** 2).sum().item() for r in range(len(s) + 1)] for s in spectra]
    for share in range(3, 15):
        ways = [ranks for ranks in product(range(1, 5), range(1, 7), range(1, 6)) if sum(ranks) == share]
        best = min(ways, key=lambda ranks: sum(tail[r] for tail, r in zip(tails, ranks, strict=True)))
        assert share_out(spectra, share) == list(best)
    assert share_out(spectra, 40) == [4, 6, 5]
    assert min(share_out(spectra, 9, least=2)) >= 2


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("method", ["kfac", "asvd-1"])
def test_bytes_shared_out_over_all_layers_lose_less_by_prediction(method, joint):
    """The same bytes in all; layers differ, and what the spectra predict is no worse than with equal shares."""
    lost, reports = [], []
    for allocation in ("uniform", "fisher"):
        model = tiny_model(num_hidden_layers=3)
        with torch.no_grad():
            model.get_parameter("model.layers.1.self_attn.o_proj.weight").mul_(20)
        stats = nsvd.calibrate(model, token_ids())
        stats = stats.with_gradients(nsvd.fisher(model, token_ids()))
        reports.append(nsvd.compress_kv_(model, stats, method=method, joint=joint, allocation=allocation))
        lost.append(predicted_loss(model, stats, reports[-1].table.layer))
    assert reports[0].bytes_after == reports[1].bytes_after
    assert reports[1].table.rank_v.nunique() > 1
    if method == "kfac":  # its own unit
        assert lost[1] < lost[0]


def predicted_loss(model, stats, layers) -> float:
    """tr(H (W − Ŵ) G (W − Ŵ)ᵀ), summed over keys and values."""
    lost, dense = 0.0, tiny_model(num_hidden_layers=3)
    for name in (f"{layer}.{part}" for layer in layers for part in ("k_proj", "v_proj")):
        D = (dense.get_submodule(name).weight - model.get_submodule(name).to_linear().weight).double()
        lost += (stats[name].H @ D @ stats[name].G @ D.mT).trace().item()
    return lost


def test_best_needs_nothing_but_the_model():
    """It writes its own text; or takes the text given; one latent for keys and values, unless told otherwise."""
    model, other = tiny_model(num_hidden_layers=3), tiny_model(num_hidden_layers=3)
    report = nsvd.compress_kv_(model, method="best")
    assert (report.method, report.joint, report.allocation) == ("best", True, "fisher")
    assert report.seconds.keys() >= {"sample", "calibrate", "gradients"}
    assert report.cache_ratio_reached <= 0.5
    assert_same_text(generate(model), generate(model, use_cache=False))
    apart = nsvd.compress_kv_(other, method="best", windows=[token_ids(), token_ids(seed=9)], joint=False)
    assert not apart.joint
    assert "sample" not in apart.seconds


def test_best_after_best(tmp_path):
    """Pivoted, shifted layers first; then the cache; both stories are told, and saved."""
    model = tiny_model()
    nsvd.compress_(model, windows=token_ids(), method="best", ratio=0.3)
    nsvd.compress_kv_(model, windows=token_ids(), method="best")
    assert_same_text(generate(model), generate(model, use_cache=False))
    nsvd.save(model, tiny_tokenizer(), tmp_path / "both")
    assert torch.equal(logits(nsvd.load(tmp_path / "both", device="cpu")[0]), logits(model))


def test_one_latent_for_both_is_never_worse_for_the_same_bytes():
    """Summed relative squared errors on the calibration text: a joint latent could always be two separate ones side by side."""
    sums = [
        (report.table[["k_calibration_error", "v_calibration_error"]] ** 2).sum(axis=1)
        for joint in (False, True)
        if (report := nsvd.compress_kv_(tiny_model(), windows=token_ids(), joint=joint)) is not None
    ]
    assert (sums[1] <= sums[0] + 1e-6).all()
    assert (sums[1] < sums[0]).any()


def test_one_latent_is_one_matrix_in_memory():
    """Keys and values share the down-projection."""
    model = latent(joint=True)
    for layer in latent_layers(model).values():
        assert layer.attention.k_proj.down.weight is layer.attention.v_proj.down.weight


def test_a_ratio_of_one_changes_nothing_but_the_layers_that_pay_for_positions():
    """Without rotation nothing has to be paid, and the model says what it said."""
    model = tiny_model("opt")
    before = logits(model)
    report = nsvd.compress_kv_(model, method="svd", cache_ratio=1)
    assert report.cache_ratio_reached == 1
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_saved_and_read_again(family, joint, dtype, tmp_path):
    """Both ways of reading give a model with a latent cache and the same bits, which can be saved once more."""
    model = latent(family, joint=joint, dtype=dtype)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "one")
    for again in (
        nsvd.load(tmp_path / "one", device="cpu")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval(),
    ):
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(generate(again).sequences, generate(model).sequences)
        assert bytes_per_token(again) == bytes_per_token(model)
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    nsvd.save(again, None, tmp_path / "two")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert first["quantization_config"] == second["quantization_config"]


def test_the_choice_to_absorb_is_saved_and_older_files_are_read(tmp_path):
    """Off, on, and not told."""
    for absorb, expected in ((False, False), (True, True), ("auto", True)):
        nsvd.save(latent(absorb=absorb), tiny_tokenizer(), tmp_path / "low")
        assert {f.absorb for f in latent_layers(nsvd.load(tmp_path / "low", device="cpu")[0]).values()} == {expected}
    edit(tmp_path / "low", lambda c: [spec.pop("absorb") for spec in c["latent_cache"]["layers"].values()])
    assert {f.absorb for f in latent_layers(nsvd.load(tmp_path / "low", device="cpu")[0]).values()} == {False}


@pytest.mark.parametrize("joint", [False, True])
def test_dequantize_gives_the_plain_dense_model_back(joint, tmp_path):
    """Dense layers, the family's own forward, a dense cache, no trace in config.json; and it says the same."""
    model = latent(joint=joint)
    said = logits(model)
    plain = model.dequantize()
    assert latent_layers(plain) == {}
    assert not any("forward" in vars(module) for module in plain.modules())
    assert nsvd.targets(plain).keys() == nsvd.targets(tiny_model(num_hidden_layers=3)).keys()
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    nsvd.compress_kv_(plain, method="svd", cache_ratio=0.3)  # and it can be done again


def test_a_model_compressed_before_keeps_its_other_layers(tmp_path):
    """The ranks of key and value projections change, everything else stays, config.json tells both stories."""
    model, stats = tiny_model(), nsvd.calibrate(tiny_model(), token_ids())
    nsvd.compress_(model, stats, ratio=0.3, k1=K1)
    before = copy.deepcopy(model)
    nsvd.compress_kv_(model, stats, cache_ratio=0.5)
    for name, layer in before.named_modules():
        if isinstance(layer, nsvd.LowRankLinear) and not name.endswith(("k_proj", "v_proj")):
            assert torch.equal(model.get_submodule(name).up.weight, layer.up.weight)
    assert_same_text(generate(model), generate(model, use_cache=False))
    nsvd.save(model, tiny_tokenizer(), tmp_path / "both")
    config = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    assert (config["method"], config["ratio"], len(config["modules"])) == ("nsvd-1", 0.3, 14)
    assert (config["latent_cache"]["method"], config["latent_cache"]["cache_ratio"]) == ("asvd-1", 0.5)
    assert torch.equal(logits(nsvd.load(tmp_path / "both", device="cpu")[0]), logits(model))


def test_the_copy_of_a_model_is_independent():
    """deepcopy brings its own latent layers, which point at the copy's weights."""
    model = latent()
    other = copy.deepcopy(model)
    for name, layer in latent_layers(other).items():
        assert layer.attention is other.get_submodule(name)
        assert layer.rotation.model is other
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_text(generate(other), generate(other, use_cache=False))


REFUSED = {
    "gpt_neox": ({}, r"gpt_neox\.layers\.0\.attention.*GPTNeoXAttention"),  # fused
    "phi3": ({"intermediate_size": 48}, r"model\.layers\.0\.self_attn.*Phi3Attention"),  # fused
    "gptj": ({"rotary_dim": 4}, r"transformer\.h\.0\.attn .GPTJAttention"),  # another way to call its attention
    "llama4_text": (
        {"intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2},
        r"model\.layers\.0\.self_attn .Llama4TextAttention. makes its keys",  # a complex rotation
    ),
    "bart": (
        {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        r"encoder_attn .BartAttention.: its keys do not reach",  # cross attention
    ),
    "mamba": ({}, "MambaForCausalLM"),
}


@pytest.mark.every
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(family):
    """One sentence that names the layer, and the model as it was."""
    changes, message = REFUSED[family]
    model = tiny_model(family, **changes)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_kv_(model, method="svd")
    assert_same(before, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_ratio": 0.0}, r"lies in \(0, 1\]"),
        ({"cache_ratio": 1.1}, r"lies in \(0, 1\]"),
        ({"cache_ratio": 0.1}, r"layer model\.layers\.0\.self_attn: cache_ratio 0.1 leaves no rank"),
        ({"method": "magic"}, "unknown method"),
        ({"absorb": "perhaps"}, "absorb is 'perhaps'"),
        ({"allocation": "strs"}, "unknown allocation 'strs'; there are uniform, fisher"),
        (
            {"allocation": "fisher"},
            r"allocation 'fisher' weighs the outputs of layer model\.layers\.0\.self_attn\.k_proj",
        ),
        ({"method": "best"}, r"K-FAC weighs the outputs of layer model\.layers\.0\.self_attn\.k_proj by the loss"),
        ({"method": "asvd-1", "stats": None}, "needs statistics"),
        ({"method": "asvd-1", "k1": 0.5}, "no option k1"),
        ({"method": "nsvd-1", "k1": 0.99}, r"layer model\.layers\.0\.self_attn: 13 numbers .* less than rank 51"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(options, message):
    """Ratios, methods, options; the layer is named where one is at fault."""
    model = tiny_model()
    before, stats = state(model), nsvd.calibrate(model, token_ids())
    with pytest.raises(ValueError, match=message):
        nsvd.compress_kv_(model, **({"stats": stats} | options))
    assert_same(before, model)


def test_a_latent_cache_is_not_compressed_twice():
    """The model has to be made dense first."""
    model = latent()
    with pytest.raises(ValueError, match=r"already; dequantize\(\)"):
        nsvd.compress_kv_(model, method="svd")


@pytest.mark.parametrize("where", [f"{K}.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_nan_in_a_weight_stops_with_its_name(where):
    """Nothing is replaced."""
    model = tiny_model()
    poison(model, where)
    before = state(model)
    with pytest.raises(ValueError, match=where.removesuffix(".weight") + " holds NaN or Inf"):
        nsvd.compress_kv_(model, method="svd")
    assert_same(before, model)


def test_nan_in_an_activation_stops_with_the_layer():
    """Also when the method does not look at activations."""
    model = tiny_model()
    model.get_submodule("model.layers.1.input_layernorm").register_forward_hook(lambda _m, _args, y: y * float("nan"))
    for method in ("svd", "asvd-1"):
        before = state(model)
        with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.self_attn"):
            nsvd.compress_kv_(model, windows=token_ids(), method=method)
        assert_same(before, model)


def test_a_quantized_cache_is_refused():
    """It would round positions."""

    class Rounded(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            out = super().update(keys, values, layer_idx, *args, **kwargs)
            self.layers[layer_idx]._quantized_keys = None
            return out

    with pytest.raises(ValueError, match="quantized cache"):
        latent()(input_ids=IDS, past_key_values=Rounded())


def rename_cache(monkeypatch, model, change) -> None:
    """Another release of transformers: its attention layers are called with what ``change`` makes of their arguments."""
    kind = type(model.get_submodule(next(iter(key_value_layers(model)))))
    call, forward = kind.__call__, kind.forward

    def called(self, *args, **kwargs):
        return call(self, *args, **change(kwargs))

    @functools.wraps(forward)
    def run(self, hidden_states, **kwargs):
        was = {"memory": next(name for name in inspect.signature(forward).parameters if name in NAMES)}
        return forward(self, hidden_states, **{was.get(name, name): value for name, value in kwargs.items()})

    monkeypatch.setattr(kind, "__call__", called)
    monkeypatch.setattr(kind, "forward", run)


NAMES = ("cache", "past_key_values")  # of the cache, in releases of transformers


def renamed(kwargs: dict) -> dict:
    return {"memory" if name in NAMES else name: value for name, value in kwargs.items()}


def lost(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name not in NAMES} | {"use_cache": True}


def foreign(kwargs: dict) -> dict:
    class Paged:
        def update(self, keys, values, layer_idx, **_):
            return keys, values

    return {name: Paged() if name in NAMES else value for name, value in kwargs.items()}


@pytest.mark.every
@pytest.mark.parametrize("family", SUPPORTED)
def test_the_cache_is_found_by_its_type_under_any_name(family, monkeypatch):
    """Compressed and run in a release that calls it otherwise: the same factors, the same text, latents held."""
    expected = latent(family)
    text = generate(expected, length=6)
    rename_cache(monkeypatch, expected, renamed)
    model = latent(family)
    assert examine_of(model) == examine_of(expected)
    again = generate(model, length=6)
    assert_same_text(again, text)
    assert held(again.past_key_values) == held(text.past_key_values)


def examine_of(model) -> list[tuple[int, bool]]:
    return [(layer.rotated, layer.absorb) for layer in latent_layers(model).values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [(lost, "layer 0 is to cache latents, but it is given no cache"), (foreign, "a Paged is no cache of transformers")],
)
def test_dense_keys_and_values_are_never_cached_in_silence(change, message, monkeypatch):
    """A cache promised that does not arrive, or arrives as something else, is an error."""
    model = latent()
    rename_cache(monkeypatch, model, change)
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, use_cache=True)


def test_a_cache_that_is_given_and_not_used_is_an_error(monkeypatch):
    """A forward that looks for it elsewhere would attend to the new tokens alone."""
    model = latent()
    kind = type(next(iter(latent_layers(model).values())).attention)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: forward(self, *args, **lost(kwargs)))
    with pytest.raises(ValueError, match="layer 0 is to cache latents, but it does not use the cache it is given"):
        model(input_ids=IDS, use_cache=True)


def edit(folder, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    (folder / "nsvd_manifest.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["latent_cache"]["layers"].update({"model.layers.9.self_attn": {"rotated": 8, "joint": True}}),
            "layers.9",
        ),
        (lambda c: c["latent_cache"]["layers"]["model.layers.0.self_attn"].update(rotated="yes"), "layers.0.*yes"),
        (lambda c: c["latent_cache"]["layers"]["model.layers.0.self_attn"].pop("joint"), r"layers\.0"),
        (lambda c: c["latent_cache"]["layers"]["model.layers.0.self_attn"].update(absorb=1), "layers.0.*'absorb': 1"),
        (lambda c: c["modules"][K].update(rank=5), "two ranks, 5 and"),
    ],
)
def test_a_damaged_description_is_refused(change, message, tmp_path):
    """The layer is named."""
    nsvd.save(latent(joint=True), tiny_tokenizer(), tmp_path / "low")
    edit(tmp_path / "low", change)
    with pytest.raises(nsvd.CheckpointError, match=message):
        nsvd.load(tmp_path / "low")


def test_the_same_input_gives_the_same_factors():
    """To the bit."""
    one, other = latent(), latent()
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_the_report_says_what_is_held():
    """Bytes a token, ranks, parameters of the factors, method, versions; all but the table is JSON."""
    for joint in (False, True):
        model = tiny_model()
        report = nsvd.compress_kv_(model, windows=token_ids(), joint=joint)
        assert (report.bytes_before, report.bytes_after) == bytes_per_token(model)
        assert report.cache_ratio_reached == report.bytes_after / report.bytes_before <= report.cache_ratio == 0.5
        weights = {
            id(p): p.numel() for n, p in model.named_parameters() if ("k_proj" in n or "v_proj" in n) and p.ndim == 2
        }
        assert report.params_after == sum(weights.values())
        for row in report.table.itertuples():
            assert row.rank_k == model.get_submodule(row.layer).k_proj.rank
            assert row.rank_v == model.get_submodule(row.layer).v_proj.rank
        assert json.loads(json.dumps(report.as_dict()))["method"] == "asvd-1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.every
@pytest.mark.parametrize("family", SUPPORTED)
def test_what_is_found_by_trying_does_not_depend_on_the_dtype(family, dtype):
    """It is tried in float32."""
    assert examine(tiny_model(family, dtype=dtype, **SUPPORTED[family])) == examine(
        tiny_model(family, **SUPPORTED[family])
    )


def test_a_small_sink_is_found_in_bfloat16():
    """Weights that sum to 0.98 at first and nearly to one later: no more than rounding in that dtype, and not absorbed."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("gpt_oss", dtype=dtype, **NOT_ABSORBED["gpt_oss"])
        with torch.no_grad():
            [p.fill_(-4.0) for name, p in model.named_parameters() if "sinks" in name]
        assert {able for _, able in examine(model).values()} == {False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_examining_leaves_no_trace(dtype):
    """No hook, no mode, no tensor is different afterwards."""
    model = tiny_model("qwen3", dtype=dtype).train()
    before = state(model)
    assert set(examine(model).values()) == {(8, True)}
    assert_same(before, model)
