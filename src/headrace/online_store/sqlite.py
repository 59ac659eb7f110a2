"""An online store in an SQLite file: for one machine, where any number of processes read while one writes.

The file has a write-ahead log, and leaves flushing to its checkpoints (`synchronous=NORMAL`): a process that is killed loses nothing that was
answered; a machine that loses power may lose the last moments, and never damages the file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from headrace.errors import OnlineStoreError
from headrace.online_store.engine import FORMAT, Generation, Standing, new_token
from headrace.online_store.records import RANK, TIME, instant_us
from headrace.online_store.views import MARKER

_BUSY_S = 30.0  # how long a change waits for others before it is given up
_APPLICATION = 0x68726F73  # in the file's head: whose it is
_MAP_BYTES = 1 << 30  # of the file that are read as memory; reading 100 keys takes half as long as through calls of the system
_ASKED = 512  # keys in one statement
_STATEMENTS = 256  # that a connection keeps prepared, one for each number of keys
_PAGE_BYTES = 16384
_LOG_BYTES = 4 << 20  # after which the log is moved into the file
_SWEPT = 5000  # rows looked at or removed in one step
_TABLES = """
CREATE TABLE generations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, view TEXT NOT NULL, state TEXT NOT NULL, schema BLOB NOT NULL, token BLOB NOT NULL, keys INTEGER NOT NULL,
    newest BLOB NOT NULL, published INTEGER, writes INTEGER NOT NULL, base INTEGER, base_writes INTEGER
);
CREATE UNIQUE INDEX one_current ON generations (view) WHERE state = 'current';
CREATE UNIQUE INDEX one_begun ON generations (view) WHERE state = 'begun';
CREATE TABLE feature_values (
    generation INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (generation, key)
) WITHOUT ROWID;
"""
# All keys are one parameter: as a parameter each, they would take a third longer. The rows come in their order, which the right side of a LEFT JOIN cannot
# change, and the marker's after them.
_FETCH = """
SELECT kept.value FROM json_each(?2) AS asked LEFT JOIN feature_values AS kept ON kept.generation = ?1 AND kept.key = CAST(asked.value AS BLOB)
UNION ALL SELECT value FROM feature_values WHERE generation = ?1 AND key = ?3
"""
_ESCAPED = bytes(range(32)) + b'"\\'  # in JSON, where older releases of SQLite cut a text at an escaped zero
# The first 16 bytes of a value say how late it is, the next 8 its expiry (records.py). Values lie in the index of their keys, which saves a reader the way
# to another page; so that vectors do not make that index deep, pages are large.

_open: weakref.WeakSet[SqliteEngine] = weakref.WeakSet()
_watched = False


class SqliteEngine:
    """An `Engine` in a file. Threads take connections from a pool; none is open while the process forks, since SQLite's locks do not pass to a child.

    Args:
        path: the file.
        make: whether to make it if it is not there, rather than raise.

    Raises:
        OnlineStoreError: it is missing, damaged, no store, of a newer release, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, make: bool = True) -> None:
        self.path = Path(path).expanduser()
        self.name = str(self.path)
        self._idle: list[sqlite3.Connection] = []
        self._used = 0
        self._change = threading.Condition()
        try:
            if make:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            elif not self.path.exists():
                raise OnlineStoreError(f"there is no online store in {self.name!r}; `headrace features FILE --publish STORE` makes it, or correct the path")
        except OSError as error:
            raise OnlineStoreError(f"the online store in {self.name!r} cannot be opened: {error.strerror or error}") from error
        weakref.finalize(self, _close, self._idle)  # a stage's store is never closed: it goes with the stage
        self._see_to_tables()
        _watch(self)

    def close(self) -> None:
        """See `Engine`."""
        with self._change:
            _close(self._idle)

    def views(self) -> list[str]:
        """See `Engine`."""
        with self._connection() as connection:
            return [view for (view,) in connection.execute("SELECT view FROM generations WHERE state = 'current'")]

    def current(self, view: str) -> Generation | None:
        """See `Engine`."""
        with self._connection() as connection:
            return _current(connection, view)

    def make(self, view: str, schema: bytes) -> Generation:
        """See `Engine`."""
        with self._changing() as connection:
            return _current(connection, view) or _insert(connection, view, schema, "current")

    def begin(self, view: str, schema: bytes) -> Generation:
        """See `Engine`."""
        with self._changing() as connection:
            connection.execute("UPDATE generations SET state = 'gone' WHERE view = ? AND state = 'begun'", (view,))
            generation = _insert(connection, view, schema, "begun")
            connection.execute(
                "UPDATE generations SET (base, base_writes) = (SELECT number, writes FROM generations WHERE view = ? AND state = 'current') WHERE number = ?",
                (view, generation.number),
            )
        self._remove_gone()
        return generation

    def drop(self, generation: Generation) -> None:
        """See `Engine`."""
        with self._changing() as connection:
            connection.execute("UPDATE generations SET state = 'gone' WHERE number = ? AND state = 'begun'", (generation.number,))
        self._remove_gone()

    def swap(self, generation: Generation) -> bool:
        """See `Engine`."""
        with self._changing() as connection:
            now = connection.execute("SELECT number, writes FROM generations WHERE view = ? AND state = 'current'", (generation.view,)).fetchone()
            base = connection.execute("SELECT base, base_writes FROM generations WHERE number = ? AND state = 'begun'", (generation.number,)).fetchone()
            if base is None or base != (now or (None, None)):
                return False
            if now is not None:
                connection.execute("UPDATE generations SET state = 'gone' WHERE number = ?", now[:1])
                connection.execute("DELETE FROM feature_values WHERE generation = ? AND key = ?", (now[0], MARKER))
            connection.execute("UPDATE generations SET state = 'current' WHERE number = ?", (generation.number,))
        self._remove_gone()
        return True

    def fetch(self, generation: Generation, keys: Sequence[bytes]) -> list[bytes | None] | None:
        """See `Engine`."""
        with self._connection() as connection:
            joined = b"".join(keys)
            if len(joined.translate(None, _ESCAPED)) < len(joined):
                return _one_by_one(connection, generation, keys)
            asked = '["' + b'","'.join(keys).decode() + '"]' if keys else "[]"
            values = [value for (value,) in connection.execute(_FETCH, (generation.number, asked, MARKER)).fetchall()]
        return values if len(values) > len(keys) and values.pop() == generation.token else None

    def put(self, generation: Generation, keys: Sequence[bytes], values: Sequence[bytes], published_us: int) -> int | None:
        """See `Engine`."""
        with self._changing() as connection:
            there: dict[bytes, bytes] = {}
            for at in range(0, len(keys), _ASKED):
                asked = keys[at : at + _ASKED]
                there.update(connection.execute(f"SELECT key, substr(value, 1, 16) {_of(len(asked))}", [generation.number, *asked]))
            before, chosen, newer = len(there), {}, 0
            for key, value in zip(keys, values, strict=True):
                if there.get(key, b"") <= value[RANK]:
                    there[key], chosen[key] = value[RANK], value
                    newer += 1
            newest = max((value[TIME] for value in chosen.values()), default=b"")
            told = connection.execute(
                "UPDATE generations SET keys = keys + ?, newest = max(newest, ?), published = ?, writes = writes + 1 "
                "WHERE number = ? AND token = ? AND state != 'gone'",
                (len(there) - before, newest, published_us, generation.number, generation.token),
            )
            if not told.rowcount:
                return None
            connection.executemany(
                "INSERT INTO feature_values (generation, key, value) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                [(generation.number, key, value) for key, value in chosen.items()],
            )
        return newer

    def standing(self, generation: Generation) -> Standing:
        """See `Engine`."""
        with self._connection() as connection:
            row = connection.execute("SELECT newest, published, keys FROM generations WHERE number = ?", (generation.number,)).fetchone()
        newest, published, keys = row or (b"", None, 0)
        return Standing(instant_us(newest) if newest else None, published, keys)

    def sweep(self, generation: Generation, before: bytes) -> int:
        """See `Engine`."""
        removed, last = 0, b""
        while True:
            with self._connection() as connection:
                page = "SELECT key, substr(value, 17, 8) FROM feature_values WHERE generation = ? AND key >= ? ORDER BY key LIMIT ?"
                keys = connection.execute(page, (generation.number, last, _SWEPT)).fetchall()
            expired = [key for key, expiry in keys if expiry <= before and key != MARKER]
            if expired:
                with self._changing() as connection:
                    old = "DELETE FROM feature_values WHERE generation = ? AND key = ? AND substr(value, 17, 8) <= ?"
                    count = connection.executemany(old, [(generation.number, key, before) for key in expired]).rowcount
                    connection.execute("UPDATE generations SET keys = keys - ? WHERE number = ?", (count, generation.number))
                removed += count
            if len(keys) < _SWEPT:
                return removed
            last = keys[-1][0]

    def settle(self) -> None:
        """See `Engine`. What still lies in the log is moved into the file, as far as no reader is in the way."""
        with self._connection() as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _remove_gone(self) -> None:
        """Remove what lies in generations that are gone, a part at a time, and then themselves. Whoever is killed meanwhile leaves it to the next."""
        while True:
            with self._changing() as connection:
                gone = connection.execute("SELECT number FROM generations WHERE state = 'gone' LIMIT 1").fetchone()
                if gone is None:
                    return
                part = "DELETE FROM feature_values WHERE generation = ?1 AND key IN (SELECT key FROM feature_values WHERE generation = ?1 LIMIT ?2)"
                if not connection.execute(part, (*gone, _SWEPT)).rowcount:
                    connection.execute("DELETE FROM generations WHERE number = ?", gone)

    def _see_to_tables(self) -> None:
        """Make the tables in a file that is new, or see that they are those of this release."""
        with self._connection() as connection:
            ours = connection.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION
            if not ours and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise OnlineStoreError(f"{self.name!r} is a database of something else, and no online store; give a file of its own")
            format = connection.execute("PRAGMA user_version").fetchone()[0]
            if format > FORMAT:
                raise OnlineStoreError(
                    f"the online store in {self.name!r} was made by a newer headrace (format {format}; this release knows {FORMAT}): install that release"
                )
            if ours:
                return
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # settled by the first page that is written
            connection.execute("PRAGMA journal_mode = WAL")
        with self._changing() as connection:
            if connection.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION:
                return  # somebody else was faster
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection out of the pool, or a new one. What it raises is told in words, and costs it its place in the pool."""
        with self._change:
            connection = self._idle.pop() if self._idle else None
            self._used += 1
        sound = False
        try:
            connection = connection or self._connect()
            yield connection
            sound = True
        except sqlite3.Error as error:
            raise self._told(error) from error
        finally:
            if connection is not None and not sound:
                connection.close()  # which undoes what it was about to change
            with self._change:
                self._used -= 1
                if sound and connection is not None:
                    self._idle.append(connection)
                self._change.notify_all()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes; it is undone when the block raises."""
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=_STATEMENTS)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BYTES // _PAGE_BYTES}")
        connection.execute(f"PRAGMA mmap_size = {_MAP_BYTES}")
        return connection

    def _told(self, error: sqlite3.Error) -> OnlineStoreError:
        code = getattr(error, "sqlite_errorname", "") or ""
        why = str(error)
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return OnlineStoreError(f"the online store in {self.name!r} is damaged ({why}); move the file away, and publish again")
        if code.startswith("SQLITE_FULL"):
            return OnlineStoreError(f"the disk of the online store in {self.name!r} is full; nothing of the batch was kept. Make room, and publish again")
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return OnlineStoreError(f"the online store in {self.name!r} is busy: another program has been writing for {_BUSY_S:g} s")
        return OnlineStoreError(f"the online store in {self.name!r} cannot be used: {why}")

    def before_fork(self) -> None:
        """Wait until no thread uses a connection, close all, and let none be opened until `after_fork`."""
        self._change.acquire()
        while self._used:
            self._change.wait()
        _close(self._idle)

    def after_fork(self) -> None:
        """In both processes: go on."""
        self._change.release()


