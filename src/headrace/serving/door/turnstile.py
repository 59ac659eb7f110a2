"""How many requests are under way, and when there are none any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Turnstile:
    """Counts who is inside. Lives on one loop."""

    def __init__(self) -> None:
        self.inside = 0
        self._empty: asyncio.Future[None] | None = None

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Somebody is inside for the length of the block."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if self._empty is not None and not self.inside and not self._empty.done():
                self._empty.set_result(None)

    async def empty(self, *, timeout_s: float) -> None:
        """Wait until nobody is inside, for so long at most."""
        if self.inside:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._empty}, timeout=timeout_s)
