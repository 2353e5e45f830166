"""One look for every figure, and one way to save it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from nsvd.stored.files import replacing

PALETTE = {
    "svd": "#8c8c8c",
    "asvd-0": "#c9a227",
    "asvd": "#c9a227",
    "asvd-1": "#2a6f97",
    "asvd-2": "#61a5c2",
    "asvd-3": "#bfbfbf",
    "nsvd-1": "#c1121f",
    "nsvd-2": "#e5736b",
    "nid-1": "#6a4c93",
    "nid-2": "#a28bbf",
    "ridge": "#2d6a4f",
    "kfac": "#00a6a6",
    "sola": "#e36414",
    "ZS-SVD": "#9d4edd",
    "LEMS": "#6f4518",
    "best": "#38b000",
    "best, no corpus": "#9ef01a",
    "best, plain": "#1b5e20",
    "control": "#f9a03f",
    "dense": "#000000",
}
CHOICES = {
    "uniform": "#8c8c8c",
    "strs": "#b56576",
    "spectrum": "#355070",
}  # ways to share out ranks: no method's colours
TEXTS = {"corpus": "#4a4e69", "own text": "#588157", "random tokens": "#bc8a5f", "corpus + own text": "#3a5a40"}


def style() -> None:
    """Set the look of all figures; call it once, after the imports."""
    sns.set_theme(context="notebook", style="ticks", font_scale=0.85)
    mpl.rcParams.update(
        {
            "figure.dpi": 90,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "svg.hashsalt": "nsvd",
        }
    )


def log_scale(axes: Axes, *which: str, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Logarithmic ``x`` and ``y`` axes labelled with plain numbers at ``subs`` times the powers of ten; at these alone where there
    are more than four."""
    for name in which:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_data_interval()
        axis.set_major_locator(LogLocator(subs=(1,) if high > 1e4 * low > 0 else subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def guessing(axis: Axes, vocabulary: int, over: float = 1.0) -> None:
    """A dotted line at the perplexity of a guess among all words, ``over`` a dense model's; the axis shows it where it is near."""
    level, (low, high) = vocabulary / over, axis.get_ylim()
    if level < high:
        axis.axhline(level, color="black", lw=0.8, ls=":", label="a guess among all words")
    axis.set_ylim(low, high)


def save(figure: Figure, name: str, out: str | Path) -> None:
    """Write ``out/name.png`` and ``out/name.pdf``, without dates, so that the same figure is the same file."""
    about = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    for kind, metadata in about.items():
        with replacing(Path(out) / f"{name}.{kind}") as part:
            figure.savefig(part, metadata=metadata)
