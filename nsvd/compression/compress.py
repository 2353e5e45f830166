"""Replace the linear layers of a model by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsvd.compression.exchange import Exchange
from nsvd.compression.measure import check_statistics, take_statistics
from nsvd.compression.prepared import Prepared, check_prepared
from nsvd.compression.ranks import SEARCHING, uniform
from nsvd.compression.report import Clock, Report, covered, left_alone, peak_memory, text_of, versions
from nsvd.compression.request import Request, chosen_layers, resolve
from nsvd.compression.sola import split
from nsvd.compression.whole_layers import Result, factor
from nsvd.stored.changes import FactorSums
from nsvd.stored.checkpoint import is_compressed, mark_compressed
from nsvd.stored.transposed import linear_layers
from nsvd.walk.calibrate import Walked, walkable
from nsvd.walk.experts import experts_apart
from nsvd.walk.lazy import held_modules
from nsvd.walk.processes import rank
from nsvd.walk.sampling import own_text
from nsvd.walk.shelf import Shelf
from nsvd.walk.soundness import check_values, predicted
from nsvd.walk.statistics import Statistics
from nsvd.walk.text import check_readable

# Every second window is enough for moments that decide on ranks alone, as where the layers see shifted ones.
RANKS_EVERY = 2


@torch.inference_mode(False)
@torch.no_grad()
def compress_(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    method: str = "nsvd-1",
    ratio: float | None = None,
    ranks: Mapping[str, int] | None = None,
    allocation: str | None = None,
    factors: str | None = None,
    shifted: bool | None = None,
    refine: int = 0,
    distill: int = 0,
    windows: Tensor | Sequence[Tensor] | None = None,
    weights: Sequence[float] | str = "uniform",
    search_count: int | None = None,
    neurons: float | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    prepared: Prepared | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: float | str,
) -> Report:
    """Replace every target layer by rank-k factors, in place, and report.

    Layers are decomposed in float64 and exchanged block by block. When something raises, all are put back: the model is
    unchanged. A layer whose factors would not be smaller than its weight stays
    dense and is reported so; the model's dtype is kept. Experts that are tensors of three dimensions are taken apart into layers
    and compressed, each for its own tokens; they stay dense with ``shifted``, ``distill``, gradients (``kfac``, ``best``, the
    allocations ``fisher`` and ``zero-sum``) and ``sola``. The report tells what share of the blocks was taken.

    Args:
        model: a model with ``nn.Linear`` layers, or GPT-2's ``Conv1D``.
        stats: moments from ``calibrate`` (not needed for ``svd``).
        method: a name of ``METHODS``; ``options`` are its own (``k1``, ``alpha``, ``mu``, ``eta``; for ``sola`` those
            of ``nsvd.linalg.sola.PUBLISHED`` and of its ``inner`` method). Or ``best``: ``kfac`` with ``mu`` 0.3,
            the allocation ``fisher``, pivoted factors, shifted inputs and up to half of what is removed as neurons, on text that
            the model samples from itself where no ``windows`` are given.
        ratio: fraction of the target layers' parameters to remove, in [0, 1); 0 leaves all dense, and no text is needed.
        ranks: in place of ``ratio``, the rank of each layer to compress; layers that are not named stay dense.
        allocation: how ``ratio`` is shared out: ``uniform`` (the default), the same for every layer; ``strs``, the ASVD
            paper's rank search, some nine passes over ``windows`` a layer; ``spectrum``, from the singular values; ``fisher``,
            from them and the gradients of the loss; ``lems``, an integer program over a model of the error, one pass a
            layer; ``zero-sum``, the selection of ZS-SVD, from the gradients of the weights; ``svd-llm-v2``, from the
            singular values within each type of layer. All but the first hold all decompositions in memory at once.
            For ``sola``: ``sola`` (its default), or ``uniform`` or ``spectrum`` over the layers that it compresses.
        factors: how they are stored: ``plain`` (the default), or ``pivoted``, which buys more rank for the same parameters.
        shifted: take the layers in order, each for the inputs it gets after those before it are compressed. A layer that stays
            dense gets the best weight for its inputs, too, unless ``ranks`` do not name it. With ranks to be found
            by a method that uses gradients, these are then averaged over the dense model and the compressed one.
        refine: after a block's layers are exchanged, this many steps of gradient descent on their factors, towards what the
            dense block gave out; goes with ``shifted``. A hundred or two are what it takes, and a dozen for each rate that is tried
            before; a block whose first batch would end worse stays as it was. Errors are weighed by the loss where the
            statistics hold the gradients of a block's last layer, else all alike.
        distill: after everything, this many steps of gradient descent on all factors at once, towards what the dense model
            predicts after every token of ``windows`` (Kullback–Leibler divergence). Two hundred are what it takes, and a dozen
            for each rate that is tried before. Where the divergence on the first step's windows would end higher, all stays as it
            was, and the report has no losses. Each step costs some four passes over 1024 tokens of every domain, a window at
            least, and memory for the gradients of the whole model.
        windows: token ids (count, length), or one such tensor for each of several domains: to calibrate on
            when ``stats`` is not given (every second one, with ``shifted``), to search on (``search_count``), to take gradients
            from, to follow with ``shifted``, to ``distill`` on.
        weights: of the domains of ``windows`` where ``stats`` are taken from them: ``uniform``, ``worst-case`` or numbers, see
            ``mix``. Statistics that are given bring the weights they were mixed with.
        search_count: how many windows of every domain ``strs``, ``lems`` and ``zero-sum`` read; by default all.
        neurons: the share, in [0, 1], of what is to be removed that goes as whole neurons of the feed-forwards: those that cost
            the loss least, see ``nsvd.linalg.neurons``; ranks remove the rest. The default is 0; for ``best`` a
            half, or 1.5 times the ratio where this is less, if there are feed-forwards, and no ``ranks`` or ``prepared``. Goes with
            ``kfac`` or ``best``, ``fisher`` and ``shifted``. No feed-forward loses more than half of its neurons. The report's
            errors of such a layer are those of its factors beside the smaller, refitted weight.
        layers, exclude: names or patterns of the target layers to compress, and of those to leave alone, see ``targets``; by
            default all. ``ratio`` is that of the layers taken.
        prepared: what ``prepare`` returned for this model, statistics, outer step and options, else refused; to follow inputs needs
            others.
        seed: of what is sampled.

    Raises:
        ValueError: unknown method, option, allocation or layer; ratio or k1 out of range or rounding to nothing (the layer
            is named); NaN or Inf in a weight (the layer is named); statistics that do not fit; a model compressed before.
        FloatingPointError: NaN or Inf in an activation, from ``calibrate``, in a loss of the search, or in one of the last steps.
    """
    ask = resolve(
        method, options, ratio=ratio, ranks=ranks, allocation=allocation, factors=factors, shifted=shifted, refine=refine,
        distill=distill, windows=windows, weights=weights, search_count=search_count, seed=seed, progress=progress,
        neurons=neurons, layers=layers, exclude=exclude,
    )  # fmt: skip
    return carry_out(model, ask, stats, prepared)


@torch.inference_mode(False)
@torch.no_grad()
def carry_out(
    model: nn.Module,
    ask: Request,
    stats: Statistics | None = None,
    prepared: Prepared | None = None,
    shelf: Shelf | None = None,
) -> Report:
    """``compress_`` as the request says; what is measured on the way, and cannot stay in memory, lies on the ``shelf``.

    Several processes that work ``together`` call it with the same arguments, and all have the same model afterwards.
    """
    with linear_layers(model), experts_apart(model) if ask.reaches_experts else nullcontext():
        return _carried_out(model, ask, stats, prepared, Shelf() if shelf is None else shelf)


def _carried_out(
    model: nn.Module, ask: Request, stats: Statistics | None, prepared: Prepared | None, shelf: Shelf
) -> Report:
    ask = replace(ask, progress=ask.progress and rank() == 0)
    if ask.weights != "uniform" and stats is not None:
        raise ValueError("weights are those of windows to calibrate on; statistics that are given are mixed already")
    if prepared is not None and ask.optional:
        ask = replace(ask, neurons=0.0)
    if prepared is not None and ask.neurons:
        raise ValueError("prepared is of whole layers, and neurons leave some of each: give one of the two")
    if is_compressed(model):
        raise ValueError("this model is compressed already; dequantize() it first")
    layers, clock = chosen_layers(model, ask), Clock()
    wanted = _given(model, layers, ask)
    for ids in ask.domains:
        check_readable(model, ids)
    check_values(model)
    before = predicted(model)
    if ask.idle:
        nothing = Result(Exchange(model, layers, stats, ask, clock).rows({}, {}), [])
        return _report(model, ask, layers, stats, nothing, clock, {})
    if ask.sampled:
        ask = replace(ask, domains=[own_text(cast(PreTrainedModel, model), seed=ask.seed)], sampled_text=True)
        clock.lap("sample")
    texts, used = ask.domains, _texts(ask, stats)
    if stats is None and ask.shifted and wanted is None:
        texts = [ids[::RANKS_EVERY] for ids in texts]
    known: Statistics | Walked | None = stats
    once = stats is None and prepared is None and ask.one_by_one and ask.weights != "worst-case"
    if once and wanted is not None and (decoder := walkable(model, wanted)) is not None:
        how = {"shelf": shelf, "most": _blocks_done(shelf), "progress": ask.progress}
        known = Walked(decoder, texts, list(wanted), ask.weights, **how)
    else:
        given = stats is not None
        how = {"weights": ask.weights, "ratio": ask.ratio, "shelf": shelf, "layers": list(layers)}
        known = stats = take_statistics(
            model, stats, texts, ask.judge, ask.allocation, clock, ask.seed, ask.progress, **how
        )
        if given or stats is None:
            check_statistics(layers if wanted is None else {name: layers[name] for name in wanted}, stats, ask.method)
    if prepared is not None:
        check_prepared(prepared, layers, stats, ask.method, ask.options)
    job = Exchange(model, layers, known, ask, clock, shelf)
    result = split(job, prepared, before) if ask.splits else factor(job, wanted, prepared, before)
    return _report(model, ask, layers, known, result, clock, used)


def _blocks_done(shelf: Shelf, stage: str = "final") -> int:
    """The border that an interrupted exchange has reached."""
    return max((shelf.note(key)["at"] or 0 for key in shelf.keys(stage)), default=0) if shelf.lasting else 0


def _texts(ask: Request, stats: Statistics | None) -> dict[str, dict]:
    """Which of the windows serve what, besides the calibration, of which the statistics tell themselves."""
    gradients = (ask.judge.needs_gradients or ask.allocation == "fisher") and not (stats and stats.gradients)
    purposes = {
        "gradients": gradients,
        "targets": ask.shifted,
        "search": ask.allocation in SEARCHING,
        "distillation": ask.distill,
    }
    return {
        purpose: text_of(ask.domains, ask.sampled_text)
        for purpose, served in purposes.items()
        if served and ask.domains
    }


def _given(model: nn.Module, layers: Mapping[str, nn.Linear], ask: Request) -> dict[str, int] | None:
    """The ranks that are known before anything is measured, None where they have to be found."""
    if ask.ranks is None:
        return None if ask.searches or ask.splits else uniform(model, ask.removed, ask.factors, layers=layers)
    for name, k in ask.ranks.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} to compress; the model has {', '.join(list(layers)[:3])}, …")
        if not 1 <= k <= min(layers[name].weight.shape):
            raise ValueError(f"layer {name}: rank {k} is not in 1 … {min(layers[name].weight.shape)}")
    return {name: ask.ranks[name] for name in layers if name in ask.ranks}


def _report(
    model: nn.Module,
    ask: Request,
    layers: Mapping[str, nn.Linear],
    stats: Statistics | Walked | None,
    result: Result,
    clock: Clock,
    texts: dict,
) -> Report:
    """What was done; told to the model, too, so that it is saved with it."""
    before, after = (
        sum(sizes) for sizes in zip(*((r["d_out"] * r["d_in"], r["params"]) for r in result.rows), strict=True)
    )
    size, whole = next(iter(layers.values())).weight.element_size(), sum(p.numel() for p in model.parameters())
    gone = {row["layer"]: row["d_out"] - row.get("outputs", row["d_out"]) for row in result.rows}
    removed = before - after + sum(n for name, n in gone.items() if layers[name].bias is not None)
    first = whole + removed
    report = Report(
        method=ask.name, options=ask.method.resolve(ask.options),
        allocation=ask.allocation if ask.ranks is None else "given", factors=ask.factors,
        shifted=ask.shifted, neurons=ask.neurons if any(gone.values()) or not ask.optional else 0.0, refine=ask.refine,
        distill=ask.distill, losses=list(result.losses), seed=ask.seed,
        calibration=None if stats is None else stats.origin, texts=texts, search_tokens=result.tokens, ratio=ask.ratio,
        ratio_reached=1 - after / before, params_before=before, params_after=after,
        model_ratio_reached=removed / first, model_params_before=first,
        model_params_after=whole, blocks_covered=covered(model, before, removed),
        left_alone=left_alone(model, layers), bytes_before=before * size,
        bytes_after=after * size, seconds=clock.seconds, peak_memory=peak_memory(), versions=versions(), rows=result.rows,
        moves=list(result.moves),
    )  # fmt: skip
    if result.changed:
        told = (
            "method",
            "options",
            "allocation",
            "factors",
            "shifted",
            "neurons",
            "refine",
            "distill",
            "ratio",
            "ratio_reached",
        )
        told += ("model_ratio_reached",)
        sums = FactorSums()
        for module in held_modules(model):
            sums.add(module)
        mark_compressed(
            model, result.changed, factor_sums=sums.told(), **{name: getattr(report, name) for name in told}
        )
    return report
