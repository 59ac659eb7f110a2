"""The ledger: which rows of which input unit are done, kept beside the output, so that a run can go on from anywhere.

    _headrace/ledger/claims/000003-5f2c...           one file per run that ever held the output; the greatest name holds it
    _headrace/ledger/000003-5f2c.../base-000000      everything that was known when the run began, or at its last compaction
    _headrace/ledger/000003-5f2c.../record-000000    what became done since then, one record per commit
    _headrace/staging/000003-5f2c.../part-...        files written, whose rows count once a record names them

A run writes only under its own name, which nobody else ever has, so no two writers meet in one file. Exactly one view counts:

1. To take over, a run first writes its claim, then reads its predecessors, then writes its base.
2. The holder writes a record, then lists the claims. Is there a greater one, it has lost the output, and stops.

Either the holder sees the newer claim, or its record was complete before that claim was, and the newcomer reads it. So what a
run takes as committed is in the view of every later run, and what a run that has lost the output still writes is in none.
docs/ledger.md draws this, and says how it is tested. Free of engines; files go through a `headrace.store.Store`.
"""

from __future__ import annotations

import json
import re
import uuid
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from headrace.errors import LedgerError, StorageError, TakenOverError
from headrace.state import Change, DataFile, State
from headrace.store import Store

HOME = "_headrace"  # what headrace keeps beside the data; readers skip names that start with _
SUCCESS = "_SUCCESS"
LETTERS = f"{HOME}/dead_letters"
REPORT = f"{HOME}/report.json"
OTHERS = {"training.json": "a training", "features": "features"}
"""What lies in `HOME` of outputs that are no batch job's, and what they hold."""

_CLAIMS, _LEDGER, _STAGING = f"{HOME}/ledger/claims", f"{HOME}/ledger", f"{HOME}/staging"
_COMPACT_AFTER = 256  # records; a load reads that many small files at most
_PUTS, _LOADS = 3, 10  # attempts: a put whose answer was lost is put again, a load that a compaction overtook is begun again
_OURS = re.compile(r"(?:part|letters)-(\d{6}-[0-9a-z]+)-")


def load(store: Store, *, below: str = "~") -> State | None:
    """What is known of an output, from the greatest run named below `below` that wrote a base; None when there is none.

    Raises:
        LedgerError: a record is damaged or missing.
    """
    for _ in range(_LOADS):
        try:
            return _load(store, below)
        except FileNotFoundError:
            continue  # its holder compacted it meanwhile: what was read is in the next base
    raise LedgerError(f"the ledger changed {_LOADS} times while it was read; another run is writing to this output")


def begun(store: Store) -> bool:
    """Whether there is a ledger at all, whatever state it is in."""
    return bool(store.names(_LEDGER))


def holder(store: Store) -> str:
    """The name of the run that holds the output, or held it last; empty where none ever did."""
    return max((name for name in store.names(_CLAIMS) if name[:1].isdigit()), default="")  # others: a put that was cut off


def claim_of(run: str) -> str:
    """The name of the file by which a run claimed the output; its age is that of the run."""
    return f"{_CLAIMS}/{run}"


def _load(store: Store, below: str) -> State | None:
    run, names = _newest(store, below)
    state = None
    if run:
        base = max(name for name in names if name.startswith("base-"))
        state = State.from_json(_decode(base, store.read(f"{_LEDGER}/{run}/{base}")))
        first = _number(base)
        records = sorted(name for name in names if name.startswith("record-") and _number(name) >= first)
        for expected, name in enumerate(records, first):
            if _number(name) != expected:
                if _newest(store, below)[0] != run:
                    raise FileNotFoundError(run)
                raise LedgerError(f"record {expected} of run {run} is missing from the ledger, though later ones are there")
            state.apply(Change.from_json(_decode(name, store.read(f"{_LEDGER}/{run}/{name}"))))
    if _newest(store, below)[0] != run:
        raise FileNotFoundError(run)  # a newer run has its base by now, and may have removed a part of what was read
    return state


