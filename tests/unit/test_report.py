"""The report of a run is a pure summary of its events."""

from __future__ import annotations

import random

from headrace.events import BlockDone, BudgetHalved, Event, FileWritten, ReplicaReady, RunFinished, RunStarted, UnitRead
from headrace.report import Report, Tally


def summarise(events: list[Event], *groups: str) -> Report:
    """The report of a run with these events."""
    tally = Tally()
    for event in events:
        tally.add([event])
    return tally.report(pipeline="p", output="out", groups=groups)


EVENTS: list[Event] = [
    RunStarted("p", ("in",), "out"),
    UnitRead(0, 60),
    UnitRead(1, 40),
    ReplicaReady("embed", "node", "cpu", 1.5, at_s=2.0),
    ReplicaReady("embed", "node", "cpu", 2.5, at_s=3.0),
    BlockDone("clean", 100, 0.1, 0, 0, at_s=3.0),
    BlockDone("embed", 60, 4.0, 900, 1000, at_s=14.0),
    BlockDone("embed", 40, 2.0, 600, 1000, at_s=15.0),
    BudgetHalved("embed", "1,024 tokens of text", 2),
    FileWritten("part-1.parquet", 100, 5_000_000),
    RunFinished(100, 100, 20.0),
]


def test_what_a_report_says() -> None:
    """Rows, files, time, and each group's share, whatever order the events came in."""
    shuffled = random.Random(0).sample(EVENTS, len(EVENTS))
    report = summarise(shuffled, "clean", "embed")
    assert (report.rows_in, report.rows_out, report.files, report.bytes, report.rows_per_s) == (100, 100, 1, 5_000_000, 5.0)
    clean, embed = report.groups
    assert (clean.rows, clean.replicas, clean.padding) == (100, 0, 0.0)
    assert (embed.rows, embed.busy_s, embed.replicas, embed.setup_s, embed.padding) == (100, 6.0, 2, 2.5, 0.25)
    assert report.steady_rows_per_s == 100 / 5.0, "from the start of the slowest group's first block to the end of its last"
    assert [halved.stage for halved in report.budgets_halved] == ["embed"]


def test_as_text() -> None:
    """What the command prints at the end."""
    assert str(summarise(EVENTS, "clean", "embed")).splitlines() == [
        "100 rows in 20.0 s: 5.0 rows/s, 20 in steady state",
        "1 file, 5.0 MB in out",
        "   clean: 0.1 s busy in tasks",
        "   embed: 6.0 s busy on 2 replicas, ready after 2.5 s, 25% padding",
        "   embed: out of memory, batches of 1,024 tokens of text divided by 2",
    ]


def test_a_run_of_nothing() -> None:
    """A run without rows has a report like any other."""
    report = summarise([RunFinished(0, 0, 0.0)], "clean")
    assert (report.rows_per_s, report.steady_rows_per_s, report.files) == (0.0, 0.0, 0)
    assert str(report)


def test_a_unit_that_was_read_twice_counts_once() -> None:
    """A reader that died after it had told its rows is no reason to count them twice."""
    tally = Tally()
    tally.add([UnitRead(0, 10), UnitRead(1, 5), UnitRead(0, 10)])
    assert tally.rows_read == 15
