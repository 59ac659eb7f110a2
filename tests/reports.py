"""Reports of runs that never were, for whatever shows them: one like a real run's, and the ends of what there can be."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from headrace.cost import Machine, Meter, Prices
from headrace.events import (
    BlockDone,
    BudgetHalved,
    Committed,
    Event,
    FileWritten,
    GroupPlanned,
    GroupSampled,
    MachinesSeen,
    ProcessDied,
    ReplicaReady,
    RunFailed,
    RunFinished,
    RunStarted,
    UnitLost,
)
from headrace.report import Report
from headrace.tally import READER, WRITER, Tally

BEGAN_S = 1_790_000_000.0
HOSTILE = "<script>alert(1)</script>\u202egnp.exe\"'&\x00\x1b[31m"
"""Markup, a turn of the writing direction, quotes, and what no file should hold."""

PLAN = """pipeline reviews

  input
    | text: str
  clean+tokenise   tasks, 1 CPU
    | tokens: list[int]
  embed            1-8 replicas, 1 GPU (L4), batches of 16,384 tokens of tokens
    | vector: vector(384)
  output
"""
VERSIONS = {"python": "3.11.7", "headrace": "0.1.0", "ray": "2.60.0"}

GROUPS = (
    GroupPlanned(READER, "reader", at_s=BEGAN_S),
    GroupPlanned("clean+tokenise", "tasks", 1.0, 0.0, ("1024 rows",), at_s=BEGAN_S),
    GroupPlanned("embed", "model", 1.0, 1.0, ("16,384 tokens of tokens",), at_s=BEGAN_S),
    GroupPlanned(WRITER, "writer", at_s=BEGAN_S),
)


def report_of(events: list[Event], *, price: str = "L4=0.80", lost: dict[int, str] | None = None) -> Report:
    """The report of a run with these events."""
    tally = Tally(Meter(Prices.parse([price] if price else [])))
    tally.add(events)
    return Report.of(tally, output="s3://reviews/vectors", state=None, lost=lost)


def _machine(name: str, *, gpus: float) -> tuple[str | float | None, ...]:
    return dataclasses.astuple(Machine(name, cpus=16.0, memory_gb=64.0, gpus=gpus, accelerator="L4" if gpus else None))


def _begun(rows: int | None) -> Iterator[Event]:
    yield RunStarted("reviews", ("s3://reviews/in",), "s3://reviews/vectors", "000001-5f2c", BEGAN_S, rows, versions=tuple(VERSIONS.items()), at_s=BEGAN_S)
    yield from GROUPS
    yield MachinesSeen((_machine("10.0.0.1", gpus=2.0), _machine("10.0.0.2", gpus=2.0), _machine("10.0.0.3", gpus=0.0)), at_s=BEGAN_S)


@functools.cache
def usual(*, wall_s: int = 840, speed: float = 1.0) -> Report:
    """A run of a few minutes on four GPUs that waited for tokens: three kinds of dead letters, a file that is gone, a batch budget halved."""
    events: list[Event] = list(_begun(2_000_000))
    events += [ReplicaReady("embed", f"10.0.0.{1 + at % 2}", "cuda", 38.0 + at, at_s=BEGAN_S + 55 + 4 * at) for at in range(4)]
    done = 0
    for at in range(70, wall_s):
        now_s, rows = BEGAN_S + at, int(speed * (2400 + 500 * math.sin(at / 40) + 60 * math.sin(at * 1.7)))
        done += rows
        events.append(BlockDone(READER, rows, 0.4, 0, 0, at_s=now_s))
        events.append(BlockDone("clean+tokenise", rows, 11.0 + math.sin(at / 9), 0, 0, at_s=now_s))
        events.append(BlockDone("embed", rows, 2.3 + 0.5 * math.sin(at / 40), 90 * rows, 104 * rows, at_s=now_s))
        events.append(GroupSampled("embed", 0 if at % 3 else 2, 3 if at % 3 else 4, 4, at_s=now_s))
        events.append(GroupSampled("clean+tokenise", 9 if at % 4 else 0, 12 if at % 7 else 0, at_s=now_s))
        events.append(GroupSampled(READER, 3, 2 if at % 5 else 0, at_s=now_s))
        events.append(GroupSampled(WRITER, 0, 1 if at % 8 == 0 else 0, at_s=now_s))
        causes = (("ValueError in clean+tokenise", 2), ("UnicodeDecodeError in clean+tokenise", 1)) if at % 10 == 0 else ()
        causes += (("ProcessDied in embed", 1),) if at == 400 else ()
        dead = sum(number for _, number in causes)
        events.append(Committed(rows - dead, dead, causes, share=min(1.0, done / 2_000_000), at_s=now_s))
        if at % 30 == 0:
            events.append(FileWritten(f"part-{at}.parquet", 30 * rows, 46_000_000, 0.9, at_s=now_s))
    events.append(BudgetHalved("embed", "16,384 tokens of tokens", 2, at_s=BEGAN_S + 90))
    events.append(ProcessDied("embed, block 311", 1, at_s=BEGAN_S + 399))
    events.append(UnitLost(17, "cannot read 's3://reviews/in/2024-06.parquet', row group 4: unexpected end of file", at_s=BEGAN_S + 200))
    dead = sum(event.dead for event in events if isinstance(event, Committed))
    events.append(RunFinished(done, done - dead, dead, float(wall_s), at_s=BEGAN_S + wall_s))
    return report_of(events)


def failed() -> Report:
    """A run that ended half-way, before any machine had a price."""
    events = [
        *_begun(None),
        ReplicaReady("embed", "10.0.0.1", "cuda", 4.0, at_s=BEGAN_S + 12),
        *(BlockDone("embed", 500, 0.8, 0, 0, at_s=BEGAN_S + 14 + at) for at in range(9)),
        *(Committed(500, 0, share=0.05 * (1 + at), at_s=BEGAN_S + 15 + at) for at in range(9)),
        RunFailed("DeadLetterError", "1,204 rows failed, and --max-dead-letters allows 1%", at_s=BEGAN_S + 25),
    ]
    return report_of(events, price="")


def empty() -> Report:
    """A run over no rows at all."""
    return report_of([*_begun(0), RunFinished(0, 0, 0, 0.0, at_s=BEGAN_S)])


def nothing() -> Report:
    """What there is of a run that ended before it began."""
    return report_of([])


def hostile() -> Report:
    """A run whose every name was chosen by somebody who means no good."""
    plan = GroupPlanned(HOSTILE, "model", 1.0, 0.0, (HOSTILE,), at_s=BEGAN_S)
    events: list[Event] = [
        RunStarted(HOSTILE, (HOSTILE,), HOSTILE, HOSTILE, BEGAN_S, 100, at_s=BEGAN_S),
        plan,
        MachinesSeen((dataclasses.astuple(Machine(HOSTILE, instance=HOSTILE, cpus=4.0)),), at_s=BEGAN_S),
        ReplicaReady(HOSTILE, HOSTILE, HOSTILE, 1.0, at_s=BEGAN_S + 1),
        BlockDone(HOSTILE, 100, 2.0, 1, 2, at_s=BEGAN_S + 8),
        GroupSampled(HOSTILE, 0, 1, 1, at_s=BEGAN_S + 7),
        GroupSampled(HOSTILE, 0, 0, 1, at_s=BEGAN_S + 8),
        BudgetHalved(HOSTILE, HOSTILE, 2, at_s=BEGAN_S + 8),
        Committed(50, 50, ((HOSTILE, 50),), at_s=BEGAN_S + 9),
        UnitLost(0, HOSTILE * 100, at_s=BEGAN_S + 9),
        RunFailed(HOSTILE, HOSTILE, at_s=BEGAN_S + 10),
    ]
    return dataclasses.replace(report_of(events, price="1.20"), output=HOSTILE)


@functools.cache
def huge() -> Report:
    """A run of forty days over 10^15 rows, with five hundred groups, a thousand causes, and as many files that cannot be read."""
    groups = [GroupPlanned(f"stage_{at:03}_{'x' * 80}", "model", 1.0, 1.0, ("16,384 tokens of text",), at_s=BEGAN_S) for at in range(500)]
    end_s, rows = BEGAN_S + 40 * 86_400, 10**15
    events: list[Event] = [
        *_begun(rows),
        *groups,
        *(BlockDone(group.group, rows // 500, 86_400.0, 10**17, 11 * 10**16, at_s=end_s - at) for at, group in enumerate(groups)),
        *(GroupSampled(group.group, 0, 1, 10_000, at_s=end_s - 5 + step) for group in groups for step in (0, 5)),
        *(Committed(rows // 40 - 10**9, 10**9, ((f"Error{at} in stage", 10**9),), at_s=BEGAN_S + 86_400 * (1 + at)) for at in range(40)),
        *(Committed(0, 1, ((f"Rare{at} in stage", 1),), at_s=end_s) for at in range(1000)),
        *(UnitLost(at, f"cannot read 's3://{'deep/' * 60}{at}.parquet'", at_s=end_s) for at in range(1000)),
        FileWritten("part", rows, 10**18, 1e6, at_s=end_s),
        RunFinished(rows, rows - 40 * 10**9, 40 * 10**9, 40 * 86_400.0, at_s=end_s),
    ]
    return report_of(events, price="31.55")


ALL = {"usual": usual, "failed": failed, "empty": empty, "nothing": nothing, "hostile": hostile, "huge": huge}
