"""Runs: what was done with which settings, code, data and machines, and what came of it, as MLflow keeps it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import __version__, filesystems, fingerprint
from headrace.errors import RegistryError
from headrace.ledger import HOME
from headrace.pipeline import Pipeline
from headrace.plan import Plan, explain
from headrace.registry.connection import changing
from headrace.registry.references import VIEW, Reference, named

OUTPUT, CODE = "headrace.output", "headrace.code"
"""Tags of a run: where its rows are, and a digest of its code."""

ARTIFACTS = "headrace"
"""The folder of a run's artifacts that holds its record."""

_PARAM, _BATCH = 6000, 100  # characters, and parameters at a time, as mlflow has it
_METRICS = 1000
_LIBRARIES = ("ray", "numpy", "pyarrow", "torch", "xgboost", "lightgbm", "scikit-learn", "polars", "transformers", "vllm", "mlflow-skinny", "mlflow")
_MODULES = {"scikit-learn": "sklearn", "mlflow-skinny": "mlflow"}


@dataclass(frozen=True, slots=True)
class Run:
    """A run that MLflow keeps: its id, and the experiment that it is one of."""

    id: str
    experiment: str

    def __str__(self) -> str:
        return f"run:{self.id}"


@dataclass(frozen=True, slots=True)
class _Record:
    """What is written of a run."""

    params: Mapping[str, str]
    metrics: Sequence[tuple[str, float, int]]
    inputs: Sequence[Reference]
    tags: Mapping[str, str]
    texts: Mapping[str, str]
    files: Sequence[Path]


def log_run(
    name: str,
    *,
    settings: Any = None,
    metrics: Mapping[str, Any] | None = None,
    pipeline: Pipeline | Plan | None = None,
    inputs: Sequence[str | os.PathLike[str]] | str = (),
    output: str | None = None,
    facts: Mapping[str, str] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
) -> Run:
    """Keep a run in MLflow, whole or marked as failed: what is compared in its interface, and a record that says what the results depend on.

    Library versions and this machine's hardware are noted in any case, and the commit, where the program lies in a git repository.

    Args:
        name: the experiment: runs of one name are compared with each other.
        settings: a dataclass or a mapping; nested ones get names with dots.
        metrics: numbers by their names, or for a curve a sequence of `(step, number)` pairs, or of numbers, which are steps 0, 1, 2...
        pipeline: whose code, settings and models are noted as facts; of a plan, what `hr.explain` says, too. Models of a registry count as inputs.
        inputs: what it was made from: paths, URIs, `models:/name@alias`, `view:name`, noted as they are now.
        output: the folder of a batch job or a training: its input, facts, plan, versions, machines and cost are read from there. Of features
            it may be `view:name`.
        facts: further facts of code, such as those of `headrace.fingerprint`.
        files: pictures, reports and the like to keep with it.

    Raises:
        RegistryError: mlflow is missing, the registry is out of reach, or something of this cannot be written down. Nothing is, then, or the run has failed.
        SettingError: a model that is named has no such version.
    """
    if not isinstance(name, str) or not name.strip():
        raise RegistryError(f"log_run: name must be text, such as 'stays', got {name!r}")
    record = _record(settings, metrics or {}, pipeline, [inputs] if isinstance(inputs, str) else inputs, output, facts or {}, files)
    with changing(f"run of {name!r}", make=True) as mlflow:
        from mlflow.tracking.context.registry import resolve_tags  # user, program, commit: as mlflow's own runs have them

        client = mlflow.MlflowClient()
        experiment = _experiment(mlflow, client, name)
        run = client.create_run(experiment, tags={**resolve_tags(), **record.tags})
        status = "FAILED"
        try:
            _write(client, run.info.run_id, record)
            status = "FINISHED"
        finally:
            client.set_terminated(run.info.run_id, status)
    return Run(run.info.run_id, name)


def _record(
    settings: Any,
    metrics: Mapping[str, Any],
    pipeline: Pipeline | Plan | None,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | None,
    facts: Mapping[str, str],
    files: Sequence[str | os.PathLike[str]],
) -> _Record:
    """What there is to write, found out and checked before anything is."""
    texts: dict[str, str] = {"hardware.json": _json(hardware()), "versions.json": _json(versions())}
    tags: dict[str, str] = {}
    made_from: list[Reference | str | os.PathLike[str]] = [*inputs]
    facts, params = dict(facts), dict(_flat(settings, ""))
    if pipeline is not None:
        plain = (pipeline.pipeline if isinstance(pipeline, Plan) else pipeline).pinned()
        facts |= fingerprint.facts(plain, {})
        params |= {f"{stage.name}.{name}": repr(value) for stage in plain.stages for name, value in stage.settings.items() if value is not None}
        made_from += [value for stage in plain.stages for value in stage.settings.values() if isinstance(value, str) and value.startswith("models:/")]
        texts |= {"plan.txt": explain(pipeline) + "\n"} if isinstance(pipeline, Plan) else {"pipeline.txt": repr(plain) + "\n"}
    curves = list(_curves(metrics))
    if output is not None and output.startswith(VIEW):
        tags[OUTPUT] = output
    elif output is not None:
        told = _told(output)
        facts |= told["facts"]
        made_from += told["inputs"]
        curves += [(f"run.{key}", float(value), 0) for key, value in told["figures"].items()]
        texts |= told["texts"]
        tags[OUTPUT] = named(output)
    if facts:
        texts["facts.json"] = _json(facts)
        code = sorted((key, value) for key, value in facts.items() if key.startswith(("code of ", "loop")))
        tags[CODE] = hashlib.sha256(repr(code or sorted(facts.items())).encode()).hexdigest()[:16]
    texts["settings.json"] = _json(params)
    paths = [Path(path) for path in files]
    if missing := [path for path in paths if not path.exists()]:
        raise RegistryError(f"log_run: there is no file {str(missing[0])!r} to keep; correct the path")
    return _Record(params, curves, list(_references(made_from)), tags, texts, paths)


