"""A Redis of the tests' own, from the Debian package (`sh tools/apt.sh redis-server`): on a free port of this machine, in memory, gone afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

_START_S = 20.0


@contextlib.contextmanager
def running(*options: str) -> Iterator[str]:
    """Its URL without the number of a database; skips the test where it cannot be started."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no Redis here: sh tools/apt.sh redis-server")
    if importlib.util.find_spec("redis") is None:
        pytest.skip("there is no client for Redis here: pip install 'headrace[redis]'")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(server, port)
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(_START_S)


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"Redis did not start: it ended with {server.poll()}")
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with running() as url:
        yield url
