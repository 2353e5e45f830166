"""Parts of a block that will not change any more: they run once for a batch, and after that their output is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def settled_parts(block: nn.Module, begin: str, groups: Mapping[str, Sequence[str]], done: str) -> list[str]:
    """The parts of the block, of several layers each, whose layers are all exchanged once the group ``done`` is.

    ``begin`` is what names of the block's layers begin with; ``groups`` are these, by the first of each group, in forward order.
    """
    leaders = list(groups)
    later = [layer for leader in leaders[leaders.index(done) + 1 :] for layer in groups[leader]]
    named = {layer for group in groups.values() for layer in group}
    return [
        part
        for part, module in block.named_children()
        if begin + part not in named
        and any(layer.startswith(f"{begin}{part}.") for layer in named)
        and not any(layer.startswith(f"{begin}{part}.") for layer in later)
    ]


@contextmanager
def remembering(block: nn.Module, settled: Sequence[str], outputs: MutableMapping[str, object]) -> Iterator[None]:
    """In the context settled parts give back what ``outputs`` holds for them; what is missing there is put in as they run.

    Layers are exchanged in forward order, so what comes before a settled part does not change either.
    """
    before = {part: block.get_submodule(part) for part in settled}
    with ExitStack() as stack:
        for part, module in before.items():
            if part in outputs:
                stack.callback(block.set_submodule, part, module)
                block.set_submodule(part, _Remembered(outputs[part]))
            else:
                keep = lambda _m, _a, out, part=part: outputs.__setitem__(part, out)  # noqa: E731
                stack.callback(module.register_forward_hook(keep).remove)
        yield


@contextmanager
def completion(block: nn.Module, part: str | None, layer: nn.Module) -> Iterator[list[Callable[[Tensor], object]]]:
    """How a part of the block makes its output from the layer's, after it ran in the context: that very tensor, put in its place.

    Nothing is found where the part gives out something else, does not run, or is None.
    """
    own: list[tuple[Tensor, int]] = []
    found: list[Callable[[Tensor], object]] = []

    def compare(_module: nn.Module, _args: tuple, out: object) -> None:
        (said, version), (leaves, form) = own[-1], tree_flatten(out)
        same = [leaf is said and said._version == version for leaf in leaves]
        if any(same):
            rest = [None if is_it else leaf for leaf, is_it in zip(leaves, same, strict=True)]
            fill = lambda new: [new if is_it else leaf for leaf, is_it in zip(rest, same, strict=True)]  # noqa: E731
            found.append(lambda new: tree_unflatten(fill(new), form))

    with ExitStack() as stack:
        if part is not None:
            keep = lambda _m, _a, out: own.append((out, out._version))  # noqa: E731
            stack.callback(layer.register_forward_hook(keep).remove)
            stack.callback(block.get_submodule(part).register_forward_hook(compare).remove)
        stack.callback(own.clear)
        yield found


class _Remembered(nn.Module):
    """Gives out what it was given, whatever comes in."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args, **_kwargs) -> object:
        return self.output
