"""Random models of every supported family, a tokenizer and token ids, small enough for tests."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import nsvd

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}  # two queries to a key
FAMILIES = {
    "llama": GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": GROUPED,
    "qwen2": GROUPED,  # biases on queries, keys and values
    "qwen3": GROUPED | {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": GROUPED | {"head_dim": 8},  # tied
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # tied, biases everywhere
    "gpt_neox": {"intermediate_size": 48},
    "phi": {"intermediate_size": 48},
}
LATE_WINDOW = {  # of qwen2: only the blocks behind the first look no further back than four tokens
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
}
PIVOTED = {"method": "asvd-1", "factors": "pivoted"}
K1 = 0.8  # of ranks as small as 7, the usual 0.95 leaves nothing for the inner step
Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def float32():
    """Models are built in float32, as users build them; import this where a test runs one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def tiny_model(family: str = "llama", *, seed: int = 0, dtype=torch.float32, **changes) -> PreTrainedModel:
    """A random model in evaluation mode, its biases not zero."""
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changes))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_tokenizer(length: int = 64, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; with ``bos``, every text begins with ``<s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(alphabet, 2)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    if bos:
        bytewise.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=length
    )


def token_ids(count: int = 12, length: int = 16, *, seed: int = 1) -> torch.Tensor:
    """Random windows."""
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(seed))


def statistics(model: PreTrainedModel, ids: torch.Tensor | None = None) -> nsvd.Statistics:
    """All that any method may ask for: moments of the inputs and of the loss's gradients."""
    ids = token_ids() if ids is None else ids
    return nsvd.calibrate(model, ids).with_gradients(nsvd.fisher(model, ids))


def compressed(model: PreTrainedModel, ids: torch.Tensor | None = None, **options) -> PreTrainedModel:
    """A compressed copy."""
    model = copy.deepcopy(model)
    options = {"ratio": 0.3, "method": "nsvd-1"} | options
    options |= {"k1": K1} if options["method"] == "nsvd-1" else {}
    nsvd.compress_(model, windows=token_ids() if ids is None else ids, **options)
    return model


def logits(model: PreTrainedModel, seed: int = 2) -> torch.Tensor:
    """What the model says to fixed windows."""
    with torch.no_grad():
        return model(input_ids=token_ids(3, 12, seed=seed)).logits


def state(model: torch.nn.Module) -> dict:
    """All that must not change when something is refused: tensors, kinds of layers, mode, hooks."""
    modules = {
        name: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    marks = {name: vars(model).get(name) for name in ("hf_quantizer", "is_quantized")}
    return {"tensors": {name: t.clone() for name, t in model.state_dict().items()}, "modules": modules, "marks": marks}


def assert_same(before: dict, model: torch.nn.Module) -> None:
    """The model is what it was when ``state`` looked at it."""
    after = state(model)
    assert before["modules"] == after["modules"]
    assert before["marks"] == after["marks"]
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        torch.testing.assert_close(after["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_refused(model: PreTrainedModel, stats, arguments: dict, message: str) -> None:
    """``compress_`` raises one ``ValueError`` that says so, and leaves the model as it was."""
    before = state(model)
    with pytest.raises(ValueError, match=message):
        nsvd.compress_(model, stats, **arguments)
    assert_same(before, model)


def poison(model: torch.nn.Module, name: str, row=0, value: float = float("nan")) -> None:
    """Put NaN into a row (or ``...``, all) of a parameter."""
    with torch.no_grad():
        model.get_parameter(name)[row] = value


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
