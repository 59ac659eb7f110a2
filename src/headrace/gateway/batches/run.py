"""The run of a batch: lines go to the engine as it has room, and what becomes of them is taken down in groups.

Memory holds the lines under way and the results that wait for the disk, both within `Limits`; nothing grows with the batch.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from headrace.errors import StorageError
from headrace.gateway.batches.gate import Gate
from headrace.gateway.batches.limits import Limits
from headrace.gateway.batches.lines import Answered, Failed, Line, Lines, Lost, Outcome, Result, Retry, answer, failure, open_line
from headrace.gateway.batches.records import Batch, Charge
from headrace.gateway.batches.results import Results

Send = Callable[[Line], Awaitable[Outcome]]
Book = Callable[[Sequence[Charge]], Awaitable[None]]

_QUEUE = 64
"""Lines of a run that queue at the gate: as many as keep it busy, and all runs have the same number there."""
_BUSY = (429, 503)
_AGAIN = (408, *range(500, 600))

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """What lines go through.

    Attributes:
        send: has a line computed. It says what became of it, and raises nothing; it may be cancelled.
        book: books charges, and has done so when it returns. A charge whose id was booked before is booked already.
        gate: bounds the lines under way.
    """

    send: Send
    book: Book
    gate: Gate


class Run:
    """One run of a batch, as far as it comes."""

    def __init__(self, batch: Batch, lines: Lines, results: Results, *, engine: Engine, limits: Limits) -> None:
        self._batch, self._lines, self._results = batch, lines, results
        self._engine, self._limits = engine, limits
        self._held_lines = self._held_bytes = 0  # read, and not taken down yet
        self._queued = 0  # of these lines, those that wait to be sent for the first time
        self._freed = asyncio.Event()
        self._finished: list[tuple[Result, int]] = []
        self._arrived = asyncio.Event()
        self._over = False  # nothing more will finish
        self._tasks: set[asyncio.Task[None]] = set()
        self._resting: set[asyncio.Task[None]] = set()  # those of them whose line is not at the engine

    async def work(self, halt: asyncio.Event) -> None:
        """Send what is not done, until all is done or `halt` is set; then lines that are at the engine have a grace."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_down())
            everything = group.create_task(self._send_all(group))
            told = group.create_task(halt.wait())
            await asyncio.wait((everything, told), return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            everything.cancel()
            for task in self._resting:
                task.cancel()  # some before their first step
            if under_way := self._tasks - self._resting:
                await asyncio.wait(under_way, timeout=self._limits.grace_s)
            for task in self._tasks:
                task.cancel()
            self._over = True
            self._arrived.set()

    async def _send_all(self, group: asyncio.TaskGroup) -> None:
        """Begin every line that is not done, and wait until all are taken down."""
        done = self._results.progress.done
        while taken := await asyncio.to_thread(self._lines.take):
            for number, raw in taken:
                if done.overlaps(number, number + 1):
                    continue
                assert raw is not None  # the file was found valid
                while self._queued >= _QUEUE or self._held_lines >= self._limits.open_lines or self._held_bytes >= self._limits.open_bytes:
                    await self._free()
                self._held_lines += 1
                self._held_bytes += len(raw)
                self._queued += 1
                task = group.create_task(self._carry(open_line(self._batch, number, raw), len(raw)))
                self._tasks.add(task)
                self._resting.add(task)
                task.add_done_callback(self._forget)
        while self._held_lines:
            await self._free()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._resting.discard(task)

    async def _free(self) -> None:
        self._freed.clear()
        await self._freed.wait()

    async def _carry(self, line: Line, size: int) -> None:
        """Have one line computed."""
        lost = waits = 0
        limits = self._limits
        await self._pass()
        self._queued -= 1
        self._freed.set()
        while True:
            try:
                outcome = await self._engine.send(line)
            finally:
                self._engine.gate.leave()
            if isinstance(outcome, Answered) and outcome.status in _BUSY:
                outcome = Retry(limits.retry_s * 2 ** min(waits, 16))
            if isinstance(outcome, Retry):
                waits += 1
                pause_s = outcome.after_s
            else:
                lost += 1
                result = self._judge(line, outcome, last=lost >= limits.attempts)
                if result is not None:
                    break
                pause_s = limits.retry_s * 2 ** (lost - 1)
            await self._pass(min(pause_s, limits.most_retry_s))
        self._finished.append((result, size))
        self._held_bytes += len(result.text)
        self._arrived.set()

    def _judge(self, line: Line, outcome: Answered | Lost | Failed, *, last: bool) -> Result | None:
        """What an outcome makes of a line; None if it is to be tried again."""
        if isinstance(outcome, Failed):
            return failure(line, outcome.code, outcome.message)
        if isinstance(outcome, Answered):
            if outcome.status in _AGAIN and not last:
                return None
            result = answer(line, outcome)
            if result is not None or not last:
                return result
            outcome = Lost("the answer was not JSON")
        return failure(line, "server_error", f"There was no answer after {self._limits.attempts} attempts: {outcome.reason}") if last else None

    async def _pass(self, pause_s: float = 0) -> None:
        """Stay away from the engine for a while, and pass the gate to it."""
        task = asyncio.current_task()
        assert task is not None
        self._resting.add(task)
        try:
            if pause_s > 0:
                await asyncio.sleep(pause_s * random.uniform(0.9, 1.2))  # noqa: S311  not all at once
            await self._engine.gate.enter()
        finally:
            self._resting.discard(task)

    async def _take_down(self) -> None:
        """Take down what has finished, in groups, until nothing more will."""
        while not (self._over and not self._finished):
            await self._arrived.wait()
            if not self._over:
                await asyncio.sleep(self._limits.gather_s)
            self._arrived.clear()
            finished, self._finished = self._finished, []
            if finished:
                await self._settle([result for result, _ in finished])
                self._held_lines -= len(finished)
                self._held_bytes -= sum(size + len(result.text) for result, size in finished)
                self._freed.set()

    async def _settle(self, group: list[Result]) -> None:
        """Take down a group. Where the disk refuses, wait until it does not; meanwhile `Limits` hold up the lines."""
        while True:
            try:
                charges = await asyncio.to_thread(self._results.add, group)
                break
            except StorageError as error:
                if self._over:
                    raise
                _log.warning("batch %s waits for the disk: %s", self._batch.id, error)
                await asyncio.sleep(self._limits.pause_s)
        if charges:
            await self._engine.book(charges)


async def give_up(batch: Batch, lines: Lines, results: Results) -> None:
    """Answer every line that is not done with why it will not be: the batch has expired, or was cancelled."""
    code, message = {
        "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
        "cancelled": ("batch_cancelled", "This request was not executed, as the batch was cancelled."),
    }[batch.ending]
    while taken := await asyncio.to_thread(lines.take):
        done = results.progress.done
        left = [failure(open_line(batch, number, raw), code, message) for number, raw in taken if raw and not done.overlaps(number, number + 1)]
        if left:
            await asyncio.to_thread(results.add, left)
