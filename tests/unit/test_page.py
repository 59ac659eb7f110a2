"""The page of a run: what it says, that it stays whole whatever names and messages hold, and that it asks for nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from headrace.console.charts import Curve, percent, plot, short
from headrace.console.page import page
from headrace.cost import Meter, Prices
from headrace.events import BlockDone, Committed, Event, GroupPlanned, GroupSampled, MachinesSeen, ReplicaReady, RunFailed, RunFinished, RunStarted, UnitLost
from headrace.report import Report
from headrace.tally import READER, WRITER, Tally

VOID = {"meta", "link", "br", "path", "rect", "wbr"}
NASTY = "<script>alert(1)</script>\u202e\x00'\"&"
RUN: list[Event] = [
    RunStarted("reviews", ("in",), "out", "000001-a", asked_s=1.7e9, rows=40_000, versions=(("headrace", "0.1.0"), ("ray", "2.60.0")), at_s=1.7e9 + 2),
    MachinesSeen((("head", "g6.4xlarge", None, 16.0, 64.0, 1.0, "L4"),), at_s=1.7e9 + 2),
    GroupPlanned(READER, "reader", at_s=1.7e9 + 2),
    GroupPlanned("clean", "tasks", 1.0, at_s=1.7e9 + 2),
    GroupPlanned("embed", "model", 1.0, 1.0, ("16,384 tokens of tokens",), at_s=1.7e9 + 2),
    GroupPlanned(WRITER, "writer", at_s=1.7e9 + 2),
    ReplicaReady("embed", "n", "cuda", 4.0, "openvino, slices of 1,024 tokens", at_s=1.7e9 + 8),
    *(GroupSampled("embed", 0, at % 2, 1, 0, at_s=1.7e9 + 8 + at / 2) for at in range(60)),
    *(GroupSampled("clean", 2, 1, at_s=1.7e9 + 8 + at / 2) for at in range(60)),
    *(BlockDone(READER, 2000, 0.2, 0, 0, at_s=1.7e9 + 6 + at) for at in range(20)),
    *(BlockDone("clean", 2000, 0.9, 0, 0, at_s=1.7e9 + 8 + at) for at in range(20)),
    *(BlockDone("embed", 2000, 0.5, 95, 100, at_s=1.7e9 + 10 + at) for at in range(20)),
    *(Committed(1999, 1, (("ValueError in embed", 1),), at_s=1.7e9 + 11 + at) for at in range(20)),
    UnitLost(3, "cannot read 'x.parquet'", at_s=1.7e9 + 19),
]
DONE: list[Event] = [*RUN, RunFinished(40_000, 39_980, 20, 32.0, at_s=1.7e9 + 34)]


def report_of(events: list[Event]) -> Report:
    tally = Tally(Meter(Prices.parse(["g6.4xlarge=1.10"])))
    for event in events:
        tally.add([event])
    return Report.of(tally, output="out", state=None)


class Elements(HTMLParser):
    """Holds that every element is closed where it should be, and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data.split()


def text_of(report: Report, **more: str) -> str:
    return " ".join(Elements(page(report, **more)).words)


@pytest.mark.parametrize(("name", "events"), [("succeeded", DONE), ("failed", [*RUN, RunFailed("StageError", "stage 'embed' failed", at_s=1.7e9 + 34)])])
def test_the_page_is_as_kept(name: str, events: list[Event], golden: Callable[[str, str], None]) -> None:
    """Before a renewed one is committed: look at the difference, and at the page in a browser."""
    golden(f"page-{name}.html", page(report_of(events), plan="pipeline reviews\n  clean -> embed\n"))


def test_what_a_page_says() -> None:
    """Outcome, the bottleneck in a sentence, where the time went, failures by cause, money, the plan."""
    said = text_of(report_of(DONE), plan="the plan of it")
    for part in (
        "succeeded 40,000 rows in, 39,980 out, 20 dead letters",
        "What held it back: the accelerator of embed waited",
        "for clean",
        "openvino, slices of 1,024 tokens",
        "waiting for input",
        "ValueError in embed 20",
        "cannot read 'x.parquet'",
        "headrace replay out",
        "g6.4xlarge 1 0.01 1.1",
        "the plan of it",
        "Made with headrace 0.1.0 , ray 2.60.0",
    ):
        assert part in said, f"{part!r} is not in: {said}"


