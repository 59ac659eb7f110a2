"""The plan: neighbouring stages fused into groups, hardware chosen, batch rules resolved. Every target reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.columns import ColumnType
from headrace.hardware import Choice, Cluster, choose, share
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
        return {**self.pipeline.inputs, **self.pipeline.kept(self.keep)}

    @property
    def columns(self) -> dict[str, ColumnType]:
        """Columns of the result: the kept ones first, then the pipeline's outputs."""
        return {**self.pipeline.kept(self.keep), **self.pipeline.outputs}


def resolve(pipeline: Pipeline, cluster: Cluster, *, keep: Sequence[str] = ()) -> Plan:
    """Fuse, choose hardware and prune columns for `cluster`.

    Neighbouring functions with the same hardware and Ray arguments share a group. A class has a group of its own, so that
    what prepares its input runs decoupled from it, on resources of its own.

    Raises:
        HardwareError: no node can hold a stage.
        WiringError: a column to keep is overwritten by a stage.
    """
    runs: list[list[tuple[Stage, Choice]]] = []
    for stage in pipeline.stages:
        choice = choose(stage.on, cluster, stage=stage.name)
        last = runs[-1][-1] if runs else None
        fuse = last and not (stage.is_model or last[0].is_model) and last[1] == choice and dict(last[0].ray) == dict(stage.ray)
        runs[-1].append((stage, choice)) if fuse else runs.append([(stage, choice)])
    replicas = _replicas(runs, cluster)
    groups: list[Group] = []
    needed = {**pipeline.kept(keep), **pipeline.outputs}
    for run in reversed(runs):  # backwards, because what a group must pass on depends on the groups after it
        stages, choice = tuple(stage for stage, _ in run), run[0][1]
        name = "+".join(stage.name for stage in stages)
        groups.append(Group(name, stages, choice, replicas.get(name) if stages[0].is_model else None, needed))
        for stage in reversed(stages):
            needed = {name: column for name, column in needed.items() if name not in stage.writes} | dict(stage.reads)
    return Plan(pipeline, cluster, tuple(reversed(groups)), tuple(keep))


def _replicas(runs: Sequence[Sequence[tuple[Stage, Choice]]], cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Bounds for each model, the upper ones such that all of them fit on the cluster at once, beside the functions."""
    wishes = []
    for run in runs:
        stage, choice = run[0]
        if stage.is_model:
            wishes.append((stage.name, choice, *stage.replicas))
        elif choice.hardware.gpus or choice.hardware.cpus > 1:  # one CPU is always left to functions, see on_ray/cluster.py
            wishes.append((stage.name, choice, 1, 1))
    counts = share(wishes, cluster)
    return {name: (least, count) for (name, _, least, _), count in zip(wishes, counts, strict=True)}


def explain(plan: Plan, *, types: Mapping[str, ColumnType] | None = None) -> str:
    """The plan as text: the columns on every edge, and each group with its hardware, replicas and batch rules.

    `types` are those of a source at hand; without them a column that is only carried has the type `any`.
    """
    lines = [f"pipeline {plan.pipeline.name}", f"cluster  {plan.cluster}", "", "source"]
    edge = {name: (types or {}).get(name, column) if column.kind == "any" else column for name, column in plan.source.items()}
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
