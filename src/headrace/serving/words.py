"""Last words: what a process leaves behind when it kills itself, so that whoever asks why it died can tell that from an outside SIGKILL.

A file in a directory of the user's own, named for the process. It is empty while the process lives and after a SIGKILL from outside; a
crash, `os._exit` and a SIGKILL to itself leave a text; a clean end removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_MOST_CHARS = 8_000
_UNREAD_S = 3600.0  # how long the words of the dead are kept
_installed: _Words | None = None


def path(pid: int) -> Path:
    """Where the process with this id leaves its last words."""
    return Path(tempfile.gettempdir()) / f"headrace-words-{os.getuid()}" / str(pid)


def read(pid: int) -> str | None:
    """Why the process with this id killed itself; None if it did not, or never `install`ed."""
    file = path(pid)
    try:
        if not _ours(file.parent):
            return None
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_MOST_CHARS).strip() or None
    except OSError:
        return None


def install() -> None:
    """Have this process leave last words from now on. Replaces the file that faulthandler writes to."""
    global _installed  # noqa: PLW0603 - a process has one set of last words, as it has one faulthandler
    if _installed is None or _installed.pid != os.getpid():
        _installed = _Words()
        atexit.register(remove)


def remove() -> None:
    """Take the file away: this process ends well. Nothing happens if `install` was not called."""
    global _installed
    words, _installed = _installed, None
    if words is not None and words.pid == os.getpid():
        words.close()


class _Words:
    """The open file, and what was there before it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        file = path(self.pid)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not _ours(file.parent):
            raise PermissionError(f"{file.parent} belongs to another user")
        _sweep(file.parent)
        self.stream: IO[str] = file.open("w", encoding="utf-8")
        self.enabled = faulthandler.is_enabled()
        faulthandler.enable(self.stream, all_threads=True)
        self.exit, self.kill = os._exit, os.kill
        os._exit = self._noted(self.exit, lambda status: f"os._exit({status})")
        os.kill = self._noted(self.kill, lambda pid, number: "os.kill of itself with SIGKILL" if (pid, number) == (self.pid, signal.SIGKILL) else "")

    def _noted(self, act: Callable[..., Any], what: Callable[..., str]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            text = what(*given, **named)
            if text and os.getpid() == self.pid:  # a fork of the process may end as it likes
                self._leave(text)
            return act(*given, **named)

        return noted

    def _leave(self, text: str) -> None:
        frame = sys._getframe(2)  # noqa: SLF001 - who called
        if frame.f_globals.get("__name__", "").partition(".")[0] == "ray":
            return  # Ray ends its own workers so
        with contextlib.suppress(OSError):  # a full disk must not keep it from ending
            print(f"{text}, called in {frame.f_code.co_qualname}, {frame.f_code.co_filename}:{frame.f_lineno}", file=self.stream, flush=True)

    def close(self) -> None:
        os._exit, os.kill = self.exit, self.kill
        faulthandler.disable()
        if self.enabled and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        path(self.pid).unlink(missing_ok=True)
        self.stream.close()


def _ours(folder: Path) -> bool:
    return folder.stat().st_uid == os.getuid()


def _sweep(folder: Path) -> None:
    """Remove the files of processes that ended long ago."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if file.name.isdecimal() and file.stat().st_mtime < time.time() - _UNREAD_S and not _alive(int(file.name)):
                file.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
