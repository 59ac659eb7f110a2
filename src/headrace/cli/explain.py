"""`headrace explain`: what would run, where."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from headrace import plan
from headrace.cli.loading import load
from headrace.cli.options import Address, File, Keep, Set, names
from headrace.columns import from_arrow
from headrace.errors import SourceError
from headrace.formats import Input
from headrace.settings import override
from headrace.sources import open_source, select

In = Annotated[list[str] | None, typer.Option("--input", "-i", metavar="PATH", help="Check the pipeline against this input, too; repeatable.")]
Online = Annotated[bool, typer.Option("--online", help="The plan of a service in place of a batch job's: what shares a replica, and why not.")]


def explain(file: File, input: In = None, set_: Set = None, keep: Keep = "", online: Online = False, address: Address = None) -> None:
    """Draw the plan: groups, the hardware chosen on this cluster, batch rules, columns with types on every edge."""
    pipeline = override(load(file), set_ or [])
    kept = names(keep)
    source = open_source(Input(input)) if input else None
    if kept == "all":
        if source is None:
            raise SourceError("--keep all needs to know the columns: give the --input, too, or name them: --keep a,b")
        kept = tuple(source.schema.names)
    from headrace.on_ray.cluster import connected, here  # loads ray

    if address or os.environ.get("RAY_ADDRESS"):
        with connected(address) as cluster:
            resolved = plan.resolve(pipeline, cluster, keep=kept, online=online)
    else:
        resolved = plan.resolve(pipeline, here(), keep=kept, online=online)
    if source:
        source = select(source, resolved.source, pipeline=pipeline.name)
    print(plan.explain(resolved, types={field.name: from_arrow(field.type) for field in source.schema} if source else None))
    if source:
        print(f"\ninput    {source.format}, {len(source.units)} units" + (f", {source.rows:,} rows" if source.rows is not None else ""))
