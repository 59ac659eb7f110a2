"""The processes of an engine: known by a mark in their environment, and ended with the one that started them, however that ends.

vLLM's processes outlive a parent that is killed, and keep the accelerator's memory from whoever comes next. So this module runs as a program as
well: beside each engine, waiting for the end of its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "HEADRACE_ENGINE"
_STARTING = threading.Lock()  # the environment is that of the whole process
_PATIENCE_S, _PAUSE_S = 10.0, 0.02


class Processes:
    """What is started within `marked`, and what that starts in turn."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        # In a session of its own, so that what is sent to all processes of a terminal or a group spares it. Its input ends with this process.
        command = [sys.executable, "-I", "-S", __file__, self.mark]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - this very file

    @contextlib.contextmanager
    def marked(self) -> Iterator[None]:
        """Mark what is started during the block."""
        with _STARTING:
            os.environ[_VARIABLE] = self.mark
            try:
                yield
            finally:
                del os.environ[_VARIABLE]

    def end(self) -> None:
        """SIGKILL for all of them: one that is stopped listens to nothing else."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(_PATIENCE_S)
        _end(self.mark)


def _end(mark: str) -> None:
    """Until there are none: one may just be starting another. One that the kernel holds back is not waited for without end."""
    wanted, until_s = f"{_VARIABLE}={mark}".encode(), time.monotonic() + _PATIENCE_S
    while (found := [pid for pid in _others() if wanted in _environment(pid)]) and time.monotonic() < until_s:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def _others() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and int(entry.name) != os.getpid()]


def _environment(pid: int) -> list[bytes]:
    """A process's variables; none of one that has ended, that belongs to another user, or that is dead and only waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)  # it ends when its parent has
    sys.stdin.buffer.read()
    _end(sys.argv[1])
