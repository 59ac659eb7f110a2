"""`headrace features`: feature views over files, as of labels or of an instant."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json as json_module
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.loading import load_views
from headrace.cli.options import Address, Json, Quiet, Verbose
from headrace.errors import SettingError
from headrace.features.job import FeatureJob

File = Annotated[str, typer.Argument(metavar="FILE[::NAME]", help="The Python file with the feature views, and the name of one if only that is wanted.")]
Out = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A folder or URI that does not exist, is empty, or holds this job.")]
In = Annotated[list[str] | None, typer.Option("--input", "-i", metavar="PATH", help="Events to read instead of the view's own source; repeatable.")]
Labels = Annotated[
    list[str] | None, typer.Option("--labels", metavar="PATH", help="Join the features of all views with these rows, as known at the time of each; repeatable.")
]
At = Annotated[
    str | None, typer.Option(metavar="INSTANT", help="Without --labels: as of when, such as 2024-03-31T12:00; now by default, without a zone in UTC.")
]
Parts = Annotated[int | None, typer.Option(min=1, metavar="N", help="How many parts to cut events into by key; by their number and size when left out.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what the output holds, and begin again.")]
Local = Annotated[bool, typer.Option("--local", help="Compute in this process, one part after the other, without Ray.")]


def features(
    file: File,
    output: Out,
    input: In = None,
    labels: Labels = None,
    at: At = None,
    parts: Parts = None,
    restart: Restart = False,
    local: Local = False,
    address: Address = None,
    quiet: Quiet = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compute features: what is known of each key at an instant, or with --labels what was known at the time of each label.

    The same command again goes on where it stopped. The output is Parquet, in parts by key.
    """
    instant = None if at is None else _instant(at)
    views = load_views(file)
    job = FeatureJob.of(views, output=output, input=input or None, labels=labels or None, at=instant, parts=parts)
    if local:
        report = job.run(restart=restart)
    else:
        from headrace.on_ray import features as on_ray  # loads ray: a mistake above is told half a second earlier
        from headrace.on_ray.cluster import connected

        folder = Path(file.partition("::")[0]).resolve().parent
        report = on_ray.run(job, input=input or None, connect=partial(connected, address, folder=folder, verbose=verbose), restart=restart)
    if json:
        print(json_module.dumps(dataclasses.asdict(report), indent=1))
    elif not quiet:
        print(report)


def _instant(text: str) -> dt.datetime:
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingError(f"--at {text!r} is no instant ({error}); write it as 2024-03-31T12:00 or 2024-03-31T12:00+02:00") from error
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)
