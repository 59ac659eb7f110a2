"""What a ledger says: the rows of each input unit that are settled, and the files that hold them. Pure; `headrace.ledger` keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace.errors import LedgerError
from headrace.intervals import Intervals, Span

_NONE = Intervals()


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows, by its name in the output folder (or, for dead letters, in theirs)."""

    name: str
    rows: int
    bytes: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One commit. `done` and `dead` are the rows that it settles, per unit; a dead row may become done, or dead again.

    `files` and `letters` are added, `dropped` names files of either kind that no longer count (merged, or replayed). `counts`
    tells how many rows a unit has, where only reading could tell, and `unreadable` why the rest of a unit is given up.
    """

    files: Sequence[DataFile] = ()
    letters: Sequence[DataFile] = ()
    dropped: Sequence[str] = ()
    done: Mapping[int, Sequence[Span]] = field(default_factory=dict)
    dead: Mapping[int, Sequence[Span]] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Change:
        """The inverse of `to_json`."""
        made: dict[str, Any] = {name: {int(unit): one for unit, one in value.items()} if isinstance(value, dict) else value for name, value in values.items()}
        for name in ("files", "letters"):
            made[name] = [DataFile(**one) for one in made.get(name, ())]
        return Change(**made)


@dataclass(slots=True, kw_only=True)
class State:
    """What is known of an output. Grows with units and files, never with rows.

    `request` is what the run was asked for, `facts` what its results depend on (see `headrace.fingerprint`), and `units` the
    name of the file with the unit table.
    """

    request: Mapping[str, Any]
    facts: Mapping[str, str]
    units: str
    done: dict[int, Intervals] = field(default_factory=dict)
    dead: dict[int, Intervals] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    files: dict[str, DataFile] = field(default_factory=dict)
    letters: dict[str, DataFile] = field(default_factory=dict)
    finished: bool = False

    @property
    def rows_done(self) -> int:
        """Rows committed."""
        return sum(file.rows for file in self.files.values())

    @property
    def rows_dead(self) -> int:
        """Rows given up as dead letters."""
        return sum(rows.rows for rows in self.dead.values())

    def missing(self, unit: int, start: int, rows: int | None) -> list[tuple[int, int | None]]:
        """The rows of a unit that are neither done nor dead; the last interval is open where nobody knows how many there are."""
        stop = self.counts.get(unit) if rows is None else start + rows
        settled = self.done.get(unit, _NONE)
        left = settled.missing(start, stop)
        if dead := self.dead.get(unit):
            left = [span for begin, end in left for span in dead.missing(begin, end)]
        return left

    def apply(self, change: Change) -> None:
        """Add a commit.

        Raises:
            LedgerError: it would count a row twice, or its files do not hold the rows that it settles. Nothing is changed then.
        """
        self._check(change)
        for unit, spans in change.done.items():
            done, dead = self.done.setdefault(unit, Intervals()), self.dead.get(unit)
            for start, stop in spans:
                done.add(start, stop)
                if dead is not None:
                    dead.discard(start, stop)
        for unit, spans in change.dead.items():
            dead = self.dead.setdefault(unit, Intervals())
            for start, stop in spans:
                dead.add(start, stop)
        self.counts |= change.counts
        self.unreadable |= change.unreadable
        for name in change.dropped:
            del (self.files if name in self.files else self.letters)[name]
        self.files |= {file.name: file for file in change.files}
        self.letters |= {file.name: file for file in change.letters}
        self.finished = self.finished or change.finished

    def _check(self, change: Change) -> None:
        for unit in change.done.keys() | change.dead.keys():
            settled = [*change.done.get(unit, ()), *change.dead.get(unit, ())]
            done = self.done.get(unit, _NONE)
            once = Intervals(settled).rows == sum(stop - start for start, stop in settled)
            if not once or any(done.overlaps(*span) for span in settled):
                raise LedgerError(f"a commit settles rows of unit {unit} twice: {settled[:4]}")
        if unknown := [name for name in change.dropped if name not in self.files and name not in self.letters]:
            raise LedgerError(f"a commit drops {unknown[0]!r}, which is not there")
        added = sum(file.rows for file in change.files) - sum(self.files[name].rows for name in change.dropped if name in self.files)
        rows = sum(stop - start for spans in change.done.values() for start, stop in spans)
        if added != rows:
            raise LedgerError(f"a commit settles {rows} rows, but its files hold {added}")

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types."""
        return {
            "request": dict(self.request),
            "facts": dict(self.facts),
            "units": self.units,
            "done": {unit: rows.flat for unit, rows in self.done.items()},
            "dead": {unit: rows.flat for unit, rows in self.dead.items() if rows},
            "counts": self.counts,
            "unreadable": self.unreadable,
            "files": [[file.name, file.rows, file.bytes, file.at_s] for file in self.files.values()],
            "letters": [[file.name, file.rows, file.bytes, file.at_s] for file in self.letters.values()],
            "finished": self.finished,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> State:
        """The inverse of `to_json`."""
        return State(
            request=values["request"],
            facts=values["facts"],
            units=values["units"],
            done={int(unit): Intervals.of(flat) for unit, flat in values["done"].items()},
            dead={int(unit): Intervals.of(flat) for unit, flat in values["dead"].items()},
            counts={int(unit): rows for unit, rows in values["counts"].items()},
            unreadable={int(unit): why for unit, why in values["unreadable"].items()},
            files={one[0]: DataFile(*one) for one in values["files"]},
            letters={one[0]: DataFile(*one) for one in values["letters"]},
            finished=values["finished"],
        )
