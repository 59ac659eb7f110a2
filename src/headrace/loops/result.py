"""What a training came to: its sums over time, the record that is kept of them, and the result that is returned."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.cost import Cost, Machine, Meter, Prices, money
from headrace.events import (
    CheckpointSaved,
    Event,
    MachinesSeen,
    MetricsReported,
    ProcessDied,
    RowsFailed,
    RunFailed,
    RunFinished,
    RunStarted,
    StepsDone,
    UnitLost,
    WorkersStarted,
)
from headrace.report import count, duration, rate
from headrace.tally import Timeline

_POINTS = 2_000  # of a curve; of more, every second one is dropped
_RECENT = 8  # spans of a worker that what it does now is told from

Point = tuple[int, float, float]
"""A step, when it was in seconds since the run's start, and the value there."""


@dataclass(slots=True)
class Sums:
    """A training's events, summed up as they come; its size is bounded."""

    meter: Meter = field(default_factory=lambda: Meter(Prices()))
    started: RunStarted | None = None
    finished: RunFinished | None = None
    failed: RunFailed | None = None
    timeline: Timeline | None = None
    first_s: float = math.inf  # when rows were first taken, and when last
    rows_s: float = 0.0
    last_s: float = 0.0
    workers: int = 0
    starts: int = 0
    step: int = 0
    rows: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0
    accelerated_s: float = 0.0  # of accelerators that tell how busy they are, and how much of it they were
    accelerator_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    checkpoints: int = 0
    saving_s: float = 0.0
    saved_step: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    deaths: int = 0
    recent: dict[int, list[StepsDone]] = field(default_factory=dict)
    _strides: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, events: Iterable[Event]) -> None:  # noqa: C901 - a line per kind of event
        """Fold in events, in the order in which they happened."""
        for event in events:
            self.last_s = max(self.last_s, event.at_s)
            match event:
                case RunStarted():
                    self.started = event
                    self.timeline = Timeline(event.asked_s or event.at_s)
                case MachinesSeen():
                    self.meter.see([Machine(name, **dict(zip(_MACHINE, rest, strict=True))) for name, *rest in event.machines], at_s=event.at_s)  # type: ignore[arg-type]
                case WorkersStarted():
                    self.workers, self.starts, self.recent = event.workers, self.starts + 1, {}
                    self.step = event.step
                case StepsDone():
                    self._steps(event)
                case MetricsReported():
                    self._metrics(event)
                case CheckpointSaved():
                    self.checkpoints, self.saving_s, self.saved_step = self.checkpoints + 1, self.saving_s + event.busy_s, event.step
                    self.step = max(self.step, event.step)
                case RowsFailed():
                    self.failures.update(dict(event.causes))
                case UnitLost():
                    self.failures[f"part of the input that cannot be read ({event.why})"] += 1
                case ProcessDied():
                    self.deaths += 1
                case RunFinished():
                    self.finished = event
                case RunFailed():
                    self.failed = event

    def _steps(self, event: StepsDone) -> None:
        begun_s = event.at_s - event.span_s
        self.first_s, self.rows_s = min(self.first_s, begun_s), max(self.rows_s, event.at_s)
        self.step, self.rows = max(self.step, event.step), self.rows + event.rows
        self.wait_s, self.busy_s = self.wait_s + event.wait_s, self.busy_s + event.span_s
        if event.accelerator_share is not None:
            self.accelerated_s += event.span_s
            self.accelerator_s += event.span_s * event.accelerator_share
        self.recent[event.worker] = [*self.recent.get(event.worker, [])[1 - _RECENT :], event]
        if self.timeline is not None:
            self.timeline.add("rows", begun_s, event.at_s, event.rows)
            self.timeline.add("wait", begun_s, event.at_s, event.wait_s)
            self.timeline.add("span", begun_s, event.at_s, event.span_s)

    def _metrics(self, event: MetricsReported) -> None:
        start_s = self.timeline.start_s if self.timeline else event.at_s
        for step, values in zip(event.steps, event.values, strict=True):
            for name, value in values:
                self.metrics[name] = value
                points = self.curves.setdefault(name, [])
                while points and points[-1][0] >= step:
                    points.pop()  # of workers that died after their last checkpoint: these steps are made again
                stride, seen = self._strides.get(name, (1, 0))
                if seen % stride == 0:
                    points.append((step, event.at_s - start_s, value))
                if len(points) > _POINTS:
                    del points[1::2]
                    stride *= 2
                self._strides[name] = (stride, seen + 1)


