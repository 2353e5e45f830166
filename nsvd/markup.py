"""How a notebook shows a value: small pieces of HTML with their own colours, and sizes in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_FRAME = "max-height: 24em; overflow: auto; display: inline-block"
_RIGHT = "text-align: right; font-variant-numeric: tabular-nums"


def text(value: object) -> str:
    """A cell of text."""
    return f'<td style="text-align: left">{escape(str(value))}</td>'


def number(value: float | None, form: str = "{:,}") -> str:
    """A cell with a number, empty for None."""
    return f'<td style="{_RIGHT}">{"" if value is None else form.format(value)}</td>'


def bar(value: float | None, most: float, form: str = "{:.1%}") -> str:
    """A cell with a number on a bar, as long as the number's share of ``most``."""
    if value is None:
        return "<td></td>"
    share = 0.0 if most <= 0 else min(max(value / most, 0.0), 1.0)
    fill = f"linear-gradient(to right, rgba(42, 111, 151, 0.35) {share:.1%}, transparent {share:.1%})"
    return f'<td style="{_RIGHT}; min-width: 8em; background: {fill}">{form.format(value)}</td>'


def shaded(value: float | None, most: float, form: str = "{:.3f}") -> str:
    """A cell with a number, the redder the nearer to ``most``."""
    if value is None:
        return "<td></td>"
    share = 0.0 if most <= 0 else min(max(value / most, 0.0), 1.0)
    return f'<td style="{_RIGHT}; background: rgba(193, 18, 31, {0.7 * share:.2f})">{form.format(value)}</td>'


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that scrolls when it is long; the cells are HTML already."""
    titles = "".join(f'<th style="padding: 0 0.6em">{escape(title)}</th>' for title in head)
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div style="{_FRAME}"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def block(title: str, inside: str = "", note: str = "") -> str:
    """A title, what is under it, and a small note."""
    small = f'<div style="opacity: 0.7; font-size: 90%">{escape(note)}</div>' if note else ""
    return f"<div><div><b>{escape(title)}</b></div>{inside}{small}</div>"


def size(count: float) -> str:
    """Bytes in words: ``1.5 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
