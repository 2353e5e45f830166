"""Execute the notebooks with parameters, by papermill."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from weakref import WeakSet

import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from nbformat.v4 import new_output
from tqdm.auto import tqdm

from nsvd.lab.parameters import check, declared, read_preset
from nsvd.lab.paths import checkout
from nsvd.lab.records import origin
from nsvd.stored.files import check_writable, replacing

KERNEL = "python3"
# Large tensors come from pages of 2 MB, where the system has such, and their memory, up to 2 GB of it, is kept for the next
# ones. Else every operation on a tensor of some MB gets its memory from the system anew, page by page: a tenth to a quarter of
# the time of a pass through a small model. An older glibc takes one half of this, which is worse than nothing.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648"
GLIBC = (2, 35)


@dataclass(frozen=True)
class Outcome:
    """One executed notebook, and the error that ended it (None where none did); or why it was left out, with its source."""

    notebook: str
    file: Path
    error: str | None = None
    skipped: str | None = None


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


def lacking(source: Path) -> str | None:
    """What a notebook needs beyond the workbook, as its metadata say, and is not installed: a sentence, or None."""
    needs = (
        nbformat.read(source, as_version=4).metadata.get("nsvd", {}).get("needs", {})
    )  # packages, each with its extra
    return next(
        (f"it needs {name}: pip install -e '.[{extra}]'" for name, extra in needs.items() if find_spec(name) is None),
        None,
    )


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
    Of ``all``, those that need a package which is not installed are left out.

    When interrupted, it ends the kernels that run; their notebooks are failed ones, up to where they came.

    Raises:
        ValueError: a file that is not a notebook, or needs a package which is not installed; a parameter no chosen notebook
            declares, or one of a preset that no notebook declares; a value of another kind than the parameter's; two
            notebooks of one name, or an output over its source.
        OSError: a notebook, its figures or its results could not be written; nothing is executed then.
    """
    chosen, given = notebooks(names), dict(parameters or {})
    kinds = {file: declared(file) for file in chosen}
    absent = {file: why for file in chosen if (why := lacking(file))}
    if absent and "all" not in names:
        file, why = next(iter(absent.items()))
        raise ValueError(f"{file.stem} cannot run: {why}")
    left_out = [Outcome(file.stem, file, skipped=why) for file, why in absent.items()]
    chosen = [file for file in chosen if file not in absent]
    _known(given, set().union(*kinds.values()), f"parameter of {', '.join(file.stem for file in chosen)}")
    if preset is not None:
        values = read_preset(preset)
        everywhere = set().union(*(declared(file) for file in notebooks()), *kinds.values())
        _known(values, everywhere, f"parameter (in {preset}) of any notebook")
        given = values | given
    for known in kinds.values():
        check({name: value for name, value in given.items() if name in known}, known)
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"shard {i}/{n}: expected i/n with i from 1 to n")
    if jobs < 1:
        raise ValueError(f"{jobs} jobs: 1 is the least")
    folder = Path(out) if out else checkout() / "notebooks" / "executed"
    _apart(chosen, folder)
    place, mine = folder.absolute(), {}
    for file in chosen[i - 1 :: n]:
        beside = {"figures": f"{place}/figures", "results": f"{place}/results/{file.stem}.jsonl"} if out else {}
        mine[file] = {k: v for k, v in (beside | given).items() if k in kinds[file]}
        _check_outputs(file, mine[file], folder)
    folder.mkdir(parents=True, exist_ok=True)

    _Kernel()  # the first instance looks classes up, which two threads cannot do at a time
    with _around_kernels(jobs), ThreadPoolExecutor(jobs) as pool:
        turn = 1 if jobs == 1 else -1  # the last of the workbook take longest, so side by side they start first
        futures = [pool.submit(_execute, file, mine[file], folder) for file in list(mine)[::turn]]
        try:
            bar = tqdm(futures, "notebooks", total=len(mine), disable=not progress, leave=False)
            return [future.result() for future in bar][::turn] + left_out
        except BaseException as error:
            for future in futures:
                future.cancel()
            while isinstance(error, KeyboardInterrupt) and wait(futures, timeout=0.1).not_done:
                _Kernel.end_all()
            raise


