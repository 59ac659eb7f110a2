"""The doors' logs on the standard output of the command that started them: one named pipe each, whose lines stay whole."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO

_AT_ONCE = 1 << 16


class Pipes:
    """Reads a named pipe for each of `doors` for the length of the block, and writes their lines to `out`. `pattern` says what they are called."""

    def __init__(self, doors: Sequence[str], out: BinaryIO) -> None:
        self._out, self._lock = out, threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-logs-"))  # of this user alone
        self.pattern = str(self._folder / "{}")
        self._files = []
        for door in doors:
            os.mkfifo(self._folder / door, 0o600)
            # For writing as well, so that the end of a door is not the end of the pipe: the next one opens it again.
            self._files.append(os.open(self._folder / door, os.O_RDWR))
        self._threads = [threading.Thread(target=self._read, args=(file,), name="headrace-logs", daemon=True) for file in self._files]
        self._ending = False
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is still in the pipes, and take them away."""
        self._ending = True
        for file in self._files:
            os.write(file, b"\n")  # wakes the thread
        for file, thread in zip(self._files, self._threads, strict=True):
            thread.join()
            os.close(file)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, file: int) -> None:
        rest = b""
        while True:
            try:
                rest += os.read(file, _AT_ONCE)
            except BlockingIOError:
                return
            if self._ending:
                os.set_blocking(file, False)
            whole, _, rest = rest.rpartition(b"\n")
            if whole := whole.rstrip(b"\n"):
                try:
                    with self._lock:
                        self._out.write(whole + b"\n")
                        self._out.flush()
                except (OSError, ValueError):  # nobody reads standard output any more: lines are dropped, doors go on
                    continue


def writer(pattern: str, door: str) -> IO[str] | None:
    """The pipe of one door, for writing; None where nobody reads it any more."""
    try:
        file = os.open(pattern.format(door), os.O_WRONLY | os.O_NONBLOCK)  # which fails where there is no reader, and would wait for one otherwise
    except OSError:
        return None
    if not stat.S_ISFIFO(os.fstat(file).st_mode):
        os.close(file)
        return None
    os.set_blocking(file, True)
    return open(file, "w", encoding="utf-8")
