"""Events folded into sums as they come: what the report, the live view and the advice are made of."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from headrace.cost import Cost, Machine, Meter, Prices
from headrace.events import (
    BlockDone,
    BudgetHalved,
    Committed,
    EngineSampled,
    Event,
    FileWritten,
    GroupPlanned,
    GroupSampled,
    LookedUp,
    MachinesSeen,
    ProcessDied,
    ReplicaReady,
    RunFailed,
    RunFinished,
    RunStarted,
    UnitLost,
)

READER, WRITER = "(read)", "(write)"
"""The names of the two ends of every run, among its groups; no stage can be called so."""

_BUCKETS = 120
_WINDOW_S = 30.0  # over which a current rate is taken, or half the run where that is longer
_RECENT_S = 10.0
_NOTES = 8  # of a group that are kept: replicas on machines of one kind say the same
_LONGEST_GAP_S = 5.0  # a sample stands for the time since the last one, but not for longer: events may have been lost


@dataclass(slots=True)
class Timeline:
    """Amounts over time, in buckets that double in width when there would be too many: its size is bounded."""

    start_s: float
    width_s: float = 1.0
    series: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, from_s: float, to_s: float, amount: float) -> None:
        """Spread an amount evenly over a span of time."""
        from_s, to_s = max(0.0, from_s - self.start_s), max(0.0, to_s - self.start_s)
        while to_s >= _BUCKETS * self.width_s:
            self.width_s *= 2
            for known in self.series.values():
                known[:] = [sum(known[at : at + 2]) for at in range(0, len(known), 2)]
        values = self.series.setdefault(name, [])
        first, last = int(from_s / self.width_s), int(to_s / self.width_s)
        values += [0.0] * (last + 1 - len(values))
        for at in range(first, last + 1):
            inside = min(to_s, (at + 1) * self.width_s) - max(from_s, at * self.width_s)
            values[at] += amount * inside / (to_s - from_s) if to_s > from_s else amount

    def rate(self, name: str, now_s: float) -> float:
        """Of an amount, per second, over the last ten seconds or so."""
        values, now = self.series.get(name, []), now_s - self.start_s
        first = max(0, int((now - _RECENT_S) / self.width_s))
        return sum(values[first:]) / max(1.0, now - first * self.width_s)


@dataclass(slots=True)
class EngineSums:
    """Running sums over what the engines of a group's replicas said; see `readings`. `kv_cache` is the highest use of one of their caches, 0 to 1."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0
    preempted: int = 0
    kv_cache: float = 0.0

    def sample(self, event: EngineSampled) -> None:
        """Fold in a sample."""
        self.prompt_tokens += event.prompt_tokens
        self.generated_tokens += event.generated_tokens
        self.prefix_tokens += event.prefix_tokens
        self.prefix_hits += event.prefix_hits
        self.preempted += event.preempted
        self.kv_cache = max(self.kv_cache, event.kv_cache_peak)


@dataclass(slots=True)
class GroupSums:
    """Running sums over a group's blocks, replicas and samples. All times are in seconds.

    `replica_s` adds up over replicas that are ready, `starved_s` and `blocked_s` the part of it in which they had nothing to do,
    because no block waited for them, or although one did: then whatever comes after them could not take more. For tasks all
    three count the run's own time.
    """

    plan: GroupPlanned
    rows: int = 0
    busy_s: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    first_s: float = math.inf
    first_block_s: float = math.inf
    first_ready_s: float = math.inf
    last_s: float = -math.inf
    replicas: int = 0
    setup_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    engine: EngineSums | None = None
    lookups: dict[str, tuple[int, int]] = field(default_factory=dict)  # by view: keys asked for, and how many were not there
    last: GroupSampled | None = None
    replica_s: float = 0.0
    starved_s: float = 0.0
    blocked_s: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))  # seconds of replicas, and idle ones among them

    def block(self, event: BlockDone) -> None:
        """Fold in a block."""
        self.rows += event.rows
        self.busy_s += event.busy_s
        self.tokens += event.tokens
        self.padded_tokens += event.padded_tokens
        self.first_s = min(self.first_s, event.at_s - event.busy_s)
        self.first_block_s = min(self.first_block_s, event.at_s)
        self.last_s = max(self.last_s, event.at_s)

    def sample(self, event: GroupSampled) -> None:
        """Fold in a sample, which stands for the time since the last one."""
        before, self.last = self.last, event
        if before is None:
            return
        span_s = min(max(0.0, event.at_s - before.at_s), _LONGEST_GAP_S)
        workers = event.replicas if self.plan.kind == "model" else 1
        idle_s = max(0, workers - event.running) * span_s
        self.replica_s += workers * span_s
        if event.queued and self.plan.kind != "writer":  # which waits for a file's worth of blocks
            self.blocked_s += idle_s
        else:
            self.starved_s += idle_s
        self.recent.append((workers * span_s, idle_s))

    @property
    def busy_share(self) -> float | None:
        """The part of the last ten seconds or so in which its replicas had something to do; None before anything is known."""
        total_s = sum(worked_s for worked_s, _ in self.recent)
        return 1 - sum(idle_s for _, idle_s in self.recent) / total_s if total_s else None


