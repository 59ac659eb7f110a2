"""Which files and batches there are, and how far each batch is, in one SQLite database that any number of processes may use.

Each change is one transaction, flushed before it is told (`synchronous=FULL`): after a kill or a power cut it is there whole or not
at all, and a full disk refuses it and leaves what was. The database must lie on a disk of the machine, as SQLite's write-ahead log
asks for.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from headrace.errors import StorageError
from headrace.gateway.batches.records import Batch, Change, Charge, File, Progress, Usage
from headrace.gateway.batches.refusal import DiskFullError, RefusedError

_VERSION = 1
_BUSY_S = 30

_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE INDEX files_of ON files (owner, number);
CREATE INDEX files_by_end ON files (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, live INTEGER NOT NULL, input TEXT NOT NULL,
    output TEXT NOT NULL, errors TEXT NOT NULL, about BLOB NOT NULL, progress BLOB NOT NULL
);
CREATE INDEX batches_of ON batches (owner, number);
CREATE INDEX batches_live ON batches (number) WHERE live;
CREATE TABLE unbooked (
    batch TEXT NOT NULL, line INTEGER NOT NULL, model TEXT NOT NULL, input INTEGER NOT NULL, output INTEGER NOT NULL, cached INTEGER NOT NULL,
    reasoning INTEGER NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""

_NEWEST_FILES = """
SELECT id, owner, filename, purpose, bytes, created_at, expires_at FROM files
WHERE owner = :owner AND (expires_at IS NULL OR expires_at > :now) AND (:purpose IS NULL OR purpose = :purpose)
    AND (:after IS NULL OR number < (SELECT number FROM files WHERE id = :after AND owner = :owner))
ORDER BY number DESC LIMIT :limit + 1
"""
_OLDEST_FILES = """
SELECT id, owner, filename, purpose, bytes, created_at, expires_at FROM files
WHERE owner = :owner AND (expires_at IS NULL OR expires_at > :now) AND (:purpose IS NULL OR purpose = :purpose)
    AND (:after IS NULL OR number > (SELECT number FROM files WHERE id = :after AND owner = :owner))
