"""`headrace check`: the parity gate."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from headrace import parity
from headrace.cli.loading import load
from headrace.cli.options import File, Set
from headrace.cli.tables import show
from headrace.errors import ParityError
from headrace.formats import Input
from headrace.parity import Target, Tolerance, Verdict
from headrace.pipeline import Pipeline
from headrace.settings import override

_SHOWN = 40
_LIMIT = 1000

In = Annotated[
    list[str], typer.Option("--input", "-i", metavar="PATH", help="Golden rows: any readable input. Its columns that are outputs are compared, too.")
]
Url = Annotated[str | None, typer.Option(metavar="URL", help="A running service to compare with: http://host:port.")]
Key = Annotated[str | None, typer.Option(metavar="KEY", help="The service's API key; HEADRACE_KEY by default.")]
Version = Annotated[int | None, typer.Option(help="Ask this version of the service, whatever others there are.")]
Limit = Annotated[int, typer.Option(help="Compare only the first rows.")]
Where = Annotated[str | None, typer.Option(metavar="EXPR", help='Which rows to compare, such as "stars >= 4".')]
Batch = Annotated[bool, typer.Option("--batch/--no-batch", help="Whether to run a batch job, too, on a Ray that is started here.")]
Tolerances = Annotated[
    list[str] | None,
    typer.Option("--tolerance", metavar="NUMBER", help="How far floats may lie apart: 0.001, relative=0.01, cosine=0.01 (of vectors); repeatable."),
]
Gate = Annotated[str | None, typer.Option("--gate", metavar="PATH", help="Golden rows: run only if headrace check finds local and batch equal over them.")]


def check(
    file: File,
    input: In,
    url: Url = None,
    key: Key = None,
    version: Version = None,
    limit: Limit = _LIMIT,
    where: Where = None,
    set_: Set = None,
    batch: Batch = True,
    tolerance: Tolerances = None,
) -> None:
    """Run the same rows locally, as a batch job and (with --url) through a service, and list every value that differs.

    Rows are also run in reverse order and each alone: their results must not depend on their neighbours. Exit code 1 if anything differs.
    """
    allowed = Tolerance.parse(tolerance or [])
    pipeline = override(load(file), set_ or [])
    rows = parity.golden(Input(input, limit=limit, where=where), pipeline)
    targets: dict[str, Target] = {}
    if batch:
        from headrace.on_ray.trial import batch as batched  # loads ray

        targets["batch"] = batched(pipeline)
    if url is None:
        tell(parity.gate(pipeline, rows, targets, tolerance=allowed))
        return
    from headrace.client import Client

    with Client(url, key=key or os.environ.get("HEADRACE_KEY"), version=version) as client:
        client[pipeline.name].contract()  # whether it is there at all, before the other ways take their time
        tell(parity.gate(pipeline, rows, targets | parity.over_http(client, pipeline.name), tolerance=allowed))


def gate(pipeline: Pipeline, path: str) -> None:
    """What `--gate` asks for before a run.

    Raises:
        ParityError: local and batch differ, or rows influence each other.
    """
    from headrace.on_ray.trial import batch as batched  # loads ray

    verdict = parity.gate(pipeline, parity.golden(Input(path, limit=_LIMIT), pipeline), {"batch": batched(pipeline)})
    if verdict.differences:
        tell(verdict)


def tell(verdict: Verdict) -> None:
    """Print what was compared, and what differs.

    Raises:
        ParityError: something does.
    """
    console = Console(highlight=False, emoji=False)
    if not verdict.differences:
        console.print(str(verdict), markup=False, soft_wrap=True)
        return
    rows = [(one.target, "all" if one.row is None else str(one.row), one.column, one.expected, one.found, one.apart) for one in verdict.differences[:_SHOWN]]
    show(console, ("target", "n row", "column", "expected", "found", "apart"), rows, wrap={3, 4, 5})
    if (rest := len(verdict.differences) - _SHOWN) > 0:
        console.print(f"and {rest:,} more", markup=False)
    raise ParityError(str(verdict))
