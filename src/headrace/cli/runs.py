"""`headrace runs`: which runs there are, and how they stand."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.tables import clean, moment, show
from headrace.console.runs import DAMAGED, Run
from headrace.console.runs import runs as find
from headrace.cost import money
from headrace.report import duration

Dirs = Annotated[list[str] | None, typer.Argument(metavar="DIR", help="Folders, globs of folders or URIs to look in and below; this folder by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON array.")]

_HEADS = ("output", "pipeline", "state", "n rows", "n dead letters", "began (UTC)", "n time", "n cost")
_STYLES = {"succeeded": "green", "running": "cyan", "stopped": "yellow", "interrupted": "yellow", "failed": "red", DAMAGED: "red"}
_WHY = 200  # characters


def runs(dirs: Dirs = None, json: Json = False) -> None:
    """List the last run on each output below some folders, the newest first: state, rows, dead letters, time and cost."""
    console = Console(highlight=False, emoji=False)
    named = dirs or ["."]
    found = find(named)
    if json:
        print(json_module.dumps([one.to_dict() for one in found], indent=1))
    elif not found:
        Console(stderr=True, highlight=False, emoji=False).print(f"no runs of headrace in or below {', '.join(named)}", markup=False, soft_wrap=True)
    else:
        rows, whys = [_cells(one) for one in found], [(one.output, one.why[:_WHY]) for one in found if one.why]
        if whys and not console.is_terminal:
            show(console, (*_HEADS, "why"), [[*row, one.why[:_WHY]] for row, one in zip(rows, found, strict=True)])
            return
        show(console, _HEADS, rows, wrap=(0, 1), styles=_STYLES)
        for output, why in whys:  # which have more room below
            console.print(clean(f"{output}: {why}"), style="dim", markup=False)


def _cells(one: Run) -> list[str]:
    if one.state == DAMAGED:
        return [one.output, one.pipeline, one.state, "", "", "", "", ""]
    rows = f"{one.rows:,}" + (f"/{one.total:,}" if one.total is not None else "")
    took = duration(one.wall_s) if one.wall_s is not None else ""
    return [one.output, one.pipeline, one.state, rows, f"{one.dead_letters:,}", moment(one.began_s), took, money(one.usd) if one.usd is not None else ""]
