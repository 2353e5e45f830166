"""Methods × options × ratios × corpora, each layer decomposed once per metric, finished cells skipped."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsvd.compression.compress import compress_
from nsvd.compression.measure import prepare
from nsvd.lab.corpora import sources
from nsvd.lab.evaluation import evaluate
from nsvd.lab.records import DOCUMENTS, Records
from nsvd.lab.tokens import common_beginning
from nsvd.linalg import by_name
from nsvd.stored.files import fingerprint
from nsvd.walk.statistics import Statistics

DENSE = "dense"


def sweep(
    model: PreTrainedModel,
    stats: Statistics,
    corpora: Mapping[str, Tensor],
    cells: Iterable[tuple[str, float, dict]],
    records: Records,
    *,
    name: str,
    progress: bool = False,
) -> pd.DataFrame:
    """Evaluate the dense model and every (method, ratio, options) cell on every corpus; a row a measurement.

    Rows hold ``model, method, ratio, k1, …, corpus, nll, standard_error, perplexity`` and ``losses``, the nll of every
    window, for paired comparisons. What ``records`` already holds, for the same weights, statistics, windows and code,
    is not measured again, so an interrupted sweep goes on where it stopped. ``frame.attrs["seconds"]`` tells the time
    by stage.
    """
    weights, moments = fingerprint(model.parameters()), stats.fingerprint()
    prepared, seconds, rows = {}, {"prepare": 0.0, "compress": 0.0, "evaluate": 0.0}, []

    def build(method: str, ratio: float, options: dict) -> PreTrainedModel:
        if method == DENSE:
            return model
        clock, outer = time.perf_counter(), _outer((method, ratio, options))
        if outer not in prepared:
            prepared.clear()
            prepared[outer] = prepare(model, stats, method, **options)
        seconds["prepare"] += time.perf_counter() - clock
        clock, changed = time.perf_counter(), copy.deepcopy(model)
        compress_(changed, stats, method=method, ratio=ratio, prepared=prepared[outer], **options)
        seconds["compress"] += time.perf_counter() - clock
        return changed

    todo = [(DENSE, 0.0, {})] + [(method, ratio, by_name(method).resolve(options)) for method, ratio, options in cells]
    todo.sort(key=lambda cell: _outer(cell) or "")  # one metric after the other, so that one is kept at a time
    for cell in tqdm(todo, "sweep", disable=not progress, leave=False):
        method, ratio, options = cell
        about = {"model": name, "weights": weights, "method": method, "ratio": ratio, **options}
        about |= {} if method == DENSE else {"statistics": moments}
        clock, made = time.perf_counter(), seconds["prepare"] + seconds["compress"]
        rows += measure(partial(build, *cell), corpora, records, about)
        made = seconds["prepare"] + seconds["compress"] - made
        seconds["evaluate"] += time.perf_counter() - clock - made
    frame = pd.DataFrame(rows)
    frame.attrs["seconds"] = seconds
    return frame


def measure(
    build: Callable[[], PreTrainedModel],
    corpora: Mapping[str, Tensor],
    records: Records,
    about: dict,
    also: Callable[[PreTrainedModel], dict] = lambda _model: {},
) -> list[dict]:
    """One model on every corpus: a row each, of ``about``, the corpus and the numbers, those of ``also(model)`` among them.

    ``about`` has to say all that tells this model from others; ``build()`` makes it where something is not yet recorded. A row says
    of the windows their fingerprint, and the token that all of them ``begin`` with (BOS), None where they differ; after
    ``by_document``, the ``documents`` that they are from, too.
    """
    rows = {
        corpus: about | {"corpus": corpus, "windows": fingerprint([ids]), "begin": common_beginning(ids)}
        for corpus, ids in corpora.items()
    }
    if missing := [corpus for corpus in corpora if records.find(**rows[corpus]) is None]:
        model = build()
        for corpus in missing:
            result = evaluate(model, corpora[corpus])
            numbers: dict = {
                "nll": result.nll,
                "standard_error": result.standard_error,
                "perplexity": result.perplexity,
            }
            numbers["losses"] = [round(loss, 5) for loss in result.losses.tolist()]
            records.add(rows[corpus], numbers | also(model))
    return [row | records.found(**row) | (records.find(**_origin(row)) or {}) for row in rows.values()]


def by_document(
    corpora: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, records: Records, *, bos: bool | None = None
) -> None:
    """Record of the windows of each corpus which document they are from, so that intervals are over documents."""
    for corpus, ids in corpora.items():
        about = _origin({"corpus": corpus, "windows": fingerprint([ids])})
        if records.find(**about) is None:
            records.add(about, {DOCUMENTS: sources(corpus, tokenizer, ids, bos=bos)})


def _origin(row: dict) -> dict:
    """What tells the record of ``by_document`` from others."""
    return {"measure": DOCUMENTS, "corpus": row["corpus"], "windows": row["windows"]}


def trial(
    model: PreTrainedModel, stats: Statistics, corpora: Mapping[str, Tensor], records: Records, about: dict, **how
) -> list[dict]:
    """A copy of the model compressed by ``compress_(…, **how)``, on every corpus: a row each, with the fraction ``removed``.

    ``about`` says what ``how`` does not: of which model and which statistics.
    """
    about = about | how
    size = about | {"measure": "compression"}

    def build() -> PreTrainedModel:
        changed = copy.deepcopy(model)
        records.add(size, {"removed": compress_(changed, stats, **how).ratio_reached})
        return changed

    rows = measure(build, corpora, records, about)
    return [row | records.found(**size) for row in rows]


def _outer(cell: tuple[str, float, dict]) -> str | None:
    """What one preparation serves: the outer step and its options."""
    method, _, options = cell
    if method == DENSE:
        return None
    return str(by_name(method).outer_step(options))
