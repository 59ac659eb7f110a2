"""The report of a run: what it did, where its time went, and what its output holds. Also of one that is still going on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.cost import Cost, money
from headrace.events import BudgetHalved, GroupPlanned, RunFinished, RunStarted
from headrace.ledger import LETTERS
from headrace.state import State
from headrace.tally import GroupSums, Tally, Timeline


@dataclass(frozen=True, slots=True)
class Shares:
    """Where the time of a group went, as shares that add up to 1.

    `computing`; `starved`, because no block was there; `blocked`, because what comes after could not take more; and `between`
    blocks, which is what handing them over costs. Of a model, it is the time of its replicas from the moment they are ready; of
    all else the time of the run.
    """

    computing: float
    starved: float
    blocked: float
    between: float

    @staticmethod
    def of(sums: GroupSums) -> Shares | None:
        """The shares, or None before anything is known."""
        if not sums.replica_s:
            return None
        idle_s = sums.starved_s + sums.blocked_s
        busy_s = sums.busy_s if sums.plan.kind == "model" else sums.replica_s - idle_s
        between_s = max(0.0, sums.replica_s - idle_s - busy_s)
        total_s = busy_s + idle_s + between_s
        return Shares(busy_s / total_s, sums.starved_s / total_s, sums.blocked_s / total_s, between_s / total_s)


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engines of a group's replicas did.

    `generated_per_s` runs from the start of the group's first block to the end of its last; `now_per_s` is that of the last moments.
    `prefix_share` is the part of the prompts' tokens that was found in the cache, and `kv_cache` the highest use of one, both 0 to 1;
    `preempted` counts sequences that had to give their room to others, and were computed again.
    """

    prompt_tokens: int
    generated_tokens: int
    generated_per_s: float
    now_per_s: float
    prefix_share: float
    kv_cache: float
    preempted: int

    @staticmethod
    def of(sums: GroupSums, tally: Tally) -> EngineReport | None:
        """The sums as figures, or None where no engine said anything."""
        if (engine := sums.engine) is None:
            return None
        return EngineReport(
            prompt_tokens=engine.prompt_tokens,
            generated_tokens=engine.generated_tokens,
            generated_per_s=engine.generated_tokens / max(sums.last_s - sums.first_s, 1e-9) if sums.rows else 0.0,
            now_per_s=tally.timeline.rate(f"tokens {sums.plan.group}", tally.last_s) if tally.timeline else 0.0,
            prefix_share=engine.prefix_hits / engine.prefix_tokens if engine.prefix_tokens else 0.0,
            kv_cache=engine.kv_cache,
            preempted=engine.preempted,
        )

    def __str__(self) -> str:
        text = f"{self.prompt_tokens:,} prompt and {self.generated_tokens:,} generated tokens"
        text += f", {rate(self.generated_per_s)} tokens/s" if self.generated_tokens else ""
        found = f"{self.prefix_share:.0%} of the prompts found in the prefix cache"
        return f"{text}; KV cache at most {self.kv_cache:.0%} in use, {found}" + (f", {count(self.preempted, 'preemption')}" if self.preempted else "")


