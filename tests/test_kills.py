"""A killed ``nsvd compress`` leaves the old or the new model, and goes on; ``python -m tests.kills`` tries it more often."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def seen(*arguments: str) -> str:
    """What the program says; in a process of its own, where nothing else has started a thread."""
    program = [sys.executable, "-m", "tests.kills", *arguments, "--seed", "1"]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_compression_leaves_the_old_or_the_new_model():
    assert "kills: 6" in seen("--count", "6")


@pytest.mark.parametrize("method", ["asvd-1", "best"])
def test_a_killed_compression_goes_on_and_ends_in_the_same_bytes(method):
    assert "kills: 6" in seen("--count", "6", "--method", method)


def test_a_killed_compression_in_memory_leaves_nothing_either():
    assert "kills: 3" in seen("--count", "3", "--method", "best", "--source", "resident")
