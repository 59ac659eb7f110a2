"""The report of a run is a pure summary of its events, and of what the ledger says of its output."""

from __future__ import annotations

import random

import pytest

from headrace.events import BlockDone, BudgetHalved, Committed, Event, FileWritten, GroupPlanned, ReplicaReady, RunFinished, RunStarted, UnitRead
from headrace.intervals import Intervals
from headrace.report import Report
from headrace.state import DataFile, State
from headrace.tally import Tally


def state_of(rows: int, *, dead: int = 0) -> State:
    """What a ledger says of an output of one file."""
    state = State(request={}, facts={}, units="u")
    state.files = {"part-1.parquet": DataFile("part-1.parquet", rows, 5_000_000)} if rows else {}
    state.dead = {0: Intervals([(0, dead)])} if dead else {}
    return state


def summarise(events: list[Event], *groups: str, state: State, lost: tuple[str, ...] = ()) -> Report:
    """The report of a run with these events."""
    tally = Tally()
    tally.add(GroupPlanned(group, "tasks" if group == "clean" else "model", 1.0) for group in groups)
    for event in events:
        tally.add([event])
    return Report.of(tally, output="out", state=state, lost=dict(enumerate(lost)))


EVENTS: list[Event] = [
    RunStarted("p", ("in",), "out"),
    UnitRead(0, 60),
    UnitRead(1, 40),
    ReplicaReady("embed", "node", "cpu", 1.5, "8 bits", at_s=2.0),
    ReplicaReady("embed", "node", "cpu", 2.5, "8 bits", at_s=3.0),
    BlockDone("clean", 100, 0.1, 0, 0, at_s=3.0),
    BlockDone("embed", 60, 4.0, 900, 1000, at_s=14.0),
    BlockDone("embed", 40, 2.0, 600, 1000, at_s=15.0),
    BudgetHalved("embed", "1,024 tokens of text", 4),
    BudgetHalved("embed", "1,024 tokens of text", 2),
    FileWritten("part-1.parquet", 100, 5_000_000),
    Committed(60, 0),
    Committed(40, 0),
    RunFinished(100, 100, 0, 20.0),
]
RESUMED: list[Event] = [
    BlockDone("clean", 30, 0.1, 0, 0, at_s=3.0),
    Committed(15, 1, (("ValueError in clean", 1),)),
    Committed(10, 4, (("ValueError in clean", 1), ("ProcessDied in clean", 3))),
    RunFinished(1100, 1095, 5, 10.0),
]


def test_what_a_report_says() -> None:
    """Rows, files, time, and each group's share, whatever order the events came in."""
    shuffled = random.Random(0).sample(EVENTS, len(EVENTS))
    report = summarise(shuffled, "clean", "embed", state=state_of(100))
    assert (report.rows_in, report.rows_out, report.rows_before, report.dead_letters) == (100, 100, 0, 0)
    assert (report.files, report.bytes, report.rows_per_s) == (1, 5_000_000, 5.0)
    clean, embed = report.stages
    assert (clean.rows, clean.replicas, clean.padding) == (100, 0, 0.0)
    assert (embed.rows, embed.busy_s, embed.replicas, embed.setup_s, embed.padding) == (100, 6.0, 2, 2.5, 0.25)
    assert report.steady_rows_per_s == 100 / 5.0, "from the start of the slowest group's first block to the end of its last"
    assert embed.notes == ("8 bits",)
    assert [(halved.stage, halved.divisor) for halved in report.budgets_halved] == [("embed", 4)]


def test_as_text() -> None:
    """What the command prints at the end."""
    assert str(summarise(EVENTS, "clean", "embed", state=state_of(100))).splitlines() == [
        "100 rows in 20.0 s: 5.0 rows/s, 20 in steady state",
        "1 file, 5.0 MB in out",
        "   clean: 0.1 s busy in tasks",
        "   embed: 6.0 s busy on 2 replicas, ready after 2.5 s, 25% padding",
        "      8 bits",
        "   embed: out of memory, batches of 1,024 tokens of text divided by 4",
    ]


def test_a_run_that_went_on() -> None:
    """Rows are those of all runs, the rate is that of this one, and causes add up."""
    report = summarise(RESUMED, "clean", state=state_of(1095, dead=5))
    assert (report.rows_in, report.rows_out, report.dead_letters, report.rows_before, report.rows_per_s) == (1100, 1095, 5, 1070, 3.0)
    assert report.causes == {"ProcessDied in clean": 3, "ValueError in clean": 2}
    assert list(report.causes) == ["ProcessDied in clean", "ValueError in clean"], "the most frequent one first"


def test_failures_as_text() -> None:
    """What was done before, what failed and why, and what to do about it; a file that costs several units is told of once."""
    report = summarise(RESUMED, "clean", state=state_of(1095, dead=5), lost=("cannot read 'a'", "cannot read 'a'", "cannot read 'b'"))
    assert str(report).splitlines()[:7] == [
        "30 rows in 10.0 s: 3.0 rows/s, 300 in steady state",
        "1,070 rows were done before",
        "1 file, 5.0 MB in out",
        "5 dead letters in out/_headrace/dead_letters (now: 3 ProcessDied in clean, 2 ValueError in clean)",
        "unreadable: cannot read 'a'",
        "unreadable: cannot read 'b'",
        "when the cause is mended: headrace replay out",
    ]


@pytest.mark.parametrize(("dead", "more"), [(0, []), (1, ["1 dead letter in out/_headrace/dead_letters", "when the cause is mended: headrace replay out"])])
def test_a_job_that_was_done_before(dead: int, more: list[str]) -> None:
    """Nothing was run; the failures that the output still has are told."""
    report = Report.of_finished("p", "out", state_of(100, dead=dead), {})
    assert (report.rows_in, report.rows_before, report.rows_out, report.dead_letters) == (100 + dead, 100 + dead, 100, dead)
    assert (report.rows_per_s, report.groups, report.wall_s) == (0.0, (), 0.0)
    assert str(report).splitlines() == [f"nothing to do: all {100 + dead} rows were done before", "1 file, 5.0 MB in out", *more]


def test_a_run_of_nothing() -> None:
    """A run without rows has a report like any other."""
    report = summarise([RunFinished(0, 0, 0, 0.0)], "clean", state=state_of(0))
    assert (report.rows_per_s, report.steady_rows_per_s, report.files) == (0.0, 0.0, 0)
    assert str(report).startswith("0 rows in 0.0 s")
