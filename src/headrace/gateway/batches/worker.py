"""Carries batches out: takes those that nobody runs, and brings each from its file to its results."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import BinaryIO

from headrace.errors import StorageError
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.gate import Gate
from headrace.gateway.batches.lines import Lines
from headrace.gateway.batches.records import Batch, Ending, Fault, File, Status
from headrace.gateway.batches.results import Results
from headrace.gateway.batches.run import Book, Engine, Run, Send, give_up
from headrace.gateway.batches.shelf import Sheet
from headrace.gateway.batches.validation import Check

_SWEEP_S = 600

_log = logging.getLogger(__name__)


class _GoneError(Exception):
    """The input of a batch is not on the disk: somebody has deleted it by hand."""


class Worker:
    """Runs batches of a depot, a few side by side. Any number of workers may share the depot, in one process or in many."""

    def __init__(self, depot: Depot, *, send: Send, book: Book, slots: Callable[[], int]) -> None:
        """Nothing starts yet.

        Args:
            depot: where files and batches are.
            send: has a line computed; see `Engine`.
            book: books charges; see `Engine`.
            slots: how many lines may be under way at this moment; asked all the time. 0 holds the batches up.
        """
        self._depot, self._limits = depot, depot.limits
        self._engine = Engine(send, book, Gate(slots))
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._owners: dict[str, str] = {}
        self._rests: dict[str, float] = {}  # batches whose run failed, and when they are taken up again

    async def run(self, stopping: asyncio.Event) -> None:
        """Carry batches out until `stopping` is set; what is under way then has a grace, and the rest is left to the next worker."""
        loop = asyncio.get_running_loop()
        swept_s = -float(_SWEEP_S)
        try:
            while not stopping.is_set():
                try:
                    if loop.time() - swept_s >= _SWEEP_S:
                        swept_s = loop.time()
                        await asyncio.to_thread(self._depot.sweep)
                    await self._start(await asyncio.to_thread(self._depot.catalog.live), stopping)
                except StorageError as error:
                    _log.warning("cannot look for batches: %s", error)
                await _within(stopping, self._limits.poll_s)
            if self._tasks:
                await asyncio.wait(list(self._tasks.values()))
        finally:
            for task in list(self._tasks.values()):
                task.cancel()
            if self._tasks:
                await asyncio.wait(list(self._tasks.values()))

    async def _start(self, live: list[tuple[str, str]], stopping: asyncio.Event) -> None:
        """Take up batches while there is room: first those of owners of whom the fewest run here, then the oldest."""
        now = asyncio.get_running_loop().time()
        self._rests = {name: until for name, until in self._rests.items() if until > now}
        waiting = [(name, owner) for name, owner in live if name not in self._tasks and name not in self._rests]
        while waiting and len(self._tasks) < self._limits.runs:
            running = Counter(self._owners.values())
            name, owner = min(waiting, key=lambda found: running[found[1]])
            waiting.remove((name, owner))
            batch = await asyncio.to_thread(self._depot.catalog.batch, name)
            if batch is None or not batch.live:
                continue
            output = self._depot.shelf.claim(batch.output_id)
            if output is not None:
                task = asyncio.create_task(self._carry_out(name, output, stopping), name=name)
                self._tasks[name], self._owners[name] = task, owner
                task.add_done_callback(partial(self._done, output))

    def _done(self, output: Sheet, task: asyncio.Task[None]) -> None:
        output.close()
        name = task.get_name()
        del self._tasks[name], self._owners[name]
        if not task.cancelled() and (mistake := task.exception()) is not None:
            _log.error("batch %s is taken up again in %g s: its run failed", name, self._limits.pause_s, exc_info=mistake)
            self._rests[name] = task.get_loop().time() + self._limits.pause_s

    async def _carry_out(self, name: str, output: Sheet, stopping: asyncio.Event) -> None:
        """Bring a batch as far as it comes. Every step can be done again: whoever takes the batch up goes on where this was left."""
        batch = await asyncio.to_thread(self._depot.catalog.batch, name)
        assert batch is not None
        try:
            if batch.status == "validating":
                batch = await self._validate(batch, stopping)
            if batch.status == "cancelling" and not batch.total:  # it was cancelled before anybody had looked at its lines
                batch = await self._end(batch, "cancelled")
            if not batch.live:
                await asyncio.to_thread(self._depot.release, batch.output_id)  # the claim may have made it anew, if somebody else was faster
            elif batch.status != "validating":
                with contextlib.closing(Results(self._depot, batch, output)) as results:
                    await self._complete(batch, results, stopping)
        except _GoneError:
            await self._end(batch, "failed", (Fault("file_not_found", "The input file is not on the server's disk any more."),))

    async def _complete(self, batch: Batch, results: Results, stopping: asyncio.Event) -> None:
        """Have the lines of a valid batch answered, and end it."""
        charges = await asyncio.to_thread(self._depot.catalog.unbooked, batch)
        if charges:  # of a run that died, perhaps before it had booked them
            await self._engine.book(charges)
        if not batch.ending and results.progress.done.rows < batch.total and not await self._reason(batch):
            await self._run(batch, results, stopping)
        complete = results.progress.done.rows >= batch.total
        batch = await self._finalize(batch, complete=complete)
        if not complete and not batch.ending:
            if not stopping.is_set():
                raise StorageError(f"the input of {batch.id} has fewer lines than when it was looked at")
            return
        if not complete:
            with await self._open(batch) as file:
                await give_up(batch, Lines(file), results)
        await self._end(batch, batch.ending or "completed")

    async def _validate(self, batch: Batch, stopping: asyncio.Event) -> Batch:
        """Look at all of its lines; it is in progress then, or has failed."""
        check = Check(batch.endpoint, lines=self._limits.lines, line_bytes=self._limits.line_bytes)
        with await self._open(batch) as file:
            lines = Lines(file, line_bytes=self._limits.line_bytes)
            while taken := await asyncio.to_thread(lines.take):
                if stopping.is_set():
                    return batch
                if not await asyncio.to_thread(check.add, taken):
                    break
        await asyncio.to_thread(check.end)
        if check.faults:
            return await self._end(batch, "failed", tuple(check.faults))

        def begun(found: Batch) -> Batch:
            found = replace(found, total=check.total, model=check.model)
            return found if found.status == "cancelling" else found.moved("in_progress", self._depot.clock())

        return await asyncio.to_thread(self._depot.catalog.change, batch.id, begun)

    async def _open(self, batch: Batch) -> BinaryIO:
        """Its input."""
        try:
            return await asyncio.to_thread(self._depot.shelf.open, batch.input_file_id)
        except FileNotFoundError:
            raise _GoneError(batch.id) from None

    async def _run(self, batch: Batch, results: Results, stopping: asyncio.Event) -> None:
        """Send its lines until all are done, or there is a reason not to go on."""
        halt = asyncio.Event()
        watch = asyncio.create_task(self._watch(batch, stopping, halt))
        try:
            with await self._open(batch) as file:
                run = Run(batch, Lines(file), results, engine=self._engine, limits=self._limits)
                await run.work(halt)
        finally:
            watch.cancel()

    async def _watch(self, batch: Batch, stopping: asyncio.Event, halt: asyncio.Event) -> None:
        """Set `halt` once the batch is cancelled or has expired, or the worker is to stop."""
        while not stopping.is_set() and not await self._reason(batch):
            await _within(stopping, self._limits.poll_s)
        halt.set()

    async def _reason(self, batch: Batch) -> Ending:
        """Why its lines are to stay without an answer, if they are."""
        try:
            found = await asyncio.to_thread(self._depot.catalog.batch, batch.id)
        except StorageError as error:
            _log.warning("cannot look whether %s was cancelled: %s", batch.id, error)
            return ""
        return self._ending(found) if found is not None else ""

    def _ending(self, batch: Batch) -> Ending:
        if batch.status == "cancelling":
            return "cancelled"
        return "expired" if self._depot.clock() >= batch.expires_at else ""

    async def _finalize(self, batch: Batch, *, complete: bool) -> Batch:
        """If all of its lines are done, or there is a reason why the others will not be: then it cannot be cancelled any more."""

        def closed(found: Batch) -> Batch:
            ending = found.ending or ("cancelled" if found.status == "cancelling" else "" if complete else self._ending(found))
            if found.status == "finalizing" or not (complete or ending):
                return found
            found = replace(found, ending=ending)
            return found if found.status == "cancelling" else found.moved("finalizing", self._depot.clock())

        return await asyncio.to_thread(self._depot.catalog.change, batch.id, closed)

    async def _end(self, batch: Batch, status: Status, faults: tuple[Fault, ...] = ()) -> Batch:
        """It is over: its results become files, and what nobody needs any more goes."""
        return await asyncio.to_thread(self._end_now, batch, status, faults)

    def _end_now(self, batch: Batch, status: Status, faults: tuple[Fault, ...]) -> Batch:
        now = self._depot.clock()
        expires_at = int(now) + batch.output_expires_s if batch.output_expires_s is not None else None
        found = self._depot.catalog.batch(batch.id)
        assert found is not None
        files = [
            File(
                id=name, owner=batch.owner, filename=f"{batch.id}_{what}.jsonl", purpose="batch_output", bytes=size, created_at=int(now), expires_at=expires_at
            )
            for name, what, size in ((batch.output_id, "output", found.progress.output_bytes), (batch.error_id, "error", found.progress.error_bytes))
            if size
        ]
        batch = self._depot.catalog.end(batch.id, lambda found: replace(found, faults=faults).moved(status, now), files)
        for name in (batch.output_id, batch.error_id, batch.input_file_id):
            self._depot.release(name)
        return batch


async def _within(event: asyncio.Event, wait_s: float) -> None:
    """Wait for the event, for so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await event.wait()
