"""What ``nsvd info`` tells of a model: its kinds of layers on a screen, or every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from nsvd.cache.latent import bytes_per_token
from nsvd.lab.speed import dense
from nsvd.stored.changes import is_changed
from nsvd.stored.checkpoint import describe
from nsvd.stored.folder import read_json
from nsvd.stored.groups import groups, place
from nsvd.stored.layers import CompressedLayer, NarrowLinear
from nsvd.stored.section import LowRankConfig, section_of


def overview(model: PreTrainedModel, name: str, *, every: bool = False) -> Iterator[str]:
    """Lines about a model that was loaded by this name; with ``every`` a line a compressed layer in place of one a kind.

    Why a layer stayed dense is told where the name is that of a folder with a report in it.

    Raises:
        CheckpointError: if that report cannot be read.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    yield f"{name}: {type(model).__name__}, {model.num_parameters():,} parameters, {size / 2**20:.1f} MiB, {model.dtype}"
    section = section_of(model)
    if section is None:
        yield "dense"
        return
    yield from _compression(model, section)
    yield from _every(model) if every else _kinds(model)
    file = Path(name) / "nsvd_report.json"
    report = read_json(file) if file.is_file() else {}
    if not every and (left := dense(model)):
        yield from _dense(left, report)
    if not every and report.get("left_alone"):
        yield f"left alone {largest(report['left_alone'])}"


def _compression(model: PreTrainedModel, section: LowRankConfig) -> Iterator[str]:
    """By which method, how much is gone, whether it is still what it was; the cache."""
    about = section.to_dict()
    reached, whole = about.get("ratio_reached"), about.get("model_ratio_reached")
    removed = f", {reached:.1%} of the target layers' parameters removed" if reached is not None else ""
    removed += f", {whole:.1%} of the whole model's" if whole is not None else ""
    if "method" in about:
        yield f"compressed by {about['method']} {about.get('options') or ''}{removed}"
    if is_changed(model):
        yield "changed after compression: its factors are not those that it was given then, as after fine-tuning"
    if cache := about.get("latent_cache"):
        before, after = bytes_per_token(model)
        how = f"{cache.get('method')} {cache.get('options') or ''}"
        yield f"KV cache compressed by {how}: {before:,} → {after:,} bytes a token"
        absorbing = [layer.get("absorb", False) for layer in cache["layers"].values()]
        yield f"values are not rebuilt where absorbing them is cheaper, in {sum(absorbing)} of {len(absorbing)} layers"


def _every(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            about = ", ".join(f"{key} {value}" for key, value in describe(module).items())
            yield f"  {name}: {module.out_features} × {module.in_features}, {about}"


def _kinds(model: nn.Module) -> Iterator[str]:
    """A line for the layers of one kind, with their smallest, median and largest rank."""
    kinds = groups(model)
    yield f"{sum(len(one.layers) for one in kinds)} layers are compressed, to the ranks (smallest / median / largest):"
    width = max(len(one.place) for one in kinds)
    for one in kinds:
        low, median, high = one.ranks
        rank = f" {low}" if low == high else f" {low} / {median} / {high}"
        rank = "" if one.kind == NarrowLinear.kind else rank  # dense, without some neurons
        shape = f"{one.d_out} × {one.d_in}"
        yield f"  {one.place:{width}}  {len(one.layers)} of {shape}, {one.kind}{rank}, {one.kept:.0%} of the parameters kept"


def _dense(left: Mapping[str, nn.Linear], report: Mapping) -> Iterator[str]:
    """The layers that could be compressed and are not, by kind, and why."""
    rows = {row["layer"]: row["rank"] for row in report.get("layers") or () if {"layer", "rank"} <= row.keys()}
    counts = Counter((place(name), _why(name, rows)) for name in left)
    yield f"{len(left)} layers are dense:"
    for (where, why), number in counts.items():
        yield f"  {where}: {number}{why and f', {why}'}"


def _why(name: str, ranks: Mapping[str, int | None]) -> str:
    if not ranks:
        return ""
    if name not in ranks:
        return "not among the layers to compress"
    return "no rank was chosen" if ranks[name] is None else "factors of its rank save no parameters"


def largest(sizes: Mapping[str, int], most: int = 3) -> str:
    """The first few names with their numbers of parameters, and how many more there are."""
    told = [f"{name} ({size:,})" for name, size in list(sizes.items())[:most]]
    rest = sum(list(sizes.values())[most:])
    return ", ".join(told + ([f"others ({rest:,})"] if rest else []))
