"""Drivers over the real ledger, as small as they can be, and the laws that hold wherever they stop.

A row is a bit. A data file of the model is a list of rows, and tells by itself what it holds: the laws count rows in files,
and do not believe the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

from interleavings import Asking, Disk, alone

from headrace import ledger
from headrace.errors import LedgerError, StorageError, TakenOverError
from headrace.intervals import Intervals
from headrace.ledger import LETTERS, SUCCESS, Ledger, staged
from headrace.state import Change, DataFile, State

UNITS = {0: 3, 1: 1}
ROWS = [(unit, row) for unit, rows in UNITS.items() for row in range(rows)]
ALL = (1 << len(ROWS)) - 1
STAGING, LEDGER, CLAIMS = "_headrace/staging", "_headrace/ledger", "_headrace/ledger/claims"


def bits(spans: Mapping[int, Any]) -> int:
    """Rows as bits, from intervals per unit."""
    return sum(1 << ROWS.index((unit, row)) for unit, some in spans.items() for start, stop in some for row in range(start, stop))


def mask(rows: Sequence[tuple[int, int]]) -> int:
    """Rows as bits."""
    return sum(1 << ROWS.index(row) for row in rows)


def spans(rows: Sequence[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Intervals per unit, from rows."""
    return {unit: list(Intervals((row, row + 1) for one, row in rows if one == unit)) for unit, _ in rows}


