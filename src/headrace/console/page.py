"""The page of a run, `_headrace/report.html`: one file that shows what `report.json` says, and asks for nothing from anywhere.

A pure function of a report. All that comes from the user or from the engine (names, paths, messages) is escaped and kept from
changing the direction of the text around it. No scripts; the page's own policy forbids them, and every request.
"""

from __future__ import annotations

import datetime as dt
import html
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from headrace.advice import bottleneck
from headrace.console import html as pages
from headrace.console.charts import Curve, bar, percent, plot, stack
from headrace.console.html import safe, text
from headrace.cost import Cost, money
from headrace.ledger import LETTERS
from headrace.report import GroupReport, Report, count, duration, rate, size

_CARDS, _ROWS, _LINES = 12, 100, 50  # groups drawn, rows of a table, lines of a list; a page stays one that a browser opens
_PLAN = 20_000  # characters of a plan
_PARTS = (("computing", "computing"), ("starved", "waiting for input"), ("blocked", "waiting for what comes after"), ("between", "between blocks"))
_KINDS = {"reader": "reads the input", "tasks": "functions, in tasks", "model": "kept in memory", "writer": "writes the output"}


def page(report: Report, *, plan: str = "") -> str:
    """The page as HTML. `plan` is the text of `plan.explain`."""
    name = report.pipeline or "a run"
    said = bottleneck(report)
    body = [
        *_head(report, name),
        f'<p class="said"><strong>What held it back:</strong> {safe(said)}.</p>' if said else "",
        *_over_time(report),
        *_groups(report),
        *_failures(report),
        *_money(report.cost, report.usd_per_million_tokens),
        *_plan(plan),
        *_footer(report),
    ]
    return pages.report(name, report.state, body)


def _head(report: Report, name: str) -> list[str]:
    started = dt.datetime.fromtimestamp(report.started_s, dt.UTC).strftime("%Y-%m-%d %H:%M UTC") if 0 < report.started_s < 1e11 else ""
    when = ", ".join(filter(None, [f"began {started}" if started else "", f"run {safe(report.run)}" if report.run else ""]))
    lines = [
        "<header>",
        f"<h1>{safe(name)}</h1>",
        f'<p class="outcome"><span class="badge">{text(report.state)}</span>{_outcome(report)}</p>',
        f'<p class="soft">Output: {safe(report.output)}{f"; {when}" if when else ""}</p>',
        "</header>",
    ]
    if report.error:
        lines.insert(3, f'<p class="error">{safe(report.error)}</p>')
    if report.state in ("failed", "stopped"):
        lines.insert(-1, '<p class="soft">What was committed stays: the same command goes on from there.</p>')
    return [*lines, *_figures(report)]


def _outcome(report: Report) -> str:
    """What became of the rows, in one line."""
    of = f" of {count(report.rows, 'row')}" if report.rows is not None and report.rows != report.rows_in else ""
    parts = [
        f"{report.rows_in:,}{of} in" if of else f"{count(report.rows_in, 'row')} in",
        f"{report.rows_out:,} out",
        count(report.dead_letters, "dead letter"),
    ]
    return f"{', '.join(parts)}; {duration(report.wall_s)}, {rate(report.rows_per_s)} rows/s"


def _figures(report: Report) -> list[str]:
    """The figures that are asked for first."""
    usd = report.cost.usd if report.cost else None
    each = report.cost.usd_per_million_rows if report.cost else None
    done = f"{report.share:.0%} of this run's work" if report.share is not None and report.state != "succeeded" else ""
    shown = [
        ("Rows out", f"{report.rows_out:,}", f"{report.rows_before:,} settled before" if report.rows_before else done),
        (
            "Dead letters",
            f"{report.dead_letters:,}",
            f"{report.dead_letters / report.rows_in:.2%} of the rows" if report.dead_letters and report.rows_in else "",
        ),
        ("Time", duration(report.wall_s), f"start-up {duration(report.startup_s)}" if report.startup_s else ""),
        ("Rows per second", rate(report.rows_per_s), f"{rate(report.steady_rows_per_s)} in steady state" if report.steady_rows_per_s else ""),
        ("Output", size(report.bytes), count(report.files, "file")),
        ("Cost", money(usd), f"{money(each)} per million rows" if each is not None else ""),
    ]
    cells = [f"<div><dt>{name}</dt><dd>{value.replace(',', ',<wbr>')}{f' <small>{more}</small>' if more else ''}</dd></div>" for name, value, more in shown]
    return ["<dl>", *cells, "</dl>"]


def _over_time(report: Report) -> list[str]:
    curve = _curve(report, "rows")
    if curve is None:
        return []
    shaded = f"; shaded: start-up, {duration(report.startup_s)}" if report.startup_s > 0 else ""
    what = "Rows settled per second"
    return [
        "<h2>Over time</h2>",
        f"<figure><figcaption>{what}{shaded}</figcaption>{plot(curve, what=what, tall=True, startup_s=report.startup_s)}</figure>",
    ]


