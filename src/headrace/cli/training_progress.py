"""How far a training is: a live view on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace.cli.live_view import BAR, LiveView
from headrace.cost import Meter, Prices
from headrace.events import Event, RowsFailed, WorkersStarted
from headrace.loops.result import Sums, TrainingReport, spent, told
from headrace.report import count, duration, rate
from headrace.training import Training


class TrainingProgress(LiveView[TrainingReport]):
    """Watches a training's events; see the `watch` of `headrace.train`."""

    def __init__(self, training: Training, *, quiet: bool = False, prices: Prices | None = None, console: Console | None = None) -> None:
        super().__init__(frame, line, quiet=quiet, console=console)
        self.epochs = training.epochs
        self.sums = Sums(Meter(prices or Prices()))

    def update(self, events: Sequence[Event]) -> None:
        """Take in new events and show where the training is."""
        for event in events:
            if isinstance(event, WorkersStarted) and (event.step or self.sums.starts):
                self.console.print(f"{count(event.workers, 'worker')} go on from step {event.step:,}", style="yellow", markup=False)
            if isinstance(event, RowsFailed) and not self.sums.failures:
                self.console.print(f"rows are left out: {event.causes[0][0]}", style="yellow", markup=False)
        self.sums.add(events)
        self.show(self._report)

    def _report(self) -> TrainingReport:
        self.sums.last_s = max(self.sums.last_s, time.time())  # time goes by where nothing happens, too
        return TrainingReport.of(self.sums, epochs=self.epochs)


def frame(report: TrainingReport) -> RenderableType:
    """The live view: how far the training is, how fast, how long it waits for rows, and its metrics."""
    done = min(1.0, (report.rows_before + report.rows_in) / report.rows) if report.rows else 0.0
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(report.training, style="bold"),
        ProgressBar(total=1.0, completed=done, width=BAR, complete_style="green", finished_style="green"),
        Text(f"step {report.step:,}"),
        Text(", ".join([duration(report.wall_s), *spent(report)]), style="dim"),
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    busy = [] if report.accelerator_share is None else [("accelerators busy", f"{report.accelerator_share:.1%}")]
    names = ("workers", "rows/s", "waiting for rows", *(name for name, _ in busy), "saved at", *report.metrics)
    for name in names:
        table.add_column(name, justify="right")
    values = (f"{value:.4g}" for value in report.metrics.values())
    shares = (f"{report.wait_share_now:.1%}", *(value for _, value in busy))
    table.add_row(f"{report.workers}", rate(report.now_per_s), *shares, f"{report.saved_step:,}", *values)
    return Group(bar, table)


def line(report: TrainingReport) -> str:
    """The same in one line."""
    if not report.rows_in:
        return f"{report.wall_s:5.0f} s  starting"
    of = f" of {report.rows:,}" if report.rows else ""
    parts = [f"{report.wall_s:5.0f} s  step {report.step:,}", f"{report.rows_in:,}{of} rows", f"{rate(report.now_per_s)} rows/s"]
    parts.append(f"{report.wait_share_now:.1%} waiting for rows")
    return ", ".join([*parts, *([told(report.metrics)] if report.metrics else []), *spent(report)])
