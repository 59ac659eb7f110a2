"""How many lines may be under way, all runs of a process together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

_LOOK_S = 0.05


class Gate:
    """Lets lines through while fewer are under way than `slots` says at that moment, first come, first served.

    `slots` may say less than before, or nothing for a while: then no line goes through until enough of those under way have come back.
    """

    def __init__(self, slots: Callable[[], int]) -> None:
        self.under_way = 0
        self._slots = slots
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    async def enter(self) -> None:
        """Wait for a slot, and take it."""
        async with self._turn:
            while self.under_way >= self._slots():
                self._left.clear()
                with suppress(TimeoutError):  # nobody says when there are more slots
                    async with asyncio.timeout(_LOOK_S):
                        await self._left.wait()
            self.under_way += 1

    def leave(self) -> None:
        """Give it back."""
        self.under_way -= 1
        self._left.set()