@dataclass(frozen=True, slots=True)
class LookupReport:
    """How many keys of a view were looked up in an online store, and how many of them were not there, and have defaults."""

    view: str
    keys: int
    missing: int

    def __str__(self) -> str:
        return f"view {self.view!r}: {count(self.keys, 'key')} looked up, {self.missing:,} ({self.missing / max(1, self.keys):.1%}) not found"


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What one group did; its name, kind and hardware are those of `events.GroupPlanned`.

    `busy_s` adds up over replicas and tasks; `padding` is the share of tokens that were padding (0 to 1); `rows_per_s` runs from
    the start of its first block to the end of its last; `notes` are what the set-up of replicas returned. Of the last moments are
    `now_per_s`, in rows, `busy_share`, `queued` blocks, `running` tasks, and replicas `ready` and `starting`.
    """

    name: str
    kind: str
    cpus: float
    gpus: float
    rules: tuple[str, ...]
    rows: int
    busy_s: float
    replicas: int
    setup_s: float
    padding: float
    rows_per_s: float
    shares: Shares | None
    notes: tuple[str, ...] = ()
    now_per_s: float = 0.0
    busy_share: float | None = None
    queued: int = 0
    running: int = 0
    ready: int = 0
    starting: int = 0
    engine: EngineReport | None = None
    lookups: tuple[LookupReport, ...] = ()

    @property
    def said(self) -> tuple[str, ...]:
        """What the group's stages said of themselves, as lines."""
        return (*self.notes, *([str(self.engine)] if self.engine else []), *map(str, self.lookups))

    @staticmethod
    def of(sums: GroupSums, tally: Tally) -> GroupReport:
        """The sums as figures."""
        plan, last, timeline = sums.plan, sums.last, tally.timeline
        return GroupReport(
            name=plan.group,
            kind=plan.kind,
            cpus=plan.cpus,
            gpus=plan.gpus,
            rules=plan.rules,
            rows=sums.rows,
            busy_s=sums.busy_s,
            replicas=sums.replicas,
            setup_s=sums.setup_s,
            padding=1 - sums.tokens / sums.padded_tokens if sums.padded_tokens else 0.0,
            rows_per_s=sums.rows / max(sums.last_s - sums.first_s, 1e-9) if sums.rows else 0.0,
            shares=Shares.of(sums),
            notes=tuple(sums.notes),
            now_per_s=timeline.rate(f"rows {plan.group}", tally.last_s) if timeline else 0.0,
            busy_share=sums.busy_share,
            queued=last.queued if last else 0,
            running=last.running if last else 0,
            ready=last.replicas if last else 0,
            starting=last.starting if last else 0,
            engine=EngineReport.of(sums, tally),
            lookups=tuple(LookupReport(view, keys, missing) for view, (keys, missing) in sorted(sums.lookups.items())),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did, and what its output holds.

    `state` is `running`, `succeeded`, `stopped` or `failed`, the last with an `error`. `rows_in` is `rows_out` plus
    `dead_letters`, over all runs of the job; `rows_before` of them were settled by earlier runs; `rows` are those of the input, if
    known. `unreadable` says which input files could not be read, or not to their end. `share` is how much of this run's work is
    done, 0 to 1, and `eta_s` how long the rest should take. In seconds from the command, `startup_s` is when rows were being read
    and every model had a replica ready, `first_rows_s` when the first rows had passed through all groups. `steady_rows_per_s` is
    that of the slowest group, set-up excluded.
    """

    pipeline: str
    output: str
    run: str
    state: str
    error: str
    started_s: float
    rows: int | None
    rows_in: int
    rows_out: int
    rows_before: int
    dead_letters: int
    causes: Mapping[str, int]
    unreadable: tuple[str, ...]
    files: int
    bytes: int
    wall_s: float
    share: float | None
    eta_s: float | None
    startup_s: float
    first_rows_s: float | None
    steady_rows_per_s: float
    groups: tuple[GroupReport, ...]
    budgets_halved: tuple[BudgetHalved, ...]
    process_deaths: int = 0
    cost: Cost | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=lambda: Timeline(0.0))

    @property
    def rows_per_s(self) -> float:
        """Rows per second of the whole run, start-up included."""
        return (self.rows_in - self.rows_before) / self.wall_s if self.wall_s else 0.0

    @property
    def usd_per_million_tokens(self) -> float | None:
        """What the run cost for each million of tokens that engines read and wrote; None where there were none, or no price."""
        tokens = sum(group.engine.prompt_tokens + group.engine.generated_tokens for group in self.groups if group.engine)
        return self.cost.usd / tokens * 1e6 if tokens and self.cost and self.cost.usd is not None else None

    @property
    def stages(self) -> tuple[GroupReport, ...]:
        """The groups without the two ends of the run."""
        return tuple(group for group in self.groups if group.kind in ("tasks", "model"))

    @staticmethod
    def of(tally: Tally, *, output: str, state: State | None, lost: Mapping[int, str] | None = None) -> Report:
        """The report of a run as far as its events tell; `state` is what its output holds, `lost` units that are given up, and why."""
        started, finished, failed = tally.started, tally.finished, tally.failed
        groups = tuple(GroupReport.of(sums, tally) for sums in tally.groups.values())
        stages = [group for group in groups if group.kind in ("tasks", "model")]
        slowest = max(stages, key=lambda one: one.busy_s, default=None)
        before = started.before if started else 0
        dead = state.rows_dead if state else tally.dead
        settled = state.rows_done + dead if state else before + tally.rows
        begun_s = tally.timeline.start_s if tally.timeline else tally.last_s
        last_group = tally.groups[stages[-1].name] if stages else GroupSums(GroupPlanned("", "tasks"))
        return Report(
            pipeline=started.pipeline if started else "",
            output=output,
            run=started.run if started else "",
            state=_state(tally),
            error=f"{failed.error}: {failed.message}" if failed else "",
            started_s=begun_s,
            rows=started.rows if started else None,
            rows_in=finished.rows_in if finished else settled,
            rows_out=finished.rows_out if finished else settled - dead,
            rows_before=settled - tally.rows if state else before,
            dead_letters=dead,
            causes=dict(tally.causes.most_common()),
            unreadable=tuple(dict.fromkeys((tally.lost if lost is None else lost).values())),
            files=len(state.files) if state else tally.files,
            bytes=sum(file.bytes for file in state.files.values()) if state else tally.bytes,
            wall_s=tally.wall_s,
            share=1.0 if finished else tally.share,
            eta_s=tally.eta_s,
            startup_s=tally.startup_s,
            first_rows_s=max(0.0, last_group.first_block_s - begun_s) if last_group.rows else None,
            steady_rows_per_s=slowest.rows_per_s if slowest else 0.0,
            groups=groups,
            budgets_halved=tuple(tally.halved.values()),
            process_deaths=tally.deaths,
            cost=tally.cost,
            versions=dict(started.versions) if started else {},
            timeline=tally.timeline or Timeline(begun_s),
        )

    @staticmethod
    def of_finished(pipeline: str, output: str, state: State, lost: Mapping[int, str]) -> Report:
        """The report of a run that found its job done already."""
        rows = state.rows_done + state.rows_dead
        tally = Tally()
        tally.add([RunStarted(pipeline, (), output, rows=rows, before=rows), RunFinished(rows, state.rows_done, state.rows_dead, 0.0)])
        return Report.of(tally, output=output, state=state, lost=lost)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the figures that are computed of others."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        nested = {name: dataclasses.asdict(values[name]) for name in ("timeline",)}
        lists = {name: [dataclasses.asdict(one) for one in values[name]] for name in ("groups", "budgets_halved")}
        computed = {"rows_per_s": self.rows_per_s, "usd_per_million_tokens": self.usd_per_million_tokens}
        return {**values, **nested, **lists, **computed, "cost": self.cost.to_dict() if self.cost else None}

    def __str__(self) -> str:
        held = f"{count(self.files, 'file')}, {size(self.bytes)} in {self.output}"
        if self.rows_before == self.rows_in and not self.groups:
            return "\n".join([f"nothing to do: all {count(self.rows_in, 'row')} were done before", held, *self._failures()])
        now = self.rows_in - self.rows_before
        lines = [f"{count(now, 'row')} in {self.wall_s:.1f} s: {rate(self.rows_per_s)} rows/s, {rate(self.steady_rows_per_s)} in steady state"]
        if self.rows_before:
            lines.append(f"{count(self.rows_before, 'row')} were done before")
        lines += [held, *self._failures()]
        for group in self.stages:
            kept = f" on {count(group.replicas, 'replica')}, ready after {group.setup_s:.1f} s" if group.replicas else " in tasks"
            padding = f", {group.padding:.0%} padding" if group.padding else ""
            lines.append(f"   {group.name}: {group.busy_s:.1f} s busy{kept}{padding}")
            lines += [f"      {note}" for note in group.said]
        if self.cost and self.cost.charges:
            lines += str(self.cost).splitlines()
        if (each := self.usd_per_million_tokens) is not None:
            lines.append(f"   {money(each)} per million tokens, read and written")
        for halved in self.budgets_halved:
            lines.append(f"   {halved.stage}: out of memory, batches of {halved.rule} divided by {halved.divisor}")
        return "\n".join(lines)

    def _failures(self) -> list[str]:
        lines = []
        if self.dead_letters:
            why = ", ".join(f"{number:,} {cause}" for cause, number in self.causes.items())
            lines.append(f"{count(self.dead_letters, 'dead letter')} in {self.output}/{LETTERS}{f' (now: {why})' if why else ''}")
        lines += [f"unreadable: {why}" for why in self.unreadable]
        if lines:
            lines.append(f"when the cause is mended: headrace replay {self.output}")
        return lines


def _state(tally: Tally) -> str:
    if tally.finished is not None:
        return "succeeded"
    if tally.failed is None:
        return "running"
    return "stopped" if tally.failed.error == "StoppedError" else "failed"


def count(number: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def rate(per_s: float) -> str:
    """A rate with as many digits as mean something."""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"


def size(number: int) -> str:
    """Bytes as people say them."""
    scale, unit = next((pair for pair in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if number >= pair[0]), (1e3, "kB"))
    return f"{number / scale:,.1f} {unit}"


def duration(span_s: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 2 min`."""
    whole = round(span_s)
    if whole < 60:
        return f"{span_s:.1f} s" if span_s < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
