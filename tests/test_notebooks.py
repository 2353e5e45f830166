"""The workbook: every notebook runs, sources carry no outputs, presets name only what is declared."""

import nbformat
import papermill
import pytest
import yaml

from nsvd.lab import workbook
from nsvd.lab.paths import checkout

SOURCES = workbook.notebooks()
TINY = {
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
    "seeds": [0],
    "models": ["mini-llama"],
    "mus": [0.03],
    "refine": 2,
    "check": False,
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_a_notebook_runs_with_small_parameters(source, tmp_path):
    """From start to end, without an error and without a word on stderr."""
    declared = papermill.inspect_notebook(str(source))
    small = TINY | {"figures": str(tmp_path / "figures"), "results": str(tmp_path / "results.jsonl")}
    parameters = {name: value for name, value in small.items() if name in declared}
    (outcome,) = workbook.run([str(source)], parameters, out=tmp_path)
    assert outcome.error is None
    outputs = [out for cell in nbformat.read(outcome.file, 4).cells for out in cell.get("outputs", [])]
    assert not [out.text for out in outputs if out.output_type == "stream"]
    assert len(list((tmp_path / "figures").glob("*.png"))) == len(list((tmp_path / "figures").glob("*.pdf"))) > 0


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


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)
def test_the_executed_notebook_is_of_this_source(source):
    """Cell for cell, but for injected parameters: what people read was made by what is here."""
    executed = nbformat.read(source.parent / "executed" / source.name, 4)
    cells = [cell.source for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert cells == [cell.source for cell in nbformat.read(source, 4).cells]


@pytest.mark.parametrize(
    "preset", sorted((checkout() / "notebooks/presets").glob("*.yaml")), ids=lambda file: file.stem
)
def test_a_preset_names_only_declared_parameters(preset):
    """papermill itself would run on with the defaults."""
    declared = set().union(*(papermill.inspect_notebook(str(source)) for source in SOURCES))
    assert set(yaml.safe_load(preset.read_text())) <= declared