def _curve(report: Report, series: str, *, per: float = 1.0, most: float = float("inf")) -> Curve | None:
    amounts, width_s = report.timeline.series.get(series), report.timeline.width_s
    if not amounts or not any(amounts):
        return None
    return Curve.of(amounts, width_s=width_s, end_s=max(report.wall_s, (len(amounts) - 1) * width_s), per=per, most=most)


def _groups(report: Report) -> list[str]:
    """Where the time went, a block for each group in the order in which rows pass; those with the most work where there are too many."""
    if not report.groups:
        return []
    drawn = report.groups
    if len(drawn) > _CARDS:
        chosen = sorted(range(len(drawn)), key=lambda at: (-drawn[at].busy_s, at))[:_CARDS]
        drawn = tuple(drawn[at] for at in sorted(chosen))
    lines = ["<h2>Where the time went</h2>", *_startup(report)]
    for group in drawn:
        lines += _card(group, report)
    if left := len(report.groups) - len(drawn):
        lines.append(f'<p class="soft">{_more(left, "group")} with less work, in figures below.</p>')
    return [*lines, *_table_of(report.groups)]


def _startup(report: Report) -> list[str]:
    """The run's own time: until everything was up, and after that."""
    if not report.wall_s:
        return []
    cold = min(1.0, report.startup_s / report.wall_s)
    first = f"First rows were through after {duration(report.first_rows_s)}. " if report.first_rows_s is not None else ""
    of = "Of a model, the bar is the time of its replicas once they are ready; of all else, the time of the run."
    return [stack([("rest", "start-up", cold), ("computing", "after it", 1 - cold)]), f'<p class="soft">{first}{of}</p>']


def _card(group: GroupReport, report: Report) -> list[str]:
    model = group.kind == "model"
    needs = (
        f"{group.gpus:g} GPU" + ("s" if group.gpus > 1 else "")
        if group.gpus
        else f"{group.cpus:g} CPU" + ("s" if group.cpus != 1 else "")
        if group.cpus
        else ""
    )
    facts = [_KINDS.get(group.kind, text(group.kind)), f"{needs} each" if needs else "", f"{count(group.rows, 'row')}, {rate(group.rows_per_s)} rows/s"]
    if model:
        facts += [count(group.replicas, "replica"), f"ready after {duration(group.setup_s)}" if group.replicas else "none was ever ready"]
    facts += [f"batches of {safe(', '.join(group.rules))}" if group.rules and model else "", f"{percent(group.padding)} padding" if group.padding else ""]
    lines = ['<section class="group">', f"<h3>{safe(group.name)}</h3>", f"<p>{'; '.join(filter(None, facts))}</p>"]
    lines += [f"<p>{safe(note)}</p>" for note in group.said]
    if group.shares is not None:
        lines.append(stack([(kind, label, getattr(group.shares, kind)) for kind, label in _PARTS]))
    curves = [
        (_curve(report, f"rows {group.name}"), "Rows per second", None),
        (
            _curve(report, f"busy {group.name}", per=max(1, group.replicas) if model else 1.0, most=1.0 if model else float("inf")),
            "Busy share of its replicas" if model else "At work at once, on average",
            1.0 if model else None,
        ),
        (_curve(report, f"tokens {group.name}"), "Tokens generated per second", None),
    ]
    figures = [
        f"<figure><figcaption>{what}</figcaption>{plot(curve, what=f'{_plain(group.name)}: {what}', top=top, percent=top is not None)}</figure>"
        for curve, what, top in curves
        if curve is not None
    ]
    if figures:
        lines.append(f'<div class="pair">{"".join(figures)}</div>')
    return [*lines, "</section>"]


def _plain(name: str) -> str:
    """A name for an attribute, which is escaped where it is put."""
    return html.unescape(text(name))


def _table_of(groups: Sequence[GroupReport]) -> list[str]:
    """The same in figures."""
    heads = ("Group", "n Rows", "n Rows/s", "n Busy", "n Replicas", "n Set-up", "n Computing", "n No input", "n Blocked", "n Between", "n Padding")
    rows = []
    for group in groups[:_ROWS]:
        shares = [percent(getattr(group.shares, kind)) if group.shares else "" for kind, _ in _PARTS]
        kept = (str(group.replicas), duration(group.setup_s)) if group.kind == "model" else ("", "")
        padding = percent(group.padding) if group.padding else ""
        rows.append((safe(group.name), f"{group.rows:,}", rate(group.rows_per_s), duration(group.busy_s), *kept, *shares, padding))
    table = _table(heads, rows, caption="All groups in figures. Busy adds up over replicas and tasks; set-up is the longest.", wide=True)
    left = len(groups) - len(rows)
    return [*table, f'<p class="soft">{_more(left, "group")} in report.json.</p>' if left else ""]


