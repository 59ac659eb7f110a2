"""What a run shows of itself: a view on a terminal, lines elsewhere, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console

from headrace.cli.progress import Progress, frame, line, tell
from headrace.cost import Meter, Prices
from headrace.events import BlockDone, Committed, Event, GroupPlanned, GroupSampled, MachinesSeen, ProcessDied, ReplicaReady, RunFinished, RunStarted, UnitLost
from headrace.report import Report
from headrace.tally import READER, WRITER, Tally

BEGUN: list[Event] = [
    RunStarted("reviews", ("in",), "out", "000001-a", asked_s=0.0, rows=40_000, before=0, at_s=1.0),
    GroupPlanned(READER, "reader", at_s=1.0),
    GroupPlanned("clean+tokenise", "tasks", 1.0, at_s=1.0),
    GroupPlanned("embed", "model", 1.0, 1.0, ("16,384 tokens of tokens",), at_s=1.0),
    GroupPlanned(WRITER, "writer", at_s=1.0),
]
GOING: list[Event] = [
    *BEGUN,
    *(GroupSampled("embed", 4, 1 + (at % 2), 2, 1, at_s=10.0 + at / 2) for at in range(21)),
    GroupSampled(READER, 12, 3, at_s=20.0),
    GroupSampled("clean+tokenise", 2, 5, at_s=20.0),
    GroupSampled(WRITER, 1, 1, at_s=20.0),
    ReplicaReady("embed", "n", "cuda", 4.0, at_s=8.0),
    *(BlockDone(READER, 2000, 0.2, 0, 0, at_s=6.0 + at) for at in range(10)),
    *(BlockDone("clean+tokenise", 2000, 0.5, 0, 0, at_s=8.0 + at) for at in range(8)),
    *(BlockDone("embed", 1000, 1.0, 95, 100, at_s=10.0 + at) for at in range(10)),
    *(Committed(995, 5, (("ValueError in embed", 5),), at_s=11.0 + at) for at in range(9)),
    UnitLost(3, "cannot read 'x'", at_s=19.0),
    ProcessDied("read 3", 4, at_s=19.5),
]


def report_of(events: list[Event]) -> Report:
    tally = Tally()
    tally.add(events)
    return Report.of(tally, output="out", state=None)


def drawn(report: Report, *, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(frame(report))
    assert isinstance(console.file, io.StringIO)
    return [text.rstrip() for text in console.file.getvalue().splitlines()]


def test_the_live_view() -> None:
    """Groups in the order in which rows pass; everything that a person asks first."""
    assert drawn(report_of(GOING), width=100) == [
        "reviews ━━━━━━╸                         22% 9,000 of 40,000 rows 20 s, 30 s left",
        "                  rows  rows/s  replicas  queue  busy",
        "(read)          20,000   1,000   3 tasks     12",
        "clean+tokenise  16,000   1,000   5 tasks      2",
        "embed           10,000     900      2 +1      4   75%",
        "(write)              0     0.0    1 task      1",
        "45 dead letters, 1 unreadable, 1 death of processes",
    ]


def test_a_recorded_run(golden: Callable[[str, str], None]) -> None:
    """What a terminal showed of a run every few seconds, colours and all, and the lines of the same moments elsewhere."""
    priced = MachinesSeen((("10.0.0.1", None, None, 16.0, 64.0, 0.0, None),), at_s=1.0)
    events = sorted([*GOING, priced, *(Committed(3100, 0, at_s=21.0 + at) for at in range(10))], key=lambda event: event.at_s)
    shown, lines = io.StringIO(), []
    console = Console(file=shown, width=110, force_terminal=True, color_system="standard", legacy_windows=False)
    for now in (1, 9, 12, 20, 31):
        tally = Tally(Meter(Prices.parse(["60"])))
        tally.add([event for event in events if event.at_s <= now])
        tally.last_s = float(now)
        report = Report.of(tally, output="out", state=None)
        console.print(frame(report))
        lines.append(line(report) + "\n")
    golden("live.ansi", shown.getvalue())
    golden("lines.txt", "".join(lines))


def test_the_live_view_before_anything_is_known() -> None:
    """And in a narrow terminal."""
    lines = drawn(report_of(BEGUN), width=60)
    assert "0 of 40,000" in " ".join(lines) and "starting" in " ".join(lines) and max(map(len, lines)) <= 60


def test_lines() -> None:
    """The same where nobody looks."""
    assert line(report_of(BEGUN)) == "    1 s  0 of 40,000 rows, embed 0 replicas, starting"
    assert line(report_of(GOING)) == (
        "   20 s  9,000 of 40,000 rows (22%), 900 rows/s, embed 2 +1 replicas, 75% busy, 45 dead letters, 1 unreadable, 1 death of processes, 30 s left"
    )


def test_what_is_told_as_it_happens() -> None:
    """Deaths and unreadable files, on standard error, and nothing at all when quiet."""
    for quiet in (False, True):
        console = Console(file=io.StringIO(), width=100, quiet=quiet)
        with Progress(quiet=quiet, console=console) as progress:
            progress.update(GOING, 40_000)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue() == ("" if quiet else "unreadable: cannot read 'x'\na process died in read 3 (4)\n")


def test_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """As text, with what held the run back and where to read on; as one document of JSON; or not at all."""
    report = report_of([*GOING, RunFinished(9000, 8955, 45, 21.0, at_s=21.0)])
    tell(report, quiet=False, as_json=False)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("9,000 rows in 21.0 s") and said[-1] == "more in out/_headrace/report.html"
    tell(report, quiet=True, as_json=False)
    assert not capsys.readouterr().out
    tell(report, quiet=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["rows_in"], told["groups"][2]["name"]) == ("succeeded", 9000, "embed") and "bottleneck" in told


def test_a_price_that_no_machine_has() -> None:
    """Is told once: it is most likely mistyped."""
    console = Console(file=io.StringIO(), width=100)
    with Progress(console=console, prices=Prices.parse(["g6.4xlrge=1.10", "0.30"])) as progress:
        for _ in range(2):
            progress.update([*BEGUN, MachinesSeen((("10.0.0.1", "g6.4xlarge", None, 16.0, 64.0, 1.0, "L4"),), at_s=1.0)], None)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "--price g6.4xlrge=1.1: no machine of the cluster is that, so far\n"


def test_money_as_it_is_spent() -> None:
    """An hour's half at 2 USD, in both views."""
    tally = Tally(Meter(Prices.parse(["2"])))
    tally.add([*BEGUN, MachinesSeen((("10.0.0.1", None, None, 16.0, 64.0, 0.0, None),), at_s=1.0), Committed(10, 0, at_s=1800.0)])
    report = Report.of(tally, output="out", state=None)
    assert "1.00 USD" in line(report) and any("1.00 USD" in text for text in drawn(report, width=120))
