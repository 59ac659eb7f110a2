"""`headrace runs` and `headrace diff`: what folders tell of their runs."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json as json_
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.console.runs import HELD_BACK, Run, differences, find, told
from headrace.cost import money
from headrace.report import duration, rate

Dirs = Annotated[list[str] | None, typer.Argument(metavar="[DIR]...", help="Output folders or URIs, or folders that hold some; by default this folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
First = Annotated[str, typer.Argument(metavar="RUN", help="The output folder or URI of a run, or a report.json.")]
Second = Annotated[str, typer.Argument(metavar="RUN", help="The same of another run.")]
_COLOURS = {"running": "cyan", "succeeded": "green", "stopped": "yellow", "interrupted": "yellow", "failed": "red", "damaged": "red"}
_SHARES = ("computing", "starved", "blocked", "between", "padding", "idle")
_WIDE = 500  # columns where there is no terminal: nothing is cut off


def runs(dirs: Dirs = None, json: Json = False) -> None:
    """List runs and their state, the latest first."""
    found = find(dirs or ["."])
    if json:
        print(json_.dumps([dataclasses.asdict(run) for run in found], indent=1))
        return
    if not found:
        print(f"no runs in {', '.join(dirs or ['this folder'])}")
        return
    table = Table("Output", "Pipeline", "State", "Rows", "Dead", "Began", "Time", "Rows/s", "Cost", box=None, pad_edge=False, header_style="bold")
    for name in ("Rows", "Dead", "Time", "Rows/s", "Cost"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for run in found:
        table.add_row(*_cells(run))
    _print(table)


def diff(first: First, second: Second, json: Json = False) -> None:
    """Compare two runs: what was run, what came of it, what it cost, and where the time of each group went."""
    found = differences(told(first), told(second))
    if json:
        print(json_.dumps([{**dataclasses.asdict(one), "ratio": one.ratio} for one in found], indent=1))
        return
    if not found:
        print("no difference")
        return
    table = Table("", first, second, "Ratio", box=None, pad_edge=False, header_style="bold")
    table.columns[3].justify = "right"
    about = None
    for one in found:
        said = [_said(one.what, value) for value in (one.first, one.second)]
        if one.about == HELD_BACK or said[0] == said[1]:  # sentences do not fit into a table; what reads the same is no news
            continue
        if one.about != about:
            table.add_row(Text(one.about, style="bold"))
            about = one.about
        table.add_row(Text(f"  {one.what}"), *map(Text, said), f"{one.ratio:.2f}" if one.ratio is not None else "")
    _print(table)
    for one in found:
        if one.about == HELD_BACK:
            print(
                f"\n{HELD_BACK}",
                *(f"  {run}: {sentence or 'nothing in particular'}" for run, sentence in zip((first, second), (one.first, one.second), strict=True)),
                sep="\n",
            )


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(width=_WIDE, highlight=False)
    with wide.capture() as text:
        wide.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def _cells(run: Run) -> Sequence[Text | str]:
    done = "" if run.rows_out is None else f"{run.rows_out:,}"
    of = f" of {run.rows:,}" if run.rows is not None and run.rows != (run.rows_out or 0) + (run.dead_letters or 0) else ""
    began = dt.datetime.fromtimestamp(run.started_s, dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M") if run.started_s else ""
    state = Text(run.state, style=_COLOURS.get(run.state, ""))
    if run.error:
        state.append(f": {run.error}", style="dim")
    return (
        Text(run.output),
        Text(run.pipeline),
        state,
        done + of,
        f"{run.dead_letters:,}" if run.dead_letters else "",
        began,
        duration(run.wall_s) if run.wall_s is not None else "",
        rate(run.rows_per_s) if run.rows_per_s else "",
        money(run.usd) if run.usd is not None else "",
    )


def _said(what: str, value: Any) -> str:
    """A value as people say it, by the unit that the end of its name tells."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if what.endswith("per_s"):
        return rate(value)
    if what.endswith("_s"):
        return duration(value)
    if what.startswith("usd"):
        return money(value)
    if what in _SHARES:
        return f"{value:.1%}"
    return f"{value:,}"
