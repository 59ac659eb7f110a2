"""`headrace train`: a loop over files on Ray Train."""

from __future__ import annotations

import dataclasses
import json as json_module
import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.loading import load_training
from headrace.cli.options import Address, Json, Price, Quiet, Verbose
from headrace.cli.run import AcceptChange, Format, In, Limit, Where
from headrace.cli.sweep_progress import SweepProgress, tell
from headrace.cli.training_progress import TrainingProgress
from headrace.cost import Prices
from headrace.errors import SettingError
from headrace.formats import Input
from headrace.ledger import HOME
from headrace.resume import Mode
from headrace.settings import override_training
from headrace.training import Training

_WORKERS = re.compile(r"([0-9]+)(?::([0-9]+))?")

File = Annotated[str, typer.Argument(metavar="FILE[::NAME]", help="The Python file with the training, and its name if the file has several.")]
Out = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A folder or URI that does not exist, is empty, or holds this training.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="[STAGE.]SETTING=VALUE", help="Override a setting of the training, or of a stage of its pipeline; repeatable."),
]
Workers = Annotated[str | None, typer.Option(metavar="N|LEAST:MOST", help="How many workers run the loop: 4, or 2:8 for as many as there is room for.")]
Epochs = Annotated[int | None, typer.Option(min=1, metavar="N", help="How often every row is given, instead of what the file says.")]
SweepOption = Annotated[
    list[str] | None, typer.Option("--sweep", metavar="SETTING=RANGE", help="Try many settings: lr=1e-4..1e-2:log, layers=1..8, kind=mean|max; repeatable.")
]
Trials = Annotated[int, typer.Option(min=1, metavar="N", help="With --sweep: how many settings are tried.")]
Metric = Annotated[
    str, typer.Option(metavar="NAME[:max]", help="With --sweep: what the trials are compared by; the smallest is the best, with :max the largest.")
]
Register = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Log the training to MLflow when it is done, and register what it saved as the next version of a model.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what the output holds, and begin again.")]


def train(
    file: File,
    input: In,
    output: Out,
    set_: Set = None,
    workers: Workers = None,
    epochs: Epochs = None,
    where: Where = None,
    limit: Limit = None,
    format: Format = None,
    sweep: SweepOption = None,
    trials: Trials = 20,
    metric: Metric = "loss",
    register: Register = None,
    restart: Restart = False,
    accept_change: AcceptChange = False,
    address: Address = None,
    price: Price = None,
    quiet: Quiet = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a training over files. The same command again goes on from the last checkpoint."""
    _check(sweep, register, restart=restart, accept_change=accept_change)
    prices = Prices.parse(price or [])
    training = override_training(load_training(file), set_ or [])
    if workers is not None:
        training = dataclasses.replace(training, workers=parse_workers(workers))
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    source = Input(input, format=format, where=where, limit=limit)

    if sweep and register:
        raise SettingError("--register is of one training; give the best trial's settings with --set, without --sweep")
    from headrace.on_ray.cluster import connected  # loads ray: a mistake above is told half a second earlier
    from headrace.on_ray.train import Fit

    connect = partial(connected, address, folder=Path(file.partition("::")[0]).resolve().parent, verbose=verbose)
    if sweep:
        from headrace.on_ray.sweep import Sweep

        search = Sweep.of(training, input=source, output=output, sweep=sweep, trials=trials, metric=metric)
        with SweepProgress(search.metric, quiet=quiet) as seen:
            tell(search.run(connect=connect, watch=seen.update), metric=search.metric, largest=search.largest, quiet=quiet, as_json=json)
        return
    fit = Fit.of(training, input=source, output=output)
    mode = Mode.RESTART if restart else Mode.ACCEPT_CHANGE if accept_change else Mode.RESUME
    with TrainingProgress(training, quiet=quiet, prices=prices) as progress:
        result = fit.run(mode=mode, connect=connect, watch=progress.update, prices=prices)
    if json:
        print(json_module.dumps({**result.record.to_dict(), "metrics": dict(result.metrics), "checkpoint": result.checkpoint}))
    elif not quiet:
        print(result.record)
        print(f"saved in {result.checkpoint}" + (f"; more in {output.rstrip('/')}/{HOME}/report.html" if result.record.rows_in else ""))
    if register:
        _register(training, register, output=output, checkpoint=result.checkpoint, quiet=quiet or json)


def _check(sweep: list[str] | None, register: str | None, *, restart: bool, accept_change: bool) -> None:
    """Refuse what does not go together."""
    if restart and accept_change:
        raise SettingError("--restart throws away what --accept-change would keep; give one of them")
    if sweep and (restart or accept_change):
        raise SettingError("--sweep goes on with the trials that had not ended; for others, choose an empty folder")
    if sweep and register:
        raise SettingError("--register is of one training; give the best trial's settings with --set, without --sweep")


def _register(training: Training, name: str, *, output: str, checkpoint: str, quiet: bool) -> None:
    from headrace.registry import register_training

    if not checkpoint:
        raise SettingError(f"--register {name}: training {training.name!r} saved nothing; call run.checkpoint(save) in its loop")
    version = register_training(training, name, output=output, checkpoint=checkpoint)
    if not quiet:
        print(f"registered as {version}, @candidate")


def parse_workers(text: str) -> int | tuple[int, int]:
    """`4` as a number, `2:8` as the least and the most.

    Raises:
        SettingError: it is neither.
    """
    said = _WORKERS.fullmatch(text)
    if said is None or not int(said[1]) or (said[2] is not None and int(said[2]) < int(said[1])):
        raise SettingError(f"--workers must be a number of at least 1, or LEAST:MOST such as 2:8, got {text!r}")
    return int(said[1]) if said[2] is None else (int(said[1]), int(said[2]))
