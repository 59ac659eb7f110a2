"""Runs by the folders that they leave: found, told in a line each, and compared two by two. Only reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from headrace import heartbeat, ledger
from headrace.errors import HeadraceError, OutputError
from headrace.filesystems import Place, locate
from headrace.ledger import HOME
from headrace.store import Folder
from headrace.units import read_units

HELD_BACK = "what held it back"
_DEEP = 4  # folders below the one that was named
_AT_ONCE = 16  # folders looked at: on an object store, each look is a round trip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a folder tells of its run. Figures that it does not tell are None.

    `state` is that of the latest run: `running`, `succeeded`, `stopped`, `failed`, `interrupted` (it died without a word) or
    `damaged`; `error` says more of the last two and of a failure. `rows` are those of the input.
    """

    output: str
    state: str
    pipeline: str = ""
    rows: int | None = None
    rows_out: int | None = None
    dead_letters: int | None = None
    started_s: float | None = None
    wall_s: float | None = None
    rows_per_s: float | None = None
    usd: float | None = None
    error: str = ""


def find(folders: Iterable[str]) -> list[Run]:
    """The runs whose outputs are these folders or URIs, or lie up to four folders below them; the latest first.

    Raises:
        OutputError: a folder is not there, or cannot be listed.
    """
    places = [locate(folder, error=OutputError) for folder in folders]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        outputs, level = dict[str, Place](), places
        for depth in range(_DEEP + 1):
            below: list[Place] = []
            for place, names in zip(level, pool.map(_folders, level, itertools.repeat(not depth)), strict=True):
                if HOME in names:
                    outputs[place.uri] = place
                else:
                    below += [place.child(name) for name in names if name[:1] not in "._"]
            level = below
        runs = list(pool.map(look, outputs.values()))
    return sorted(runs, key=lambda run: (-(run.started_s or 0.0), run.output))


def _folders(place: Place, wanted: bool) -> list[str]:
    try:
        infos = place.filesystem.get_file_info(fs.FileSelector(place.path or "/"))
    except (OSError, pa.ArrowException) as error:
        if wanted:
            raise OutputError(f"cannot list {place.uri!r}: {error}; name a folder with outputs of headrace, or one of them") from error
        return []  # not ours to read, or gone meanwhile
    return [info.base_name for info in infos if info.type == fs.FileType.Directory]


def look(place: Place) -> Run:
    """What the output at `place` tells of its latest run."""
    store = Folder(place)
    try:
        newest, report = ledger.newest(store), _report(store)
        if heartbeat.holder(store) == newest != "":
            return _unreported(place, store, "running")
        if not newest:
            return Run(output=place.uri, state="damaged", error="it has no ledger")
        if report is None or report.get("run") != newest:
            return _unreported(place, store, "interrupted")
        names = ("pipeline", "state", "rows", "rows_out", "dead_letters", "started_s", "wall_s", "rows_per_s", "error")
        return Run(output=place.uri, usd=(report["cost"] or {}).get("usd"), **{name: report[name] for name in names})
    except (HeadraceError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        first = next(iter(str(error).splitlines()), "")
        return Run(output=place.uri, state="damaged", error=f"{type(error).__name__}: {first}")


def _unreported(place: Place, store: Folder, state: str) -> Run:
    """A run that has left no report yet, by its ledger."""
    known = ledger.load(store)
    if known is None:
        return Run(output=place.uri, state=state, rows_out=0, dead_letters=0)
    counts = [unit.rows if unit.rows is not None else known.counts.get(unit.id) for unit in read_units(store.read(f"{HOME}/{known.units}"))]
    rows = None if None in counts else sum(filter(None, counts))
    started_s = min((file.at_s for file in known.files.values() if file.at_s), default=None)
    name = str(known.request.get("pipeline") or "")
    return Run(output=place.uri, state=state, pipeline=name, rows=rows, rows_out=known.rows_done, dead_letters=known.rows_dead, started_s=started_s)


def _report(store: Folder) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(f"{HOME}/report.json"))
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise ValueError("report.json is no object")
    return found


def told(path: str) -> dict[str, Any]:
    """The report that a run left: in an output folder or URI, or as a `report.json`.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    place = locate(path, error=OutputError)
    name = "" if PurePosixPath(place.path).suffix == ".json" else f"{HOME}/report.json"
    try:
        report = json.loads(Folder(place).read(name))
        if missing := [key for key in ("run", "rows_in", "groups") if key not in report]:
            raise ValueError(f"it has no {missing[0]!r}")
    except FileNotFoundError as error:
        raise OutputError(f"{path!r} has no report of a run: name an output folder of headrace, or a report.json; headrace runs DIR lists them") from error
    except (ValueError, TypeError) as error:
        raise OutputError(f"the report of {path!r} cannot be read: {error}") from error
    return dict(report)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two runs differ; `ratio` is the second over the first, of figures that are not 0."""

    about: str
    what: str
    first: Any
    second: Any

    @property
    def ratio(self) -> float | None:
        """The second over the first."""
        both = [value for value in (self.first, self.second) if isinstance(value, (int, float)) and not isinstance(value, bool)]
        return both[1] / both[0] if len(both) == 2 and both[0] else None


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """In what two runs differ by their reports: what was run, what came of it, what it cost, and where each group's time went."""
    found = []
    for about, one, other in _sections(first, second):
        for what in dict.fromkeys((*one, *other)):
            if one.get(what) != other.get(what):
                found.append(Difference(about, what, one.get(what), other.get(what)))
    return found


def _sections(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of what can be compared by name, each with what it is about."""
    yield "versions", one.get("versions") or {}, other.get("versions") or {}
    yield "what was run", one.get("facts") or {}, other.get("facts") or {}
    yield "the run", _figures(one), _figures(other)
    yield "dead letters", one.get("causes") or {}, other.get("causes") or {}
    before, after = ({group["name"]: _group(group) for group in report["groups"]} for report in (one, other))
    yield "groups", {name: "there" for name in before if name not in after}, {name: "there" for name in after if name not in before}
    for name in before:
        if name in after:
            yield name, before[name], after[name]
    yield HELD_BACK, {"": one.get("bottleneck") or ""}, {"": other.get("bottleneck") or ""}


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "state",
        "error",
        "rows_in",
        "rows_out",
        "dead_letters",
        "files",
        "bytes",
        "wall_s",
        "startup_s",
        "rows_per_s",
        "steady_rows_per_s",
        "process_deaths",
    )
    cost = report.get("cost") or {}
    return {name: report.get(name) for name in names} | {name: cost.get(name) for name in ("usd", "usd_per_million_rows", "idle")}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    names = ("kind", "cpus", "gpus", "rows", "rows_per_s", "busy_s", "replicas", "setup_s", "padding")
    rules = {"rules": ", ".join(group.get("rules") or ())}
    return {name: group.get(name) for name in names} | rules | dict(group.get("shares") or {})
