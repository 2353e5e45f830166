"""Notebooks are executed with parameters they declare, and an old result survives a failure."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from nbformat import v4

from nsvd.lab import parameters, workbook
from tests.tiny import file_limit

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = "size: int = 3  # how many\nlabel: str = 'small'  # how called"


def write(file, *code: str, parameters: str = PARAMETERS):
    """A source notebook: a title, a cell of parameters, and code."""
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells + [v4.new_code_cell(c) for c in code], metadata=KERNEL), file)
    return file


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with three notebooks of its own."""
    monkeypatch.setattr(workbook, "checkout", lambda: tmp_path)
    write(tmp_path / "notebooks" / "01_first.ipynb", "print(size * 2, label)")
    write(tmp_path / "notebooks" / "02_second.ipynb", "print(depth)", parameters="depth: int = 1  # of it")
    write(tmp_path / "notebooks" / "10_third.ipynb", "raise RuntimeError('broken')")
    write(tmp_path / "notebooks" / "draft.ipynb", "1 / 0")
    return tmp_path


@pytest.fixture
def executed(monkeypatch):
    """Instead of running anything, note which notebook would be run with what."""
    asked = []

    def note(source, parameters, folder):
        asked.append((source.stem, parameters))
        return workbook.Outcome(source.stem, folder / source.name)

    monkeypatch.setattr(workbook, "_execute", note)
    return asked


def printed(file) -> str:
    cells = nbformat.read(file, as_version=4).cells
    return "".join(out.text for cell in cells for out in cell.get("outputs", []) if out.output_type == "stream")