def _newest(store: Store, below: str) -> tuple[str, list[str]]:
    """The greatest run named below `below` that has a base, and its files; the others died, or lost the output, before they knew what was there."""
    for run in sorted((name for name in store.names(_LEDGER) if name < below and name[:1].isdigit()), reverse=True):
        names = store.names(f"{_LEDGER}/{run}")
        if any(name.startswith("base-") for name in names):
            return run, names
    return "", []


def complete(store: Store, state: State) -> bool:
    """Whether the output is finished, with exactly its files in their places, and each dead row in one letter; a retry that died may leave it otherwise."""
    there = store.names("")
    held = {name for name in (*there, *store.names(LETTERS)) if _OURS.match(name)}
    once = sum(file.rows for file in state.letters.values()) == state.rows_dead
    return state.finished and once and SUCCESS in there and held == state.files.keys() | state.letters.keys()


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _encode(values: Mapping[str, Any]) -> bytes:
    body = json.dumps(values, separators=(",", ":")).encode()
    return body + b"\n%08x\n" % zlib.crc32(body)


def _decode(name: str, content: bytes) -> dict[str, Any]:
    body, _, check = content.rstrip(b"\n").rpartition(b"\n")
    if check != b"%08x" % zlib.crc32(body):
        raise LedgerError(f"the ledger's {name} is damaged: its checksum does not match. Restore the file, or begin again with --restart")
    values: dict[str, Any] = json.loads(body)
    return values


