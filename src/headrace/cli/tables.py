"""Tables: drawn on a terminal, plain aligned text elsewhere, so that other programs can read it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = "  "


def clean(text: str) -> str:
    """Text from elsewhere without characters that would move a terminal's cursor, colour it, or turn the writing direction."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)


def moment(at_s: float | None) -> str:
    """A time in seconds since the epoch as people say it, in UTC."""
    return dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%Y-%m-%d %H:%M") if at_s else ""


def show(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: Collection[int] = (), styles: Mapping[str, str] | None = None) -> None:
    """Print a table. A head that starts with `n ` is that of numbers.

    On a terminal, columns whose number is in `wrap` may take several lines, and a cell whose text is among `styles` has that style.
    """
    names = [head.removeprefix("n ") for head in heads]
    numbers = [head.startswith("n ") for head in heads]
    cells = [[clean(cell) for cell in row] for row in rows]
    if console.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for at, (name, number) in enumerate(zip(names, numbers, strict=True)):
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=at not in wrap, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in [names, *cells]:
        line = _GAP.join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, numbers, strict=True))
        console.print(line.rstrip(), markup=False, soft_wrap=True)
