"""Figures out of counts: latencies counted in buckets and told as quantiles, and what was counted in the last ten seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from headrace.readings import GROWING
from headrace.serving.routes import LATENCY_BOUNDS_S, DoorReport, VersionReport

RECENT_S = 10.0

_FEWEST_S = 0.5  # less time than this gives no rate
_COUNTED = ("answered", "errors", "rejected", "expired", "retries")


def bucket(took_s: float) -> int:
    """The place in `VersionReport.latencies` where a request that took so long is counted."""
    return bisect_left(LATENCY_BOUNDS_S, took_s)


def quantile(counts: Sequence[float], q: float, *, bounds: Sequence[float] = LATENCY_BOUNDS_S) -> float | None:
    """The time within which a share `q` of what `counts` holds took; None where nothing was counted.

    `counts` has one entry per bound, and one for what lies beyond the last, of which only that bound is known. Inside a bucket, times count as
    evenly spread, which is how `histogram_quantile` of Prometheus has it; with bounds a factor of 1.2 apart that is right to within 20 %.
    """
    total = sum(counts)
    if total <= 0:
        return None
    wanted, below = q * total, 0.0
    for at, inside in enumerate(counts):
        if inside > 0 and below + inside >= wanted:
            if at >= len(bounds):
                return bounds[-1]
            low = bounds[at - 1] if at else 0.0
            return low + (bounds[at] - low) * max(0.0, wanted - below) / inside
        below += inside
    return bounds[-1]


class Recent:
    """What was counted lately by sources that each tell how much they have counted since they started.

    A source whose counts fall has started anew, or with `steady` was heard late; one that is silent falls out. Neither makes a figure negative.
    """

    def __init__(self, *, span_s: float = RECENT_S, steady: bool = False) -> None:
        self.span_s, self.steady = span_s, steady
        self._told: dict[Hashable, deque[tuple[float, tuple[float, ...]]]] = {}

    def add(self, source: Hashable, at_s: float, counts: Iterable[float]) -> None:
        """Take in what a source tells at a time, in seconds of any clock that only goes on."""
        told, now = self._told.setdefault(source, deque()), tuple(counts)
        if told and any(new < old for new, old in zip(now, told[-1][1], strict=True)):
            if self.steady:
                now = tuple(map(max, now, told[-1][1]))
            else:
                told.clear()
        told.append((at_s, now))
        while len(told) > 1 and told[1][0] <= at_s - self.span_s:
            told.popleft()

    def since(self, now_s: float, *, sources: Collection[Hashable] | None = None) -> tuple[list[float], float]:
        """What all sources (or these) together counted in the last `span_s`, and over how many seconds; no counts where nothing is known."""
        self._told = {source: told for source, told in self._told.items() if told[-1][0] > now_s - self.span_s}
        sums: list[float] = []
        covered_s = 0.0
        for source, told in self._told.items():
            if sources is None or source in sources:
                (first_s, first), (last_s, last) = told[0], told[-1]
                grown = [new - old for new, old in zip(last, first, strict=True)]
                sums = list(map(float.__add__, sums, grown)) if sums else grown
                covered_s = max(covered_s, last_s - first_s)
        return sums, covered_s


class Lately:
    """The figures of the last ten seconds that `/status` has, out of what doors report each second. Times are of one monotonic clock."""

    def __init__(self) -> None:
        self._versions: dict[int, Recent] = {}
        self._hops: dict[tuple[int, str], Recent] = {}
        self._paces: dict[int, Recent] = {}
        self._replicas = Recent(steady=True)  # a replica that starts anew has another name, and doors hear of one at different times
        self._stats: dict[str, Mapping[str, Any]] = {}

    def note(self, sums: Mapping[int, VersionReport], doors: Iterable[DoorReport], *, now_s: float) -> None:
        """Take in, each second, what was counted of each version and the latest reports of the doors that are there."""
        self._versions = {version: self._versions.get(version) or Recent() for version in sums}
        for version, report in sums.items():
            self._versions[version].add("", now_s, (*(float(getattr(report, name)) for name in _COUNTED), *map(float, report.latencies)))
        self._stats = {}
        for door in doors:
            self._stats |= door.replicas
            for group, latencies in door.hops.items():
                self._hops.setdefault(group, Recent()).add(door.door, now_s, map(float, latencies))
            for version, (first, gaps) in door.paces.items():
                self._paces.setdefault(version, Recent()).add(door.door, now_s, map(float, (*first, *gaps)))
        self._hops = {group: hops for group, hops in self._hops.items() if group[0] in sums}
        self._paces = {version: paces for version, paces in self._paces.items() if version in sums}
        for replica, stats in self._stats.items():
            engine = stats.get("engine") or {}
            counts = (*(stats[name] for name in ("rows", "calls", "filled")), *(engine.get(name, 0) for name in GROWING))
            self._replicas.add(replica, now_s, map(float, counts))

    def version(self, version: int, *, now_s: float) -> dict[str, float | None]:
        """Of a version: what was counted per second, and within what time half of its requests and 99 % of them were answered; None while unknown."""
        sums, over_s = self._versions[version].since(now_s) if version in self._versions else ([], 0.0)
        known = bool(sums) and over_s >= _FEWEST_S
        figures = {f"{name}_per_s": round(sums[at] / over_s, 3) if known else None for at, name in enumerate(_COUNTED)}
        return figures | _quantiles(sums[len(_COUNTED) :])

    def speech(self, version: int, *, now_s: float) -> dict[str, float | None] | None:
        """Of a version that answers OpenAI's interface: the times to first tokens, and between tokens, of streamed answers; None of one that does not."""
        if version not in self._paces:
            return None
        paces = self._paces[version].since(now_s)[0]
        half = len(paces) // 2
        return {f"{what}_{name}": value for what, counts in (("ttft", paces[:half]), ("itl", paces[half:])) for name, value in _quantiles(counts).items()}

    def group(self, version: int, group: str, replicas: Collection[str], *, now_s: float) -> dict[str, float | None]:
        """Of a group with these replicas: requests waiting in them, rows and calls per second, how full calls were, quantiles, and the most memory.

        A call is full (1) if it holds all that it could have held. Quantiles are of the time in a replica, waiting included. None is unknown.
        """
        sums, over_s = self._replicas.since(now_s, sources=replicas)
        known = bool(sums) and over_s >= _FEWEST_S
        rows, calls, filled, *grown = sums or [0.0] * (3 + len(GROWING))
        stats = [self._stats[replica] for replica in replicas if replica in self._stats]
        latencies = self._hops[version, group].since(now_s)[0] if (version, group) in self._hops else []
        return {
            "queued": sum(one["queued"] for one in stats),
            "rows_per_s": round(rows / over_s, 3) if known else None,
            "calls_per_s": round(calls / over_s, 3) if known else None,
            "fill": round(filled / calls, 4) if known and calls else None,
            "memory_bytes": max((one["memory_bytes"] for one in stats), default=None),
            "engine": _engine([one["engine"] for one in stats if one.get("engine")], dict(zip(GROWING, grown, strict=True)), over_s if known else 0.0),
            **_quantiles(latencies),
        }


def _engine(told: Sequence[Mapping[str, float]], grown: Mapping[str, float], over_s: float) -> dict[str, float | None] | None:
    """The figures of engines together, and how they have grown over so many seconds, 0 where that is not known."""
    if not told:
        return None
    rates = {"input_tokens_per_s": "prompt_tokens", "output_tokens_per_s": "generated_tokens", "preempted_per_s": "preempted"}
    return {
        "running": sum(one.get("running", 0) for one in told),
        "waiting": sum(one.get("waiting", 0) for one in told),
        "sequences": sum(one.get("sequences", 0) for one in told),
        "kv_cache": max((one["kv_cache"] for one in told if "kv_cache" in one), default=None),
        **{name: round(grown[what] / over_s, 3) if over_s else None for name, what in rates.items()},
        "prefix_hits": round(grown["prefix_hits"] / grown["prefix_tokens"], 4) if over_s and grown["prefix_tokens"] else None,
    }


def _quantiles(latencies: Sequence[float]) -> dict[str, float | None]:
    values = {"p50_s": quantile(latencies, 0.5), "p99_s": quantile(latencies, 0.99)}
    return {name: None if value is None else round(value, 6) for name, value in values.items()}
