"""Lineage: what a thing was made from, and what was made from it, as runs and versions in the registry say."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import RegistryError, nearest
from headrace.registry.catalog import STAGE, Version, pages, quoted, registered, version, version_of
from headrace.registry.connection import ABSENT, reading
from headrace.registry.references import RUN, VIEW, named
from headrace.registry.runs import CODE, OUTPUT


@dataclass(frozen=True, slots=True)
class Origin:
    """A thing of a lineage: `name`, its `kind` (model, run, view, file or service), what is known of it, and what lies behind it in the same direction."""

    name: str
    kind: str
    details: tuple[str, ...] = ()
    further: tuple[Origin, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"name": self.name, "kind": self.kind, "details": list(self.details), "further": [one.to_dict() for one in self.further]}


@dataclass(frozen=True, slots=True)
class Lineage:
    """What `of` was made from, and what was made from it."""

    of: Origin
    made_from: tuple[Origin, ...]
    made: tuple[Origin, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        sides = {side: [one.to_dict() for one in getattr(self, side)] for side in ("made_from", "made")}
        return {"name": self.of.name, "kind": self.of.kind, "details": list(self.of.details), **sides}


def lineage(of: str) -> Lineage:
    """What was made from what, both ways, starting from a model, a run, a view or a file.

    Args:
        of: `models:/name@alias`, `models:/name/3`, the name of a model (its newest version), a run's id, `view:name`, or a path or URI that runs read or wrote.

    Raises:
        RegistryError: mlflow is missing, the registry is not there or out of reach, or nothing of that name is in it.
    """
    with reading(f"lineage of {of!r}") as mlflow:
        graph = _Graph(mlflow, mlflow.MlflowClient())
        name = graph.resolve(of)
        up = tuple(graph.walk(name, graph.sources, {name}))
        down = tuple(graph.walk(name, graph.results, {name}))
        if not (up or down) and name not in graph.described:
            raise RegistryError(f"no run in the registry has read or written {of!r}, and no model or run is called so" + nearest(of, graph.models()))
        return Lineage(graph.described.get(name, Origin(name, _kind(name))), up, down)


@dataclass(slots=True)
class _Graph:
    """The edges between things, as they are asked for; `described` are those that the registry says more of than a name."""

    mlflow: Any
    client: Any
    described: dict[str, Origin] = field(default_factory=dict)
    _experiments: list[str] = field(default_factory=list)

    def walk(self, name: str, step: Callable[[str], Iterator[str]], seen: set[str]) -> Iterator[Origin]:
        """What lies behind a thing in one direction, each thing once, as a tree."""
        following = [one for one in dict.fromkeys(step(name)) if one not in seen]
        seen |= set(following)
        for one in following:
            further = tuple(self.walk(one, step, seen))
            about = self.described.get(one, Origin(one, _kind(one)))
            yield Origin(one, about.kind, about.details, further)

    def resolve(self, text: str) -> str:
        """The name of the thing that a text means."""
        if text.startswith((VIEW, RUN)):
            name = text.partition("#")[0]
        elif text.startswith("models:/") or text.partition("@")[0] in self.models():
            name = str(version(text))
        elif _is_id(text):
            name = RUN + text
        else:
            name = named(text) if self._has_file(named(text)) or "/" in text else text
        if name.startswith(RUN):
            self._run(name, must=True)
        elif name.startswith("models:/"):
            self._model(name)
        return name

    def models(self) -> list[str]:
        """The names of all models."""
        return [str(one.name) for one in pages(self.client.search_registered_models)]

    def sources(self, name: str) -> Iterator[str]:
        """What a thing was made from: a version by its run, a run from its inputs, a file by the runs that wrote it."""
        if name.startswith("models:/"):
            found = self._model(name)
            if found is not None and found.run and self._run(RUN + found.run) is not None:
                yield RUN + found.run
        elif name.startswith(RUN):
            run = self._run(name)
            for one in run.inputs.dataset_inputs if run is not None else ():
                yield self._noted(str(one.dataset.name), str(one.dataset.digest))
        else:
            yield from self._runs(f"tags.`{OUTPUT}` = {quoted(name)}")

    def results(self, name: str) -> Iterator[str]:
        """What was made from a thing: from a run its versions and files, from all else the runs that read it; and services that use a version."""
        if name.startswith(RUN):
            run = self._run(name)
            for found in pages(self.client.search_model_versions, filter_string=f"run_id={quoted(name.removeprefix(RUN))}"):
                one = version_of(found, registered(self.mlflow, self.client, found.name).aliases)
                self._describe(one)
                yield str(one)
            if run is not None and (output := run.data.tags.get(OUTPUT)):
                yield output
            return
        if name.startswith("models:/") and (model := self._model(name)) is not None:
            for service, said in model.services.items():
                self.described[f"service:{service}"] = Origin(f"service:{service}", "service", (said,))
                yield f"service:{service}"
        yield from self._runs(f"dataset.name = {quoted(name)}")

    def _runs(self, condition: str) -> Iterator[str]:
        if not self._experiments:
            self._experiments = [one.experiment_id for one in pages(self.client.search_experiments)]
        for run in pages(self.client.search_runs, experiment_ids=self._experiments, filter_string=condition, order_by=["attributes.start_time"]):
            self._describe_run(run)
            yield RUN + str(run.info.run_id)

    def _has_file(self, name: str) -> bool:
        return bool(list(self._runs(f"dataset.name = {quoted(name)}"))) or bool(list(self._runs(f"tags.`{OUTPUT}` = {quoted(name)}")))

    def _run(self, name: str, *, must: bool = False) -> Any:
        try:
            run = self.client.get_run(name.removeprefix(RUN))
        except self.mlflow.MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            if must:
                raise RegistryError(f"the registry has no run {name.removeprefix(RUN)!r}; headrace models show MODEL says which one made a model") from error
            return None
        self._describe_run(run)
        return run

    def _describe_run(self, run: Any) -> None:
        experiment, tags = self.client.get_experiment(run.info.experiment_id), run.data.tags
        began = dt.datetime.fromtimestamp(run.info.start_time / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
        commit = tags.get("mlflow.source.git.commit", "")
        code = [f"code {tags[CODE]}" if CODE in tags else "", f"commit {commit[:12]}" if commit else ""]
        metrics = ", ".join(f"{key} {value:g}" for key, value in sorted(run.data.metrics.items())[:4])
        details = [str(experiment.name), began, str(run.info.status).lower() if run.info.status != "FINISHED" else "", *code, metrics]
        self.described[RUN + run.info.run_id] = Origin(RUN + str(run.info.run_id), "run", tuple(filter(None, details)))

    def _model(self, name: str) -> Version | None:
        """The version of that name; None if it was deleted."""
        model, _, number = name.removeprefix("models:/").rpartition("/")
        try:
            aliases = self.client.get_registered_model(model).aliases
            found = version_of(self.client.get_model_version(model, number), aliases)
        except self.mlflow.MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return None
        self._describe(found)
        return found

    def _describe(self, one: Version) -> None:
        stage = one.tags.get(STAGE)
        details = [*(f"@{alias}" for alias in one.aliases), f"files {one.digest[:16]}" if one.digest else "", f"used by stage {stage}" if stage else ""]
        self.described[str(one)] = Origin(str(one), "model", tuple(filter(None, details)))

    def _noted(self, name: str, state: str) -> str:
        """Note in what state something was read, where nothing else is known of it."""
        if not name.startswith(("models:/", RUN)):
            self.described[name] = Origin(name, _kind(name), (f"as of {state}",) if state not in ("", "unknown") else ())
        return name


def _kind(name: str) -> str:
    return next((kind for kind, start in (("model", "models:/"), ("view", VIEW), ("run", RUN), ("service", "service:")) if name.startswith(start)), "file")


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(one in "0123456789abcdef" for one in text)