class Ledger:
    """An output, held by this run. Made by `claim`; `begin` comes first, then commits, then `finish`."""

    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.run = run
        self.state: State
        self._records = self._base = 0
        self._published: set[str] = set()
        self._refused: StorageError | None = None

    @classmethod
    def claim(cls, store: Store, *, token: str | None = None, restart: bool = False) -> tuple[Ledger, State | None]:
        """Take the output over from whoever held it, and read what is known of it, unless that is to be thrown away.

        Raises:
            TakenOverError: another run claims the output at the same time.
        """
        last = holder(store) or "000000-"
        ledger = cls(store, f"{int(last.partition('-')[0]) + 1:06d}-{token or uuid.uuid4().hex[:12]}")
        store.put(claim_of(ledger.run), b"")
        ledger.check()
        try:
            return ledger, None if restart else load(store, below=ledger.run)
        except LedgerError:
            ledger.check()  # a newer run may have swept away half of what was to be read
            raise

    def check(self) -> None:
        """Raise TakenOverError if a newer run has claimed the output."""
        newer = [name for name in self.store.names(_CLAIMS) if name > self.run]
        if newer:
            raise TakenOverError(f"another run (number {int(max(newer)[:6])}) has taken over this output; this one stops, and what it committed is kept")

    def begin(self, state: State) -> None:
        """Write down where this run starts from, and remove what earlier runs left without committing it."""
        self.state = state
        self._put_base()
        if not state.finished:
            self.store.delete(SUCCESS)
        self._published = set(self.store.names("")) & state.files.keys() | set(self.store.names(LETTERS)) & state.letters.keys()
        for name in state.letters:
            self.publish(name)  # before those go that it takes the place of
        self._sweep(own=False)

    def new_name(self, kind: str, ending: str) -> str:
        """A name for a new file of this run, where `kind` is `part` or `letters`."""
        return new_name(self.run, kind, ending)

    def commit(self, change: Change) -> None:
        """Make a change count, in this view and in that of every later run; the files that it names must be staged by now.

        Raises:
            TakenOverError: a newer run holds the output; whether the change counts is for it to say.
            LedgerError: the change does not add up; nothing was written.
            StorageError: the record cannot be written; the run must end, and may be resumed.
        """
        if self._refused:
            raise self._refused
        if values := change.to_json():
            self.state.apply(change)
            self._put(f"record-{self._records:06d}", values)
            self._records += 1
            self.check()
            if self._records - self._base >= _COMPACT_AFTER:
                self.compact()

    def compact(self) -> None:
        """Fold the records so far into a new base."""
        old, self._base = self._base, self._records
        self._put_base()
        self.store.delete(f"{_LEDGER}/{self.run}/base-{old:06d}")
        for number in range(old, self._base):
            self.store.delete(f"{_LEDGER}/{self.run}/record-{number:06d}")

    def publish(self, name: str) -> None:
        """Give a committed file its place in the output folder. Done again after a crash, it does no harm."""
        if name in self._published:
            return
        target = self._published_as(name)
        try:
            self.store.move(staged(name), target)
        except FileNotFoundError:
            folder, _, base = target.rpartition("/")
            if base not in self.store.names(folder):
                self.check()  # a newer run may have merged it into another file
                raise LedgerError(f"the committed file {name} is neither staged nor in the output; was it deleted? Begin again with --restart") from None
        self._published.add(name)

    @staticmethod
    def _published_as(name: str) -> str:
        return f"{LETTERS}/{name}" if name.startswith("letters-") else name

    def unpublished(self) -> list[DataFile]:
        """Committed files that are not in the output folder yet."""
        return [file for file in self.state.files.values() if file.name not in self._published]

    def settle(self, change: Change) -> None:
        """Commit, then remove the files that the change dropped."""
        self.commit(change)
        for file in change.letters:
            self.publish(file.name)  # before the old ones go; of rows, there may be none twice, not even for a moment
        for name in change.dropped:
            # First where it was staged: a run that has lost the output could still publish it from there.
            self.store.delete(staged(name))
            self.store.delete(self._published_as(name))

    def finish(self, before_success: Callable[[], object] = lambda: None) -> None:
        """Mark the run as finished, leave exactly the committed files in the output, and put down `_SUCCESS`.

        Begun again after a crash, it goes on where it was. `before_success` is called when all files are in their places.
        """
        if not self.state.finished:
            self.commit(Change(finished=True))
        for name in (*self.state.files, *self.state.letters):
            self.publish(name)
        self._sweep(own=True)
        before_success()
        self.check()
        self.store.put(SUCCESS, b"")

    def _put_base(self) -> None:
        self._put(f"base-{self._base:06d}", self.state.to_json())
        self.check()

    def _put(self, name: str, values: Mapping[str, Any]) -> None:
        content = _encode(values)
        for attempt in range(1, _PUTS + 1):
            try:
                self.store.put(f"{_LEDGER}/{self.run}/{name}", content)
                return
            except StorageError as error:
                if attempt == _PUTS:
                    self._refused = error  # it may take effect yet: no other content may ever go under this name
                    raise

    def _sweep(self, *, own: bool) -> None:
        """Remove what does not count and never will: of earlier runs, and of this one too when nobody writes for it any more.

        Newer runs' files are never touched, because a run that has lost the output may be here without knowing it.
        """
        for folder in (_LEDGER, _CLAIMS):
            for run in self.store.names(folder):
                if run < self.run:  # "claims" is greater than any number
                    self.store.delete(f"{folder}/{run}")
        known = self.state.files.keys() | self.state.letters.keys()
        # Staged files first: nobody can publish a file from where it no longer is.
        for run in [run for run in self.store.names(_STAGING) if run < self.run or (own and run == self.run)]:
            names = set(self.store.names(f"{_STAGING}/{run}"))
            # At the end all that counts is in its place; a move that was cut off may have left it here as well.
            for name in [f"/{name}" for name in sorted(names - known)] if names & known and not own else [""]:
                self.store.delete(f"{_STAGING}/{run}{name}")
        for folder in ("", f"{LETTERS}/"):
            for name in self.store.names(folder.rstrip("/")):
                made = _OURS.match(name)
                if made and made[1] <= self.run and name not in known:
                    self.store.delete(folder + name)


def new_name(run: str, kind: str, ending: str) -> str:
    """A name that no other file of the output has, telling which run made it."""
    return f"{kind}-{run}-{uuid.uuid4().hex[:8]}{ending}"


def staged(name: str) -> str:
    """Where a file lies until it is published, told from its name."""
    made = _OURS.match(name)
    if made is None:
        raise LedgerError(f"{name!r} is no file of a ledger")
    return f"{_STAGING}/{made[1]}/{name}"
