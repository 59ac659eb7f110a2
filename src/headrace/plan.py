"""The plan: neighbouring stages fused into groups, hardware chosen, batch rules resolved. Every target reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.columns import ColumnType
from headrace.errors import WiringError
from headrace.hardware import Choice, Cluster, Hardware, choose, share
from headrace.pipeline import Pipeline
from headrace.stage import Stage

_SHOWN = 80  # characters of a setting in `explain`


@dataclass(frozen=True, slots=True)
class Group:
    """Stages that run in one process, one after another, on the same hardware.

    `replicas` is (least, most) for a group that lives in actors: one with a model, and online every one. It is None for a
    group of functions of a batch job, which runs as tasks. `carries` are the columns that leave the group: outputs, kept
    columns, and what later groups read. `why` says online why it does not share a replica with the group before it.
    """

    name: str
    stages: tuple[Stage, ...]
    choice: Choice
    replicas: tuple[int, int] | None
    carries: Mapping[str, ColumnType]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline resolved against a cluster, for a batch job or, `online`, for a service."""

    pipeline: Pipeline
    cluster: Cluster
    groups: tuple[Group, ...]
    keep: tuple[str, ...]
    online: bool = False

    @property
    def source(self) -> dict[str, ColumnType]:
        """Columns to read from the source: what the stages read, and what is kept."""
        return {**self.pipeline.inputs, **self.pipeline.kept(self.keep)}

    @property
    def columns(self) -> dict[str, ColumnType]:
        """Columns of the result: the kept ones first, then the pipeline's outputs."""
        return {**self.pipeline.kept(self.keep), **self.pipeline.outputs}

    @property
    def arrivals(self) -> tuple[Mapping[str, ColumnType], ...]:
        """Columns that reach each group."""
        return (self.source, *(group.carries for group in self.groups[:-1]))


@dataclass(slots=True)
class _Run:
    """Stages that are to become a group. `heavy` is the one that decides where they run, if one does: the others have no say."""

    stages: list[Stage]
    choice: Choice
    heavy: Stage | None
    why: str = ""

    @property
    def name(self) -> str:
        return "+".join(stage.name for stage in self.stages)


def resolve(pipeline: Pipeline, cluster: Cluster, *, keep: Sequence[str] = (), online: bool = False) -> Plan:
    """Fuse, choose hardware and prune columns for `cluster`.

    For a batch job, neighbouring functions with the same hardware and Ray arguments share a group. A class has a group of its
    own, so that what prepares its input runs decoupled from it, on resources of its own.

    Online, where a hop costs more than company does, neighbours share a replica by default: functions join it whatever it
    runs on, and models on CPUs with the same range of replicas, whose CPUs add up. What needs an accelerator, Ray arguments
    of its own, or another number of replicas begins a group, and so does a stage with `apart=True`.

    Raises:
        HardwareError: no node can hold a stage.
        WiringError: a column to keep is overwritten by a stage, or `keep` is asked for online.
    """
    if online and keep:
        raise WiringError(f"keep={list(keep)} is for batch jobs; online, whoever asks has the columns that it sent: join the answer to them")
    runs = _colocated(pipeline, cluster) if online else _fused(pipeline, cluster)
    wishes = [(run.name, run.choice, *span) for run in runs if (span := _wish(run, online=online))]
    counts = share(wishes, cluster)
    replicas = {name: (least, count) for (name, _, least, _), count in zip(wishes, counts, strict=True)}
    groups: list[Group] = []
    needed = {**pipeline.kept(keep), **pipeline.outputs}
    for run in reversed(runs):  # backwards, because what a group must pass on depends on the groups after it
        in_actors = online or run.stages[0].is_model
        groups.append(Group(run.name, tuple(run.stages), run.choice, replicas[run.name] if in_actors else None, needed, run.why))
        for stage in reversed(run.stages):
            needed = {name: column for name, column in needed.items() if name not in stage.writes} | dict(stage.reads)
    return Plan(pipeline, cluster, tuple(reversed(groups)), tuple(keep), online)


def _fused(pipeline: Pipeline, cluster: Cluster) -> list[_Run]:
    """The groups of a batch job."""
    runs: list[_Run] = []
    for stage in pipeline.stages:
        choice = choose(stage.on, cluster, stage=stage.name)
        last = runs[-1].stages[-1] if runs else None
        if last and not (stage.is_model or last.is_model) and runs[-1].choice == choice and dict(last.ray) == dict(stage.ray):
            runs[-1].stages.append(stage)
        else:
            runs.append(_Run([stage], choice, stage))
    return runs