def test_a_page_asks_for_nothing() -> None:
    """No script, no address, and a policy that would forbid both."""
    made = page(report_of(DONE))
    attributes = Elements(made).attributes
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'") in attributes
    assert [value for _, name, value in attributes if name in ("src", "href", "action", "srcset")] == ["data:,"]
    assert not re.search(r"<script|url\(|@import|\son\w+=", made)


def test_names_and_messages_cannot_break_out() -> None:
    """Whatever a column, a stage, a path or an error is called."""
    report = report_of(
        [
            RunStarted(NASTY, (NASTY,), NASTY, NASTY, asked_s=0.0, rows=9, versions=((NASTY, NASTY),), at_s=0.0),
            GroupPlanned(NASTY, "model", 1.0, 0.0, (NASTY,), at_s=0.0),
            ReplicaReady(NASTY, NASTY, NASTY, 1.0, NASTY, at_s=1.0),
            MachinesSeen(((NASTY, NASTY, None, 1.0, 1.0, 0.0, None),), at_s=1.0),
            BlockDone(NASTY, 9, 1.0, 1, 2, at_s=8.0),
            Committed(8, 1, ((NASTY, 1),), at_s=9.0),
            UnitLost(0, NASTY, at_s=9.0),
            RunFailed(NASTY, NASTY, at_s=9.0),
        ]
    )
    made = page(dataclasses.replace(report, output=NASTY), plan=NASTY)
    assert not any(tag == "script" for tag, _, _ in Elements(made).attributes)
    assert "<script" not in made and "\x00" not in made and "&lt;script&gt;" in made


def test_pages_of_runs_without_much_to_say() -> None:
    """Before the first row, and where nothing was to do."""
    assert "running" in text_of(report_of([])) and "No machine was seen" in text_of(report_of([]))
    nothing = text_of(report_of([RunStarted("p", (), "out", rows=5, before=5), RunFinished(5, 5, 0, 0.0)]))
    assert "5 rows in, 5 out" in nothing and "Nothing: no dead letters" in nothing


def test_a_page_of_a_large_run_stays_one_that_a_browser_opens() -> None:
    """Hundreds of groups, causes and lost files are counted, not listed."""
    events: list[Event] = [RunStarted("p", (), "out", asked_s=0.0, rows=10**10, at_s=0.0)]
    for at in range(300):
        events += [
            GroupPlanned(f"group-{at}", "tasks", 1.0, at_s=0.0),
            BlockDone(f"group-{at}", 10**9, float(at), 0, 0, at_s=400.0),
            UnitLost(at, f"file {at}"),
        ]
        events.append(Committed(0, 1, ((f"Error {at}", 1),), at_s=1.0 + at))
    made = page(report_of(events))
    assert len(made) < 400_000
    assert "288 more groups" in made and "250 more causes" in made and "250 more files" in made


@pytest.mark.parametrize(("number", "said"), [(0, "0"), (0.25, "0.25"), (99, "99"), (800, "800"), (20_000, "20k"), (1_500_000, "1.5M"), (2e13, "20T")])
def test_numbers_of_scales(number: float, said: str) -> None:
    assert short(number) == said


def test_shares_that_are_not_quite_all_or_nothing() -> None:
    assert [percent(share) for share in (0, 0.0001, 0.5, 0.9999, 1)] == ["0%", "<1%", "50%", ">99%", "100%"]


def test_a_curve_counts_what_had_gone_by_of_its_last_span() -> None:
    """Two spans of 2 s and a half one: 10 rows each are 5/s, 5/s and 10/s."""
    assert Curve.of([10, 10, 10], width_s=2, end_s=5).values == (5, 5, 10)
    assert Curve.of([10], width_s=2, end_s=2, per=10, most=0.3).values == (0.3,)


@pytest.mark.parametrize("end_s", [0.0, 0.4, 59, 3600, 86400 * 400])
def test_a_plot_of_any_length_has_few_ticks(end_s: float) -> None:
    drawn = plot(Curve((1.0, 2.0), max(end_s, 1) / 2, end_s), what="rows", tall=True)
    Elements(drawn)
    assert 1 <= drawn.count('class="x') <= 8