def _references(given: Sequence[Any]) -> Iterator[Reference]:
    """Each once, in order."""
    seen = set()
    for one in given:
        reference = one if isinstance(one, Reference) else Reference.of(one)
        if reference.name not in seen:
            seen.add(reference.name)
            yield reference


def _write(client: Any, run: str, record: _Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    now_ms = int(time.time() * 1000)
    params = [Param(key, value if len(value) <= _PARAM else value[: _PARAM - 3] + "...") for key, value in record.params.items()]
    for at in range(0, len(params), _BATCH):
        client.log_batch(run, params=params[at : at + _BATCH])
    points = [Metric(key, value, now_ms, step) for key, value, step in record.metrics]
    for at in range(0, len(points), _METRICS):
        client.log_batch(run, metrics=points[at : at + _METRICS])
    datasets = [
        DatasetInput(Dataset(one.name, (one.version or "unknown")[:36], one.kind, json.dumps({"uri": one.name})), [InputTag("mlflow.data.context", "input")])
        for one in record.inputs
    ]
    if datasets:
        client.log_inputs(run, datasets)
    for name, text in record.texts.items():
        client.log_text(run, text, f"{ARTIFACTS}/{name}")
    for path in record.files:
        (client.log_artifacts if path.is_dir() else client.log_artifact)(run, str(path))


def _experiment(mlflow: Any, client: Any, name: str) -> str:
    """The id of the experiment, begun if there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        with contextlib.suppress(mlflow.MlflowException):  # another process was first
            return str(client.create_experiment(name))
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise RegistryError(f"experiment {name!r} was deleted in MLflow; restore it there, or use another name")
    return str(found.experiment_id)


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Settings as names and texts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, str(value)
    elif value is not None:
        raise RegistryError(f"log_run: settings must be a dataclass or a mapping, got {value!r}")


def _curves(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Metrics as (name, number, step)."""
    for name, value in metrics.items():
        points = [(0, value)] if isinstance(value, Real) else value
        try:
            pairs = [point if isinstance(point, (tuple, list)) else (at, point) for at, point in enumerate(points)]
            found = [(int(step), float(number)) for step, number in pairs]
        except (TypeError, ValueError):
            raise RegistryError(f"log_run: metric {name!r} must be a number, numbers, or pairs (step, number), got {value!r}") from None
        if endless := [number for _, number in found if math.isinf(number)]:
            raise RegistryError(f"log_run: metric {name!r} has {endless[0]}, which no store can hold; leave it out, or say nan")
        yield from ((name, number, step) for step, number in found)


def _told(output: str) -> dict[str, Any]:
    """What the report in the folder of a job or a training tells.

    Raises:
        RegistryError: there is none.
    """
    place = filesystems.locate(output, error=RegistryError)
    texts = {name: text for name in ("report.json", "plan.txt") if (text := _text(place.child(f"{HOME}/{name}")))}
    try:
        report = json.loads(texts["report.json"])
    except (KeyError, ValueError):
        raise RegistryError(f"output {output!r} has no {HOME}/report.json, so what it was made from is not known; name the folder of a finished run") from None
    facts = {str(name): str(value) for name, value in (report.get("facts") or {}).items()}
    models = [text for value in facts.values() if (text := value.strip("'\"")).startswith("models:/")]
    inputs = (report.get("request") or {}).get("input") or []
    figures = {name: report[name] for name in ("rows_in", "rows_out", "dead_letters", "wall_s", "rows_per_s") if isinstance(report.get(name), (int, float))}
    if (usd := (report.get("cost") or {}).get("usd")) is not None:
        figures["usd"] = usd
    references = [Reference.of(model) for model in models] + [_as_read(uri, str(report.get("units", ""))) for uri in inputs]
    return {"facts": facts, "inputs": references, "figures": figures, "texts": texts}


def _as_read(uri: str, units: str) -> Reference:
    """An input as the run had it: by its table of units, whose name is a digest of it. It may be gone by now."""
    return Reference(named(uri), units.rpartition("units-")[2].partition(".")[0])


def _text(place: filesystems.Place) -> str:
    try:
        with place.filesystem.open_input_stream(place.path) as stream:
            return bytes(stream.read()).decode()
    except (OSError, pa.ArrowException):
        return ""


def versions() -> dict[str, str]:
    """The versions of headrace, Python, and those libraries of this process that results may depend on."""
    found = {"headrace": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        if _MODULES.get(library, library) in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[library] = importlib.metadata.version(library)
    return found


def hardware() -> dict[str, Any]:
    """This machine: its processor, the cores that this process may use, memory in GB of 10^9 bytes, and accelerators by the driver's names."""
    processor = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    kinds = [next((line.partition(":")[2].strip() for line in _lines(str(card)) if line.startswith("Model")), "GPU") for card in cards]
    return {"processor": processor, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory_gb, 1), "accelerators": kinds}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"
