"""A service's work in the background as a Ray actor: a door without HTTP, and the loop on which the work is done.

It may be killed at any time: Ray starts it again, and the work goes on from what is on the disk.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from headrace.on_ray.doors import Opening
from headrace.on_ray.ties import Ties, ask_words
from headrace.serving.door.server import new_loop
from headrace.serving.door.side import SideDoor

_LEFT_S = 5.0  # for work that is cancelled to let go of what it has


class Backstage:
    """The actor; `name` is what control knows it by among the doors."""

    def __init__(self, service: str, name: str, opening: Opening) -> None:
        self._ties = Ties(service)
        self._loop = new_loop()()
        threading.Thread(target=self._loop.run_forever, name="headrace-backstage", daemon=True).start()
        self._call(self._begin, service, name, opening)
        self._ties.hold(self.door, self._call, self._watch)

    def listens(self) -> None:
        """Answers as soon as it is there, as a door does."""

    def drain(self, timeout_s: float) -> None:
        """Begin nothing more, and finish what is at replicas. What is not done in time is left to who comes next."""
        self._ties.stopped.set()
        asyncio.run_coroutine_threadsafe(self._end(timeout_s), self._loop).result()

    def _begin(self, service: str, name: str, opening: Opening) -> None:
        self.door = SideDoor(service, name=name, ask_words=ask_words)
        self._stopping = asyncio.Event()
        self._work = asyncio.get_running_loop().create_task(opening.work(self.door, self._stopping))

    async def _end(self, timeout_s: float) -> None:
        self._stopping.set()
        await asyncio.wait({self._work}, timeout=timeout_s)
        self._work.cancel()
        await asyncio.wait({self._work}, timeout=_LEFT_S)
        self.door.close()

    def _watch(self) -> None:
        """The work ends when it is told to, or because of a mistake."""
        asyncio.run_coroutine_threadsafe(asyncio.wait({self._work}), self._loop).result()
        if not self._ties.stopped.is_set():
            self._work.result()
            raise RuntimeError("the work in the background has ended by itself")

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns that is called on the loop."""

        async def called() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result()