def deterministic_names() -> SimpleNamespace:
    """Stands for the module `uuid`: the names that a run gives to its files come from a count, which each run begins anew."""
    names = SimpleNamespace(numbers=count())
    names.uuid4 = lambda: SimpleNamespace(hex=f"{next(names.numbers):08x}")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as `headrace.on_ray` drives it: look, claim, begin, write and commit, merge, publish, clear up letters, finish.

    `rows` is the input, `segment` how many rows go into a file, and `deadly` the rows that fail. With `looks` it leaves a
    finished output alone. With `merges` all files that are not published are merged into one. `retry` and `restart` are the
    modes of that name. A `stubborn` run commits what it can after the store refused something, as the real one does. One that
    does it `wrongly` publishes before it commits.
    """

    token: str
    rows: Sequence[tuple[int, int]] = tuple(ROWS)
    segment: int = 2
    deadly: frozenset[tuple[int, int]] = frozenset()
    looks: bool = False
    merges: bool = False
    retry: bool = False
    restart: bool = False
    stubborn: bool = False
    wrongly: bool = False

    def __call__(self, store: Asking) -> str:
        """How it ended. Only what must not happen is raised."""
        ledger.uuid.numbers = count()  # type: ignore[attr-defined]
        try:
            return self._run(store)
        except TakenOverError:
            return "taken over"
        except StorageError:
            return "refused"
        except LedgerError as error:
            return f"the ledger is damaged: {error}"
        except FileNotFoundError:
            return "a staged file is gone"  # a merge that a zombie overtook by publishing; the run fails and can be resumed

    def _run(self, store: Asking) -> str:
        if self.looks and self._nothing_to_do(store):
            return "left alone"
        held, before = ledger.Ledger.claim(store, token=self.token, restart=self.restart)
        state = before or State(request={}, facts={}, units="")
        known = bits(state.done) | (0 if self.retry else bits(state.dead))
        todo = [row for row in self.rows if not known >> ROWS.index(row) & 1]
        _rest(store, state, todo)
        held.begin(replace(state, finished=state.finished and (self.retry or not todo)))
        store.kept |= bits(state.done) | bits(state.dead)  # not before: until the base stands, a record that nobody counted on may be lost again
        small = self._settle(store, held, todo)
        if self.merges and len(small) > 1:
            small = [self._merge(store, held, small)]
        names = [*small, *(file.name for file in held.unpublished()), *held.state.letters]
        for at, name in enumerate(names):
            _rest(store, held, names[at:])
            held.publish(name)
        _rest(store, held)
        self._consolidate(held)
        _rest(store, held)
        held.finish()
        return "success"

    def _nothing_to_do(self, store: Asking) -> bool:
        known = ledger.load(store)
        return known is not None and not self.retry and ledger.complete(store, known)

    def _settle(self, store: Asking, held: Ledger, todo: Sequence[tuple[int, int]]) -> list[str]:
        small = [file.name for file in held.unpublished()] if self.merges else []
        refused: StorageError | None = None
        for at in range(0, len(todo), self.segment):
            some = todo[at : at + self.segment]
            _rest(store, held, todo[at:], small, refused)
            try:
                small += self._commit(store, held, some)
            except StorageError as error:
                if not self.stubborn:
                    raise
                refused = error
        if refused is not None:
            raise refused
        return small

    def _commit(self, store: Asking, held: Ledger, rows: Sequence[tuple[int, int]]) -> list[str]:
        good, bad = [row for row in rows if row not in self.deadly], [row for row in rows if row in self.deadly]
        files = [self._write(held, "part", good)] if good else []
        letters = [self._write(held, "letters", bad)] if bad else []
        if self.wrongly:
            for file in files:
                held.publish(file.name)
        held.commit(Change(files=files, letters=letters, done=spans(good), dead=spans(bad)))
        store.kept |= bits(spans(rows))
        for file in letters if self.merges else [*files, *letters]:
            held.publish(file.name)
        return [file.name for file in files] if self.merges else []

    @staticmethod
    def _write(held: Ledger, kind: str, rows: Sequence[tuple[int, int]]) -> DataFile:
        name, content = held.new_name(kind, ".json"), json.dumps(rows).encode()
        held.store.put(staged(name), content)
        return DataFile(name, len(rows), len(content))

    def _merge(self, store: Asking, held: Ledger, names: Sequence[str]) -> str:
        rows = [row for name in names for row in json.loads(store.read(staged(name)))]
        merged = self._write(held, "part", rows)
        held.settle(Change(files=[merged], dropped=names))
        return merged.name

    def _consolidate(self, held: Ledger) -> None:
        """As `headrace.letters.consolidate`."""
        state = held.state
        if sum(file.rows for file in state.letters.values()) == state.rows_dead:
            return
        for name in sorted(state.letters):
            held.store.read(f"{LETTERS}/{name}")
        still = [row for row in ROWS if bits(state.dead) >> ROWS.index(row) & 1]
        held.settle(Change(letters=[self._write(held, "letters", still)] if still else [], dropped=list(state.letters)))


def _rest(store: Asking, *memory: object) -> None:
    """Nothing that a run did matters any more but this, and how many names it has given."""
    told = [sorted((name, _told(value)) for name, value in vars(one).items() if name != "store") if hasattr(one, "__dict__") else repr(one) for one in memory]
    store.rest(f"{told} {ledger.uuid.numbers}")  # type: ignore[attr-defined]


def _told(value: object) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)


def read(store: Asking) -> int:
    """A reader: the settled rows that it sees."""
    try:
        state = ledger.load(store)
    except LedgerError:
        return 0
    return 0 if state is None else bits(state.done) | bits(state.dead)


@dataclass(slots=True, kw_only=True)
class Laws:
    """What must hold in every state; see `test_protocol.py`.

    `resumer` is the run that comes when all others have died. `promised` are the rows that the output holds whenever `_SUCCESS` is
    there; with `whole`, those or all, and nothing between. `for_ever` is whether what is committed stays so, which a restart
    ends, and `resumes` whether to try what comes of every state.
    """

    resumer: Callable[[Asking], Any]
    promised: int = ALL
    for_ever: bool = True
    whole: bool = False
    resumes: bool = True
    resumed: set[int] = field(default_factory=set)

    def on_disk(self, disk: Disk, kept: int) -> None:
        """1 to 3, then 4 for a store that was not seen before."""
        done, dead, _ = view(disk)
        if self.for_ever:
            assert not kept & ~(done | dead), f"rows {kept & ~(done | dead):b} were committed, and the ledger does not know them any more"
        if SUCCESS in disk:
            parts, letters = published(disk), _rows(disk, [name for name in disk if name.startswith(f"{LETTERS}/")])
            once = 0
            for row in parts:
                assert not once & row, f"_SUCCESS is there, and row {row:b} is in two files"
                once |= row
            once |= sum(set(letters))
            assert not self.promised & ~once, f"_SUCCESS is there, and of rows {self.promised:b} only {once:b}"
            assert not self.whole or once in (self.promised, ALL), f"_SUCCESS is there, and rows {once:b} of {ALL:b}"
        if self.resumes and id(disk) not in self.resumed:
            self.resumed.add(id(disk))
            self.resume(disk)

    def resume(self, disk: Disk) -> None:
        """What the store comes to when a run goes on from here, and nobody disturbs it (4)."""
        after, end = alone(self.resumer, disk)
        assert end in ("success", "left alone"), f"a run that goes on from here ends with: {end}"
        assert SUCCESS in after, "a run that went on from here left no _SUCCESS"
        done, dead, files = view(after)
        assert done | dead == ALL and not done & dead, f"a run that went on from here left rows {ALL & ~(done | dead):b} open"
        there = {name for name in after if "/" not in name and name != SUCCESS}
        letters = {name.rpartition("/")[2] for name in after if name.startswith(f"{LETTERS}/")}
        assert there | letters == files, f"the output holds {sorted(there | letters)}, and the ledger {sorted(files)}"
        assert sorted(published(after)) == [1 << at for at in range(len(ROWS)) if done >> at & 1], "the output holds other rows than the ledger"
        assert sum(set(_rows(after, [f"{LETTERS}/{name}" for name in letters]))) == dead, "the letters hold other rows than the ledger"
        if end == "success":
            left = [name for name in after if name.startswith(f"{STAGING}/")]
            assert not left, f"a run that went on from here left {left}"
            runs = {name.split("/")[2] for name in after if name.startswith(f"{LEDGER}/")} | {name.split("/")[3] for name in after if name.startswith(CLAIMS)}
            assert len(runs) == 2, f"a run that went on from here left {runs}"  # claims, and its own

    @staticmethod
    def on_end(end: Any, promised: int, lost: bool) -> None:
        """5, and a reader sees all that was committed when it began."""
        if isinstance(end, int):
            assert not promised & ~end, f"rows {promised:b} were committed, and a reader that began after that saw only {end:b}"
        else:
            assert not end.startswith("the ledger"), f"a run ended: {end}"
            assert not (lost and end == "success"), "a run ended well, though another had taken the output over before its last look"


def view(disk: Disk) -> tuple[int, int, set[str]]:
    """Rows done, rows dead and files of the committed view; AssertionError if files and ledger do not say the same (1, 6)."""
    box: list[State | None] = []
    alone(lambda store: box.append(ledger.load(store)), disk)
    state = box[0]
    if state is None:
        return 0, 0, set()
    held = 0
    for name in state.files:
        assert name in disk or staged(name) in disk, f"the committed file {name} is gone"
        for row in _rows(disk, [name if name in disk else staged(name)]):
            assert not held & row, f"row {row:b} is in two committed files"
            held |= row
    done, dead = bits(state.done), bits(state.dead)
    assert held == done, f"the committed files hold rows {held:b}, and the ledger says {done:b}"
    letters = [path for name in state.letters for path in (f"{LETTERS}/{name}", staged(name)) if path in disk]
    assert len({path.rpartition("/")[2] for path in letters}) == len(state.letters), "a committed letter is gone"
    assert not dead & ~sum(set(_rows(disk, letters))), "a dead row has no letter"
    return done, dead, {*state.files, *state.letters}


def published(disk: Disk) -> list[int]:
    """The rows that a reader of the folder sees."""
    return _rows(disk, [name for name in disk if name.startswith("part-")])


def _rows(disk: Disk, names: Sequence[str]) -> list[int]:
    return [1 << ROWS.index(tuple(row)) for name in names for row in json.loads(disk[name])]


def settled_before(*runs: Callable[[Asking], Any], without: Sequence[str] = (), disk: Disk | None = None) -> Disk:
    """What lies in the store when runs have been there one after another, without some files."""
    after: Disk = disk or {}
    for run in runs:
        after, end = alone(run, after)
        assert end in ("success", "left alone"), end
    return {name: content for name, content in after.items() if name not in without}
