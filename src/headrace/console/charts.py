"""Charts of the page of a run, as HTML with SVG inside. Labels are HTML, so that they keep their size however wide a chart is drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.report import duration, rate

_STEPS_S = (0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600, 7200, 14400, 28800, 43200, 86400)
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (0, "s"))
_DAY_S = 86400.0
_MOST_TICKS = 6
_W, _H = 1000, 100  # of the drawing's own coordinates, which are stretched to what room there is


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure over time: a value for each span of `width_s`, from the run's start up to `end_s` (seconds)."""

    values: tuple[float, ...]
    width_s: float
    end_s: float

    @staticmethod
    def of(amounts: Sequence[float], *, width_s: float, end_s: float, per: float = 1.0, most: float = math.inf) -> Curve:
        """Amounts per second, divided by `per` and at most `most`. Of the last span, only what had gone by of it counts."""
        last = len(amounts) - 1
        spans_s = [width_s if at < last else min(width_s, max(end_s - at * width_s, width_s / 2)) for at in range(len(amounts))]
        return Curve(tuple(min(most, max(0.0, one) / span_s / per) for one, span_s in zip(amounts, spans_s, strict=True)), width_s, end_s)


def plot(curve: Curve, *, what: str, top: float | None = None, tall: bool = False, percent: bool = False, startup_s: float = 0.0) -> str:
    """A chart of one curve over the time of the run. `top` is the upper end of its scale, and `what` says what it shows."""
    ticks = _levels(max(curve.values, default=0.0) if top is None else top, tall=tall)
    high, end_s = ticks[-1], max(curve.end_s, 1e-3)
    shown = [f"{one:.0%}" if percent else short(one) for one in ticks]
    peak, mean = max(curve.values, default=0.0), sum(curve.values) / max(1, len(curve.values))
    told = [f"{one:.0%}" if percent else rate(one) for one in (mean, peak)]
    summary = f"{what} over {duration(end_s)}: {told[0]} on average, {told[1]} at most"
    parts = [f'<svg viewBox="0 0 {_W} {_H}" preserveAspectRatio="none" role="img" aria-label="{html.escape(summary)}">']
    if startup_s > 0:
        parts.append(f'<rect class="startup" width="{_x(startup_s, end_s)}" height="{_H}"/>')
    parts += [f'<path class="grid" d="M0 {_y(one, high)}H{_W}"/>' for one in ticks]
    if curve.values:
        line = _line(curve, high=high, end_s=end_s)
        parts.append(f'<path class="area" d="M0 {_H}V{line[1:].partition(" ")[2]}V{_H}Z"/><path class="line" d="{line}"/>')
    parts += _hovers(curve, end_s=end_s, percent=percent) if tall else []
    parts.append("</svg>")
    parts += [f'<span class="y" style="top:{_y(one, high)}%">{text}</span>' for one, text in zip(ticks, shown, strict=True)]
    for at, (at_s, text) in enumerate(_times(end_s)):
        left = round(100 * at_s / end_s, 1)
        place = " first" if not at else " last" if left > 93 else ""
        parts.append(f'<span class="x{place}{" odd" if at % 2 else ""}" style="left:{left}%">{text}</span>')
    return f'<div class="plot{" tall" if tall else ""}">{"".join(parts)}</div>'


def stack(parts: Sequence[tuple[str, str, float]]) -> str:
    """One bar of several parts, with its key: (class for the colour, label, share of the whole from 0 to 1) each."""
    bars = "".join(f'<i class="{kind}" style="flex-grow:{100 * share:.2f}"></i>' for kind, _, share in parts if share >= 0.0005)
    keys = "".join(f'<li><i class="{kind}"></i>{html.escape(label)} <b>{percent(share)}</b></li>' for kind, label, share in parts)
    return f'<div class="stack" aria-hidden="true">{bars}</div><ul class="key">{keys}</ul>'


def bar(share: float) -> str:
    """A thin bar for a cell of a table; the figure itself stands beside it."""
    return f'<div class="bar" aria-hidden="true"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></div>'


def percent(share: float) -> str:
    """A share in per cent; what is not quite nothing, or not quite all, is not said to be."""
    whole = f"{share:.0%}"
    return "<1%" if whole == "0%" and share > 0 else ">99%" if whole == "100%" and share < 1 else whole


def short(number: float) -> str:
    """A number for the scale of a chart: `0.5`, `800`, `20k`, `1.5M`."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.3g}{sign}"
    return f"{number:.2g}" if number < 100 else f"{number:.0f}"


def _levels(top: float, *, tall: bool) -> list[float]:
    """The levels that a scale up to `top` shows, evenly apart; the last is its upper end."""
    if not (math.isfinite(top) and top > 0):
        return [0.0, 1.0]
    if not tall:
        step = 10 ** math.floor(math.log10(top))
        return [0.0, next(step * one for one in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * one >= top * (1 - 1e-9))]
    step = 10 ** math.floor(math.log10(top / 4))
    step = next(step * one for one in (1, 2, 2.5, 5, 10) if step * one >= top / 4 * (1 - 1e-9))
    return [step * at for at in range(math.ceil(top / step - 1e-9) + 1)]


def _times(end_s: float) -> list[tuple[float, str]]:
    """The instants that a scale of time shows, with what they are called."""
    step = next((one for one in _STEPS_S if end_s / one <= _MOST_TICKS), 0.0)
    if not step:
        days = end_s / _DAY_S / _MOST_TICKS
        unit = 10 ** math.floor(math.log10(days))
        step = _DAY_S * next(unit * one for one in (1, 2, 5, 10) if unit * one >= days * (1 - 1e-9))
    size, name = next((size, name) for size, name in _UNITS if step >= size)
    return [(at * step, f"{at * step / (size or 1):g} {name}") for at in range(int(end_s / step + 1e-9) + 1)]


def _line(curve: Curve, *, high: float, end_s: float) -> str:
    """The curve in steps: a level for each span, for its values are means over them."""
    words, level = [], ""
    for at, value in enumerate(curve.values):
        y = _y(value, high)
        if y != level:
            words.append(f"{'M0 ' if not at else f'H{_x(at * curve.width_s, end_s)}V'}{y}")
            level = y
    return "".join(words) + f"H{_x(len(curve.values) * curve.width_s, end_s)}"


def _hovers(curve: Curve, *, end_s: float, percent: bool) -> list[str]:
    """What a pointer that rests on the chart is told."""
    rects = []
    for at, value in enumerate(curve.values):
        left, right = float(_x(at * curve.width_s, end_s)), float(_x((at + 1) * curve.width_s, end_s))
        if right > left:
            said = f"{duration(at * curve.width_s)}: {f'{value:.0%}' if percent else rate(value)}"
            rects.append(f'<rect class="hover" x="{left:g}" width="{right - left:.4g}" height="{_H}"><title>{said}</title></rect>')
    return rects


def _x(at_s: float, end_s: float) -> str:
    return f"{min(1.0, max(0.0, at_s / end_s)) * _W:.1f}".removesuffix(".0")


def _y(value: float, high: float) -> str:
    return f"{(1 - min(1.0, value / high)) * _H:.1f}".removesuffix(".0")
