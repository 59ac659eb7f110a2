"""How two runs differ: what they were asked for, what became of the rows, and where the time and the money went."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from headrace.console.charts import percent
from headrace.console.runs import parse, report_in
from headrace.cost import money
from headrace.errors import OutputError, nearest
from headrace.filesystems import Place, locate
from headrace.ledger import HOME, REPORT
from headrace.report import duration, rate, size
from headrace.store import Folder

Shown = Callable[[Any], str]

_LONGEST = 60  # characters of a value
_ROWS: Mapping[str, Shown] = dict.fromkeys(("rows", "rows_before", "rows_in", "rows_out", "dead_letters", "process_deaths", "files"), lambda one: f"{one:,}")
_TIMES: Mapping[str, Shown] = {"wall_s": duration, "startup_s": duration, "first_rows_s": duration, "rows_per_s": rate, "steady_rows_per_s": rate}
_GROUP: Mapping[str, Shown] = {
    "cpus": lambda one: f"{one:g}",
    "gpus": lambda one: f"{one:g}",
    "replicas": lambda one: f"{one:,}",
    "rows_per_s": rate,
    "busy_s": duration,
    "setup_s": duration,
    "padding": percent,
}
_COST: Mapping[str, Shown] = {"usd": money, "usd_per_million_rows": money, "idle": percent, "idle_usd": money}
_CALLED = {
    "rows": "rows of the input",
    "rows_before": "rows settled before",
    "rows_in": "rows in",
    "rows_out": "rows out",
    "dead_letters": "dead letters",
    "process_deaths": "deaths of processes",
    "wall_s": "time",
    "startup_s": "start-up",
    "first_rows_s": "first rows through",
    "rows_per_s": "rows/s",
    "steady_rows_per_s": "rows/s in steady state",
    "busy_s": "busy",
    "setup_s": "set-up",
    "starved": "waiting for input",
    "blocked": "waiting for what comes after",
    "between": "between blocks",
    "idle": "idle share",
    "usd": "cost",
    "usd_per_million_rows": "cost per million rows",
    "idle_usd": "cost of the idle share",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not the same in two runs.

    `before` and `after` are the values as the reports have them, None where a report lacks them, and `shown` the two in words; `ratio` is
    that of the second to the first, where both are numbers and neither is 0.
    """

    part: str
    name: str
    before: Any
    after: Any
    shown: tuple[str, str]
    ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def read(uri: str) -> dict[str, Any]:
    """The report of a run, by the folder it wrote to or by the path of its `report.json`.

    Raises:
        OutputError: no run ended there, or its report cannot be read.
    """
    place = locate(uri, error=OutputError)
    if uri.endswith(".json"):
        try:
            folder, _, name = place.path.rpartition("/")
            return parse(Folder(Place(place.filesystem, folder, uri)).read(name))
        except FileNotFoundError:
            raise OutputError(f"there is no file {uri!r}; name the folder that a run wrote to, or its {REPORT}") from None
        except ValueError as error:
            raise OutputError(f"{uri!r} cannot be compared: {error}") from error
    store = Folder(place)
    if report := report_in(store):
        return report
    held = store.names("")
    if HOME in held:
        raise OutputError(f"the run in {uri!r} has no report: it has not ended, or was killed. headrace runs {uri} says which; run it to its end")
    if held:
        raise OutputError(f"{uri!r} holds no run of headrace; headrace runs {uri} lists those below it")
    parent, name = os.path.split(place.path.rstrip("/"))
    siblings = Folder(Place(place.filesystem, parent, uri)).names("")
    raise OutputError(f"there is no run in {uri!r}: the folder is empty, or not there{nearest(name, siblings)}")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What differs between two reports, in the order in which a person asks; figures that look the same are the same.

    Raises:
        OutputError: a report is not of the form that headrace writes, or not of a batch job.
    """
    for report in (before, after):
        if (kind := report.get("kind", "batch")) != "batch":
            raise OutputError(f"{report['output']!r} holds {'a training' if kind == 'training' else kind}; what is compared are batch jobs")
    try:
        return [one for one in _all(before, after) if one.shown[0] != one.shown[1]]
    except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise OutputError(f"the reports cannot be compared; one is damaged, or was written by another version of headrace: {error!r}") from error


def _all(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for name in ("state", "pipeline"):
        yield _words("run", name, before[name], after[name])
    yield from _asked(before, after)
    yield from _figures("rows", before, after, {**_ROWS, "bytes": size})
    yield from _table("dead letters", before["causes"], after["causes"])
    yield from _figures("time", before, after, _TIMES)
    old, new = ({group["name"]: group for group in one["groups"]} for one in (before, after))
    for name in _names(old, new):
        yield from _group(name, old.get(name), new.get(name))
    costs = before["cost"] or {}, after["cost"] or {}
    yield from _figures("money", *costs, {name: shown for name, shown in _COST.items() if any(one.get(name) is not None for one in costs)})
    yield _words("advice", "what held it back", before.get("bottleneck"), after.get("bottleneck"), most=1000)


def _asked(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    """What the runs were: input, flags, settings, code, versions. What an older report does not tell is not compared."""
    if before.get("request") and after.get("request"):
        yield _words("input", "paths", *(", ".join(one["request"].get("input", ())) for one in (before, after)))
        yield _same("input", "files", before.get("units"), after.get("units"))
    for part, key in (("settings", "facts"), ("versions", "versions")):
        old, new = before.get(key) or {}, after.get(key) or {}
        for name in _names(old, new) if old and new else ():
            digest = name.startswith(("code of ", "version of "))
            yield (_same if digest else _words)(part, name, old.get(name), new.get(name))


def _group(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterator[Difference]:
    if old is None or new is None:
        yield Difference(f"group {name}", "the group", old and name, new and name, ("absent" if old is None else "there", "absent" if new is None else "there"))
        return
    part = f"group {name}"
    yield _words(part, "batches of", *(", ".join(one["rules"]) for one in (old, new)))
    yield from _figures(part, old, new, _GROUP)
    shares = old["shares"] or {}, new["shares"] or {}
    yield from _figures(part, *shares, dict.fromkeys(("computing", "starved", "blocked", "between"), percent))


def _table(part: str, old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[Difference]:
    for name in sorted(_names(old, new), key=lambda name: -max(old.get(name, 0), new.get(name, 0))):
        yield _figure(part, name, old.get(name, 0), new.get(name, 0), lambda number: f"{number:,}")


def _figures(part: str, old: Mapping[str, Any], new: Mapping[str, Any], shown: Mapping[str, Shown]) -> Iterator[Difference]:
    for name, words in shown.items():
        yield _figure(part, _CALLED.get(name, name), old.get(name), new.get(name), words)


def _figure(part: str, name: str, old: float | None, new: float | None, words: Shown) -> Difference:
    told = ("-" if old is None else words(old), "-" if new is None else words(new))
    return Difference(part, name, old, new, told, new / old if old and new else None)


def _words(part: str, name: str, old: str | None, new: str | None, *, most: int = _LONGEST) -> Difference:
    return Difference(part, name, old, new, (_short(old, most), _short(new, most)) if old != new else ("", ""))


def _same(part: str, name: str, old: str | None, new: str | None) -> Difference:
    """Of what is known by a digest only."""
    told = ("", "changed") if old and new else ("there" if old else "absent", "there" if new else "absent")
    return Difference(part, name, old, new, told if old != new else ("", ""))


def _short(text: str | None, most: int) -> str:
    if not text:
        return "-"
    return text if len(text) <= most else text[: most - 3] + "..."


def _names(old: Mapping[str, Any], new: Mapping[str, Any]) -> Sequence[str]:
    """The names of both, in order."""
    return list(dict.fromkeys([*old, *new]))