def _failures(report: Report) -> list[str]:
    lines = ["<h2>What failed</h2>"]
    if report.error:
        lines.append(f'<p>The run itself: <span class="error">{safe(report.error)}</span></p>')
    if report.dead_letters:
        lines.append(f"<p>{count(report.dead_letters, 'dead letter')} in <code>{text(report.output.rstrip('/'))}/{LETTERS}</code>.</p>")
    if report.causes:
        causes = sorted(report.causes.items(), key=lambda item: -item[1])
        total = max(1, sum(report.causes.values()))
        rows = [(safe(cause), f"{number:,}", bar(number / total)) for cause, number in causes[:_LINES]]
        lines += _table(("Cause", "n Rows", "Share"), rows, caption="Dead letters of this run by cause")
        if left := len(causes) - len(rows):
            lines.append(f'<p class="soft">{_more(left, "cause")} in report.json.</p>')
    if report.unreadable:
        lines.append(f"<h3>{len(report.unreadable):,} unreadable</h3>")
        lines += _list(report.unreadable, "file")
    others = [f"{halved.stage}: out of memory, batches of {halved.rule} divided by {halved.divisor}" for halved in report.budgets_halved]
    if report.process_deaths:
        others.append(f"{count(report.process_deaths, 'death')} of processes; their work was tried again")
    if others:
        lines += ["<h3>Mended on the way</h3>", *_list(others, "line")]
    if report.dead_letters or report.unreadable:
        lines.append(f'<p class="soft">When the cause is mended: <code>headrace replay {text(shlex.quote(report.output))}</code></p>')
    return lines if len(lines) > 1 else [*lines, '<p class="good">Nothing: no dead letters, no unreadable files, no process died.</p>']


def _money(cost: Cost | None, per_tokens: float | None) -> list[str]:
    lines = ["<h2>Money</h2>"]
    if cost is None:
        return [*lines, '<p class="soft">No machine was seen, so there is nothing to price.</p>']
    if cost.usd is not None:
        least = "At least " if cost.unpriced else ""
        each = f", {money(cost.usd_per_million_rows)} per million rows" if cost.usd_per_million_rows is not None else ""
        tokens = f", {money(per_tokens)} per million tokens" if per_tokens is not None else ""
        lines.append(f"<p>{least}<strong>{money(cost.usd)}</strong>{each}{tokens}.</p>")
    if cost.busy is not None and cost.idle is not None:
        idle = f": {money(cost.idle_usd)}" if cost.idle_usd is not None else ""
        lines.append(stack([("computing", "at work", cost.busy), ("rest", f"idle hardware{idle},", cost.idle)]))
    if cost.charges:
        rows = [
            (safe(one.what), f"{one.machines:,}", f"{one.hours:,.2f}", f"{one.price.usd_per_hour:.6g}", money(one.usd), safe(one.price.basis))
            for one in cost.charges[:_LINES]
        ]
        lines += _table(("Machines", "n Number", "n Hours", "n USD/h", "n Sum", "Price from"), rows, caption="Machine-time and its prices", wide=True)
        if left := len(cost.charges) - len(rows):
            lines.append(f'<p class="soft">{_more(left, "kind of machine", plural="kinds of machines")} in report.json.</p>')
    if cost.unpriced:
        kinds = sorted({machine.what for machine in cost.unpriced})
        named = ", ".join(kinds[:_CARDS]) + (f" and {len(kinds) - _CARDS:,} more kinds" if len(kinds) > _CARDS else "")
        whose = f"{len(cost.unpriced):,} of the machines ({safe(named)}), there for {cost.unpriced_hours:,.2f} hours"
        lines.append(
            f'<p>No price is set for {whose}. Name one with <code class="flag">--price</code>, such as <code class="flag">--price cpu=0.04</code>.</p>'
        )
    return lines


def _plan(plan: str) -> list[str]:
    if not plan.strip():
        return []
    return ["<h2>The plan</h2>", f'<pre tabindex="0" aria-label="The plan">{text(plan.rstrip(), most=_PLAN)}</pre>']


def _footer(report: Report) -> list[str]:
    made = ", ".join(f"{safe(name)} {safe(version)}" for name, version in list(report.versions.items())[:_LINES])
    more = "The same as data: report.json, and every event in events-*.jsonl, beside this page."
    return [f"<footer>{f'Made with {made}. ' if made else ''}{more}</footer>"]


def _list(lines: Sequence[str], noun: str) -> list[str]:
    """At most so many lines; the rest is counted."""
    shown = [f"<li>{safe(line)}</li>" for line in lines[:_LINES]]
    left = len(lines) - len(shown)
    return ['<ul class="plain">', *shown, "</ul>", f'<p class="soft">{_more(left, noun)} in report.json.</p>' if left else ""]


def _more(left: int, noun: str, *, plural: str = "") -> str:
    return f"{left:,} more {noun if left == 1 else plural or noun + 's'}"


def _table(heads: Iterable[str], rows: Iterable[Sequence[Any]], *, caption: str, wide: bool = False) -> list[str]:
    """A table with headers, which scrolls within itself where it is too wide. A head that starts with `n ` is that of numbers."""
    number = ' class="n"'
    names = [(number if head.startswith("n ") else "", head.removeprefix("n ")) for head in heads]
    table = '<table class="wide">' if wide else "<table>"
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">', table, f"<caption>{caption}</caption>"]
    lines.append("<thead><tr>" + "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in names) + "</tr></thead>")
    lines.append("<tbody>")
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{cell}</td>" for (kind, _), cell in zip(names[1:], rest, strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return [*lines, "</tbody>", "</table>", "</div>"]
