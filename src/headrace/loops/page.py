"""The page of a training, `_headrace/report.html`: one file that shows what `report.json` says, and asks for nothing from anywhere."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from headrace.console import html as pages
from headrace.console.charts import Curve, plot, stack
from headrace.console.html import safe, text
from headrace.cost import money
from headrace.loops.result import Point, TrainingReport
from headrace.report import count, duration, rate

_CURVES = 12  # metrics drawn
_LINES = 50  # of a list
_COLUMNS = 120  # values drawn of a curve


def page(report: TrainingReport) -> str:
    """The page as HTML."""
    name = report.training or "a training"
    body = [*_head(report, name), *_figures(report), *_speed(report), *_curves(report), *_failures(report), *_money(report), *_footer(report)]
    return pages.report(name, report.state, body)


def _head(report: TrainingReport, name: str) -> list[str]:
    outcome = f"step {report.step:,}; {count(report.rows_in, 'row')} in {duration(report.wall_s)}"
    began = f"; began {dt.datetime.fromtimestamp(report.started_s, dt.UTC):%Y-%m-%d %H:%M} UTC" if report.started_s else ""
    return [
        "<header>",
        f"<h1>{safe(name)}</h1>",
        f'<p class="outcome"><span class="badge">{text(report.state)}</span>{outcome}</p>',
        f'<p class="error">{safe(report.error)}</p>' if report.error else "",
        f'<p class="soft">Output: {safe(report.output)}{began}{f"; run {safe(report.run)}" if report.run else ""}</p>',
        '<p class="soft">What was saved stays: the same command goes on from there.</p>' if report.state in ("failed", "stopped") else "",
        "</header>",
    ]


def _figures(report: TrainingReport) -> list[str]:
    """The figures that are asked for first: the loop's own, then those of the run."""
    usd = report.cost.usd if report.cost else None
    shown = [
        *((safe(name), f"{value:.4g}", "") for name, value in list(report.metrics.items())[:_CURVES]),
        ("Rows per second", rate(report.rows_per_s), f"on {count(report.workers, 'worker')}"),
        ("Waiting for rows", f"{report.wait_share:.1%}", "of the workers' time"),
        *([] if report.accelerator_share is None else [("Accelerators busy", f"{report.accelerator_share:.1%}", "of the time, as their driver has it")]),
        ("Checkpoints", f"{report.checkpoints:,}", f"the loop waited {duration(report.saving_s)}"),
        ("Time", duration(report.wall_s), f"start-up {duration(report.startup_s)}" if report.startup_s else ""),
        ("Cost", money(usd), ""),
    ]
    cells = [f"<div><dt>{name}</dt><dd>{value}{f' <small>{more}</small>' if more else ''}</dd></div>" for name, value, more in shown]
    return ["<dl>", *cells, "</dl>"]


def _speed(report: TrainingReport) -> list[str]:
    series, width_s = report.timeline.series, report.timeline.width_s
    if not any(series.get("rows", ())):
        return []
    rows = Curve.of(series["rows"], width_s=width_s, end_s=max(report.wall_s, (len(series["rows"]) - 1) * width_s))
    what = "Rows per second"
    shaded = f"; shaded: start-up, {duration(report.startup_s)}" if report.startup_s > 0 else ""
    waiting = stack([("starved", "waiting for rows", report.wait_share), ("computing", "in the loop", max(0.0, 1 - report.wait_share))])
    return [
        "<h2>Over time</h2>",
        f"<figure><figcaption>{what}{shaded}</figcaption>{plot(rows, what=what, tall=True, startup_s=report.startup_s)}</figure>",
        "<h3>The workers' time</h3>",
        waiting,
    ]


def _curves(report: TrainingReport) -> list[str]:
    """A picture of each metric; those that fall below 0 are told in figures only."""
    lines = []
    for name, points in list(report.curves.items())[:_CURVES]:
        drawn = [point for point in points if 0 <= point[2] < float("inf")]
        if len(drawn) < 2 or len(drawn) < len(points):
            continue
        curve = _over_time(drawn)
        first, last = drawn[0], drawn[-1]
        caption = f"{safe(name)} over time: {first[2]:.4g} at step {first[0]:,}, {last[2]:.4g} at step {last[0]:,}"
        lines.append(f"<figure><figcaption>{caption}</figcaption>{plot(curve, what=name, tall=True)}</figure>")
    return ["<h2>Metrics</h2>", *lines] if lines else []


def _over_time(points: Sequence[Point]) -> Curve:
    """Means over equal spans of time; a span without a report has the value of the one before."""
    end_s = max(points[-1][1], 1e-3)
    width_s = end_s / _COLUMNS
    found: list[list[float]] = [[] for _ in range(_COLUMNS)]
    for _, at_s, value in points:
        found[min(_COLUMNS - 1, int(at_s / width_s))].append(value)
    level, values = points[0][2], []
    for here in found:
        level = sum(here) / len(here) if here else level
        values.append(level)
    return Curve(tuple(values), width_s, end_s)


def _failures(report: TrainingReport) -> list[str]:
    lines = [f"<li>{number:,} left out: {safe(why)}</li>" for why, number in list(report.failures.items())[:_LINES]]
    if report.restarts:
        lines.append(f"<li>The workers were started again {count(report.restarts, 'time')}</li>")
    return ["<h2>What failed</h2>", *(['<ul class="plain">', *lines, "</ul>"] if lines else ['<p class="good">Nothing.</p>'])]


def _money(report: TrainingReport) -> list[str]:
    if report.cost is None:
        return []
    return ["<h2>Money</h2>", f'<pre tabindex="0" aria-label="Cost">{text(str(report.cost), most=20_000)}</pre>']


def _footer(report: TrainingReport) -> list[str]:
    made = ", ".join(f"{safe(name)} {safe(version)}" for name, version in list(report.versions.items())[:_LINES])
    more = "The same as data: report.json, and every event in events-*.jsonl, beside this page."
    return [f"<footer>{f'Made with {made}. ' if made else ''}{more}</footer>"]
