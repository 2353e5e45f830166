"""Mathematics is tested in float64, on one thread, from a fixed seed."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("project", derandomize=True, deadline=None)  # every run draws the same examples
settings.load_profile("project")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def float64():
    """Default dtype float64 and seed 0 for the length of a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: compares with a program that is no dependency; skipped where it is not installed"
    )


def pytest_addoption(parser):
    parser.addoption("--few", action="store_true", help="of a test with many cases the first two and the last two")


def few(items, most=4):
    """Of every test function the first two and the last two cases, in order; all where it is marked ``every``."""
    cases = {}
    for item in items:
        cases.setdefault((item.parent, getattr(item, "originalname", None) or item.name), []).append(item)
    kept = set()
    for group in cases.values():
        whole = len(group) <= most or group[0].get_closest_marker("every")
        kept.update(map(id, group if whole else [*group[: most // 2], *group[-(most // 2) :]]))
    return [item for item in items if id(item) in kept]


def pytest_collection_modifyitems(config, items):
    """Leave out what ``--few`` leaves out; tests marked ``shared`` need texts that lie beside the project, not in it."""
    if config.getoption("--few"):
        left = few(items)
        kept = set(map(id, left))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = left
    if not SHARED.is_dir():
        absent = pytest.mark.skip(reason="needs the evaluation texts in ../shared, which are not here")
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(absent)
