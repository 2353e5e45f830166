"""A killed ``nsvd compress`` leaves the old or the new model; ``python -m tests.kills`` tries it more often."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_compression_leaves_the_old_or_the_new_model():
    """Six kills; in a process of its own, where nothing else has started a thread."""
    program = [sys.executable, "-m", "tests.kills", "--count", "6", "--seed", "1"]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kills: 6" in done.stdout
