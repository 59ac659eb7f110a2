"""How far a run is: a live view on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace.advice import bottleneck
from headrace.cli.live_view import BAR, LiveView
from headrace.cost import Meter, Prices, money
from headrace.events import Event, ProcessDied, UnitLost
from headrace.ledger import HOME
from headrace.report import GroupReport, Report, count, duration, rate
from headrace.tally import Tally


class Progress(LiveView[Report]):
    """Watches a run's events; see the `watch` of `headrace.run`."""

    def __init__(self, *, quiet: bool = False, prices: Prices | None = None, console: Console | None = None) -> None:
        super().__init__(frame, line, quiet=quiet, console=console)
        self.tally = Tally(Meter(prices or Prices()))
        self.unmatched: tuple[str, ...] | None = None

    def update(self, events: Sequence[Event], total: int | None) -> None:
        """Take in new events and show where the run is."""
        self.tally.add(events)
        for event in events:
            if isinstance(event, ProcessDied):
                self.console.print(f"a process died in {event.work} ({event.deaths})", style="yellow", markup=False)
            if isinstance(event, UnitLost):
                self.console.print(f"unreadable: {event.why}", style="yellow", markup=False)
        if self.unmatched is None and self.tally.meter.machines:
            self.unmatched = self.tally.meter.prices.unmatched(self.tally.meter.machines)
            for name in self.unmatched:
                self.console.print(f"--price {name}: no machine of the cluster is that, so far", style="yellow", markup=False)
        self.show(self._report)

    def _report(self) -> Report:
        self.tally.last_s = max(self.tally.last_s, time.time())  # time goes by where nothing happens, too
        output = self.tally.started.output if self.tally.started else ""
        return Report.of(self.tally, output=output, state=None)


def tell(report: Report, *, quiet: bool, as_json: bool) -> None:
    """Print what a run came to, and what held it back."""
    if as_json:
        print(json.dumps({**report.to_dict(), "bottleneck": bottleneck(report)}))
    elif not quiet:
        print(report)
        if said := bottleneck(report):
            print(said)
        if report.groups:
            print(f"more in {report.output.rstrip('/')}/{HOME}/report.html")


def frame(report: Report) -> RenderableType:
    """The live view: how far the run is, and what each group is doing."""
    settled = report.rows_in
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(report.pipeline, style="bold"),
        ProgressBar(total=1.0, completed=report.share or 0.0, width=BAR, complete_style="green", finished_style="green"),
        Text(f"{report.share:4.0%}" if report.share is not None else "  - "),
        Text(f"{settled:,}" + (f" of {count(report.rows, 'row')}" if report.rows is not None else " rows")),
        Text(", ".join([duration(report.wall_s), _rest(report), *_spent(report)]), style="dim"),
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("", "left"), ("rows", "right"), ("rows/s", "right"), ("replicas", "right"), ("queue", "right"), ("busy", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for group in report.groups:
        table.add_row(*_cells(group))
    parts: list[RenderableType] = [bar, table]
    if failures := _failures(report):
        parts.append(Text(failures, style="yellow"))
    return Group(*parts)


def _cells(group: GroupReport) -> tuple[str, ...]:
    replicas = f"{group.ready}" + (f" +{group.starting}" if group.starting else "") if group.kind == "model" else count(group.running, "task")
    busy = f"{group.busy_share:.0%}" if group.busy_share is not None and group.kind == "model" else ""
    busy += f", {_tokens(group)}" if group.engine else ""
    return group.name, f"{group.rows:,}", rate(group.now_per_s), replicas, str(group.queued), busy


def _tokens(group: GroupReport) -> str:
    assert group.engine is not None
    return f"{rate(group.engine.now_per_s)} tokens/s"


def line(report: Report) -> str:
    """The same in one line."""
    settled = f"{report.rows_in:,}" + (f" of {report.rows:,}" if report.rows is not None else "") + " rows"
    if report.share is not None:
        settled += f" ({report.share:.0%})"
    parts = [f"{report.wall_s:5.0f} s  {settled}"]
    if settled_per_s := report.timeline.rate("rows", report.started_s + report.wall_s):
        parts.append(f"{rate(settled_per_s)} rows/s")
    for group in report.stages:
        if group.kind == "model":
            busy = f", {group.busy_share:.0%} busy" if group.busy_share is not None and group.ready else ""
            waiting = f" +{group.starting}" if group.starting else ""
            tokens = f", {_tokens(group)}" if group.engine else ""
            parts.append(f"{group.name} {group.ready}{waiting} replica{'s' * (group.ready != 1)}{busy}{tokens}")
    if failures := _failures(report):
        parts.append(failures)
    return ", ".join([*parts, *_spent(report), _rest(report)])


def _rest(report: Report) -> str:
    if report.share == 1:
        return "finishing"
    if report.eta_s is not None:
        return f"{duration(report.eta_s)} left"
    return "starting" if report.first_rows_s is None else "running"


def _spent(report: Report) -> list[str]:
    return [money(report.cost.usd)] if report.cost and report.cost.usd is not None else []


def _failures(report: Report) -> str:
    parts = []
    if report.dead_letters:
        parts.append(count(report.dead_letters, "dead letter"))
    if report.unreadable:
        parts.append(f"{len(report.unreadable)} unreadable")
    if report.process_deaths:
        parts.append(f"{count(report.process_deaths, 'death')} of processes")
    return ", ".join(parts)
