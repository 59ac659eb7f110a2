"""Where a run starts: afresh, where another one stopped, or not at all. Pure decisions over a state, a source and facts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from headrace.errors import ChangedError
from headrace.fingerprint import OUTPUT_COLUMNS, differences, refuse
from headrace.ledger import HOME
from headrace.state import State
from headrace.units import Source, Unit, write_units

Todo = list[tuple[Unit, list[tuple[int, int | None]]]]
"""The rows to run, as intervals per unit; one without an end goes on to the end of the unit."""

_SHOWN = 4  # files named in a message
_FIXED = {
    "--where": "rows are counted behind the filter, so those that are done cannot be told apart any more",
    OUTPUT_COLUMNS: "one output cannot hold both",
}
"""Facts that cannot change during the life of an output, and why."""
GONE = "is gone from the input"  # how the reason ends, for a unit whose file was there once


class Mode(StrEnum):
    """What to do with an output that was begun before: go on with the same job, go on although it changed, or throw it away.

    `RETRY` goes on although it changed, and runs what failed again as well.
    """

    RESUME = "resume"
    ACCEPT_CHANGE = "accept-change"
    RESTART = "restart"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts: what is known, and the units that `state` counts by.

    `changes` tell what is not as it was when the output was begun; `grew` is whether the input has rows that it had not.
    """

    state: State
    units: tuple[Unit, ...]
    changes: tuple[str, ...] = ()
    grew: bool = False


def start(before: State | None, source: Source, *, request: Mapping[str, Any], facts: Mapping[str, str], old: Callable[[str], Sequence[Unit]]) -> Start:
    """Where a run over `source` starts that goes on from `before`, whose unit table `old` reads by its name.

    Units keep their numbers for as long as the output lives: dead letters and intervals count by them.

    Raises:
        ChangedError: rows of a unit are settled that cannot be told from the others any more.
    """
    if before is None or not (before.files or before.letters or before.finished):  # nothing is there to be kept
        return Start(State(request=request, facts=facts, units=table_name(source.units), unreadable=dict(source.unreadable)), source.units)
    _refuse_other_output(before.facts, facts)
    table = old(before.units)
    changes = differences(before.facts, facts) + _changed_files([unit for unit in table if not is_gone(before.unreadable.get(unit.id))], source.units)
    state = replace(before, request=request, facts=facts, counts=dict(before.counts), unreadable=dict(before.unreadable))
    known = {unit.key: unit for unit in table}
    fresh = max((unit.id for unit in table), default=-1) + 1
    units = []
    for unit in source.units:
        was = known.pop(unit.key, None)
        now = replace(unit, id=fresh if was is None else was.id)
        if was is None:
            fresh += 1
        elif _version(was) != _version(now):
            _refuse_other_rows(was, now, before)
            state.counts.pop(now.id, None)
            state.unreadable.pop(now.id, None)
        if is_gone(state.unreadable.get(now.id)):  # it is back
            del state.unreadable[now.id]
        if unit.id in source.unreadable:
            state.unreadable[now.id] = source.unreadable[unit.id]
        units.append(now)
    for gone in known.values():
        state.unreadable.pop(gone.id, None)
        if _settled(before, gone):
            units.append(gone)
            state.unreadable[gone.id] = f"{gone.paths[0]!r} {GONE}"
    state.units = table_name(units)
    return Start(state, tuple(units), tuple(changes), grew=bool(todo(state, units)))


def check(here: Start, output: str, mode: Mode) -> None:
    """Raise ChangedError where something changed since the output was begun, and the user has not said what to do then."""
    if here.changes and mode is Mode.RESUME:
        raise refuse(output, here.changes)


def todo(state: State, units: Sequence[Unit], *, retry: bool = False) -> Todo:
    """The rows that are neither done nor given up, per unit in order; with `retry` those given up as well."""
    found: Todo = []
    for unit in units:
        rows: list[tuple[int, int | None]] = []
        why = state.unreadable.get(unit.id)
        if why is None or (retry and not is_gone(why)):
            rows += state.missing(unit.id, unit.start, unit.rows)
        if retry and not is_gone(why) and unit.id in state.dead:
            rows = sorted([*rows, *state.dead[unit.id]], key=lambda span: span[0])
        if rows:
            found.append((unit, rows))
    return found


def is_gone(why: str | None) -> bool:
    """Whether a unit is given up because its file is not in the input any more."""
    return why is not None and why.endswith(GONE)


def given_up(state: State, units: Sequence[Unit]) -> dict[int, str]:
    """The units of which rows are missing because they cannot be read, and why. One whose file has no footer has none that could be counted."""
    known = {unit.id: unit for unit in units}
    lost = ((known[number], why) for number, why in state.unreadable.items() if number in known)
    return {unit.id: why for unit, why in lost if unit.rows == 0 or state.missing(unit.id, unit.start, unit.rows)}


def renumbered(source: Source, units: Sequence[Unit]) -> Source:
    """The source with the numbers that its units have in the ledger, where `units` begin with them in the source's order."""
    pairs = zip(source.units, units[: len(source.units)], strict=True)
    return replace(source, unreadable={now.id: source.unreadable[was.id] for was, now in pairs if was.id in source.unreadable})


def table_name(units: Sequence[Unit]) -> str:
    """The name of a unit table, which tells its content apart from any other's."""
    return f"{HOME}/units-{hashlib.sha256(write_units(units)).hexdigest()[:16]}.parquet"


def _version(unit: Unit) -> tuple[int, int, int | None]:
    return unit.size_bytes, unit.modified_ns, unit.rows


def _settled(state: State, unit: Unit) -> int:
    return sum(rows[unit.id].rows for rows in (state.done, state.dead) if unit.id in rows)


def _refuse_other_rows(was: Unit, now: Unit, before: State) -> None:
    """Refuse a file whose rows moved, as far as that can be told: where only reading counts them, by its size."""
    same_file = (was.size_bytes, was.modified_ns) == (now.size_bytes, now.modified_ns)  # of which --limit takes another part
    sizes = (f"{was.rows} rows", f"{now.rows}") if was.rows is not None else (f"{was.size_bytes:,} bytes", f"{now.size_bytes:,}")
    moved = was.rows != now.rows or (was.rows is None and was.size_bytes != now.size_bytes)
    if moved and not same_file and (settled := _settled(before, was)):
        raise ChangedError(
            f"{was.paths[0]!r} had {sizes[0]} when {settled} of its rows were run, and has {sizes[1]} now: "
            "they cannot be told apart any more. Begin again with --restart, or put the file back"
        )


def _refuse_other_output(before: Mapping[str, str], facts: Mapping[str, str]) -> None:
    """Refuse what cannot change during the life of an output, whatever the user accepts."""
    for name, why in _FIXED.items():
        if before.get(name) != facts.get(name):
            raise ChangedError(
                f"{name} was {before.get(name)!r} when the output was begun, and is {facts.get(name)!r} now: {why}. Begin again with --restart, or keep it"
            )


def _changed_files(old: Sequence[Unit], new: Sequence[Unit]) -> list[str]:
    was, now = ({unit.key: (unit.size_bytes, unit.modified_ns) for unit in units} for units in (old, new))
    lines = []
    for what, keys in (
        ("new in the input", now.keys() - was.keys()),
        ("gone from the input", was.keys() - now.keys()),
        ("changed", {key for key in was.keys() & now.keys() if was[key] != now[key]}),
    ):
        if names := sorted({PurePosixPath(path).name for paths, *_ in keys for path in paths}):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"input: {what}: {', '.join(names[:_SHOWN])}{more}")
    return lines
