"""The report of a run: a pure summary of its events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.events import BlockDone, BudgetHalved, Committed, Event, ReplicaReady, RunFinished
from headrace.ledger import LETTERS
from headrace.state import State


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What one group did. `busy_s` adds up over replicas; `padding` is the share of tokens that were padding (0 to 1)."""

    name: str
    rows: int
    busy_s: float
    replicas: int
    setup_s: float
    padding: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did, and what its output holds.

    `rows_in` is `rows_out` plus `dead_letters`, over all runs of the job; `rows_before` of them were settled by earlier runs.
    `unreadable` says which input files could not be read, or not to their end. `steady_rows_per_s` is that of the slowest
    group, set-up excluded.
    """

    pipeline: str
    output: str
    rows_in: int
    rows_out: int
    rows_before: int
    dead_letters: int
    causes: Mapping[str, int]
    unreadable: tuple[str, ...]
    files: int
    bytes: int
    wall_s: float
    steady_rows_per_s: float
    groups: tuple[GroupReport, ...]
    budgets_halved: tuple[BudgetHalved, ...]

    @property
    def rows_per_s(self) -> float:
        """Rows per second of the whole run, start-up included."""
        return (self.rows_in - self.rows_before) / self.wall_s if self.wall_s else 0.0

    @staticmethod
    def of_finished(pipeline: str, output: str, state: State, lost: Mapping[int, str]) -> Report:
        """The report of a run that found its job done already."""
        rows = state.rows_done + state.rows_dead
        return Tally(finished=RunFinished(rows, state.rows_done, state.rows_dead, 0.0), rows_before=rows).report(
            pipeline=pipeline, output=output, groups=(), state=state, lost=lost
        )

    def __str__(self) -> str:
        held = f"{_count(self.files, 'file')}, {_size(self.bytes)} in {self.output}"
        if self.rows_before == self.rows_in and not self.groups:
            return "\n".join([f"nothing to do: all {_count(self.rows_in, 'row')} were done before", held, *self._failures()])
        now = self.rows_in - self.rows_before
        lines = [f"{_count(now, 'row')} in {self.wall_s:.1f} s: {_rate(self.rows_per_s)} rows/s, {_rate(self.steady_rows_per_s)} in steady state"]
        if self.rows_before:
            lines.append(f"{_count(self.rows_before, 'row')} were done before")
        lines += [held, *self._failures()]
        for group in self.groups:
            kept = f" on {_count(group.replicas, 'replica')}, ready after {group.setup_s:.1f} s" if group.replicas else " in tasks"
            padding = f", {group.padding:.0%} padding" if group.padding else ""
            lines.append(f"   {group.name}: {group.busy_s:.1f} s busy{kept}{padding}")
        for halved in self.budgets_halved:
            lines.append(f"   {halved.stage}: out of memory, batches of {halved.rule} divided by {halved.divisor}")
        return "\n".join(lines)

    def _failures(self) -> list[str]:
        lines = []
        if self.dead_letters:
            why = ", ".join(f"{count:,} {cause}" for cause, count in self.causes.items())
            lines.append(f"{_count(self.dead_letters, 'dead letter')} in {self.output}/{LETTERS}{f' (now: {why})' if why else ''}")
        lines += [f"unreadable: {why}" for why in self.unreadable]
        if lines:
            lines.append(f"when the cause is mended: headrace replay {self.output}")
        return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


@dataclass(slots=True)
class _Sums:
    """Running sums over a group's blocks and replicas."""

    rows: int = 0
    busy_s: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    first_s: float = math.inf
    last_s: float = -math.inf
    replicas: int = 0
    setup_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Events folded into sums as they come: its size grows with groups and kinds of failure, never with rows or blocks."""

    groups: dict[str, _Sums] = field(default_factory=dict)
    rows: int = 0
    rows_before: int | None = None
    causes: Counter[str] = field(default_factory=Counter)
    halved: dict[str, BudgetHalved] = field(default_factory=dict)
    finished: RunFinished | None = None

    def add(self, events: Iterable[Event]) -> None:
        """Fold in events, in whatever order they come."""
        for event in events:
            match event:
                case Committed(rows=rows, dead=dead, causes=causes):
                    self.rows += rows + dead
                    self.causes.update(dict(causes))
                case BlockDone():
                    sums = self.groups.setdefault(event.group, _Sums())
                    sums.rows += event.rows
                    sums.busy_s += event.busy_s
                    sums.tokens += event.tokens
                    sums.padded_tokens += event.padded_tokens
                    sums.first_s = min(sums.first_s, event.at_s - event.busy_s)
                    sums.last_s = max(sums.last_s, event.at_s)
                case ReplicaReady(group=group, setup_s=setup_s):
                    sums = self.groups.setdefault(group, _Sums())
                    sums.replicas += 1
                    sums.setup_s = max(sums.setup_s, setup_s)
                case BudgetHalved(stage=stage):
                    self.halved[stage] = max(event, self.halved.get(stage, event), key=lambda one: one.divisor)
                case RunFinished():
                    self.finished = event

    def report(self, *, pipeline: str, output: str, groups: Sequence[str], state: State, lost: Mapping[int, str]) -> Report:
        """The report of a finished run; `groups` are those of the plan, in order, `state` what its output holds, `lost` units given up, and why."""
        assert self.finished is not None, "a report is made of a finished run"
        sums = {name: self.groups.get(name, _Sums()) for name in groups}
        slowest = max(sums.values(), key=lambda one: one.busy_s, default=_Sums())
        return Report(
            pipeline=pipeline,
            output=output,
            rows_in=self.finished.rows_in,
            rows_out=self.finished.rows_out,
            rows_before=self.finished.rows_in - self.rows if self.rows_before is None else self.rows_before,
            dead_letters=state.rows_dead,
            causes=dict(self.causes.most_common()),
            unreadable=tuple(dict.fromkeys(lost.values())),
            files=len(state.files),
            bytes=sum(file.bytes for file in state.files.values()),
            wall_s=self.finished.wall_s,
            steady_rows_per_s=slowest.rows / max(slowest.last_s - slowest.first_s, 1e-9) if slowest.rows else 0.0,
            groups=tuple(
                GroupReport(
                    name=name,
                    rows=one.rows,
                    busy_s=one.busy_s,
                    replicas=one.replicas,
                    setup_s=one.setup_s,
                    padding=1 - one.tokens / one.padded_tokens if one.padded_tokens else 0.0,
                )
                for name, one in sums.items()
            ),
            budgets_halved=tuple(self.halved.values()),
        )