class _Kernel(AsyncKernelManager):
    """Kernels that are known where they were started: an interrupt reaches neither them nor the threads that wait for them."""

    started: ClassVar[WeakSet[_Kernel]] = WeakSet()

    async def start_kernel(self, **options) -> None:
        _Kernel.started.add(self)
        await super().start_kernel(**options)

    @classmethod
    def end_all(cls) -> None:
        for kernel in list(cls.started):
            if (process := getattr(kernel.provisioner, "process", None)) is not None:
                process.kill()


@contextmanager
def _around_kernels(jobs: int) -> Iterator[None]:
    """The environment of kernels started inside: each its part of the cores, and ``MALLOC``. What the user has set stays."""
    ours, tuned = {}, os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" not in tuned and _glibc() >= GLIBC:
        ours["GLIBC_TUNABLES"] = f"{tuned}:{MALLOC}" if tuned else MALLOC
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        ours["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _glibc() -> tuple[int, ...]:
    """The version of the C library, where it is glibc; else nothing."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".") if part.isdigit()) if name == "glibc" else ()


def _execute(source: Path, parameters: dict, folder: Path) -> Outcome:
    target, failed = folder / source.name, folder / f"{source.stem}.failed.ipynb"
    error, clock = None, time.perf_counter()
    with TemporaryDirectory() as scratch:
        plain, ran = Path(scratch) / "source.ipynb", Path(scratch) / "ran.ipynb"  # papermill fills in braces in a path
        plain.write_bytes(source.read_bytes())
        try:
            papermill.execute_notebook(
                str(plain), str(ran), parameters, progress_bar=False, log_output=False, kernel_name=KERNEL,
                kernel_manager_class=_Kernel,
                resources={"metadata": {"path": str(checkout())}},  # papermill's own cwd= moves all threads
            )  # fmt: skip
        except papermill.PapermillExecutionError as problem:
            error = f"{source.name}, cell {problem.exec_count}: {problem.ename}: {problem.evalue}"
        except (RuntimeError, NoSuchKernel) as problem:  # killed for memory, say, or not installed
            error = f"{source.name}: {problem}"
        about = {"parameters": parameters, "seconds": round(time.perf_counter() - clock), "origin": origin()}
        notebook = _clean(nbformat.read(ran, as_version=4), about)
    with replacing(failed if error else target) as part:
        nbformat.write(notebook, part)
    if not error:
        failed.unlink(missing_ok=True)
    return Outcome(source.stem, failed if error else target, error)


def _clean(notebook: nbformat.NotebookNode, about: dict) -> nbformat.NotebookNode:
    """Without the cells' times, other metadata and sliders; tags, kernel, and what is told ``about`` the run stay."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [_seen(output) for output in cell.outputs]
    kept = {k: v for k, v in notebook.metadata.items() if k in ("kernelspec", "language_info")}
    notebook.metadata = nbformat.from_dict(kept | {"nsvd": about})
    return notebook


def _seen(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output as a reader can see it: sliders need a notebook that runs."""
    if "application/vnd.jupyter.widget-view+json" not in output.get("data", {}):
        return output
    words = "Sliders and menus are shown where this notebook runs in JupyterLab."
    return new_output("display_data", {"text/markdown": words, "text/plain": words})


def _known(given: Mapping, declared: set[str], what: str) -> None:
    if unknown := sorted(set(given) - declared):
        raise ValueError(f"{', '.join(unknown)}: no {what}; declared are {', '.join(sorted(declared))}")


def _check_outputs(source: Path, parameters: Mapping, folder: Path) -> None:
    """Raise ``OSError`` if the notebook, its results or a figure cannot be put where they go."""
    check_writable(folder / source.name)
    if results := parameters.get("results"):
        check_writable(checkout() / results)
    if figures := parameters.get("figures"):
        check_writable(checkout() / figures / source.stem)


def _apart(chosen: Sequence[Path], folder: Path) -> None:
    names = [file.name for file in chosen]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two of the notebooks are called {twice[0]}; run them apart")
    for file in chosen:
        if (folder / file.name).resolve() == file.resolve():
            raise ValueError(f"{file} would be overwritten by its own output; choose another folder for the output")