def _colocated(pipeline: Pipeline, cluster: Cluster) -> list[_Run]:
    """The groups of a service."""
    runs: list[_Run] = []
    for stage in pipeline.stages:
        choice = choose(stage.on, cluster, stage=stage.name)
        light = not (stage.is_model or choice.hardware.gpus or choice.hardware.cpus > 1 or choice.hardware.memory_gb or stage.ray)
        heavy = None if light else stage
        joint = _joint(runs[-1], stage, choice, heavy, cluster) if runs else ""
        if isinstance(joint, Choice):
            runs[-1].stages.append(stage)
            runs[-1].choice, runs[-1].heavy = joint, runs[-1].heavy or heavy
        else:
            runs.append(_Run([stage], choice, heavy, joint))
    return runs


def _joint(run: _Run, stage: Stage, choice: Choice, heavy: Stage | None, cluster: Cluster) -> Choice | str:
    """What the run needs with `stage` in it, or why the stage cannot join it."""
    if stage.apart:
        return "apart=True"
    if run.stages[-1].apart:
        return f"{run.stages[-1].name} is apart"
    if heavy is None:
        return run.choice
    if run.heavy is None:
        return choice
    if choice.hardware.gpus or run.choice.hardware.gpus:
        return f"{choice} after {run.choice}"
    if dict(stage.ray) != dict(run.heavy.ray):
        return f"ray={dict(stage.ray)} after {dict(run.heavy.ray)}"
    if stage.replicas != run.heavy.replicas:
        return f"replicas {_range(stage.replicas)} after {_range(run.heavy.replicas)}"
    one, other = run.choice.hardware, choice.hardware
    both = Hardware(cpus=one.cpus + other.cpus, memory_gb=(one.memory_gb or 0) + (other.memory_gb or 0) or None)
    fits = sum(node.fits(both, None) for node in cluster.nodes)
    return Choice(both, None, fits) if fits >= stage.replicas[0] else f"no room for {both} in one replica"


def _wish(run: _Run, *, online: bool) -> tuple[int, int | None] | None:
    """How many replicas a run may have of what must fit on the cluster at once; None for tasks, which take what is left."""
    if online:
        return run.heavy.replicas if run.heavy else (1, None)
    if run.stages[0].is_model:
        return run.stages[0].replicas
    # One CPU is always left to functions, see on_ray/cluster.py.
    return (1, 1) if run.choice.hardware.gpus or run.choice.hardware.cpus > 1 else None


def explain(plan: Plan, *, types: Mapping[str, ColumnType] | None = None) -> str:
    """The plan as text: the columns on every edge, and each group with its hardware, replicas and batch rules.

    `types` are those of a source at hand; without them a column that is only carried has the type `any`.
    """
    first, last = ("request", "answer") if plan.online else ("source", "sink")
    lines = [f"pipeline {plan.pipeline.name}", f"cluster  {plan.cluster}", "", first]
    edge = {name: (types or {}).get(name, column) if column.kind == "any" else column for name, column in plan.source.items()}
    for number, group in enumerate(plan.groups, 1):
        lines += _edge(edge)
        kind = f"{_span(group.replicas)} kept in memory" if group.replicas else "tasks, as many as there is room for"
        lines.append(f"group {number}: {group.name}    {group.choice}, {kind}" + (f"    begins here: {group.why}" if group.why else ""))
        for stage in group.stages:
            settings = "".join(f", {name}={_shown(value)}" for name, value in stage.settings.items() if value is not None)
            reads = ", ".join(f"{name}: {column}" for name, column in stage.reads.items())
            writes = ", ".join(f"{name}: {column}" for name, column in stage.writes.items())
            lines.append(f"   {stage.name}({reads}) -> {writes}    batch {stage.batch}{settings}")
            edge = {**edge, **stage.writes}
        edge = {name: column for name, column in edge.items() if name in group.carries}
    return "\n".join([*lines, *_edge(edge), last])


def _shown(value: object) -> str:
    """A setting in few words."""
    text = str(getattr(value, "__name__", value)) if callable(value) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[-1]}"


def _span(replicas: tuple[int, int]) -> str:
    least, most = replicas
    return f"{most} replica{'s' * (most > 1)}" if least == most else f"{least} to {most} replicas"


def _range(replicas: tuple[int, int | None]) -> str:
    least, most = replicas
    return f"{least}.." if most is None else f"{least}..{most}"


def _edge(columns: Mapping[str, ColumnType]) -> Iterable[str]:
    return ["   │  " + ", ".join(f"{name}: {column}" for name, column in columns.items()), "   ▼"]
