"""A PostgreSQL of the tests' own, from the Debian package (`sh tools/apt.sh postgresql`): no network, no password, gone afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_START_S = 20.0


def _programs() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def _identity() -> dict[str, Any]:
    """As whom it runs: PostgreSQL refuses to be root, and its package makes a user for it."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam("postgres")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The URL of its databases without the name of one, to be used with `.format(name)`; skips the test where it cannot be started."""
    programs = _programs()
    if programs is None:
        pytest.skip("there is no PostgreSQL here: sh tools/apt.sh postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("there is no driver for PostgreSQL here: pip install 'headrace[gateway]'")
    identity = _identity()
    home = tempfile.mkdtemp(prefix="headrace-pg-", dir="/tmp")  # pytest's own folders are closed to other users, and too long for a socket
    try:
        if identity:
            os.chown(home, identity["user"], identity["group"])
        quiet: dict[str, Any] = {"cwd": home, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **identity}
        subprocess.run(
            [programs / "initdb", "-D", f"{home}/data", "-U", "headrace", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"], check=True, **quiet
        )
        settings = {"listen_addresses": "", "unix_socket_directories": home, "fsync": "off", "shared_buffers": "16MB", "max_connections": "50"}
        server = subprocess.Popen([programs / "postgres", "-D", f"{home}/data", *(f"--{name}={value}" for name, value in settings.items())], **quiet)
        try:
            _wait(server, home)
            yield f"postgresql+psycopg://headrace@/{{}}?host={home}"
        finally:
            server.send_signal(signal.SIGINT)  # ends without waiting for whoever is connected
            server.wait(_START_S)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def create(url: str, name: str) -> str:
    """The URL of a new, empty database."""
    with _connect(url.partition("?host=")[2]) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return url.format(name)


def _connect(home: str) -> Any:
    import psycopg

    return psycopg.connect(host=home, user="headrace", dbname="postgres", autocommit=True)


def _wait(server: subprocess.Popen[bytes], home: str) -> None:
    import psycopg

    until = time.monotonic() + _START_S
    while True:
        try:
            _connect(home).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"PostgreSQL did not start: it ended with {server.poll()}")
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Gives the place of a new, empty database each time it is called; what uses it runs on both engines."""
    numbers = itertools.count(1)
    if request.param == "sqlite":
        folder = tmp_path_factory.mktemp("accounts")
        return lambda: str(folder / f"{next(numbers)}.db")
    url = request.getfixturevalue("postgresql")
    return lambda: create(url, f"accounts_{next(numbers)}_{time.monotonic_ns()}")
