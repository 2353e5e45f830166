"""torch.compile takes a compressed model in one graph, for a prompt and for decoding with either cache."""

import functools

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import StaticCache

from nsvd.walk.caches import caches_of
from tests.tiny import compressed, tiny_model, token_ids

WAYS = {
    "plain": {"method": "svd"},
    "pivoted": {"method": "svd", "factors": "pivoted"},
    "narrow": {"method": "best"},
    "split": {"method": "sola", "ratio": 0.05, "keep_outer": 0},
}
PROMPT, NEW = 8, 2  # a prompt longer than the ranks


@functools.cache
def model(way: str):
    return compressed(tiny_model(num_hidden_layers=1), **WAYS[way])


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test is taken up, and none is left."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def said(model, forward, static: bool) -> torch.Tensor:
    """Logits of a prompt read at once, then of tokens read one by one with a cache."""
    ids, held = token_ids(2, PROMPT + NEW), {}
    if static:
        (name,) = caches_of(model(input_ids=ids[:, :1], use_cache=True))
        held = {name: StaticCache(config=model.config, max_cache_len=PROMPT + NEW)}
    found = []
    for part in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)):
        output = forward(input_ids=part, use_cache=True, **held)
        found.append(output.logits)
        held = caches_of(output)
    return torch.cat(found, 1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
@pytest.mark.parametrize("way", WAYS)
def test_one_graph_holds_the_whole_model(way, static):
    """``fullgraph`` raises where Python that cannot be followed would break it; the logits are those of the eager model."""
    made = model(way)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(said(made, compiled, static), said(made, made, static), rtol=0, atol=1e-5)


def test_fused_kernels_say_the_same():
    """By the default backend, which makes kernels for the machine: here the reordering is fused with what follows."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    made = model("pivoted")
    compiled = torch.compile(made, fullgraph=True)
    with torch.no_grad():
        both = [one(input_ids=token_ids(2, PROMPT), use_cache=False).logits for one in (made, compiled)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)