ORDER BY number ASC LIMIT :limit + 1
"""
_FILE = """
SELECT id, owner, filename, purpose, bytes, created_at, expires_at FROM files
WHERE id = :id AND owner = :owner AND (expires_at IS NULL OR expires_at > :now)
"""
_NEWEST_BATCHES = """
SELECT about, progress FROM batches
WHERE owner = :owner AND (:after IS NULL OR number < (SELECT number FROM batches WHERE id = :after AND owner = :owner))
ORDER BY number DESC LIMIT :limit + 1
"""
_READ_BY_LIVE = "SELECT EXISTS (SELECT 1 FROM batches WHERE live AND :id IN (input, output, errors))"
_NAMED = "SELECT EXISTS (SELECT 1 FROM files WHERE id = :id)"


class Catalog:
    """The database. Its methods wait for the disk: from a loop they are called in a thread."""

    def __init__(self, path: str) -> None:
        """Open it, and make it if it is not there; no two processes may do so at the same time."""
        self._writing, self._reading = threading.Lock(), threading.Lock()
        with _told("open"):
            self._writer = _connect(path)
            found = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                self._writer.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
            elif found != _VERSION:
                raise StorageError(f"the catalog {path!r} has version {found}, and this headrace reads version {_VERSION}")
            self._reader = _connect(path)  # with one of its own, no reader waits for a flush

    def close(self) -> None:
        """Close it."""
        with self._writing, self._reading:
            self._writer.close()
            self._reader.close()

    # Files

    def add_file(self, file: File, *, owner_bytes: int) -> None:
        """Add a file.

        Raises:
            RefusedError: its owner would have more than `owner_bytes`.
        """
        with self._change() as database:
            held = database.execute("SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner = ?", (file.owner,)).fetchone()[0]
            if held + file.bytes > owner_bytes:
                raise RefusedError(
                    400, f"Your files would have more than {owner_bytes:,} bytes, which is the most; delete some.", code="storage_limit_exceeded"
                )
            _insert(database, file)

    def file(self, owner: str, name: str, now: float) -> File | None:
        """A file of this owner, unless it has expired."""
        found = self._read(_FILE, {"id": name, "owner": owner, "now": now})
        return _file(found[0]) if found else None

    def files(self, owner: str, now: float, *, limit: int, after: str | None = None, purpose: str | None = None, oldest: bool = False) -> list[File]:
        """The files that come after this one, the newest first or the oldest: as many as the limit says, and one more if there is more."""
        if after is not None and not self._read("SELECT 1 FROM files WHERE id = ? AND owner = ?", (after, owner)):
            raise _no_place(after)
        values = {"owner": owner, "now": now, "limit": limit, "after": after, "purpose": purpose}
        return [_file(row) for row in self._read(_OLDEST_FILES if oldest else _NEWEST_FILES, values)]

    def remove_file(self, name: str) -> bool:
        """Take a file out of the catalog. Whether its bytes can go too: those that a live batch reads stay until it is over."""
        with self._change() as database:
            database.execute("DELETE FROM files WHERE id = ?", (name,))
            return not database.execute(_READ_BY_LIVE, {"id": name}).fetchone()[0]

    def expired_files(self, now: float) -> list[str]:
        """The files whose time is over."""
        return [row[0] for row in self._read("SELECT id FROM files WHERE expires_at <= ? LIMIT 1000", (now,))]

    def needs(self, name: str) -> bool:
        """Whether anything still needs these bytes: a file of the catalog, or a live batch."""
        return any(self._read(query, {"id": name})[0][0] for query in (_READ_BY_LIVE, _NAMED))

    # Batches

    def add_batch(self, batch: Batch, *, live: int) -> None:
        """Add a batch.

        Raises:
            RefusedError: its input is not there, or its owner has `live` batches already.
        """
        with self._change() as database:
            file = database.execute(
                "SELECT purpose FROM files WHERE id = ? AND owner = ? AND (expires_at IS NULL OR expires_at > ?)",
                (batch.input_file_id, batch.owner, batch.created_at),
            ).fetchone()
            if file is None:
                raise RefusedError(400, f"No such File object: {batch.input_file_id}", param="input_file_id", code="file_not_found")
            if file[0] != "batch":
                raise RefusedError(
                    400, f"The file {batch.input_file_id} has the purpose '{file[0]}', not 'batch'.", param="input_file_id", code="invalid_purpose"
                )
            if database.execute("SELECT COUNT(*) FROM batches WHERE live AND owner = ?", (batch.owner,)).fetchone()[0] >= live:
                raise RefusedError(429, f"You have {live:,} batches under way, which is the most.", code="batch_limit_exceeded", kind="rate_limit_error")
            database.execute(
                "INSERT INTO batches (id, owner, live, input, output, errors, about, progress) VALUES (?, ?, 1, ?, ?, ?, ?, ?)",
                (batch.id, batch.owner, batch.input_file_id, batch.output_id, batch.error_id, batch.dump(), batch.progress.dump()),
            )

    def batch(self, name: str, owner: str | None = None) -> Batch | None:
        """A batch, of this owner if one is named."""
        found = self._read("SELECT about, progress FROM batches WHERE id = ? AND (? IS NULL OR owner = ?)", (name, owner, owner))
        return Batch.load(*found[0]) if found else None

    def batches(self, owner: str, *, limit: int, after: str | None = None) -> list[Batch]:
        """The batches that come after this one, the newest first: as many as the limit says, and one more if there is more."""
        if after is not None and not self._read("SELECT 1 FROM batches WHERE id = ? AND owner = ?", (after, owner)):
            raise _no_place(after)
        return [Batch.load(*row) for row in self._read(_NEWEST_BATCHES, {"owner": owner, "limit": limit, "after": after})]

    def live(self) -> list[tuple[str, str]]:
        """The batches that are not over, with their owners, the oldest first."""
        return [(name, owner) for name, owner in self._read("SELECT id, owner FROM batches WHERE live ORDER BY number", ())]

    def change(self, name: str, change: Change) -> Batch:
        """Change a batch in one step; its progress stays as it is."""
        with self._change() as database:
            before = Batch.load(*database.execute("SELECT about, progress FROM batches WHERE id = ?", (name,)).fetchone())
            after = change(before)
            if after is not before:
                database.execute("UPDATE batches SET about = ?, live = ? WHERE id = ?", (after.dump(), after.live, name))
            return after

    def settle(self, name: str, progress: Progress, charges: Sequence[Charge]) -> None:
        """Note how far a run is, and what it has to book. What it had to book before is booked."""
        with self._change() as database:
            database.execute("UPDATE batches SET progress = ? WHERE id = ?", (progress.dump(), name))
            database.execute("DELETE FROM unbooked WHERE batch = ?", (name,))
            rows = (
                (name, charge.line, charge.model, used.input_tokens, used.output_tokens, used.cached_tokens, used.reasoning_tokens)
                for charge in charges
                for used in [charge.usage]
            )
            database.executemany("INSERT INTO unbooked VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def unbooked(self, batch: Batch) -> list[Charge]:
        """What a run had noted to book, and may have booked or not when it ended."""
        found = self._read("SELECT line, model, input, output, cached, reasoning FROM unbooked WHERE batch = ?", (batch.id,))
        return [Charge(batch.id, batch.owner, model, line, Usage(*used)) for line, model, *used in found]

    def end(self, name: str, change: Change, files: Sequence[File]) -> Batch:
        """End a batch, and add the files of its results, in one step. All of it is booked. One that is over stays as it is."""
        with self._change() as database:
            before = Batch.load(*database.execute("SELECT about, progress FROM batches WHERE id = ?", (name,)).fetchone())
            if not before.live:
                return before
            after = change(before)
            database.execute("UPDATE batches SET about = ?, live = ? WHERE id = ?", (after.dump(), after.live, name))
            database.execute("DELETE FROM unbooked WHERE batch = ?", (name,))
            for file in files:
                _insert(database, file)
            return after

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._writing, _told("write"):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._commit()
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def _commit(self) -> None:
        self._writer.execute("COMMIT")

    def _read(self, query: str, values: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with self._reading, _told("read"):
            return self._reader.execute(query, values).fetchall()


def _connect(path: str) -> sqlite3.Connection:
    made = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    made.execute("PRAGMA journal_mode = WAL")
    made.execute("PRAGMA synchronous = FULL")
    return made


def _insert(database: sqlite3.Connection, file: File) -> None:
    values = (file.id, file.owner, file.filename, file.purpose, file.bytes, file.created_at, file.expires_at)
    database.execute("INSERT INTO files (id, owner, filename, purpose, bytes, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _file(row: tuple[Any, ...]) -> File:
    name, owner, filename, purpose, size, created_at, expires_at = row
    return File(id=name, owner=owner, filename=filename, purpose=purpose, bytes=size, created_at=created_at, expires_at=expires_at)


def _no_place(after: str) -> RefusedError:
    return RefusedError(400, f"There is nothing with the id '{after[:100]}' to go on after.", param="after", code="invalid_value")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise trouble with the disk as StorageError. A mistake in a query is none, and passes."""
    try:
        yield
    except sqlite3.OperationalError as error:
        kind = DiskFullError if error.sqlite_errorcode == sqlite3.SQLITE_FULL else StorageError
        raise kind(f"cannot {what} the catalog of batches: {error}") from error