@dataclass(slots=True)
class Tally:
    """A run so far. Its size grows with groups, machines and kinds of failure, never with rows or blocks."""

    meter: Meter = field(default_factory=lambda: Meter(Prices()))
    cpus: float = 0.0
    gpus: float = 0.0
    groups: dict[str, GroupSums] = field(default_factory=dict)
    started: RunStarted | None = None
    finished: RunFinished | None = None
    failed: RunFailed | None = None
    rows: int = 0
    dead: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    halved: dict[str, BudgetHalved] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    deaths: int = 0
    files: int = 0
    bytes: int = 0
    share: float | None = None
    last_s: float = 0.0
    timeline: Timeline | None = None
    _settled: deque[tuple[float, float]] = field(default_factory=deque)  # when, and how much of the run was settled by then

    def add(self, events: Iterable[Event]) -> None:
        """Fold in events. Those of workers come late, and in any order, but for the first that tells of the run."""
        for event in events:
            self._fold(event)
            self.last_s = max(self.last_s, event.at_s)

    def _fold(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.started = event
                self.timeline = Timeline(event.at_s if event.asked_s is None else event.asked_s)
            case RunFinished():
                self.finished = event
            case RunFailed():
                self.failed = event
            case Committed():
                self._commit(event)
            case FileWritten(at_s=at_s, busy_s=busy_s):
                self.files += 1
                self.bytes += event.bytes
                self._work(BlockDone(WRITER, event.rows, busy_s, 0, 0, at_s=at_s))
            case MachinesSeen(machines=machines, at_s=at_s):
                self._see([_machine(values) for values in machines], at_s)
            case UnitLost(unit=unit, why=why):
                self.lost[unit] = why
            case ProcessDied():
                self.deaths += 1
            case _:
                self._work(event)

    def _work(self, event: Event) -> None:
        """Fold in what a group did."""
        match event:
            case GroupPlanned(group=group):
                self.groups[group] = GroupSums(event)
            case GroupSampled(group=group):
                self._group(group).sample(event)
            case BlockDone(group=group, at_s=at_s, busy_s=busy_s):
                self._group(group).block(event)
                self._draw(f"busy {group}", at_s - busy_s, at_s, busy_s)
                self._draw(f"rows {group}", at_s - busy_s, at_s, event.rows)
            case ReplicaReady(group=group, setup_s=setup_s, note=note, at_s=at_s):
                sums = self._group(group)
                sums.replicas += 1
                sums.first_ready_s = min(sums.first_ready_s, at_s)
                sums.setup_s = max(sums.setup_s, setup_s)
                if note and note not in sums.notes and len(sums.notes) < _NOTES:
                    sums.notes.append(note)
            case EngineSampled(group=group, at_s=at_s):
                sums = self._group(group)
                sums.engine = sums.engine or EngineSums()
                sums.engine.sample(event)
                self._draw(f"tokens {group}", at_s - 1, at_s, event.generated_tokens)
            case LookedUp(group=group, view=view):
                lookups = self._group(group).lookups
                keys, missing = lookups.get(view, (0, 0))
                lookups[view] = keys + event.keys, missing + event.missing
            case BudgetHalved(stage=stage):
                self.halved[stage] = max(event, self.halved.get(stage, event), key=lambda one: one.divisor)

    def _see(self, machines: list[Machine], at_s: float) -> None:
        first = not self.cpus
        self.meter.see(machines, at_s=self._start_s if first else at_s)
        self.cpus, self.gpus = sum(one.cpus for one in machines), sum(one.gpus for one in machines)

    def _group(self, name: str) -> GroupSums:
        return self.groups.setdefault(name, GroupSums(GroupPlanned(name, {READER: "reader", WRITER: "writer"}.get(name, "tasks"))))

    def _draw(self, name: str, from_s: float, to_s: float, amount: float) -> None:
        if self.timeline is not None:
            self.timeline.add(name, from_s, to_s, amount)

    def _commit(self, event: Committed) -> None:
        self.rows += event.rows + event.dead
        self.dead += event.dead
        self.causes.update(dict(event.causes))
        self.share = event.share if event.share is not None else self._share_of_rows()
        last_s = self._settled[-1][0] if self._settled else event.at_s
        self._draw("rows", last_s, event.at_s, event.rows + event.dead)
        if self.share is not None:
            self._settled.append((event.at_s, self.share))
            while len(self._settled) > 2 and self._settled[1][0] < event.at_s - self._window_s(event.at_s):
                self._settled.popleft()

    def _share_of_rows(self) -> float | None:
        if self.started is None or self.started.rows is None:
            return None
        return min(1.0, self.rows / max(1, self.started.rows - self.started.before))

    def _window_s(self, now_s: float) -> float:
        return max(_WINDOW_S, (now_s - self._start_s) / 2)

    @property
    def _start_s(self) -> float:
        return self.timeline.start_s if self.timeline is not None else self.last_s

    @property
    def wall_s(self) -> float:
        """Seconds from the command to the last that is known."""
        return self.finished.wall_s if self.finished is not None else max(0.0, self.last_s - self._start_s)

    @property
    def busy(self) -> float | None:
        """The share of what is paid for that was at work: of accelerators where the run used some, else of cores. None before anything is known."""
        stages = [sums for sums in self.groups.values() if sums.plan.kind in ("tasks", "model")]
        accelerated = [sums for sums in stages if sums.plan.gpus]
        worked_s = sum(sums.busy_s * (sums.plan.gpus if accelerated else max(sums.plan.cpus, 1.0)) for sums in accelerated or stages)
        paid_s = (self.gpus if accelerated else self.cpus) * self.wall_s
        return min(1.0, worked_s / paid_s) if paid_s else None

    @property
    def cost(self) -> Cost | None:
        """What the run has cost so far; None before any machine was seen."""
        return self.meter.cost(at_s=self._start_s + self.wall_s, rows=self.rows, busy=self.busy) if self.cpus else None

    @property
    def startup_s(self) -> float:
        """Seconds from the command until the first rows were being read, and a replica of every model was ready."""
        begun = [sums.first_s if sums.plan.kind == "reader" else sums.first_ready_s for sums in self.groups.values()]
        return max(0.0, max((at_s for at_s in begun if at_s < math.inf), default=self._start_s) - self._start_s)

    @property
    def eta_s(self) -> float | None:
        """Seconds that the rest should take, counted from the last event; None until two commits tell a rate."""
        if self.finished is not None or len(self._settled) < 2:
            return None
        (first_s, first), (last_s, last) = self._settled[0], self._settled[-1]
        if last <= first or last_s <= first_s:
            return None
        return max(0.0, last_s + (1 - last) * (last_s - first_s) / (last - first) - self.last_s)


def _machine(values: tuple[Any, ...]) -> Machine:
    name, instance, market, cpus, memory_gb, gpus, accelerator = values
    return Machine(name, instance=instance, market=market, cpus=cpus, memory_gb=memory_gb, gpus=gpus, accelerator=accelerator)
