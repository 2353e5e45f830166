"""Experts that a model holds as one tensor of three dimensions, taken apart into linear layers, and put together again.

They are known by what transformers' ``use_experts_implementation`` leaves on a module, not by its class: whether there is a
gate, a bias, and which way the weights lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

# The layer of each expert by the parameter that it is a slice of. No checkpoint of experts one by one has these names, so
# transformers does not take a layer that stays dense for a part of the whole parameter.
LAYER = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
PARAMETER = {layer: parameter for parameter, layer in LAYER.items()}
WITHIN = re.compile(rf"(.+)\.\d+\.({'|'.join(PARAMETER)})")  # the name of a layer of an expert


class ExpertsApart(nn.Module):
    """Experts of linear layers: ``<number>.gate_up`` or ``<number>.up``, and ``<number>.down``. ``take_apart`` makes them.

    ``kind`` is the class that they were. Its gate and its activation are theirs.
    """

    kind: type[nn.Module]
    has_gate: bool
    act_fn: Callable[[Tensor], Tensor]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(name.isdigit() for name in self._modules)

    def layers(self) -> Iterator[nn.Module]:
        """The layers of all of them, dense or compressed."""
        for number in range(self.count):
            yield from self.expert(number).values()

    def expert(self, number: int) -> nn.ModuleDict:
        """The layers of one of them, by their names within it."""
        return cast(nn.ModuleDict, self._modules[str(number)])

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, everyone: Iterable[int] = ()) -> Tensor:
        """Σ of the experts' outputs for x (n, d), by their numbers (n, k) and weights (n, k).

        The experts in ``everyone`` run on all n tokens. What they say of those that are not theirs is dropped.
        """
        out, every = torch.zeros_like(x), torch.arange(len(x), device=x.device)
        for number in sorted({*index.unique().tolist(), *everyone} & {*range(self.count)}):
            token, place = torch.where(index == number)
            said = self._said(number, x[every])[token] if number in everyone else self._said(number, x[token])
            out.index_add_(0, token, (said * weights[token, place, None]).to(out.dtype))
        return out

    def _said(self, number: int, x: Tensor) -> Tensor:
        expert = self.expert(number)
        if self.has_gate:
            gate = self.kind._apply_gate  # pyright: ignore[reportAttributeAccessIssue]  # see ``are_experts``
            return expert["down"](gate(self, expert["gate_up"](x)))
        return expert["down"](self.act_fn(expert["up"](x)))


def are_experts(module: nn.Module) -> bool:
    """Whether a module is experts in the form that transformers has for many of them, and holds nothing else."""
    told = all(isinstance(getattr(module, name, None), bool) for name in ("has_gate", "has_bias", "is_transposed"))
    if not told or isinstance(module, ExpertsApart) or not hasattr(module, "_apply_gate"):
        return False
    weights = _weights(module)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    wanted = {*weights, *(f"{name}_bias" for name in weights if module.has_bias)}
    if shapes.keys() != wanted or any(True for _ in module.buffers()):
        return False
    count = shapes[weights[0]][0]
    return all(
        len(shape) == (2 if name.endswith("_bias") else 3) and shape[0] == count for name, shape in shapes.items()
    )


def take_apart(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Make ``ExpertsApart`` of experts, in place; their layers look into the parameters, which are returned by name."""
    whole = dict(experts.named_parameters())
    for number in range(len(whole[_weights(experts)[0]])):
        layers = {}
        for name in _weights(experts):
            weight, bias = whole[name], whole.get(f"{name}_bias")
            layers[LAYER[name]] = _linear(weight[number].mT if experts.is_transposed else weight[number],
                                          None if bias is None else bias[number])  # fmt: skip
            layers[LAYER[name]].requires_grad_(weight.requires_grad)
        experts.add_module(str(number), nn.ModuleDict(layers).train(experts.training))
    for name in whole:
        del experts._parameters[name]
    experts.kind, experts.__class__ = type(experts), ExpertsApart  # pyright: ignore[reportArgumentType]
    return whole


@torch.no_grad()
def put_together(experts: ExpertsApart, whole: Mapping[str, nn.Parameter] | None = None) -> None:
    """The inverse, for experts that are all dense; by default with parameters of their own."""
    parts = [experts.expert(number) for number in range(experts.count)]
    for number in range(len(parts)):
        del experts._modules[str(number)]
    experts.__class__ = experts.__dict__.pop("kind")
    if whole is None:
        whole = {}
        for name in _weights(experts):
            layers = [cast(nn.Linear, part[LAYER[name]]) for part in parts]
            weights = torch.stack([layer.weight.mT if experts.is_transposed else layer.weight for layer in layers])
            whole[name] = nn.Parameter(weights, layers[0].weight.requires_grad)
            if experts.has_bias:
                biases = torch.stack([layer.bias for layer in layers])
                whole[f"{name}_bias"] = nn.Parameter(biases, layers[0].bias.requires_grad)
    for name, parameter in whole.items():
        experts.register_parameter(name, parameter)


def take_apart_for(model: nn.Module, layers: Iterable[str]) -> None:
    """Take apart the experts that these layers are parts of."""
    wanted = {inside[1] for inside in map(WITHIN.fullmatch, layers) if inside}
    for name, module in list(model.named_modules()):
        if name in wanted and are_experts(module):
            take_apart(module)


def parameter_of(layer: str) -> str | None:
    """The name of the parameter of which a layer of an expert, by its name, is a slice; None for other layers."""
    inside = WITHIN.fullmatch(layer)
    return f"{inside[1]}.{PARAMETER[inside[2]]}" if inside else None


def layer_names(model: nn.Module) -> Iterator[str]:
    """The names that the layers of all experts have once they are taken apart."""
    for name, module in model.named_modules():
        if are_experts(module):
            parts = [LAYER[part] for part in _weights(module)]
            count = len(module.get_parameter(_weights(module)[0]))
            yield from (f"{name}.{number}.{part}" for number in range(count) for part in parts)


def put_together_all(model: nn.Module) -> None:
    """Put together all experts of a model; they must be dense."""
    for module in list(model.modules()):
        if isinstance(module, ExpertsApart):
            put_together(module)


def _weights(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these tensors for its own."""
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
