"""The workbook: every notebook runs, sources carry no outputs, presets name only what is declared."""

import json
import re

import nbformat
import papermill
import pytest
import yaml

import nsvd
from nsvd.lab import paper, workbook
from nsvd.lab.corpora import HUB
from nsvd.lab.paths import checkout

SOURCES = workbook.notebooks()
FOLDER = checkout() / "notebooks"
PRESETS = sorted((FOLDER / "presets").glob("*.yaml"))


def executed(folder) -> list:
    """The executed notebooks in a folder; one that failed lies beside them as ``NAME.failed.ipynb`` and is none of them."""
    return [folder / source.name for source in SOURCES if (folder / source.name).is_file()]


REAL_TEXT = executed(FOLDER / "executed/real-text")
SMOLLM2 = executed(FOLDER / "executed/smollm2-135m")
EXECUTED = [*executed(FOLDER / "executed"), *REAL_TEXT, *SMOLLM2]
MORE = {
    "01_activation_distributions": {"check"},
    "03_compression": {"check"},
    "04_evaluation": {"scales", "check"},
    "05_rank_split": {"check"},
    "07_kv_cache": {"test_count", "check"},
    "08_rank_search": {"search_count", "test_count", "alphas", "check"},
    "09_sola": {"ratios", "primes", "test_count", "held_count", "sizes", "seeds", "search_count", "check"},
    "10_beyond_nsvd": {"count", "test_count", "own_counts", "temperatures", "refine", "distill"} | {"seeds", "check"},
    "12_downstream": {"tasks", "questions", "count", "ratios", "methods", "check"},
    "13_recovery": {"dtype", "methods", "ratios", "count", "length", "steps"}
    | {"rate", "adapter_rate", "seeds", "test_count", "check"},
    "14_rank_and_bits": {"count", "test_count", "ratios", "check"},
    "15_rivals": {"count", "more", "search_count", "multiple", "test_count", "ratios", "seeds", "check"},
}  # what Makefile gives beside the preset
ROOTS = ("home", "root", "tmp", "mnt", "usr", "Users", "var", "opt", "srv")
ABSOLUTE = re.compile(rf"(?<![\w.</-])/({'|'.join(ROOTS)})/")
TINY = {
    "model": "mini-llama-s",
    "count": 8,  # more tokens than channels, or Cholesky has nothing to factor
    "test_count": 2,
    "own_counts": [4, 8],
    "temperatures": [0.8, 1.0],
    "search_count": 3,
    "kept": [0.3, 0.6],
    "length": 64,
    "draws": 8,
    "ratios": [0.3],
    "splits": [0.8],
    "nid_splits": [0.8],
    "cache_ratios": [0.5],
    "shapes": ["4 2 8"],
    "held_tokens": 32,
    "lengths": [16, 64],
    "new_tokens": 4,
    "held_count": 2,
    "primes": [0.0, 0.15],
    "sizes": [4],
    "layers": ["64 48"],
    "width": 32,
    "repeat": 1,
    "seeds": [0],
    "models": ["mini-llama"],
    "more": 4,
    "refine": 2,
    "distill": 2,
    "steps": [1, 2],
    "alone": [8, 3],
    "questions": 6,
    "alphas": [0.0, 0.5],
    "removed": [0.2],
    "scales": [1.0, 4.0],
    "control_count": 2,
    "check": False,
}


def preset(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"presets/{name}.yaml").read_text(encoding="utf-8"))


def written_for(preset) -> list:
    """The notebooks named in the first line of a preset (a file, or its text)."""
    text = preset if isinstance(preset, str) else preset.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    numbers = re.match(r"# For notebooks (\d\d)(?:( to | and )(\d\d))?[.:]", first)
    assert numbers, f"'# For notebooks NN and NN.' or '… to NN.' is to stand first, not {first!r}"
    start, link, end = numbers.groups()
    return [
        source for source in SOURCES
        if source.stem[:2] in (start, end) or (link == " to " and start <= source.stem[:2] <= end)
    ]  # fmt: skip


