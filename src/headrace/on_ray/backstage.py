"""A service's work in the background as a Ray actor: a door without HTTP, and the loop on which the work is done.

It may be killed at any time: Ray starts it again, and the work goes on from what is on the disk.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from headrace.on_ray.doors import Listening
from headrace.on_ray.ties import Ties, ask_words
from headrace.serving.door.server import new_loop
from headrace.serving.door.side import SideDoor
from headrace.serving.routes import BACKSTAGE
from headrace.serving.watch.logs import AccessLog

_LEFT_S = 5.0  # for work that is cancelled to let go of what it has


class Backstage:
    """The actor, for a service and its guests, whose controls know it by `BACKSTAGE` among the doors."""

    def __init__(self, listening: Listening) -> None:
        self._ties: Ties[SideDoor] = Ties(listening.service)
        self._loop = new_loop()()
        threading.Thread(target=self._loop.run_forever, name="headrace-backstage", daemon=True).start()
        self._run(self._begin(listening))
        self._ties.hold(self._run, self._watch)

    def listens(self) -> None:
        """Answers as soon as it is there, as a door does."""

    def drain(self, timeout_s: float) -> None:
        """Begin nothing more, and finish what is at replicas. What is not done in time is left to who comes next."""
        self._ties.close()
        self._run(self._end(timeout_s))

    def dismiss(self, guest: str, timeout_s: float) -> None:
        """Begin nothing more at a guest, which is none any more, and finish what is at its replicas."""
        self._run(self.door.lobby.dismiss(guest, timeout_s=timeout_s))

    async def _begin(self, listening: Listening) -> None:
        stream, opening = listening.log_of(BACKSTAGE), listening.opening
        assert opening is not None

        def make(service: str) -> SideDoor:
            log = None if stream is None else AccessLog(stream, service=service, door=BACKSTAGE)
            return SideDoor(service, name=BACKSTAGE, ask_words=ask_words, log=log)

        self.door = make(listening.service)
        self.door.lobby.make = make
        self._ties.introduce(self.door.lobby)
        self._stopping = asyncio.Event()
        self._work = asyncio.get_running_loop().create_task(opening.work(self.door, self._stopping))

    async def _end(self, timeout_s: float) -> None:
        self._stopping.set()
        await asyncio.wait({self._work}, timeout=timeout_s)
        self._work.cancel()
        await asyncio.wait({self._work}, timeout=_LEFT_S)
        await self.door.close(timeout_s=0.0)

    def _watch(self) -> None:
        """The work ends when it is told to, or because of a mistake."""
        self._run(asyncio.wait({self._work}))
        if not self._ties.closed:
            self._work.result()
            raise RuntimeError("the work in the background has ended by itself")

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What a coroutine returns that runs on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
