"""The books on the path of every request: an asyncio front that enters all that waits in one transaction.

A transaction costs about the same for one entry as for a hundred. While one is under way, further entries gather, and go together in the next:
alone, a request waits for nobody; under load, the number of transactions does not grow with that of requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from headrace.errors import AccountsError
from headrace.gateway.accounts.books import Books, reservation
from headrace.gateway.accounts.entries import Book, Entry, Release, Settle, Used
from headrace.gateway.accounts.keys import Key, Keys, Ring
from headrace.gateway.accounts.quotas import Grant, Refusal

KEYS_S = 1.0
"""How long `find` may go on with keys that were changed meanwhile. Reservations see changes at once."""

UPKEEP_S = 5.0
"""How often expired grants are looked for, and old rows let go of."""

_MOST_AT_ONCE = 512  # entries of one transaction: more would make the first of them wait for the last

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An entry, or with None the wish for fresh keys, and who waits for what comes of it; None if nobody does."""

    entry: Entry | None
    future: asyncio.Future[Any] | None


class Teller:
    """Keys and books for the tasks of one event loop: `async with Teller(books) as teller`.

    One thread holds the database. Leaving the block waits until all that was asked for has been entered.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._keys = Keys(books.database, clock=books.clock)
        self._line: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="headrace-teller", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ring = Ring({})
        self._changes = -1
        self._looked_s = -math.inf
        self._looking: asyncio.Future[Any] | None = None
        self._closed = False

    async def __aenter__(self) -> Teller:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self._line.put(None)
        await asyncio.to_thread(self._thread.join)
        left, _ = self._batch(0.0)  # what was granted to tasks that were cancelled meanwhile is given back
        if entries := [waiting.entry for waiting in left if waiting.entry is not None]:
            await asyncio.to_thread(self._books.post, entries)

    async def find(self, presented: str | bytes) -> Key | None:
        """The valid key whose text was presented, or None. Mostly a look into memory; once a second the database is asked whether keys have changed.

        Raises:
            AccountsError: the database cannot be asked.
        """
        return (await self._fresh()).find(presented)

    async def named(self, name: str) -> Key | None:
        """The valid key of that name, or None; as fresh as with `find`.

        Raises:
            AccountsError: the database cannot be asked.
        """
        return (await self._fresh()).named(name)

    async def number(self, name: str) -> int | None:
        """See `Keys.number`."""
        return await asyncio.to_thread(self._keys.number, name)

    async def reserve(self, key: int, model: str, *, prompt_tokens: int, max_tokens: int, id: str | None = None, paced: bool = True) -> Grant | Refusal:
        """See `Books.reserve`. If the task is cancelled while it waits, what was granted is given back."""
        waiting = self._put(reservation(key, model, prompt_tokens, max_tokens, id, paced=paced))
        try:
            return cast("Grant | Refusal", await waiting)
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:  # granted, and cancelled before the task could know
                self._unwanted(waiting.result())
            raise

    async def settle(self, grant: Grant, used: Used) -> bool:
        """See `Books.settle`. It is entered even if the task is cancelled while it waits."""
        return cast("bool", await self._put(Settle(grant, used)))

    async def release(self, grant: Grant) -> bool:
        """See `Books.release`. It is entered even if the task is cancelled while it waits."""
        return cast("bool", await self._put(Release(grant)))

    async def book(self, id: str, *, key: int, model: str, used: Used) -> bool:
        """See `Books.book`. It is entered even if the task is cancelled while it waits."""
        return cast("bool", await self._put(Book(id, key, model, used)))

    async def _fresh(self) -> Ring:
        """The keys as they were within the last second."""
        while time.monotonic() - self._looked_s >= KEYS_S:
            looking = self._looking
            if looking is None:  # one asks for all who come meanwhile
                looking = self._looking = self._put(None)
                looking.add_done_callback(self._looked)
            await asyncio.shield(looking)
            self._looked(looking)  # its callback may be still to come: a future that is done is not waited for, and this would go round for ever
        return self._ring

    def _put(self, entry: Entry | None) -> asyncio.Future[Any]:
        if self._loop is None or self._closed:
            raise AccountsError("this teller is not open: use it inside `async with Teller(books) as teller`")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._line.put(_Waiting(entry, future))
        return future

    def _looked(self, done: asyncio.Future[Any]) -> None:
        if self._looking is not done:
            return
        self._looking = None
        if not done.cancelled() and done.exception() is None:
            self._looked_s = time.monotonic()

    def _unwanted(self, result: object) -> None:
        if isinstance(result, Grant):
            self._line.put(_Waiting(Release(result), None))

    def _serve(self) -> None:
        """The thread: take all who wait, enter what they want, tell them; look after the books now and then."""
        upkeep_at, is_open = time.monotonic(), True
        try:
            while is_open:
                batch, is_open = self._batch(upkeep_at - time.monotonic())
                if batch:
                    self._attend(batch)
                if time.monotonic() >= upkeep_at:
                    more = self._upkeep()
                    upkeep_at = time.monotonic() + (0.0 if more else UPKEEP_S)
        finally:
            self._closed = True  # a fault that ends the thread must not leave anybody to wait for it

    def _batch(self, wait_s: float) -> tuple[list[_Waiting], bool]:
        """Who waits, and whether more may come. Nobody, if none has come by then."""
        batch: list[_Waiting] = []
        try:
            while len(batch) < _MOST_AT_ONCE:
                waiting = self._line.get_nowait() if batch or wait_s <= 0 else self._line.get(timeout=wait_s)
                if waiting is None:
                    return batch, False
                batch.append(waiting)
        except queue.Empty:
            pass
        return batch, True

    def _attend(self, batch: Sequence[_Waiting]) -> None:
        results: Sequence[object] = [AccountsError("the books were left by a fault of headrace: its traceback is in the log")] * len(batch)
        try:
            results = self._entered(batch)
        finally:  # whoever waits is told, whatever has happened
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._tell, batch, results)
            except RuntimeError:
                _log.warning("%d answers about reservations came too late: their event loop is closed", len(batch))

    def _entered(self, batch: Sequence[_Waiting]) -> Sequence[object]:
        entries = [waiting.entry for waiting in batch if waiting.entry is not None]
        try:
            if len(entries) < len(batch):
                self._refresh()
            results = iter(self._books.post(entries) if entries else ())
        except AccountsError as error:
            if unwanted := sum(waiting.future is None for waiting in batch):
                _log.warning("%d reservations of cancelled requests could not be given back, and will expire: %s", unwanted, error)
            return [error] * len(batch)
        return [None if waiting.entry is None else next(results) for waiting in batch]

    def _tell(self, batch: Sequence[_Waiting], results: Sequence[object]) -> None:
        for waiting, result in zip(batch, results, strict=True):
            future = waiting.future
            if future is None:
                continue
            if future.cancelled():
                if waiting.entry is not None:
                    self._unwanted(result)
            elif isinstance(result, AccountsError):
                future.set_exception(AccountsError(*result.args))  # one each: a traceback grows with every task that raises it
            else:
                future.set_result(result)

    def _refresh(self) -> None:
        changes = self._keys.changes()
        if changes != self._changes:
            self._changes, self._ring = self._keys.loaded()

    def _upkeep(self) -> bool:
        """True if there is more to do at once."""
        try:
            swept, is_more = self._books.sweep(), self._books.prune()
        except AccountsError as error:
            _log.warning("expired reservations and old rows are left for later: %s", error)
            return False
        return swept > 0 or is_more