def _one_by_one(connection: sqlite3.Connection, generation: Generation, keys: Sequence[bytes]) -> list[bytes | None] | None:
    """What `fetch` gives, for keys of any bytes: a transaction sees one state of the file."""
    one = "SELECT value FROM feature_values WHERE generation = ? AND key = ?"
    connection.execute("BEGIN")
    rows = [connection.execute(one, (generation.number, key)).fetchone() for key in (*keys, MARKER)]
    connection.execute("COMMIT")
    values = [None if row is None else row[0] for row in rows]
    return values if values.pop() == generation.token else None


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


def _current(connection: sqlite3.Connection, view: str) -> Generation | None:
    row = connection.execute("SELECT number, schema, token FROM generations WHERE view = ? AND state = 'current'", (view,)).fetchone()
    return None if row is None else Generation(view, *row)


def _insert(connection: sqlite3.Connection, view: str, schema: bytes, state: str) -> Generation:
    fresh, token = "INSERT INTO generations (view, state, schema, token, keys, newest, writes) VALUES (?, ?, ?, ?, 0, x'', 0)", new_token()
    number = connection.execute(fresh, (view, state, schema, token)).lastrowid
    assert number is not None
    connection.execute("INSERT INTO feature_values (generation, key, value) VALUES (?, ?, ?)", (number, MARKER, token))
    return Generation(view, number, schema, token)


@cache
def _of(keys: int) -> str:
    return f"FROM feature_values WHERE generation = ? AND key IN ({','.join('?' * keys)})"


def _watch(engine: SqliteEngine) -> None:
    """Have the engine's connections closed before this process forks."""
    global _watched  # noqa: PLW0603 - the hooks can be set once only, and never be taken back
    _open.add(engine)
    if not _watched:
        _watched = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


_held: list[SqliteEngine] = []  # between the hooks: those that are open may change meanwhile


def _before_fork() -> None:
    _held[:] = list(_open)
    for engine in _held:
        engine.before_fork()


def _after_fork() -> None:
    for engine in _held:
        engine.after_fork()
    _held.clear()
