"""Figures are whole or not there."""

import os

import matplotlib.pyplot as plt
import pytest

from nsvd.lab.figures import save
from tests.tiny import file_limit


def test_a_figure_on_a_full_disk_leaves_the_older_one(tmp_path):
    """Both files of it; the error names the file."""
    figure, axes = plt.subplots()
    save(figure, "line", tmp_path / "new")
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert sorted(before) == ["line.pdf", "line.png"]
    axes.plot([1, 2])
    with file_limit(3000), pytest.raises(OSError, match=r"^cannot write .*line\.png: File too large$"):
        save(figure, "line", tmp_path / "new")
    plt.close(figure)
    assert {name: (tmp_path / "new" / name).read_bytes() for name in os.listdir(tmp_path / "new")} == before
