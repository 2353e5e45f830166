"""Execute the notebooks with parameters, by papermill."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from tqdm.auto import tqdm

from nsvd.lab.paths import checkout
from nsvd.model.files import replacing


@dataclass(frozen=True)
class Outcome:
    """One executed notebook, and the error that ended it (None where none did)."""

    notebook: str
    file: Path
    error: str | None = None


def notebooks(names: Sequence[str] = ("all",)) -> list[Path]:
    """Source notebooks by path, by name (``02_theorem_checks``) or by number (``02``); ``all`` gives every one, in order."""
    folder = checkout() / "notebooks"
    every, chosen = sorted(folder.glob("[0-9][0-9]_*.ipynb")), []
    for name in names:
        if name == "all":
            found = every
        elif Path(name).is_file():
            found = [Path(name)]
        else:
            found = [file for file in every if name in (file.name, file.stem, file.stem[:2])]
        if not found:
            raise FileNotFoundError(f"no notebook {name!r}; there are {', '.join(file.stem for file in every)}")
        chosen += [file for file in found if file not in chosen]
    return chosen


def run(
    names: Sequence[str] = ("all",),
    parameters: Mapping[str, object] | None = None,
    *,
    preset: str | Path | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    progress: bool = False,
) -> list[Outcome]:
    """Execute notebooks into ``out`` (``notebooks/executed`` by default), with parameters over those of a preset file.

    A notebook is given those parameters that it declares; with ``out`` its figures and results go there too, unless they
    are given. Paths are relative to the top of the checkout. ``shard=(i, n)`` takes every n-th notebook from the i-th
    (counted from 1). A notebook that fails is left as ``NAME.failed.ipynb``; an executed one from before stays as it was.

    Raises:
        ValueError: a parameter no chosen notebook declares, or one of a preset that no notebook declares.
    """
    chosen, given = notebooks(names), dict(parameters or {})
    declared = {file: set(papermill.inspect_notebook(str(file))) for file in chosen}
    _known(given, set().union(*declared.values()), f"parameter of {', '.join(file.stem for file in chosen)}")
    if preset is not None:
        values = _preset(preset)
        everywhere = set().union(*(papermill.inspect_notebook(str(file)) for file in notebooks()), *declared.values())
        _known(values, everywhere, f"parameter (in {preset}) of any notebook")
        given = values | given
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"shard {i}/{n}: expected i/n with i from 1 to n")
    if jobs < 1:
        raise ValueError(f"{jobs} jobs: 1 is the least")
    folder = Path(out) if out else checkout() / "notebooks" / "executed"
    folder.mkdir(parents=True, exist_ok=True)

    place = folder.absolute()

    def one(file: Path) -> Outcome:
        beside = {"figures": f"{place}/figures", "results": f"{place}/results/{file.stem}.jsonl"} if out else {}
        return _execute(file, {k: v for k, v in (beside | given).items() if k in declared[file]}, folder)

    with _threads_shared(jobs), ThreadPoolExecutor(jobs) as pool:
        mine = chosen[i - 1 :: n]
        turn = 1 if jobs == 1 else -1  # the last of the workbook take longest, so side by side they start first
        outcomes = pool.map(one, mine[::turn])
        return list(tqdm(outcomes, "notebooks", total=len(mine), disable=not progress, leave=False))[::turn]


@contextmanager
def _threads_shared(jobs: int) -> Iterator[None]:
    """Kernels started inside get their part of the cores, unless the user has said how many threads they get."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _execute(source: Path, parameters: dict, folder: Path) -> Outcome:
    target, failed = folder / source.name, folder / f"{source.stem}.failed.ipynb"
    error = None
    with TemporaryDirectory() as scratch:
        ran = Path(scratch) / source.name
        try:
            papermill.execute_notebook(
                str(source), str(ran), parameters, progress_bar=False, log_output=False, kernel_name="python3",
                resources={"metadata": {"path": str(checkout())}},  # papermill's own cwd= moves all threads
            )  # fmt: skip
        except papermill.PapermillExecutionError as problem:
            error = f"{source.name}, cell {problem.exec_count}: {problem.ename}: {problem.evalue}"
        except DeadKernelError as problem:  # killed for memory, say
            error = f"{source.name}: {problem}"
        notebook = _clean(nbformat.read(ran, as_version=4), parameters)
    failed.unlink(missing_ok=True)
    with replacing(failed if error else target) as part:
        nbformat.write(notebook, part)
    return Outcome(source.stem, failed if error else target, error)


def _clean(notebook: nbformat.NotebookNode, parameters: dict) -> nbformat.NotebookNode:
    """Without times and other metadata that change from run to run; tags, kernel and parameters stay."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    kept = {k: v for k, v in notebook.metadata.items() if k in ("kernelspec", "language_info")}
    notebook.metadata = nbformat.from_dict(kept | {"nsvd": {"parameters": parameters}})
    return notebook


def _preset(file: str | Path) -> dict:
    if not Path(file).is_file():
        raise FileNotFoundError(f"no preset file {file}")
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"preset {file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"preset {file}: expected `name: value` lines")
    return values


def _known(given: Mapping, declared: set[str], what: str) -> None:
    if unknown := sorted(set(given) - declared):
        raise ValueError(f"{', '.join(unknown)}: no {what}; declared are {', '.join(sorted(declared))}")