def contents(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_notebook_runs_with_parameters_and_carries_no_times(project):
    """The output is that of the given values; only tags, kernel, language and the parameters are left as metadata."""
    [outcome] = workbook.run(["01"], {"size": 21}, out=project / "out")
    assert (outcome.notebook, outcome.file, outcome.error) == ("01_first", project / "out" / "01_first.ipynb", None)
    assert printed(outcome.file) == "42 small\n"
    notebook = nbformat.read(outcome.file, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.nsvd.parameters == {"size": 21}
    assert set(notebook.metadata) == {"kernelspec", "language_info", "nsvd"}
    assert [dict(cell.metadata) for cell in notebook.cells] == [
        {}, {"tags": ["parameters"]}, {"tags": ["injected-parameters"]}, {},
    ]  # fmt: skip
    assert "papermill" not in outcome.file.read_text(encoding="utf-8").lower()
    assert contents(project / "out") == ["01_first.ipynb"]


def test_a_notebook_that_needs_more_is_left_out_of_all(project, executed):
    """With a sentence; asked for by name, it is refused."""
    file = project / "notebooks" / "10_third.ipynb"
    notebook = nbformat.read(file, as_version=4)
    notebook.metadata.nsvd = {"needs": {"papermill": "notebooks", "no_such_package": "more"}}
    nbformat.write(notebook, file)
    *ran, last = workbook.run(["all"], out=project / "out")
    assert [stem for stem, _ in executed] == [outcome.notebook for outcome in ran] == ["01_first", "02_second"]
    assert (last.notebook, last.error) == ("10_third", None)
    assert last.skipped == "it needs no_such_package: pip install -e '.[more]'"
    with pytest.raises(ValueError, match="10_third cannot run: it needs no_such_package"):
        workbook.run(["10"], out=project / "out")


def test_a_failure_is_kept_apart_from_the_last_good_run(project):
    """``NAME.failed.ipynb`` shows the error, the executed notebook stays, the next success removes the failed one."""
    source, out = write(project / "own.ipynb", "print(size)\nassert size < 5, 'too large'"), project / "out"
    good, *_ = workbook.run([str(source)], out=out)
    before = good.file.read_bytes()
    [bad] = workbook.run([str(source)], {"size": 7}, out=out)
    assert bad.error == "own.ipynb, cell 3: AssertionError: too large"
    assert bad.file == out / "own.failed.ipynb"
    assert "7\n" in printed(bad.file)
    assert good.file.read_bytes() == before
    assert contents(out) == ["own.failed.ipynb", "own.ipynb"]
    workbook.run([str(source)], {"size": 4}, out=out)
    assert contents(out) == ["own.ipynb"]


def test_a_kernel_that_dies_is_a_failed_notebook(project):
    """Killed for memory, say: an outcome like any other, and the notebooks beside it are not lost."""
    dies = write(project / "dies.ipynb", "print('before', flush=True)", "import os\nos._exit(1)")
    good = write(project / "good.ipynb", "print(label)")
    outcomes = workbook.run([str(dies), str(good)], out=project / "out", jobs=2)
    assert [outcome.notebook for outcome in outcomes] == ["dies", "good"]
    assert "Kernel died" in outcomes[0].error
    assert printed(outcomes[0].file) == "before\n"
    assert outcomes[1].error is None
    assert contents(project / "out") == ["dies.failed.ipynb", "good.ipynb"]


def test_an_interrupt_ends_the_kernels_and_leaves_what_was_there(project):
    """Soon, with the notebooks that wait never begun; the one that ran is a failed one, whole, and a result from before stays."""
    out, begun = project / "out", project / "begun"
    slow = write(project / "slow.ipynb", f"open({str(begun)!r}, 'w').close()", "import time; time.sleep(120)")
    last = write(project / "last.ipynb", "print(label)")
    out.mkdir()
    (out / "slow.ipynb").write_text("from before", encoding="utf-8")

    def interrupt():
        while not begun.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    clock, before = (
        time.monotonic(),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            workbook.run([str(slow), str(last)], out=out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - clock < 60
    assert contents(out) == ["slow.failed.ipynb", "slow.ipynb"]
    nbformat.validate(nbformat.read(out / "slow.failed.ipynb", as_version=4))
    assert (out / "slow.ipynb").read_text(encoding="utf-8") == "from before"


def test_a_kernel_that_is_not_there_is_a_failed_notebook(project, monkeypatch):
    """It is named; the file that is left can be read."""
    monkeypatch.setattr(workbook, "KERNEL", "no-such-kernel")
    [outcome] = workbook.run(["01"], out=project / "out")
    assert "no-such-kernel" in outcome.error
    nbformat.validate(nbformat.read(outcome.file, as_version=4))


def test_a_source_is_not_replaced_by_its_output(project, executed):
    """Nor one notebook's output by that of another."""
    own, other = write(project / "own.ipynb", "1"), write(project / "other" / "own.ipynb", "2")
    with pytest.raises(ValueError, match=r"own\.ipynb would be overwritten by its own output"):
        workbook.run([str(own)], out=project)
    with pytest.raises(ValueError, match=r"two of the notebooks are called own\.ipynb"):
        workbook.run([str(own), str(other)], out=project / "out")
    assert executed == []


def test_a_path_with_braces_is_a_path(project):
    """Papermill by itself would fill parameters in."""
    [outcome] = workbook.run([str(write(project / "{size}.ipynb", "print(size)"))], {"size": 4}, out=project / "o{u}t")
    assert printed(outcome.file) == "4\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[]", b"3", b"[" * 3000, b"\xff\xfe{}", b'{"cells": 3}', b'{"nbformat": 4}',
     b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
     b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": null}', b'{"nbformat": "x", "cells": []}'],
)  # fmt: skip
def test_a_file_that_is_not_a_notebook_is_named(content, project, executed):
    """In one sentence, before anything runs."""
    (project / "e.ipynb").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.ipynb is not a notebook: .+"):
        workbook.run([str(project / "e.ipynb")], out=project / "out")
    assert executed == []
    assert not (project / "out").exists()


KINDS = (
    "size: int = 3  # a\nshare: float = 0.5  # b\nlabel: str = 'x'  # c\nfresh: bool = False  # d\n"
    "names: list[str] = []  # e\ncounts: list[int] = [1]  # f\nratios: list[float] = [0.2]  # g\nbare = 3\nlist_of = [1]\n"
    "odd = len('x')"
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("label", "2024-05-01", r"label is datetime\.date\(2024, 5, 1\), of type date; it is to be str"),
        ("label", "3", "label is 3, of type int; it is to be str"),
        ("label", "", "label is None, of type NoneType; it is to be str"),
        ("label", r'"\ud83d"', r"label is '\\ud83d', of type str"),
        ("size", "true", "size is True, of type bool; it is to be int"),
        ("size", "3.0", "to be int"),
        ("bare", "three", "bare is 'three', of type str; it is to be int"),
        ("share", "some", "to be float"),
        ("share", ".nan", "share is nan, of type float; it is to be float"),
        ("share", ".inf", "to be float"),
        ("share", "yes", "to be float"),
        ("fresh", "1", "to be bool"),
        ("names", "mini/web", r"names is 'mini/web', of type str; it is to be list\[str\]"),
        ("names", "[mini/web, 3]", r"to be list\[str\]"),
        ("counts", "[1, 2.5]", r"to be list\[int\]"),
        ("ratios", "[0.2, x]", r"to be list\[float\]"),
        ("ratios", "{a: 1}", r"of type dict; it is to be list\[float\]"),
        ("list_of", "3", "list_of is 3, of type int; it is to be list"),
        (
            "odd",
            "2024-05-01",
            "odd is .*, of type date; it is to be a number, a text, true, false, null, or a list of such",
        ),
        ("odd", "[1, .nan]", r"odd is \[1, nan\], of type list; it is to be a number"),
        ("list_of", "[2024-05-01]", r"list_of is \[.*\], of type list; it is to be list"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, text, message, project, executed):
    """The kind is that of the annotation, or of the default; nothing runs."""
    file = write(project / "kinds.ipynb", parameters=KINDS)
    with pytest.raises(ValueError, match=message):
        workbook.run([str(file)], {name: parameters.parse(text, name)}, out=project / "out")
    assert executed == []


def test_a_value_of_the_kind_is_given_as_it_is(project, executed):
    """A whole number is a float, too; where the kind is not known every value that JSON has is taken."""
    values = {
        "size": 4,
        "share": 1,
        "label": "2024-05-01",
        "fresh": True,
        "names": ["a"],
        "counts": [],
        "ratios": [1, 0.5],
        "bare": 5,
    }
    values |= {"list_of": ["b"], "odd": "anything"}
    workbook.run([str(write(project / "kinds.ipynb", parameters=KINDS))], values, out=project / "out")
    assert executed == [("kinds", values)]
    assert parameters.parse("'2024-05-01'", "label") == "2024-05-01"


def test_notebooks_run_at_the_top_of_the_checkout_and_leave_the_caller_where_he_is(project, monkeypatch):
    """Two at a time, the first to start the last to end; ``out`` is relative to the caller's folder."""
    where = ("import os, time", "time.sleep(2 - size)", "print(os.getcwd())")
    files = [
        write(project / f"{name}.ipynb", *where, parameters=f"size: int = {size}  # of it")
        for name, size in (("slow", 0), ("fast", 2))
    ]
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    outcomes = workbook.run([str(file) for file in files], out="out", jobs=2)
    assert [printed(outcome.file) for outcome in outcomes] == [f"{project}\n"] * 2
    assert contents(project / "elsewhere" / "out") == ["fast.ipynb", "slow.ipynb"]
    assert Path.cwd() == project / "elsewhere"


def environment(project, jobs: int) -> str:
    """What a kernel is told of threads and memory."""
    told = write(
        project / "told.ipynb", "import os; print(*map(os.environ.get, ('OMP_NUM_THREADS', 'GLIBC_TUNABLES')))"
    )
    before = dict(os.environ)
    (outcome,) = workbook.run([str(told)], out=project / "out", jobs=jobs)
    assert dict(os.environ) == before
    return printed(outcome.file).strip()


@pytest.mark.parametrize("jobs", [1, 2])
def test_kernels_share_the_cores_and_keep_their_memory(jobs, project, monkeypatch):
    """By the environment that they start in; what the user has set stays, and the caller's own is as before."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(workbook, "_glibc", lambda: workbook.GLIBC)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    threads = "None" if jobs == 1 else "3"
    assert environment(project, jobs) == f"{threads} {workbook.MALLOC}"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=5")
    assert environment(project, jobs) == f"{threads} glibc.rtld.nns=5:{workbook.MALLOC}"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert environment(project, jobs) == "5 glibc.malloc.check=0"


@pytest.mark.parametrize("version", [(), (2, 34)])
def test_another_or_an_older_library_is_left_alone(version, project, monkeypatch):
    """It knows no such settings, or takes only a part of them."""
    monkeypatch.setattr(workbook, "_glibc", lambda: version)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment(project, 1) == "1 None"


@pytest.mark.skipif(workbook._glibc() < workbook.GLIBC, reason="needs a newer glibc")
def test_memory_that_is_kept_is_not_asked_for_again():
    """Sixty times 16 MB, one after the other: far fewer pages come anew."""
    work = "import resource as r\nfor n in range(60): b'x' * (2**24 + n)\nprint(r.getrusage(r.RUSAGE_SELF).ru_minflt)"

    def faults(**more: str) -> int:
        plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        return int(
            subprocess.run([sys.executable, "-c", work], env=plain | more, capture_output=True, check=True).stdout
        )

    # without the threshold, mapped anew each time: what an older library makes of it
    assert faults(GLIBC_TUNABLES=workbook.MALLOC) + 100_000 < faults(
        GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072"
    )


def test_notebooks_are_chosen_by_number_name_or_path(project):
    """``all`` are the numbered ones, in order; nothing is chosen twice."""
    folder = project / "notebooks"
    every = [folder / name for name in ("01_first.ipynb", "02_second.ipynb", "10_third.ipynb")]
    assert workbook.notebooks() == every
    assert workbook.notebooks(["02", "01_first", "10_third.ipynb", "02"]) == [every[1], every[0], every[2]]
    assert workbook.notebooks([str(folder / "draft.ipynb"), "all"]) == [folder / "draft.ipynb", *every]
    with pytest.raises(FileNotFoundError, match="no notebook '03'; there are 01_first, 02_second, 10_third"):
        workbook.notebooks(["01", "03"])


def test_a_notebook_is_given_only_what_it_declares(project, executed):
    """A parameter of one is no parameter of the other."""
    workbook.run(parameters={"size": 5, "depth": 2}, out=project / "out")
    assert executed == [("01_first", {"size": 5}), ("02_second", {"depth": 2}), ("10_third", {"size": 5})]


def test_a_misspelt_parameter_is_named_before_anything_runs(project, executed):
    """With those that exist; a parameter of a notebook that was not chosen is none either."""
    with pytest.raises(ValueError, match="sise: no parameter of 01_first; declared are label, size"):
        workbook.run(["01"], {"sise": 4, "label": "x"}, out=project / "out")
    with pytest.raises(ValueError, match="depth"):
        workbook.run(["01"], {"depth": 4}, out=project / "out")
    assert executed == []
    assert not (project / "out").exists()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shards_share_the_notebooks_out(n, project, executed):
    """Each is run by exactly one of n."""
    for i in range(1, n + 1):
        workbook.run(shard=(i, n), out=project / "out")
    assert sorted(name for name, _ in executed) == ["01_first", "02_second", "10_third"]
    assert executed[0][0] == "01_first"


def test_side_by_side_the_last_notebook_starts_first(project, executed):
    """It takes longest; what is returned is in the order of the workbook all the same."""
    outcomes = workbook.run(jobs=2, out=project / "out")
    assert executed[0][0] in ("10_third", "02_second")
    assert executed[-1][0] == "01_first"
    assert [outcome.notebook for outcome in outcomes] == ["01_first", "02_second", "10_third"]


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (-1, 2), (1, 0)])
def test_a_shard_that_cannot_be_is_refused(shard, project, executed):
    """i runs from 1 to n."""
    with pytest.raises(ValueError, match="expected i/n"):
        workbook.run(shard=shard, out=project / "out")
    assert executed == []


def test_a_preset_gives_values_under_those_of_the_call(project, executed):
    """It may speak of notebooks that are not chosen now; an empty one says nothing."""
    preset = project / "large.yaml"
    preset.write_text("size: 100\nlabel: large\ndepth: 9\n", encoding="utf-8")
    workbook.run(["01"], {"size": 50}, preset=preset, out=project / "out")
    preset.write_text("# nothing yet\n", encoding="utf-8")
    workbook.run(["02"], preset=preset, out=project / "out")
    assert executed == [("01_first", {"size": 50, "label": "large"}), ("02_second", {})]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"no preset file .*preset\.yaml"),
        ("size: [1", ValueError, r"preset\.yaml is not YAML"),
        ("1: 2\nsize: 3\n", ValueError, r"preset .*preset\.yaml: 1 is no name of a parameter"),
        ("null: 2\n", ValueError, r"preset\.yaml: None is no name"),
        ("size: 3\nsize: 4\n", ValueError, r"preset\.yaml is not YAML: size given twice"),
        ("a: &a [x]\nsize: *a\n", ValueError, r"preset\.yaml is not YAML: an alias"),
        ("[" * 3000, ValueError, r"preset\.yaml is nested too deeply"),
        ("size: 2024-05-01\n", ValueError, "size is .*, of type date; it is to be int"),
        ("3\n", ValueError, "expected `name: value` lines"),
        ("- size\n- label\n", ValueError, r"preset\.yaml: expected `name: value` lines"),
        (
            "size: 3\nsise: 4\n",
            ValueError,
            r"sise: no parameter \(in .*preset\.yaml\) of any notebook; declared are depth",
        ),
    ],
)
def test_a_preset_that_cannot_be_used_is_named(content, error, message, project, executed):
    """Missing, no YAML, no mapping, or with a name no notebook declares."""
    preset = project / "preset.yaml"
    if content is not None:
        preset.write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        workbook.run(["01"], preset=preset, out=project / "out")
    assert executed == []


def test_a_preset_that_is_a_folder_or_not_utf8_is_named(project, executed):
    """Like any other that cannot be used."""
    with pytest.raises(FileNotFoundError, match=r"no preset file .* \(it is a folder\)"):
        workbook.run(["01"], preset=project, out=project / "out")
    (project / "preset.yaml").write_bytes("label: größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"preset .*preset\.yaml is not UTF-8"):
        workbook.run(["01"], preset=project / "preset.yaml", out=project / "out")
    assert executed == []


@pytest.mark.parametrize("taken", ["out", "out/01_first.ipynb/x", "out/figures", "out/results"])
def test_what_cannot_be_written_is_told_before_anything_runs(taken, project, executed):
    """A file where a folder goes, a folder where the notebook goes."""
    write(
        project / "notebooks" / "01_first.ipynb", parameters="figures: str = 'f'  # where\nresults: str = 'r'  # where"
    )
    (project / taken).parent.mkdir(parents=True, exist_ok=True)
    (project / taken).write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot write .*/out/"):
        workbook.run(["02", "01"], out=project / "out")
    assert executed == []
    assert [file.read_text() for file in project.rglob("*") if file.is_file() and file.suffix != ".ipynb"] == ["mine"]


def test_places_given_are_looked_at_too(project, executed):
    """As the notebook sees them, from the top of the checkout."""
    write(project / "notebooks" / "01_first.ipynb", parameters="results: str = 'r'  # where")
    (project / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot write .*/file/r\.jsonl: .*/file is not a writable folder"):
        workbook.run(["01"], {"results": "file/r.jsonl"}, out=project / "out")
    assert executed == []
    assert not (project / "out").exists()


def test_a_full_disk_is_one_sentence(project, monkeypatch):
    """The notebook was executed, but there is no room for it."""
    source = write(project / "own.ipynb", "print('x' * 20_000)")
    put = workbook.replacing

    @contextmanager
    def full(target):
        with file_limit(10_000), put(target) as part:
            yield part

    monkeypatch.setattr(workbook, "replacing", full)
    with pytest.raises(OSError, match=r"cannot write .*own\.ipynb: File too large"):
        workbook.run([str(source)], out=project / "out")
    assert contents(project / "out") == []
