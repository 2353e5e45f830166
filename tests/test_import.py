"""Importing and compressing load torch and transformers, and nothing that only notebooks need."""

import subprocess
import sys
from importlib.resources import files

import pytest

HEAVY = ("pandas", "matplotlib", "seaborn", "datasets", "papermill", "jupyterlab", "IPython", "ipywidgets")
COMPRESS = """
from tests.tiny import tiny_model, token_ids
ids = token_ids(40, 9)
for how in ({"method": "best"}, {"method": "asvd-1", "allocation": "strs"}, {"method": "sola", "keep_outer": 0, "grid": 1}):
    model = tiny_model()
    report = nsvd.compress_(model, ratio=0.2, windows=ids, **how)
    nsvd.compress_kv_(tiny_model(), windows=ids)
    repr(report), report._repr_html_(), report.as_dict()
    nsvd.evaluate(model, ids)
"""


@pytest.mark.parametrize("work", ["", COMPRESS], ids=["import", "compress"])
def test_nothing_is_loaded_that_only_notebooks_need(work):
    """In a fresh process. (The test's own helper imports pytest, which is none of these.)"""
    code = f"import sys, nsvd\n{work}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_table_brings_pandas():
    """The check above would notice it."""
    code = (
        "import sys, nsvd\nfrom tests.tiny import tiny_model\n"
        "nsvd.compress_(tiny_model(), method='svd', ratio=0.3).table\nprint('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_the_package_says_that_it_is_typed():
    assert (files("nsvd") / "py.typed").is_file()
