"""The statistics and decompositions a method needs, and the checks before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nsvd.compression.prepared import Prepared, describing
from nsvd.compression.report import Clock
from nsvd.compression.sola_blocks import blocks
from nsvd.linalg import Decomposition, Method, Moments, SplitMethod, by_name
from nsvd.linalg.decomposition import Spectrum
from nsvd.linalg.methods import check_finite
from nsvd.linalg.precision import double
from nsvd.linalg.sola import WHOLE, Block
from nsvd.walk.calibrate import Walked, calibrate, walkable
from nsvd.walk.decoder import longest_list
from nsvd.walk.experts import experts_apart
from nsvd.walk.gradients import fisher_into
from nsvd.walk.lazy import held
from nsvd.walk.memory import give_back
from nsvd.walk.moments import mix
from nsvd.walk.processes import dealt, gathered, rank, same
from nsvd.walk.roles import roles
from nsvd.walk.shelf import Kept, Shelf
from nsvd.walk.soundness import check_values
from nsvd.walk.statistics import Statistics
from nsvd.walk.targets import by_block, targets

DRAFT = "gradients-draft"  # on the shelf: gradients at the compressed end
ENDS = "gradients-of-both-ends"  # a mark that those of both ends are complete
GRADIENTS_EVERY, GRADIENTS_LEAST = 8, 16  # every eighth window is enough for gradients, where that leaves sixteen


@torch.inference_mode(False)
@torch.no_grad()
def prepare(
    model: nn.Module,
    stats: Statistics | None,
    method: str,
    *,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = False,
    **options: float | str,
) -> Prepared:
    """The method's outer decomposition of every target layer, or of those chosen as in ``targets``, for all ranks at once.

    Give it to ``compress_(…, prepared=…)`` again and again: a sweep over ratios, over k1, or over methods with one outer
    step (``asvd-1``, ``nsvd-1``, ``nid-1``) decomposes each layer once. For ``sola``, of the blocks that it factors. Computed
    in float64 on the layer's device (on the CPU where that has none), kept in the host's memory. What it is of is kept with it:
    for another outer step, other options, weights or statistics it is refused.
    """
    chosen = by_name(method)
    apart = isinstance(chosen, Method) and not chosen.needs_gradients
    with experts_apart(model) if apart else nullcontext():
        layers = targets(model, layers, exclude)
        check_values(model)
        check_statistics(layers, stats, chosen)
        found: dict[str, Decomposition] = {}
        decompositions(found, model, layers, stats, chosen, options, progress=progress)
        return Prepared(found, *describing(layers, stats, chosen, options))


def decompositions(
    found: MutableMapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stats: Statistics | None,
    chosen: Method | SplitMethod,
    options: dict,
    *,
    parts: Mapping[str, Block] | None = None,
    only_ranks: bool = False,
    progress: bool = False,
) -> None:
    """Decompose each layer that ``found`` lacks, and put it there; with ``only_ranks`` no more than a ``Spectrum`` of it.

    Several processes deal the layers; of those that another has decomposed each has the singular values.
    """
    if isinstance(chosen, Method):
        method, parts = chosen, dict.fromkeys(layers, WHOLE) if parts is None else parts
    else:
        parts = blocks(layers, roles(model), stats, chosen.resolve(options))
        method, options = chosen.inner(options)
    _, listed = longest_list(model) or ("", [model])
    owner = owners(model, layers)
    with tqdm(total=len(parts), desc="decompose", disable=not progress, leave=False) as bar:
        for index, names in by_block(model, parts).items():
            lacking = set().union(*gathered({name for name in names if name not in found}))
            missing = [name for name in names if name in lacking]
            bar.update(len(names) - len(missing))
            with held(listed[index]) if missing else nullcontext():
                for name in missing:
                    if is_mine(owner, name):
                        how = {"part": parts[name], "k": 0 if only_ranks else None}
                        one = prepare_layer(layers[name], name, stats, method, options, **how).to("cpu")
                        found[name] = Spectrum(one.s) if only_ranks else one
                        del one
                        give_back()
                        bar.update()
            for name in missing:
                s = cast(Tensor, same(found[name].s if is_mine(owner, name) else None, owner[name]))
                if not is_mine(owner, name):
                    found[name] = Spectrum(s)
                    bar.update()


def prepare_layer(
    layer: nn.Linear,
    name: str,
    stats: Mapping[str, Moments] | None,
    method: Method,
    options: dict,
    *,
    part: Block = WHOLE,
    k: int | None = None,
) -> Decomposition:
    """The outer decomposition of one layer, or a block of it, up to rank ``k`` where one is given; what raises names the layer."""
    W, moments = part.take(double(layer.weight)), None
    if method.needs_moments:
        known = cast(Mapping[str, Moments], stats)  # see ``check_statistics``
        moments = part.moments(known[name].to(W.device))
    with naming(name):
        return method.prepare(W, moments, k=k, **options)


def take_statistics(
    model: nn.Module,
    stats: Statistics | None,
    domains: Sequence[Tensor],
    method: Method | SplitMethod,
    allocation: str,
    clock: Clock,
    seed: int,
    progress: bool = False,
    layers: Sequence[str] | None = None,
    weights: Sequence[float] | str = "uniform",
    ratio: float | None = None,
    shelf: Shelf | None = None,
) -> Statistics | None:
    """``stats`` where given, else those of the windows, of these layers or all; with gradients where they are asked for.

    On a ``shelf`` they do not fill the memory.
    """
    if stats is None and domains and (method.needs_moments or allocation == "fisher" or weights != "uniform"):
        stats = statistics_of(model, domains, weights, ratio=ratio, layers=layers, shelf=shelf, progress=progress)
        clock.lap("calibrate")
    if (method.needs_gradients or allocation == "fisher") and stats is not None and not stats.gradients and domains:
        found, texts = {} if shelf is None else shelf.kept("gradients"), gradient_texts(domains)
        if shelf is not None and ENDS in shelf:  # an earlier run has come further
            return stats.with_gradients(averaged(found, shelf))
        how = {"layers": layers, "seed": seed, "shelf": shelf, "progress": progress}
        fisher_into(found, model, texts, stats.shares(len(domains)), **how)
        stats = stats.with_gradients(found)
        clock.lap("gradients")
    return stats


def averaged(known: Mapping[str, Tensor], shelf: Shelf) -> Mapping[str, Tensor]:
    """The means of gradients that are known and those of the other end, which are on the shelf: they leave it one by one."""
    mean, there = shelf.kept("gradients-mean"), shelf.kept(DRAFT)
    for name in list(there):
        if name not in mean:
            mean[name] = (there[name] + known[name].to(there[name])).div_(2)
        del there[name]
        if isinstance(known, Kept):
            del known[name]
    return mean


def statistics_of(
    model: nn.Module,
    domains: Sequence[Tensor],
    weights: Sequence[float] | str = "uniform",
    *,
    ratio: float | None = None,
    layers: Sequence[str] | None = None,
    shelf: Shelf | None = None,
    progress: bool = False,
) -> Statistics:
    """Moments of the windows of every domain, mixed by ``mix`` where there are several."""
    with experts_apart(model) if layers is None else nullcontext():
        names = list(targets(model) if layers is None else layers)
        if weights != "worst-case" and (decoder := walkable(model, names)) is not None:
            found = {} if shelf is None else shelf.kept("moments")
            return Walked(decoder, domains, names, weights, shelf=shelf, progress=progress).all(found)
        each = [calibrate(model, ids, layers=layers, progress=progress) for ids in domains]
        return each[0] if len(each) == 1 else mix(each, weights, model=model, ratio=ratio)


def gradient_texts(domains: Sequence[Tensor], *, others: bool = False) -> list[Tensor]:
    """The windows of every domain that gradients are taken from; with ``others`` those half-way between, if any."""
    texts = []
    for ids in domains:
        step = max(1, min(GRADIENTS_EVERY, len(ids) // GRADIENTS_LEAST))
        texts.append(ids[step // 2 if others else 0 :: step])
    return texts


def check_statistics(layers: Mapping[str, nn.Linear], stats: Statistics | None, method: Method | SplitMethod) -> None:
    """Raise ``ValueError`` unless the method has the statistics it needs, of these layers, and all they hold is finite."""
    if stats is not None:
        check_moments(layers, stats)
    if not method.needs_moments:
        return
    if stats is None:
        raise ValueError(f"{method.label} needs statistics: pass stats= from calibrate(), or windows= to calibrate on")
    if method.needs_gradients:
        check_gradients(layers, stats, method.label)
    for name, layer in layers.items():
        if name not in stats:
            raise ValueError(f"the statistics hold no layer {name}; were they taken from another model?")
        if len(stats[name].G) != layer.in_features:
            raise ValueError(
                f"layer {name} has {layer.in_features} inputs, the statistics {len(stats[name].G)}; another model's?"
            )
        if method.needs_gradients and len(stats[name].slopes()) != layer.out_features:
            raise ValueError(
                f"layer {name} has {layer.out_features} outputs, the gradients {len(stats[name].slopes())}; another model's?"
            )


def check_moments(layers: Iterable[str], stats: Statistics) -> None:
    """Raise ``ValueError`` naming the first of these layers of which a moment holds NaN or Inf."""
    known = set()
    for name in layers:
        if name in stats:
            one, leader = stats[name], stats.inputs[name]
            for letter, values, place in (("G", one.G, leader), ("mean_abs", one.mean_abs, leader), ("H", one.H, name)):
                if values is not None and (letter, place) not in known:
                    check_finite(f"{letter} of layer {name} in the statistics", values)
                    known.add((letter, place))


def check_gradients(layers: Iterable[str], stats: Statistics | None, who: str) -> None:
    """Raise ``ValueError`` unless the statistics hold the gradients of these layers."""
    for name in layers:
        if stats is None or name not in stats.gradients:
            raise ValueError(
                f"{who} weighs the outputs of layer {name} by the loss: pass windows=, or stats with gradients"
            )


def owners(model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, int]:
    """The process that decomposes each layer: every block is dealt by itself, as blocks come one after the other."""
    found: dict[str, int] = {}
    for names in by_block(model, layers).values():
        found |= dealt({name: _cost(layers[name]) for name in names})
    return found


def is_mine(owner: Mapping[str, int], name: str) -> bool:
    """Whether this process has the layer to do."""
    return owner[name] == rank()


def _cost(layer: nn.Linear) -> float:
    """Of a decomposition, in proportion."""
    d_out, d_in = layer.weight.shape
    return float(d_out * d_in * (d_out + d_in))


class naming:
    """Add the layer's name to a ``ValueError``, ``LinAlgError`` or ``FloatingPointError`` raised inside."""

    def __init__(self, layer: str):
        self.layer = layer

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        if isinstance(error, ValueError | torch.linalg.LinAlgError | FloatingPointError):
            raise kind(f"layer {self.layer}: {error}") from error