def run_small(source, folder, **more) -> workbook.Outcome:
    declared = papermill.inspect_notebook(str(source))
    small = TINY | {"figures": str(folder / "figures"), "results": str(folder / "results.jsonl")} | more
    (outcome,) = workbook.run([str(source)], {name: v for name, v in small.items() if name in declared}, out=folder)
    return outcome


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_a_notebook_runs_with_small_parameters(source, tmp_path):
    """From start to end, without an error and without a word on stderr."""
    if why := workbook.lacking(source):
        pytest.skip(why)
    outcome = run_small(source, tmp_path)
    assert outcome.error is None
    outputs = [out for cell in nbformat.read(outcome.file, 4).cells for out in cell.get("outputs", [])]
    assert not [out.text for out in outputs if out.output_type == "stream"]
    assert len(list((tmp_path / "figures").glob("*.png"))) == len(list((tmp_path / "figures").glob("*.pdf"))) > 0


@pytest.mark.parametrize(("number", "sets"), [("04", 1), ("04", 3), ("05", 1), ("06", 2), ("08", 2)])
def test_a_notebook_runs_on_few_sets(number, sets, tmp_path):
    """There may be no set away from home, or none between home and the last two; and two windows to search on."""
    (source,) = workbook.notebooks([number])
    corpora = ["mini/encyclopedia", "mini/web", "mini/reading_zh"][:sets]
    assert run_small(source, tmp_path, corpora=corpora, search_count=2).error is None


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_a_source_notebook_is_clean(source):
    """No outputs, no run metadata, one parameters cell whose every line papermill understands, a last cell that asserts."""
    notebook = nbformat.read(source, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    declared = papermill.inspect_notebook(str(source))
    assert len(declared) == len(parameters.source.strip().splitlines())
    assert all(entry["help"] for entry in declared.values())
    assert "assert" in code[-1].source
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("file", EXECUTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_executed_notebook_is_of_this_source(file):
    """Cell for cell, but for injected parameters: what people read was made by what is here."""
    executed = nbformat.read(file, 4)
    cells = [cell.source for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert cells == [cell.source for cell in nbformat.read(FOLDER / file.name, 4).cells]
    assert not [
        out for cell in executed.cells for out in cell.get("outputs", []) if out.output_type in ("error", "stream")
    ]
    assert not ABSOLUTE.search(re.sub(r'"image/png": "[^"]*"', "", file.read_text(encoding="utf-8")))


def test_a_failed_notebook_is_no_executed_one(tmp_path):
    """It may be left from a run that is being looked into."""
    for name in (SOURCES[1].name, f"{SOURCES[1].stem}.failed.ipynb", f"{SOURCES[2].stem}.failed.ipynb"):
        (tmp_path / name).touch()
    assert executed(tmp_path) == [tmp_path / SOURCES[1].name]


def test_every_notebook_has_been_executed():
    """On the embedded model and texts."""
    assert {source.name for source in SOURCES} <= {file.name for file in EXECUTED if file.parent.name == "executed"}


@pytest.mark.parametrize("file", [*REAL_TEXT, *SMOLLM2], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_run_on_real_text_is_the_presets_and_tells_numbers_only(file):
    """Its parameters are those of the preset; no path of the machine it ran on, and no text, is in it or its results."""
    name, elsewhere = file.parent.name, {"figures", "results", "fresh", *MORE.get(file.stem, ())}
    given, declared = (
        nbformat.read(file, 4).metadata.nsvd.parameters,
        papermill.inspect_notebook(str(FOLDER / file.name)),
    )
    wanted = {key: value for key, value in preset(name).items() if key in declared and key not in elsewhere}
    assert {key: value for key, value in given.items() if key not in elsewhere} == wanted
    assert not ABSOLUTE.search(re.sub(r'"image/png": "[^"]*"', "", file.read_text(encoding="utf-8")))
    if "results" in declared:
        assert given["results"] == f"data/results/{name}/{file.stem}.jsonl"
        results = (checkout() / given["results"]).read_text(encoding="utf-8")
        assert not ABSOLUTE.search(results)
        strings = [value for line in results.splitlines() for value in json.loads(line)["parameters"].values()]
        source = (FOLDER / file.name).read_text(encoding="utf-8")  # our own labels may be longer
        assert all(len(value) < 40 or value in source for value in strings if isinstance(value, str))


@pytest.mark.parametrize("root", ROOTS)
def test_an_absolute_path_would_be_found(root):
    """And a folder, a fraction or a formula is none."""
    found = (f'"/{root}/me/eval:ptb"', f"'/{root}/x/y'", f"in /{root}/z.jsonl", f"DIR:/{root}/x/y")
    others = ('"eval:ptb"', "k1 / k", f"a/{root}/z", f"https://a.org/{root}/b", f"</{root}/>")
    assert all(ABSOLUTE.search(text) for text in found)
    assert not any(ABSOLUTE.search(text) for text in others)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_names_only_parameters_of_the_notebooks_that_it_is_for(file):
    """Its first line says which; papermill itself would run on with the defaults."""
    sources, values = written_for(file), preset(file.stem)
    declared = {source.stem: set(papermill.inspect_notebook(str(source))) for source in sources}
    assert set(values) <= set().union(*declared.values())
    assert all(set(values) & names for names in declared.values())


def test_a_preset_without_notebooks_or_with_another_parameter_would_be_found(tmp_path):
    """The first line is read as written, and must be there."""
    assert [file.stem[:2] for file in written_for("# For notebooks 01 to 03.")] == ["01", "02", "03"]
    assert [file.stem[:2] for file in written_for("# For notebooks 04 and 10: more words")] == ["04", "10"]
    with pytest.raises(AssertionError, match="For notebooks"):
        written_for("# Some settings")
    assert "ratios" not in set().union(
        *(papermill.inspect_notebook(str(s)) for s in written_for("# For notebooks 05."))
    )


def test_the_mini_preset_spells_out_the_defaults():
    """Every value is what each of its notebooks takes by itself; an empty list of corpora stands for the embedded ones."""
    values = preset("mini")
    for source in written_for(FOLDER / "presets/mini.yaml"):
        for name, entry in papermill.inspect_notebook(str(source)).items():
            if name in values:
                default = yaml.safe_load(entry["default"].replace("True", "true"))
                assert values[name] == (list(nsvd.EMBEDDED) if name == "corpora" and default == [] else default), (
                    source.stem
                )


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-30b", "vicuna-7b", "opt-6.7b", "mistral-7b"])
def test_the_papers_setting_is_there_for_each_of_its_models(name):
    """256 windows of 2048 tokens of WikiText-2, no BOS, eight sets, 10 to 50 % removed, its k1; it is not claimed to have run."""
    values, text = preset(name), (FOLDER / f"presets/{name}.yaml").read_text(encoding="utf-8")
    assert name.split("-")[0] in values["model"].lower()
    assert (values["calibration"], values["count"], values["length"]) == ("wikitext2", 256, 2048)
    assert sorted(values["corpora"]) == sorted(HUB)
    assert (values["corpora"][0], values["ratios"], values["k1"]) == ("wikitext2", list(paper.AVERAGE), 0.95)
    assert values["splits"] == [0.99, 0.95, 0.9, 0.85, 0.8]
    assert values["bos"] is False
    assert "has not been run here" in re.sub(r"\s*\n# ", " ", text)


def test_the_front_page_and_the_readme_lead_to_every_notebook():
    """The front page by its title, which is its question; links are good where the executed notebooks lie together."""
    front = "\n".join(cell.source for cell in nbformat.read(SOURCES[0], 4).cells)
    readme = (checkout() / "README.md").read_text(encoding="utf-8")
    for source in SOURCES:
        title = nbformat.read(source, 4).cells[0].source.splitlines()[0].removeprefix("# ")
        assert source is SOURCES[0] or f"| [{source.stem}]({source.name}) | {title} |" in front
        assert f"| [{source.stem}](notebooks/executed/{source.name}) |" in readme
