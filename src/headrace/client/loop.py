"""The event loop of all clients of a process, in a thread of its own, which starts when it is first asked for."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class _Loops:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def here(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="headrace clients", daemon=True).start()
            return self._loop


_loops: dict[int, _Loops] = {}  # by process: a fork has no threads but the one that forked, and locks as they were


def loop() -> asyncio.AbstractEventLoop:
    """The loop of this process."""
    return _loops.setdefault(os.getpid(), _Loops()).here()


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin on it, and go on."""
    return asyncio.run_coroutine_threadsafe(work, loop())


def result(future: Future[T]) -> T:
    """Wait for it; it is stopped when the waiting is, as by Ctrl-C."""
    try:
        return future.result()
    finally:
        future.cancel()  # of no effect on one that is done
