"""`headrace replay`: what failed in an output, once more."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.loading import load
from headrace.cli.options import Address, Json, MaxDeadLetters, Price, Quiet, Set, Verbose
from headrace.cli.progress import Progress, tell
from headrace.cost import Prices
from headrace.errors import PipelineFileError
from headrace.letters import Allowance
from headrace.resume import Mode
from headrace.settings import override

Dir = Annotated[str, typer.Argument(metavar="DIR", help="The output folder or URI of a run.")]
File = Annotated[str | None, typer.Option("--file", "-f", metavar="FILE[::NAME]", help="The pipeline; the file that the run was started with by default.")]


def replay(
    dir: Dir,
    file: File = None,
    set_: Set = None,
    max_dead_letters: MaxDeadLetters = "1%",
    address: Address = None,
    price: Price = None,
    quiet: Quiet = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the dead letters of an output again, after their cause is mended, and merge what goes well this time."""
    allowance, prices = Allowance.parse(max_dead_letters), Prices.parse(price or [])

    from headrace.on_ray.cluster import connected  # loads ray
    from headrace.on_ray.job import Job, request_of

    origin = request_of(dir)["origin"]
    known = origin.get("file")
    if file is None and known is None:
        raise PipelineFileError(f"the run of {dir!r} was started from Python: name the pipeline's file with --file")
    if file is None and not Path(known.partition("::")[0]).is_file():  # moved, or on the cluster that the run was submitted to
        raise PipelineFileError(f"the run of {dir!r} was started from {known!r}, which is not here: name the pipeline's file with --file")
    file = file or known
    pipeline = override(load(file), [*(origin.get("set") or ()), *(set_ or ())])
    connect = partial(connected, address, folder=Path(file.partition("::")[0]).resolve().parent, verbose=verbose)
    with Progress(quiet=quiet, prices=prices) as progress:
        report = Job.again(pipeline, dir).run(mode=Mode.RETRY, allowance=allowance, connect=connect, watch=progress.update, prices=prices)
    tell(report, quiet=quiet, as_json=json)
