"""`headrace run`: a pipeline as a streaming batch job."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.loading import load
from headrace.cli.options import Address, File, Keep, Set, names
from headrace.cli.progress import Progress
from headrace.formats import Input, Output
from headrace.settings import override

In = Annotated[list[str], typer.Option("--input", "-i", metavar="PATH", help="A file, folder, glob or URI (s3://, gs://, ...); repeatable.")]
Out = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A folder or URI that does not exist or is empty.")]
Columns = Annotated[str, typer.Option(metavar="COLUMNS", help="Take the input to have only these columns: a,b,c.")]
Where = Annotated[str | None, typer.Option(metavar="EXPR", help='Which rows to read, such as "stars >= 4 and city is not None".')]
Limit = Annotated[int | None, typer.Option(help="Read only the first rows.")]
Format = Annotated[str | None, typer.Option(help="Input format: parquet, csv, jsonl or images; told from the names by default.")]
Sink = Annotated[str, typer.Option(help="Output format: parquet, jsonl or delta.")]
Submit = Annotated[str | None, typer.Option(metavar="URL", help="Run as a Ray job on the cluster with this dashboard, and follow it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and the workers print.")]


def run(
    file: File,
    input: In,
    output: Out,
    set_: Set = None,
    keep: Keep = "",
    columns: Columns = "",
    where: Where = None,
    limit: Limit = None,
    format: Format = None,
    sink: Sink = "parquet",
    address: Address = None,
    submit: Submit = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a pipeline over files, into files, as a streaming batch job on Ray."""
    pipeline = load(file)
    pipeline = override(pipeline, set_ or [])
    folder = Path(file.partition("::")[0]).resolve().parent
    if submit:
        from headrace.on_ray.submit import submit as submit_job  # loads ray

        raise typer.Exit(submit_job(submit, _for_the_cluster(sys.argv[1:], file), folder=folder, echo=partial(print, end="", flush=True)))
    source = Input(input, format=format, columns=names(columns) if columns else None, where=where, limit=limit)
    target = Output(output, format=sink)

    from headrace.on_ray.batch import run as run_batch  # loads ray: a mistake above is told half a second earlier
    from headrace.on_ray.cluster import connected

    connect = partial(connected, address, folder=folder, verbose=verbose)
    with Progress(quiet=quiet) as progress:
        report = run_batch(pipeline, input=source, output=target, keep=names(keep), connect=connect, watch=progress.update)
    if not quiet:
        print(report)


def _for_the_cluster(arguments: list[str], file: str) -> list[str]:
    """The same command without `--submit`, and with the file's name as it is in the folder that travels."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--submit":
            skip = not skip
        elif not argument.startswith("--submit="):
            kept.append(argument)
    path, separator, name = file.partition("::")
    return [Path(path).name + separator + name if argument == file else argument for argument in kept]
