"""The plan: neighbouring stages fused into groups, hardware chosen, batch rules resolved. Every target reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.columns import ANY, ColumnType
from headrace.errors import WiringError
from headrace.hardware import Choice, Cluster, choose
from headrace.pipeline import Pipeline
from headrace.stage import Stage


@dataclass(frozen=True, slots=True)
class Group:
    """Stages that run in one process, one after another, on the same hardware.

    `replicas` is (least, most) for a group with a model, which lives in actors, and None for a group of functions,
    which runs as tasks. `carries` are the columns that leave the group: outputs, kept columns, and what later groups read.
    """

    name: str
    stages: tuple[Stage, ...]
    choice: Choice
    replicas: tuple[int, int] | None
    carries: Mapping[str, ColumnType]


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline resolved against a cluster."""

    pipeline: Pipeline
    cluster: Cluster
    groups: tuple[Group, ...]
    keep: tuple[str, ...]

    @property
    def source(self) -> dict[str, ColumnType]:
        """Columns to read from the source: what the stages read, and what is kept."""
        return {**self.pipeline.inputs, **{name: ANY for name in self.keep if name not in self.pipeline.inputs}}

    @property
    def columns(self) -> dict[str, ColumnType]:
        """Columns of the result: the kept ones first, then the pipeline's outputs."""
        kept = {name: self.pipeline.inputs.get(name, ANY) for name in self.keep if name not in self.pipeline.outputs}
        return {**kept, **self.pipeline.outputs}


def resolve(pipeline: Pipeline, cluster: Cluster, *, keep: Sequence[str] = ()) -> Plan:
    """Fuse, choose hardware and prune columns for `cluster`.

    Neighbouring functions with the same hardware and Ray arguments share a group. A class has a group of its own, so that
    what prepares its input runs decoupled from it, on resources of its own.

    Raises:
        HardwareError: no node can hold a stage.
        WiringError: a column to keep is overwritten by a stage.
    """
    for stage in pipeline.stages:
        if lost := [name for name in keep if name in stage.writes and name not in pipeline.outputs]:
            raise WiringError(f"cannot keep {lost[0]!r} as it was: stage {stage.name!r} writes a column of that name; write to another name")
    runs: list[list[tuple[Stage, Choice]]] = []
    for stage in pipeline.stages:
        choice = choose(stage.on, cluster, stage=stage.name)
        last = runs[-1][-1] if runs else None
        fuse = last and not (stage.is_model or last[0].is_model) and last[1] == choice and dict(last[0].ray) == dict(stage.ray)
        runs[-1].append((stage, choice)) if fuse else runs.append([(stage, choice)])
    groups: list[Group] = []
    needed = {**{name: ANY for name in keep}, **pipeline.outputs}
    for run in reversed(runs):  # backwards, because what a group must pass on depends on the groups after it
        stages, choice = tuple(stage for stage, _ in run), run[0][1]
        replicas = _replicas(stages[0], choice) if stages[0].is_model else None
        groups.append(Group("+".join(stage.name for stage in stages), stages, choice, replicas, needed))
        for stage in reversed(stages):
            needed = {name: column for name, column in needed.items() if name not in stage.writes} | dict(stage.reads)
    return Plan(pipeline, cluster, tuple(reversed(groups)), tuple(keep))


def _replicas(stage: Stage, choice: Choice) -> tuple[int, int]:
    """The stage's bounds, the upper one held to what fits on the cluster."""
    least, most = stage.replicas
    most = choice.fits if most is None else min(most, choice.fits)
    return min(least, most), most


def explain(plan: Plan, *, cluster: bool = True) -> str:
    """The plan as text: the columns on every edge, and each group with its hardware, replicas and batch rules."""
    lines = [f"pipeline {plan.pipeline.name}"]
    if cluster:
        lines.append(f"cluster  {plan.cluster}")
    lines += ["", "source"]
    edge: dict[str, ColumnType] = dict(plan.source)
    for number, group in enumerate(plan.groups, 1):
        lines += _edge(edge)
        kind = f"{_span(group.replicas)} kept in memory" if group.replicas else "tasks, as many as there is room for"
        lines.append(f"group {number}: {group.name}    {group.choice}, {kind}")
        for stage in group.stages:
            settings = "".join(f", {name}={value!r}" for name, value in stage.settings.items())
            reads = ", ".join(f"{name}: {column}" for name, column in stage.reads.items())
            writes = ", ".join(f"{name}: {column}" for name, column in stage.writes.items())
            lines.append(f"   {stage.name}({reads}) -> {writes}    batch {stage.batch}{settings}")
            edge = {**edge, **stage.writes}
        edge = {name: column for name, column in edge.items() if name in group.carries}
    return "\n".join([*lines, *_edge(edge), "sink"])


def _span(replicas: tuple[int, int]) -> str:
    least, most = replicas
    return f"{most} replica{'s' * (most > 1)}" if least == most else f"{least} to {most} replicas"


def _edge(columns: Mapping[str, ColumnType]) -> Iterable[str]:
    return ["   │  " + ", ".join(f"{name}: {column}" for name, column in columns.items()), "   ▼"]
