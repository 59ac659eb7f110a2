"""`headrace run`: a pipeline as a streaming batch job."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.check import Gate
from headrace.cli.check import gate as pass_gate
from headrace.cli.loading import load
from headrace.cli.options import Address, File, Json, Keep, MaxDeadLetters, Price, Quiet, Set, Verbose, names
from headrace.cli.progress import Progress, tell
from headrace.cost import Prices
from headrace.errors import SettingError
from headrace.formats import Input, Output
from headrace.letters import Allowance
from headrace.resume import Mode
from headrace.settings import override

In = Annotated[list[str], typer.Option("--input", "-i", metavar="PATH", help="A file, folder, glob or URI (s3://, gs://, ...); repeatable.")]
Out = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A folder or URI that does not exist, is empty, or holds this job.")]
Columns = Annotated[str, typer.Option(metavar="COLUMNS", help="Take the input to have only these columns: a,b,c.")]
Where = Annotated[str | None, typer.Option(metavar="EXPR", help='Which rows to read, such as "stars >= 4 and city is not None".')]
Limit = Annotated[int | None, typer.Option(help="Read only the first rows.")]
Format = Annotated[str | None, typer.Option(help="Input format: parquet, csv, jsonl or images; told from the names by default.")]
Sink = Annotated[str, typer.Option(help="Output format: parquet, jsonl or delta.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what the output holds, and begin again.")]
AcceptChange = Annotated[bool, typer.Option("--accept-change", help="Go on although input, code or settings changed; rows that are done stay as they are.")]
Submit = Annotated[str | None, typer.Option(metavar="URL", help="Run as a Ray job on the cluster with this dashboard, and follow it.")]


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
    restart: Restart = False,
    accept_change: AcceptChange = False,
    max_dead_letters: MaxDeadLetters = "1%",
    gate: Gate = None,
    address: Address = None,
    submit: Submit = None,
    price: Price = None,
    quiet: Quiet = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a pipeline over files, into files, exactly once. The same command again goes on where it stopped."""
    if restart and accept_change:
        raise SettingError("--restart throws away what --accept-change would keep; give one of them")
    allowance, prices = Allowance.parse(max_dead_letters), Prices.parse(price or [])
    pipeline = load(file)
    pipeline = override(pipeline, set_ or [])
    path, separator, name = file.partition("::")
    folder = Path(path).resolve().parent
    if submit:
        from headrace.on_ray.submit import submit as submit_job  # loads ray

        raise typer.Exit(submit_job(submit, _for_the_cluster(sys.argv[1:], file), folder=folder, echo=partial(print, end="", flush=True)))
    source = Input(input, format=format, columns=names(columns) if columns else None, where=where, limit=limit)
    target = Output(output, format=sink)

    from headrace.on_ray.cluster import connected  # loads ray: a mistake above is told half a second earlier
    from headrace.on_ray.job import Job

    origin = {"file": str(Path(path).resolve()) + separator + name, "set": set_ or []}
    job = Job.of(pipeline, input=source, output=target, keep=names(keep), origin=origin)
    mode = Mode.RESTART if restart else Mode.ACCEPT_CHANGE if accept_change else Mode.RESUME
    if gate is not None:
        pass_gate(pipeline, gate)
    connect = partial(connected, address, folder=folder, verbose=verbose)
    with Progress(quiet=quiet, prices=prices) as progress:
        report = job.run(mode=mode, allowance=allowance, connect=connect, watch=progress.update, prices=prices)
    tell(report, quiet=quiet, as_json=json)


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