_MACHINE = [one.name for one in dataclasses.fields(Machine) if one.name not in ("name", "_")]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a training did, and how it fared. Of this run, but for `step` and `metrics`, which count from the beginning.

    `state` is `running`, `succeeded`, `stopped` or `failed`, the last with an `error`. `rows` are those of all epochs, `rows_in` those that the
    workers were given, `rows_before` those that they had been given by earlier runs; `rows_per_s` is from their first to their last.
    `wait_share` is the part of the workers' time in which they waited for rows (0 to 1), `accelerator_share` that in which their accelerators
    were busy (None where no driver tells), `saving_s` how long checkpoints kept the first
    worker. `restarts` counts how often the workers were started again. `curves` has (step, seconds since the start, value) for each
    metric. `failures` are rows left out because a stage failed on them.
    """

    training: str
    output: str
    run: str
    state: str
    error: str
    started_s: float
    rows: int | None
    rows_in: int
    rows_before: int
    step: int
    workers: int
    restarts: int
    wall_s: float
    startup_s: float
    rows_per_s: float
    now_per_s: float
    wait_share: float
    wait_share_now: float
    accelerator_share: float | None
    checkpoints: int
    saving_s: float
    saved_step: int
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[Point]]
    failures: Mapping[str, int]
    cost: Cost | None
    timeline: Timeline
    versions: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 1

    @staticmethod
    def of(sums: Sums, *, epochs: int = 1) -> TrainingReport:
        """The report of a training as far as its events tell."""
        started, failed = sums.started, sums.failed
        begun_s = sums.timeline.start_s if sums.timeline else sums.last_s
        recent = [event for events in sums.recent.values() for event in events]
        span_s = sum(event.span_s for event in recent)
        working_s = max(1e-9, sums.rows_s - sums.first_s)
        state = "succeeded" if sums.finished else "running" if failed is None else "stopped" if failed.error == "StoppedError" else "failed"
        return TrainingReport(
            training=started.pipeline if started else "",
            output=started.output if started else "",
            run=started.run if started else "",
            state=state,
            error=f"{failed.error}: {failed.message}" if failed else "",
            started_s=begun_s,
            rows=started.rows if started else None,
            rows_in=sums.rows,
            rows_before=started.before if started else 0,
            step=sums.step,
            workers=sums.workers,
            restarts=max(0, sums.starts - 1),
            wall_s=max(0.0, sums.last_s - begun_s),
            startup_s=max(0.0, sums.first_s - begun_s) if sums.rows else 0.0,
            rows_per_s=sums.rows / working_s if sums.rows else 0.0,
            now_per_s=sum(event.rows for event in recent) / span_s * max(1, len(sums.recent)) if span_s else 0.0,
            wait_share=sums.wait_s / sums.busy_s if sums.busy_s else 0.0,
            wait_share_now=sum(event.wait_s for event in recent) / span_s if span_s else 0.0,
            accelerator_share=sums.accelerator_s / sums.accelerated_s if sums.accelerated_s else None,
            checkpoints=sums.checkpoints,
            saving_s=sums.saving_s,
            saved_step=sums.saved_step,
            metrics=dict(sums.metrics),
            curves={name: tuple(points) for name, points in sums.curves.items()},
            failures=dict(sums.failures.most_common()),
            cost=sums.meter.cost(at_s=sums.last_s, rows=sums.rows) if sums.meter.machines else None,
            timeline=sums.timeline or Timeline(begun_s),
            versions=dict(started.versions) if started else {},
            epochs=epochs,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; with what `headrace runs` reads of every run."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        cost = self.cost.to_dict() if self.cost else None
        shared = {"pipeline": self.training, "kind": "training", "dead_letters": sum(self.failures.values())}
        return {**values, **shared, "timeline": dataclasses.asdict(self.timeline), "cost": cost}

    def __str__(self) -> str:
        if not self.rows_in and not self.checkpoints:
            return f"nothing to do: the training ended before, at step {self.step:,}\n{told(self.metrics)}".rstrip()
        busy = "" if self.accelerator_share is None else f", accelerators busy for {self.accelerator_share:.1%}"
        speed = f"{rate(self.rows_per_s)} rows/s, {self.wait_share:.1%} of the time waiting for rows{busy}"
        lines = [
            f"{count(self.rows_in, 'row')} in {self.wall_s:.1f} s on {count(self.workers, 'worker')}: {speed}",
            f"step {self.step:,}" + (f": {told(self.metrics)}" if self.metrics else ""),
            f"{count(self.checkpoints, 'checkpoint')}, for which the loop waited {duration(self.saving_s)}",
        ]
        if self.restarts:
            lines.append(f"the workers were started again {count(self.restarts, 'time')}")
        if self.failures:
            why = ", ".join(f"{number:,} {cause}" for cause, number in self.failures.items())
            lines.append(f"{count(sum(self.failures.values()), 'row')} left out: {why}")
        if self.cost and self.cost.charges:
            lines += str(self.cost).splitlines()
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Result:
    """What a training came to.

    Attributes:
        metrics: the last value of each metric that the loop reported.
        checkpoint: where the last checkpoint is, a path or URI: what `save` wrote, and two kinds of files of headrace's own (`_*.json`).
        record: how it got there.
    """

    metrics: Mapping[str, float]
    checkpoint: str
    record: TrainingReport

    def curve(self, name: str) -> list[tuple[int, float]]:
        """A metric over the steps of this run, as (step, value); thinned out where there are thousands."""
        return [(step, value) for step, _, value in self.record.curves.get(name, ())]


def told(metrics: Mapping[str, float]) -> str:
    """Metrics in a line: `loss 0.123, accuracy 0.98`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def spent(report: TrainingReport) -> list[str]:
    """What it cost so far, if that is known."""
    return [money(report.cost.usd)] if report.cost and report.cost.usd is not None else []
