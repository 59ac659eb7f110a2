"""Which runs there are below some folders, and how each stands: a reading of what they left beside their outputs."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from headrace import heartbeat, ledger
from headrace.errors import HeadraceError, OutputError, nearest
from headrace.filesystems import Place, locate
from headrace.ledger import HOME, REPORT, SUCCESS
from headrace.store import Folder
from headrace.units import rows_in

DAMAGED, RUNNING, INTERRUPTED = "damaged", "running", "interrupted"

_DEEPEST = 6  # folders below one that is named
_AT_ONCE = 16  # outputs that are read at the same time, for a store may be far away
_LAST_S = 1e11  # beyond any calendar
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The last run on an output.

    `state` is how it ended (`succeeded`, `stopped`, `failed`), `running`, `interrupted` where it died without an end, or
    `damaged` where that cannot be told; `why` says more. `rows` are settled, dead letters included, of `total`, if that is known.
    Times are in seconds; an interrupted run has that up to its last sign of life.
    """

    output: str
    state: str
    run: str = ""
    pipeline: str = ""
    rows: int = 0
    total: int | None = None
    dead_letters: int = 0
    began_s: float | None = None
    wall_s: float | None = None
    usd: float | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def runs(uris: Iterable[str]) -> list[Run]:
    """The last run on each output in or below these folders, globs of folders or URIs; the newest first, damaged ones last.

    Raises:
        OutputError: there is no such folder, or it cannot be listed.
    """
    damaged: list[Run] = []
    seen: set[str] = set()
    places = {place.uri: place for uri in uris for folder in _folders(uri) for place in _outputs(folder, seen, damaged)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        each = map if all(place.is_local for place in places.values()) else pool.map  # threads would only get in each other's way on a local disk
        found = dict(zip(places, each(_read, places.values()), strict=True))
        # A run that left no report is at work or dead, which its sign of life tells; those in doubt are watched together.
        signs = {uri: sign for uri, one in found.items() if one.state == INTERRUPTED and (sign := heartbeat.read(Folder(places[uri])))}
        there = heartbeat.at_work([(Folder(places[uri]), sign) for uri, sign in signs.items()])
        alive = dict(zip(signs, there, strict=True))
        known = each(lambda uri: _going(places[uri], found[uri], signs.get(uri), alive=alive.get(uri, False)), found)
        return sorted([*known, *damaged], key=lambda one: (one.state == DAMAGED, -(one.began_s or 0.0), one.output))


def report_in(store: Folder) -> dict[str, Any] | None:
    """What `report.json` of an output says; None where there is none.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        return parse(store.read(REPORT))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{store.place.child(REPORT).uri!r} is damaged: {error}") from error


def parse(content: bytes) -> dict[str, Any]:
    """The content of a `report.json`; ValueError where it is no such thing."""
    values = json.loads(content)
    if not isinstance(values, dict) or not {"pipeline", "output", "run", "state", "started_s", "rows_in"} <= values.keys():
        raise ValueError("it is no report of a run")
    return values


def _read(place: Place) -> Run:
    """The run as its report has it; as interrupted, without more, where it left none."""
    try:
        store = Folder(place)
        run, report = ledger.holder(store), report_in(store)
        if report is not None and report["run"] == run:
            return _ended(place.uri, report)
        if not run:
            return Run(output=place.uri, state=DAMAGED, why="its ledger is gone" if report else "it has no ledger; headrace 0.1.0 kept none")
        return Run(output=place.uri, state=INTERRUPTED, run=run)
    except (HeadraceError, KeyError, TypeError, ValueError) as error:
        return Run(output=place.uri, state=DAMAGED, why=_said(error))


def _ended(output: str, report: Mapping[str, Any]) -> Run:
    return Run(
        output=output,
        state=str(report["state"]),
        run=str(report["run"]),
        pipeline=str(report["pipeline"]),
        rows=int(report["rows_in"]),
        total=None if report["rows"] is None else int(report["rows"]),
        dead_letters=int(report["dead_letters"]),
        began_s=_seconds(report["started_s"]),
        wall_s=_seconds(report["wall_s"]),
        usd=None if (cost := report.get("cost")) is None or cost["usd"] is None else float(cost["usd"]),
        why=str(report.get("error", "")),
    )


def _seconds(value: float) -> float:
    if not 0 <= value < _LAST_S:
        raise ValueError(f"{value!r} is no time in seconds")
    return float(value)


def _going(place: Place, run: Run, sign: Mapping[str, Any] | None, *, alive: bool) -> Run:
    """A run without a report as its ledger has it."""
    if run.state != INTERRUPTED:
        return run
    try:
        store = Folder(place)
        state = ledger.load(store)
        if sign is None or sign["run"] != run.run:
            alive, sign = False, {}
        if not alive and (now := _read(place)).state != INTERRUPTED:
            return now  # it ended while it was watched
        began_s, last_s = sign.get("began_s") or _age(place, run.run), sign.get("at_s")
        wall_s = None if began_s is None or last_s is None else max(0.0, last_s - began_s)
        run = dataclasses.replace(run, state=RUNNING if alive else INTERRUPTED, began_s=began_s, wall_s=wall_s)
        if state is None:
            return run
        if not alive and state.finished and SUCCESS in store.names(""):
            run = dataclasses.replace(run, state="succeeded")  # it died after its last file was in its place
        total = rows_in(store.read(state.units), state.counts)
        pipeline, dead = str(state.request.get("pipeline", "")), state.rows_dead
        return dataclasses.replace(run, pipeline=pipeline, rows=state.rows_done + dead, total=total, dead_letters=dead)
    except FileNotFoundError:
        return dataclasses.replace(run, state=DAMAGED, why="its table of units is gone")
    except (HeadraceError, OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        return dataclasses.replace(run, state=DAMAGED, why=_said(error))


def _age(place: Place, run: str) -> float | None:
    """When a run claimed its output, by the clock of the file system."""
    changed_ns = place.filesystem.get_file_info(place.child(ledger.claim_of(run)).path).mtime_ns
    return None if changed_ns is None else changed_ns / 1e9


def _said(error: BaseException) -> str:
    return str(error).partition("\n")[0] if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"


def _folders(uri: str) -> list[Place]:
    """The folder that a path means, or those that match a glob; `*` stays within a folder.

    Raises:
        OutputError: there is none.
    """
    place = locate(uri.rstrip("/") or uri, error=OutputError)
    try:
        if place.filesystem.get_file_info(place.path).type == fs.FileType.Directory:
            return [place]
        segments = place.path.split("/")
        first = next((at for at, segment in enumerate(segments) if _WILD.search(segment)), len(segments) - 1)
        root = "/" if place.uri.startswith("/") else os.curdir
        base = Place(place.filesystem, "/".join(segments[:first]) or "/", "/".join(place.uri.split("/")[: first - len(segments)]) or root)
        found = [base]
        for pattern in segments[first:]:
            below = [child for folder in found for child in _below(folder)]
            found = [child for child in below if fnmatch.fnmatchcase(_name(child), pattern)]
        if not found:
            hint = nearest(_name(place), map(_name, _below(base))) if first == len(segments) - 1 else ""
            raise OutputError(f"there is no folder {uri!r}{hint}")
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"cannot list {uri!r}: {error}") from error
    return found


def _outputs(folder: Place, seen: set[str], damaged: list[Run]) -> Iterator[Place]:
    """The outputs in a folder and below it, level by level, but for those that were seen before. There is nothing below an output.

    Folders that cannot be listed go to `damaged`.
    """
    level = [folder]
    for _ in range(_DEEPEST + 1):
        fresh: dict[str, Place] = {}
        for place in level:
            fresh.setdefault(_identity(place), place)
        level = [place for known, place in fresh.items() if known not in seen]
        seen.update(fresh)
        homes = folder.filesystem.get_file_info([place.child(HOME).path for place in level])
        below = []
        for place, home in zip(level, homes, strict=True):
            if home.type == fs.FileType.Directory:
                yield place
                continue
            try:
                below += _below(place)
            except (OSError, pa.ArrowException) as error:
                damaged.append(Run(output=place.uri, state=DAMAGED, why=f"it cannot be listed: {error}"))
        if not below:
            return
        level = below


def _below(folder: Place) -> list[Place]:
    """The folders in a folder, but for those that readers of data skip as well."""
    infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
    names = sorted(info.base_name for info in infos if info.type == fs.FileType.Directory and info.base_name[:1] not in ("_", "."))
    return [_child(folder, name) for name in names]


def _child(folder: Place, name: str) -> Place:
    """The place below, called as the user would call it: nobody writes `./out`."""
    child = folder.child(name)
    return Place(child.filesystem, child.path, name) if folder.uri == os.curdir else child


def _identity(place: Place) -> str:
    """What a folder is called by all who mean it; links lead to one more than once, or in circles."""
    return os.path.realpath(place.path) if place.is_local else place.uri


def _name(place: Place) -> str:
    return place.path.rpartition("/")[2]
