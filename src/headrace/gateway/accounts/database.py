"""The database of accounts: an SQLite file or a PostgreSQL, opened, checked, and used in transactions.

SQLite keeps a write-ahead log and leaves flushing to its checkpoints (`synchronous=NORMAL`): a process that is killed loses nothing that was
answered; a machine that loses power may lose the last moments, and never damages the file. The log needs a disk of this machine: processes on
several machines share a PostgreSQL, whose own settings decide.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from headrace.errors import AccountsError
from headrace.gateway.accounts.tables import FORMAT, about, tables
from headrace.serving import keys as key_files

BUSY_S = 30.0
"""How long a transaction waits for others before it is given up."""

_POSTGRESQL = "postgresql+psycopg"
_FORMS = f"give the path of an SQLite file, or {_POSTGRESQL}://user:password@host/database"
_LOCK = 0x68656164  # PostgreSQL's advisory lock under which tables are made
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DAMAGE = ("malformed", "not a database", "file is encrypted")  # SQLite has no codes for errors that SQLAlchemy would pass on


def default_path(service: str) -> Path:
    """Where a service's accounts are unless told otherwise: `$XDG_CONFIG_HOME/headrace/gateway/<service>.db`, by default below `~/.config`.

    Raises:
        KeyFileError: this is no name of a service.
    """
    return key_files.default_path(service).parents[1] / "gateway" / f"{service}.db"


class Database:
    """An open database of accounts, with its tables. Threads may share it; processes open it each for themselves.

    Args:
        where: the path of an SQLite file, or the URL of a PostgreSQL: `postgresql+psycopg://user:password@host/database`.
        make: whether to make it if it is not there, rather than raise.

    Raises:
        AccountsError: it is missing, damaged, of a newer release, open to others, or out of reach, or a driver is missing.
    """

    def __init__(self, where: str | os.PathLike[str], *, make: bool = True) -> None:
        url = _url(os.fspath(where))
        self.name = url.render_as_string(hide_password=True) if url.database and _is_server(url) else str(url.database)
        if not _is_server(url):
            _see_to_file(Path(str(url.database)), make=make)
        try:
            self.engine = _engine(url)
        except ModuleNotFoundError as error:
            raise AccountsError(f"{self.name} needs {error.name}: pip install 'headrace[gateway]'") from error
        with contextlib.ExitStack() as undone:
            undone.callback(self.close)
            with self.writing() as connection:
                self._check(connection, make=make)
            undone.pop_all()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that may write; it is undone when the block raises.

        Raises:
            AccountsError: the database refuses or cannot be reached.
        """
        with self._told(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that reads, and keeps nobody from writing.

        Raises:
            AccountsError: the database refuses or cannot be reached.
        """
        with self._told(), self.engine.connect().execution_options(reads=True) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the engine raises into what a user can mend."""
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            why = str(getattr(error, "orig", None) or error).strip()
            if any(sign in why for sign in _DAMAGE):
                raise AccountsError(f"the accounts in {self.name!r} are damaged ({why}); restore them from a copy, or move the file away") from error
            if "database is locked" in why:
                raise AccountsError(f"the accounts in {self.name!r} are busy: another program has been writing for {BUSY_S:g} s") from error
            raise AccountsError(f"the accounts in {self.name!r} cannot be used: {why}") from error

    def _check(self, connection: sa.Connection, *, make: bool) -> None:
        """Make the tables, or see that they are those of this release."""
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        inspector = sa.inspect(connection)
        there = set(inspector.get_table_names())
        if not there & set(tables.tables):
            if not make:
                raise _missing(self.name)
            tables.create_all(connection, checkfirst=False)
            connection.execute(about.insert().values(id=1, format=FORMAT, changes=0))
            return
        known = connection.scalar(sa.select(about.c.format)) if about.name in there else None
        if known is not None and known > FORMAT:
            raise AccountsError(
                f"the accounts in {self.name!r} were made by a newer headrace (format {known}; this release knows {FORMAT}): install that release"
            )
        lacking = [name for name in tables.tables if name not in there] or [
            f"{name}.{column.name}"
            for name, table in tables.tables.items()
            for column in table.columns
            if column.name not in {found["name"] for found in inspector.get_columns(name)}
        ]
        if known != FORMAT or lacking:
            what = f"{lacking[0]} is missing" if lacking else f"their format is {known!r}"
            raise AccountsError(f"the accounts in {self.name!r} are damaged ({what}); restore them from a copy, or use another database")


def _is_server(url: sa.URL) -> bool:
    return url.drivername == _POSTGRESQL


def _url(where: str) -> sa.URL:
    if "://" not in where:
        if not where or where == ":memory:":
            raise AccountsError(f"{where!r} is no place for accounts: {_FORMS}")
        return sa.URL.create("sqlite", database=str(Path(where).expanduser()))
    try:
        url = sa.make_url(where)
    except (sa.exc.ArgumentError, ValueError):
        raise AccountsError(f"this is no URL of accounts: {_FORMS}") from None  # it is not repeated: a password may be in it
    if "@" in (url.host or "") or "password" in url.query:  # these parts are shown
        raise AccountsError("the password in the URL of accounts must stand between user: and @host, with %40 for each '@' in it, %2F for '/', %3A for ':'")
    if not _is_server(url) or not url.database:
        scheme = url.drivername
        hint = f"; write {_POSTGRESQL}:// in place of {scheme}://" if scheme.startswith("postgres") and scheme != _POSTGRESQL else ""
        raise AccountsError(f"{url.render_as_string(hide_password=True)!r} is no place for accounts: {_FORMS}{hint}")
    return url


def _see_to_file(path: Path, *, make: bool) -> None:
    """See that only its owner may write the file, or make it so. SQLite gives the files beside it the permissions of this one."""
    try:
        if make:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not path.exists():
            raise _missing(str(path))
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
        try:
            if os.fstat(handle).st_mode & _OTHERS_WRITE:
                raise AccountsError(f"others than its owner may write {str(path)!r}, and so add keys of their own; `chmod 600` it")
        finally:
            os.close(handle)
    except OSError as error:
        raise AccountsError(f"the accounts in {str(path)!r} cannot be opened: {error.strerror or error}") from error


def _missing(name: str) -> AccountsError:
    return AccountsError(f"there are no accounts in {name!r}; `headrace keys create` makes them")


def _engine(url: sa.URL) -> sa.Engine:
    if _is_server(url):
        # A pooled connection may have died with its server; one empty query says so before a transaction is begun on it.
        arguments = {"connect_timeout": 10, "options": f"-c lock_timeout={int(BUSY_S * 1000)}"}
        return sa.create_engine(url, isolation_level="READ COMMITTED", pool_pre_ping=True, connect_args=arguments)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S})
    sa.event.listen(engine, "connect", _set_up)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _set_up(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by Python's driver
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin(connection: sa.Connection) -> None:
    # A transaction that begins by reading cannot always go on to write; one that is going to write says so at once.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")
