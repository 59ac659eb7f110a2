"""`headrace diff`: what is not the same in two runs."""

from __future__ import annotations

import json as json_module
from itertools import pairwise
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.tables import clean, moment, show
from headrace.console.diff import Difference, compare, read

Before = Annotated[str, typer.Argument(metavar="RUN", help="The output folder of a run, or its report.json.")]
After = Annotated[str, typer.Argument(metavar="RUN", help="Another one, to compare with it.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]

_SENTENCES = "advice"  # too long for a column


def diff(before: Before, after: After, json: Json = False) -> None:
    """Compare two runs: input, settings, code, versions, rows, rates, time shares, cost. Only what differs is shown."""
    reports = read(before), read(after)
    found = compare(*reports)
    if json:
        runs = [{"output": report["output"], "run": report["run"]} for report in reports]
        print(json_module.dumps({"runs": runs, "differences": [one.to_dict() for one in found]}, indent=1))
        return
    console = Console(highlight=False, emoji=False)
    for sign, uri, report in zip("AB", (before, after), reports, strict=True):
        console.print(clean(f"{sign}  {uri}  {moment(report['started_s'])} UTC, run {report['run']}"), markup=False, soft_wrap=True)
    if not found:
        console.print("nothing differs")
        return
    parts = [""] + [one.part for one in found]
    rows = [["" if old == new else new, *_cells(one)] for (old, new), one in zip(pairwise(parts), found, strict=True) if one.part != _SENTENCES]
    if rows:
        console.print()
        show(console, ("", "", "n A", "n B", "n B/A"), rows, wrap=(0, 1, 2, 3))
    for one in found:
        if one.part == _SENTENCES:
            console.print(f"\n{one.name}\n  A: {clean(one.shown[0])}\n  B: {clean(one.shown[1])}", markup=False, soft_wrap=not console.is_terminal)


def _cells(one: Difference) -> list[str]:
    return [one.name, *one.shown, f"{one.ratio:.3g}" if one.ratio is not None else ""]
