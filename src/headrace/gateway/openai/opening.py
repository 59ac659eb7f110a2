"""How a door comes to speak OpenAI's interface: what it opens for that, and where."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.gateway.accounts.books import Books
    from headrace.gateway.batches.depot import Depot
    from headrace.gateway.openai.tills import Till
    from headrace.serving.door.app import Door
    from headrace.serving.door.side import SideDoor


@dataclass(frozen=True, slots=True)
class Opening:
    """What the doors of a service open, and its work in the background. Each process that has it opens everything for itself.

    Attributes:
        accounts: the SQLite file or the URL of the PostgreSQL with keys, limits and usage; without, no limits are kept.
        prices: a TOML file with prices of tokens by model.
        folder: where files and batches are kept; without, there are none.
    """

    accounts: str | None = None
    prices: str | None = None
    folder: str | None = None

    async def open(self, door: Door) -> None:
        """Have a door speak; called on its loop. The door closes what was opened.

        Raises:
            AccountsError, StorageError: accounts, prices or folder cannot be used.
        """
        from headrace.gateway.openai.edge import Edge

        async with contextlib.AsyncExitStack() as during:
            files = None
            if (till := await self._till(during)) is not None:
                door.doorman = till.doorman
            if (depot := self.depot()) is not None:
                from headrace.gateway.openai.files import Files

                files = Files(depot)
                during.push_async_callback(files.close)
            door.edge = Edge(door, till=till, files=files, during=during.pop_all())

    @property
    def works(self) -> bool:
        """Whether there are batches to run."""
        return self.folder is not None

    async def work(self, door: SideDoor, stopping: asyncio.Event) -> None:
        """Run batches through a door until `stopping` is set; lines at replicas then have a grace, and the rest is left to who comes next.

        Raises:
            AccountsError, StorageError: accounts, prices or folder cannot be used.
        """
        from headrace.gateway.batches.worker import Worker
        from headrace.gateway.openai.background import Background

        async with contextlib.AsyncExitStack() as during:
            depot = self.depot()
            assert depot is not None
            during.push_async_callback(asyncio.to_thread, depot.close)
            background = Background(door, till=await self._till(during))
            await Worker(depot, send=background.send, book=background.book, slots=background.slots).run(stopping)

    async def _till(self, during: contextlib.AsyncExitStack) -> Till | None:
        """The till of the accounts, if there are any, closed at the end."""
        if (books := self.books()) is None:
            return None
        from headrace.gateway.accounts.teller import Teller
        from headrace.gateway.openai.tills import Till

        during.callback(books.database.close)
        till = Till(await during.enter_async_context(Teller(books)))
        during.push_async_callback(till.close)
        return till

    def books(self) -> Books | None:
        """The books of the accounts, if there are any."""
        if self.accounts is None:
            return None
        from headrace.gateway.accounts.books import Books
        from headrace.gateway.accounts.database import Database
        from headrace.gateway.accounts.prices import Prices

        prices = None if self.prices is None else Prices.read(self.prices)
        return Books(Database(self.accounts), prices=prices)

    def depot(self) -> Depot | None:
        """Files and batches, if they are kept."""
        if self.folder is None:
            return None
        from headrace.gateway.batches.depot import Depot

        os.makedirs(Path(self.folder), mode=0o700, exist_ok=True)
        return Depot(self.folder)
