"""`headrace models`: the models of the registry, and which version an alias names."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headrace.cli.check import Tolerances
from headrace.cli.loading import load
from headrace.cli.options import Set
from headrace.cli.serve import seconds
from headrace.cli.tables import clean, moment, show
from headrace.errors import GateError, SettingError
from headrace.settings import override

if TYPE_CHECKING:
    from headrace.parity import Target
    from headrace.pipeline import Pipeline
    from headrace.registry import Gate

_LIMIT = 1000  # golden rows

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model.")]
Which = Annotated[str, typer.Argument(metavar="NAME[@ALIAS|/VERSION]", help="The model, and which version of it; the newest by default.")]
To = Annotated[str, typer.Option(metavar="ALIAS", help="The alias to move.")]
Of = Annotated[str, typer.Option("--version", metavar="ALIAS|N", help="The version that it is to name.")]
Alias = Annotated[str, typer.Option(metavar="ALIAS", help="The alias to move back.")]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="BOUND", help="What its run must have measured: auc>=0.8, or loss<=@prod, as good as another; repeatable."),
]
File = Annotated[str | None, typer.Option("--pipeline", metavar="FILE[::NAME]", help="A pipeline that uses the model, for --input and --latency.")]
In = Annotated[str | None, typer.Option("--input", "-i", metavar="PATH", help="Golden rows: the pipeline must compute the same of them in every way.")]
Latency = Annotated[str | None, typer.Option(metavar="TIME", help="In which 99 of 100 calls with one of these rows must return on this machine, such as 20ms.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the latency is measured.")]
Batch = Annotated[bool, typer.Option("--batch/--no-batch", help="Whether golden rows go through a batch job, too, on a Ray that is started here.")]
WithoutGates = Annotated[bool, typer.Option("--without-gates", help="Move the alias although nothing was asked of the version.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

models = typer.Typer(name="models", help="List the models of the MLflow registry, and move the aliases that name their versions.", no_args_is_help=True)


@models.command("list")
def list_models(json: Json = False) -> None:
    """List the models: the newest version, and which versions aliases name."""
    from headrace import registry

    found = registry.models()
    if json:
        print(json_module.dumps([asdict(one) for one in found], indent=1, default=dict))
        return
    rows = []
    for one in found:
        newest = one.versions[0] if one.versions else None
        aliases = ", ".join(f"@{alias} {number}" for alias, number in sorted(one.aliases.items()))
        rows.append([one.name, newest.version if newest else "", aliases, moment(newest.created_s) if newest else ""])
    if rows:
        show(_console(), ("model", "n newest", "aliases", "registered (UTC)"), rows, wrap=(0, 2))
    else:
        _say("the registry has no models")


@models.command("show")
def show_model(which: Which, json: Json = False) -> None:
    """Show a version: aliases, the run that made it, its metrics and settings, what its gates said, and the services that it was deployed with."""
    from headrace import registry
    from headrace.registry.catalog import GATES, STAGE

    one = registry.version(which)
    figures = registry.figures(one)
    if json:
        print(json_module.dumps({**asdict(one), "figures": asdict(figures) if figures else None}, indent=1))
        return
    said = json_module.loads(one.tags.get(GATES, "{}"))
    rows = [
        ("aliases", ", ".join(f"@{alias}" for alias in one.aliases)),
        ("registered", f"{moment(one.created_s)} UTC"),
        ("files", one.digest),
        ("stage", one.tags.get(STAGE, "")),
        ("run", one.run),
        *(("metric", f"{name} {value:g}") for name, value in sorted((figures.metrics if figures else {}).items())),
        *(("setting", f"{name} {value}") for name, value in sorted((figures.settings if figures else {}).items())),
        *((f"gate of @{said['alias']}", f"{'passed' if gate['passed'] else 'FAILED'}  {gate['gate']}: {gate['said']}") for gate in said.get("outcomes", ())),
        *(("service", f"{service} {told}") for service, told in sorted(one.services.items())),
    ]
    show(_console(), ("version", str(one)), [row for row in rows if row[1]], wrap=(1,))


@models.command()
def promote(
    name: Name,
    to: To = "prod",
    version: Of = "candidate",
    metric: Metrics = None,
    pipeline: File = None,
    input: In = None,
    latency: Latency = None,
    device: Device = "cpu",
    batch: Batch = True,
    tolerance: Tolerances = None,
    set_: Set = None,
    without_gates: WithoutGates = False,
) -> None:
    """Have an alias name a version if it passes every gate that is asked for: bounds on metrics, golden rows, latency. Exit code 1 if it does not."""
    gates = _metrics(metric) + _rows(pipeline, input, latency, device=device, batch=batch, tolerance=tolerance, changes=set_)
    if bool(gates) == without_gates:
        fix = "leave --without-gates out" if gates else "ask for --metric auc>=0.8, or --pipeline FILE --input golden.parquet, or say --without-gates"
        raise SettingError(f"{'gates were named, and --without-gates too' if gates else 'no gate was named'}; {fix}")
    from headrace import registry

    try:
        move = registry.promote(name, gates=gates, to=to, of=version)
    except GateError as error:
        raise GateError(clean_lines(str(error))) from error
    for outcome in move.outcomes:
        _console().print(clean(str(outcome)), markup=False, soft_wrap=True)
    _console().print(clean(str(move)), markup=False, soft_wrap=True)


@models.command()
def rollback(name: Name, alias: Alias = "prod") -> None:
    """Have an alias name the version that it named before."""
    from headrace import registry

    _console().print(clean(str(registry.rollback(name, alias=alias))), markup=False, soft_wrap=True)


def clean_lines(text: str) -> str:
    """Text of several lines from elsewhere, each of them clean."""
    return "\n".join(map(clean, text.split("\n")))


def _metrics(bounds: list[str] | None) -> list[Gate]:
    from headrace import registry

    return [registry.Metric.parse(bound) for bound in bounds or []]


def _rows(
    file: str | None, path: str | None, latency: str | None, *, device: str, batch: bool, tolerance: list[str] | None, changes: list[str] | None
) -> list[Gate]:
    """The gates that call a pipeline with rows."""
    if file is None and path is None and latency is None:
        return []
    if file is None or path is None:
        raise SettingError("golden rows and latency take both: --pipeline FILE, which uses the model, and --input golden.parquet, the rows to call it with")
    if device not in ("cpu", "cuda"):
        raise SettingError(f"--device {device!r} must be cpu or cuda")
    p99_s = seconds(latency, "--latency") if latency is not None else None
    from headrace import parity, registry

    pipeline = override(load(file), changes or [])
    rows = registry.golden(path, pipeline, limit=_LIMIT)
    targets: dict[str, Callable[[Pipeline], Target]] = {}
    if batch:
        from headrace.on_ray.trial import batch as batched  # loads ray

        targets["batch"] = batched
    gates: list[Gate] = [registry.Parity(pipeline, rows, targets, parity.Tolerance.parse(tolerance or []))]
    return gates + ([registry.Latency(pipeline, rows.rows, p99_s, device=device)] if p99_s is not None else [])


def _console() -> Console:
    return Console(highlight=False, emoji=False)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, emoji=False).print(text, markup=False, soft_wrap=True)
