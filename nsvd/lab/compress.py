"""From one folder to another: a model is compressed block by block, and a run that was stopped goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsvd.cache.compress import CacheReport, compress_kv_
from nsvd.compression.compress import carry_out
from nsvd.compression.cost import cost
from nsvd.compression.measure import statistics_of
from nsvd.compression.ranks import SEARCHING, TRYING
from nsvd.compression.report import Report
from nsvd.compression.request import RECIPES, Request, base_method, resolve
from nsvd.lab.calibration import begins_with_bos, domains
from nsvd.lab.models import check_apart, embedded_models, load, named, place_of
from nsvd.lab.records import finite, origin
from nsvd.linalg.factors import check_ratio
from nsvd.linalg.precision import home
from nsvd.stored.checkpoint import MODEL_FILES, check_target, save
from nsvd.stored.experts import are_experts
from nsvd.stored.files import beside, fingerprint, reached, replacing, sha256, short_name
from nsvd.stored.folder import CheckpointError
from nsvd.stored.gguf import load_gguf
from nsvd.stored.loading import usable_device
from nsvd.stored.locks import locked
from nsvd.walk.folder import WholeOnly, open_folder, write_folder
from nsvd.walk.moments import check_windows
from nsvd.walk.processes import count as processes
from nsvd.walk.processes import once, rank, same, together
from nsvd.walk.sampling import own_text
from nsvd.walk.shelf import Shelf
from nsvd.walk.targets import patterns

ANY = torch.zeros(1, 1, dtype=torch.long)  # a text, where it does not matter which
SEARCH_COUNT = 32  # windows of every part that strs searches on, as in the ASVD paper; and lems


class Outcome(NamedTuple):
    """What was done to the weights, to the cache, and on which text; None for what was not asked for."""

    weights: Report | None
    cache: CacheReport | None
    calibration: dict | None


@dataclass(frozen=True)
class _Text:
    """Which text, and how it is cut; None is the default of ``domains``."""

    name: str | None
    count: int | None
    length: int | None
    bos: bool | None
    seed: int
    given: Sequence[Tensor] | None = None  # its windows, where they are cut already

    def told(self) -> dict:
        """What tells it from other texts."""
        return asdict(replace(self, given=None)) | {"given": self.given and fingerprint(self.given)}


def compress(source: str | Path, out: str | Path, **arguments) -> Report | CacheReport:
    """Compress a model into a folder, and report; arguments and errors as ``compressed``, and ``ConnectionError`` where another of
    several processes has ended."""
    with together(arguments.get("device", "auto")):
        done = compressed(source, out, **arguments)
    report = done.cache if done.weights is None else done.weights
    assert report is not None, "a ratio or a cache ratio was given"
    return report


def compressed(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "nsvd-1",
    ratio: float | None = None,
    cache_ratio: float | None = None,
    joint: bool | None = None,
    calibration: str | None = None,
    count: int | None = None,
    length: int | None = None,
    bos: bool | None = None,
    windows: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    weights: str = "uniform",
    allocation: str | None = None,
    factors: str | None = None,
    shifted: bool | None = None,
    refine: int = 0,
    distill: int = 0,
    search_count: int | None = None,
    neurons: float | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    verify: bool = True,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _sentence: None,
    **options: float | str,
) -> Outcome:
    """``compress_`` and ``compress_kv_`` from folder to folder.

    A dense folder is read block by block: the model is never whole in memory. What is measured on the way lies beside ``out``, in
    ``.OUT.progress``. The same call takes up a run that was stopped, and ends in the same bytes. Where the model, the text, an
    argument, the device, the number of threads or the code is another, it starts anew, and ``tell`` gets a sentence that says so.
    ``out`` appears whole or not at all; the rest is removed then.

    A GGUF file is first written, dequantized, into a folder beside ``out``, which goes at the end. For this it is whole in memory,
    once more when a stopped run is taken up.

    The model is loaded whole for a KV cache (``cache_ratio``), for ``distill``, for the allocations ``strs`` and ``lems``, and
    where its blocks cannot be read alone. Such a run begins anew after it was stopped.

    Processes that are ``together`` share the work, and one folder; process 0 writes it, and tells the user.

    Args:
        source: an embedded name, a folder, a ``.gguf`` file or a hub id.
        out: the folder to write; an older model there is replaced.
        cache_ratio, joint: as in ``compress_kv_``.
        calibration: a corpus, ``self``, ``random``, or a sum such as ``self+wikitext2``; by default ``self`` for ``best``, and
            ``mini/encyclopedia`` for other methods on an embedded model.
        count, length, bos: how the text is cut, see ``nsvd.windows``.
        windows: token ids (count, length), or one such tensor for each of several domains, to calibrate on. ``calibration`` is then
            no more than their name.
        tell: gets sentences for the user.
        The others as in ``compress_`` and ``load``.

    Raises:
        ValueError, FloatingPointError: as ``compress_`` and ``load``.
        OSError: if ``out`` cannot be written, something else than a model would be lost, or another run writes there.
    """
    given = [windows] if isinstance(windows, Tensor) else windows
    for ids in given or ():
        check_windows(ids)
    text = _Text(calibration, count, length, bos, seed, given)
    tell = tell if rank() == 0 else lambda _sentence: None
    _check(
        ratio,
        cache_ratio,
        joint,
        weights,
        allocation,
        search_count,
        (factors, shifted, refine, distill, neurons, layers, exclude),
    )
    base_method(method).resolve(options)
    check_target(out)
    check_apart(source, out)
    ask = dict(method=method, ratio=ratio, allocation=allocation, factors=factors, shifted=shifted, refine=refine)
    ask |= dict(distill=distill, weights=weights, seed=seed, progress=progress, options=options, neurons=neurons)
    ask |= {"layers": patterns(layers), "exclude": patterns(exclude)}
    ask |= {"search_count": search_count or (SEARCH_COUNT if allocation in TRYING else None)}
    # Whatever is wrong with any text is said before one is taken.
    known = None if ratio is None else _request(ask | {"weights": "uniform"}, [ANY])
    place, how = place_of(source), {"dtype": dtype, "device": device, "verify": verify}
    why = _whole(cache_ratio, distill, allocation)
    if why is None:
        with _as_folder(place, out, dtype) as folder:
            try:
                model, tokenizer = open_folder(folder, **how)
                if any(map(are_experts, model.modules())) and known is not None and known.reaches_experts:
                    raise WholeOnly("its experts are one tensor, and are taken apart in memory")
            except WholeOnly as error:
                why = str(error)
            else:
                named(model, source)
                return _by_block(model, tokenizer, source, out, folder, text, ask, how, tell)
    model, tokenizer = load(source, **how)
    windows, about = _windows(model, tokenizer, source, text, ask, Shelf(), cache_ratio is not None)
    request = None if ratio is None else _request(ask, windows)
    tell(f"the model is loaded whole: {why}")
    if request is not None and windows:
        tell(plan(model, request))
    done = _in_memory(model, request, windows, about, ask, cache_ratio, joint)
    once(lambda: save(model, tokenizer, out, report=as_json(source, done)))
    return done


@contextmanager
def _as_folder(place: Path, out: str | Path, dtype: str | torch.dtype) -> Iterator[Path]:
    """The folder of a model. That of a GGUF file is made for as long as it is needed, beside ``out``."""
    if place.is_dir():
        yield place
        return

    dense = [load_gguf(place, dtype=dtype, device="cpu")] if rank() == 0 else []
    with beside(out) if rank() == 0 else nullcontext(place) as folder:
        once(lambda: save(*dense.pop(), folder))  # out of memory afterwards: it is read block by block from here on
        yield same(folder)


def _by_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    out: str | Path,
    folder: Path,
    text: _Text,
    ask: dict,
    how: dict,
    tell: Callable[[str], None],
) -> Outcome:
    """One block at a time, on a model that stays in its folder."""
    run = same(_about(folder, text, ask | how) if rank() == 0 else {})
    with _progress(out, run | {"number of processes": processes()}, tell) as shelf:
        windows, about = _windows(model, tokenizer, source, text, ask, shelf)
        _check_text(shelf, windows, tell)
        request = _request(ask, windows)
        if windows:
            tell(plan(model, request))
        report = carry_out(model, request, shelf=shelf)
        done = Outcome(report, None, _told(about, report))
        once(lambda: save(model, tokenizer, out, report=as_json(source, done), write=write_folder))
    return done


def plan(model: PreTrainedModel, ask: Request) -> str:
    """What the work will take, as a sentence. The time is that of the operations, at the speed of products of matrices here."""
    takes, weight = cost(model, ask), model.get_input_embeddings().get_parameter("weight")
    device, exact = weight.device, _speed(torch.float64, home(weight))
    seconds = takes.forward / _speed(weight.dtype, device) + takes.decompositions / exact
    where = f"{_size(takes.device)} on the device, {_size(takes.host)} of memory"
    if device.type == "cpu":
        where = f"{_size(takes.device + takes.host)} of memory"
    return (
        f"{takes.passes:.1f} passes over {sum(ids.numel() for ids in ask.domains):,} tokens; beside the interpreter up to {where}, "
        f"{_size(takes.disk)} of disk beside the output; some {spoken(seconds)}, more where other work goes on"
    )


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in a product of two matrices."""
    A = torch.ones(768, 768, dtype=dtype, device=device)
    (A @ A).sum().item()  # the first is slower
    begin = time.perf_counter()
    for _ in range(4):
        torch.mm(A, A)
    A.sum().item()
    return 8 * 768**3 / (time.perf_counter() - begin)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def spoken(seconds: float) -> str:
    """A time in words."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} second{'s' * (seconds >= 1.5)}"


def _check(ratio, cache_ratio, joint, weights, allocation, search_count, rest: tuple) -> None:
    """Raise ``ValueError`` for what can be refused before a model is looked at."""
    if ratio is None and cache_ratio is None:
        raise ValueError("give ratio, cache_ratio or both")
    if cache_ratio is not None and not 0 < cache_ratio <= 1:
        raise ValueError(f"cache ratio is {cache_ratio}, but the fraction of the cache kept lies in (0, 1]")
    if ratio is not None:
        check_ratio(ratio)
    if search_count is not None and (search_count < 1 or allocation not in SEARCHING):
        names = ", ".join(map(repr, SEARCHING))
        raise ValueError(f"search_count is {search_count}; it goes with allocation {names}, 1 window is the least")
    names = ("allocation", "factors", "shifted", "refine", "distill", "neurons", "layers", "exclude")
    for name, value in zip(names, (allocation, *rest), strict=True):
        if value and ratio is None:
            raise ValueError(f"{name} goes with a ratio")
    for name, steps in (("refine", rest[2]), ("distill", rest[3])):
        if steps < 0:
            raise ValueError(f"{name} is {steps}, but a number of steps is not negative")
    if cache_ratio is None and joint is not None:
        raise ValueError("joint goes with a cache ratio")
    if ratio is None and weights == "worst-case":
        raise ValueError("weights 'worst-case' go with a ratio")


def _whole(cache_ratio: float | None, distill: int, allocation: str | None) -> str | None:
    """Why a model has to be in memory as a whole, if it has to."""
    if cache_ratio is not None:
        return "its KV cache is compressed"
    if distill:
        return "distillation changes all factors at once"
    return f"{allocation} tries every layer of the whole model" if allocation in TRYING else None


def _windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    text: _Text,
    ask: dict,
    shelf: Shelf,
    also: bool = False,
) -> tuple[list[Tensor], dict | None]:
    """The text of every domain, and what is told of it; none where nothing is measured."""
    method, idle = base_method(ask["method"]), not (ask["ratio"] or also)
    measured = method.needs_moments or ask["weights"] != "uniform" or ask["allocation"] in (*SEARCHING, "fisher")
    if idle or not (measured or ask["shifted"] or ask["distill"]):
        return [], None

    def write(model: PreTrainedModel, **how) -> Tensor:
        if "own-text" not in shelf:
            shelf.put("own-text", {"ids": own_text(model, **how)})
        return shelf.get("own-text")["ids"]

    how = {"length": text.length, "count": text.count, "seed": text.seed, "bos": text.bos}
    if text.given is None:
        name = text.name or _usual_text(str(source), ask["method"])
        windows = domains(name, model, tokenizer, **how, write=write)
    else:
        name, windows = text.name, list(text.given)
    if ask["allocation"] in TRYING and len({ids.shape[1] for ids in windows}) > 1:
        raise ValueError(f"allocation {ask['allocation']!r} needs windows of one length, so not {name}")
    about = {"corpus": name, "seed": text.seed, "windows": [list(ids.shape) for ids in windows]}
    if ask["search_count"]:
        about["search_windows"] = [list(ids[: ask["search_count"]].shape) for ids in windows]
    return windows, about | {"bos": [begins_with_bos(ids, tokenizer, model) for ids in windows]}


def _check_text(shelf: Shelf, windows: list[Tensor], tell: Callable[[str], None]) -> None:
    """Empty the shelf if what lies there was measured on another text."""
    sums = [fingerprint([ids]) for ids in windows]
    known = "windows" in shelf and shelf.note("windows")["sums"] == sums
    if shelf.begun("windows", "own-text") and not known:
        tell("the text has changed since the earlier run: it is not taken up")
        shelf.clear()
    shelf.put("windows", {}, sums=sums)


def _usual_text(model: str, method: str) -> str:
    """The text to calibrate on where none is named."""
    if method in RECIPES:
        return "self"
    if model not in embedded_models():
        raise ValueError(f"{model} is no embedded model: name a text to calibrate it on, --calibration CORPUS, or self")
    return "mini/encyclopedia"


def _request(ask: dict, windows: list[Tensor]) -> Request:
    chosen = {name: value for name, value in ask.items() if name != "method"}
    return resolve(ask["method"], **chosen, ranks=None, windows=windows)


def _in_memory(
    model: PreTrainedModel,
    request: Request | None,
    windows: list[Tensor],
    about: dict | None,
    ask: dict,
    cache_ratio: float | None,
    joint: bool | None,
) -> Outcome:
    """All at once, on a model that is loaded; ``about`` is what is told of the text."""
    method, stats, report, cache = base_method(ask["method"]), None, None, None
    if windows and cache_ratio is not None and (method.needs_moments or ask["weights"] != "uniform"):
        stats = statistics_of(model, windows, ask["weights"], ratio=ask["ratio"], progress=ask["progress"])
        about = (about or {}) | {"statistics": stats.origin}  # of the dense model, for the cache, too
        request = request and replace(request, weights="uniform")
    if request is not None:
        report = carry_out(model, request, stats)
        about = _told(about, report)
    if cache_ratio is not None:
        how = {"method": ask["method"], "cache_ratio": cache_ratio, "joint": joint, "seed": ask["seed"]}
        cache = compress_kv_(model, stats, **how, windows=windows, **ask["options"])
    return Outcome(report, cache, about)


def _told(about: dict | None, report: Report) -> dict | None:
    return about and about | {"statistics": report.calibration}


def as_json(source: str | Path, done: Outcome) -> dict:
    """``nsvd_report.json``."""
    rows = lambda report: report.as_dict() | {"layers": [finite(row) for row in report.rows]}  # noqa: E731
    about = {"model": short_name(source)}
    if done.weights is not None:
        about |= rows(done.weights) | ({"moves": done.weights.moves} if done.weights.moves else {})
    if done.cache is not None:
        about["cache"] = rows(done.cache)
    return about | {"calibration": done.calibration}


def _about(place: Path, text: _Text, ask: dict) -> dict:
    """What tells a run from others. If any of it changes, what an earlier run has kept is of no use."""
    files = [file for file in sorted(place.iterdir()) if file.is_file() and not file.name.startswith(".")]
    model = {file.name: sha256(file) for file in files if any(fnmatchcase(file.name, name) for name in MODEL_FILES)}
    told = {name: value for name, value in ask.items() if name not in ("progress", "verify")}
    told |= {"device": str(usable_device(ask["device"])), "threads": torch.get_num_threads()}
    about = {"model": model, "text": text.told(), "arguments": told, "code": origin()}
    return json.loads(json.dumps(about, default=str))


@contextmanager
def _progress(out: str | Path, about: dict, tell: Callable[[str], None]) -> Iterator[Shelf]:
    """A shelf beside ``out`` that an interrupted run of the same kind has left, or a new one; it goes once all is done."""
    place = reached(out).resolve()
    folder = place.with_name(f".{place.name}.progress")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", wait=False, sure=False) if rank() == 0 else nullcontext(True) as mine:
        if mine is None:
            raise FileExistsError(f"cannot write {out}: another run is at it")
        told = folder / "run.json"
        once(lambda: _settle(folder, told, about, tell))
        shelf = Shelf(folder / "kept")
        try:
            yield shelf
        except BaseException as error:
            again = isinstance(error, ValueError | ArithmeticError | torch.linalg.LinAlgError) and not isinstance(
                error, CheckpointError
            )
            useless = again or not shelf.begun("windows")
            if rank() == 0 and useless:
                _remove(folder, told)  # it would fail again, or has nothing that is worth to be kept
            raise
        once(lambda: _remove(folder, told))


def _settle(folder: Path, told: Path, about: dict, tell: Callable[[str], None]) -> None:
    """Empty the folder unless a run of the same kind has left it, and write down which one this is."""
    before = None
    if told.is_file():
        try:
            before = json.loads(told.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
    changed = [name for name in about if before is not None and before.get(name) != about[name]]
    if before == about:
        tell("an earlier run is taken up where it was stopped")
    else:
        told.unlink(missing_ok=True)  # first: what a kill leaves is no run any more
        _clear(folder)
    if changed:
        tell(f"an earlier run is not taken up: its {' and its '.join(changed)} changed")
    with replacing(told) as part:
        part.write_text(json.dumps(about, indent=1), encoding="utf-8")


def _remove(folder: Path, told: Path) -> None:
    """In this order: what a kill leaves of it is no run any more."""
    told.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
