"""Rows that come as a stream, one JSON object a line, and are answered as a stream, line by line and in order."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, Protocol

from headrace.serving.door import heads
from headrace.serving.door.exchange import Ask
from headrace.serving.door.fleet import Version
from headrace.serving.door.journey import GONE, Answer
from headrace.serving.routes import Limits
from headrace.serving.wire import Failure

CHUNK_ROWS = 128
CHUNK_BYTES = 1 << 20
WINDOW = 8  # chunks that are computed, or wait to be sent

_KIND = (b"content-type", heads.NDJSON_TYPE)
_OPENING = re.compile(r'\s*\{\s*"rows"\s*:\s*\[\s*')
_BETWEEN = re.compile(r"\s*,?\s*")
_scan = json.JSONDecoder().raw_decode
_UNREADABLE = Failure(500, "stage_failed", "the rows of the answer cannot be told apart")
_TURNED_AWAY = (429, 503)
_OF_ROWS = (400, 413, 422)  # with stage_failed: what may be the fault of one row among others


class Chunk:
    """Lines that are computed together: where they stood in the stream, and what becomes of each. `refused` says why the service would not take it."""

    __slots__ = ("answers", "done", "lines", "numbers", "refused", "size")

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.numbers: list[int] = []
        self.answers: list[bytes] = []
        self.size = 0
        self.refused: Failure | None = None
        self.done = asyncio.Event()

    def add(self, line: bytes, number: int) -> None:
        """One more line."""
        self.lines.append(line)
        self.numbers.append(number)
        self.size += len(line)

    def fail(self, which: Iterable[int], failure: Failure) -> None:
        """These lines are answered with an error, each with what is known of it."""
        for at in which:
            self.answers[at] = error_line(failure, self.numbers[at])


class Rows(Protocol):
    """Who has rows computed."""

    @property
    def limits(self) -> Limits:
        """The bounds of the service."""

    async def compute_chunk(self, ask: Ask, version: Version, body: bytes, *, patient: bool) -> Answer | Failure:
        """What came of a part of a stream."""

    async def turn_away(self, ask: Ask, failure: Failure, version: Version | None) -> None:
        """Answer with an error; nothing was answered yet."""

    def end_stream(self, ask: Ask, version: Version, *, rows: int, failure: Failure | None) -> None:
        """A stream is over."""


class Stream:
    """One stream of rows. Up to `WINDOW` chunks are under way; nothing more is read while the client does not read their answers.

    A chunk is what has come, so that lines which come one by one are answered one by one. Once the answer has begun, what the service
    has no room for waits. The deadline is that of each chunk, unless the client has named one.
    """

    def __init__(self, rows: Rows, ask: Ask, version: Version) -> None:
        running = asyncio.current_task()
        assert running is not None
        self._running = running
        self._rows = rows
        self._ask = ask
        self._version = version
        self._exchange = ask.exchange
        self._limits = rows.limits
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue(WINDOW)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: Failure | None = None  # why it ends early
        self._mistake: BaseException | None = None
        self._number = 0
        self._answered = 0
        self._taken = False  # the first chunk decides whether the service takes the stream
        self._begun = False

    async def run(self) -> None:
        """Answer it."""
        self._start(self._read())
        self._exchange.watch(self._lose)
        try:
            await self._write()
        except asyncio.CancelledError:
            if self._mistake is not None:
                raise self._mistake from None
            if self._ended is not GONE:
                raise
        finally:
            self._exchange.watch(None)
            for task in self._tasks:
                task.cancel()
        if self._ended is GONE:
            self._exchange.status = GONE.status
        self._rows.end_stream(self._ask, self._version, rows=self._answered, failure=self._ended)

    def _lose(self) -> None:
        """The client has gone."""
        self._ended = GONE
        self._running.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (mistake := task.exception()) is not None:
            self._mistake = mistake  # of ours: the stream is cut off rather than left waiting for ever
            self._running.cancel()

    async def _write(self) -> None:
        """Send what becomes of the chunks, in order."""
        exchange = self._exchange
        while (chunk := await self._chunks.get()) is not None:
            await chunk.done.wait()
            if chunk.refused is not None:
                self._ended = chunk.refused
                break
            await self._begin()
            self._answered += len(chunk.lines)
            if not await exchange.send_piece(b"".join(chunk.answers)):
                self._ended = GONE
            exchange.hold(-chunk.size)
            if self._ended is GONE:
                return
        if self._ended is GONE:
            return
        if self._ended is not None and not self._begun:
            await self._rows.turn_away(self._ask, self._ended, self._version)
            return
        await self._begin()
        await exchange.send_piece(b"" if self._ended is None else error_line(self._ended, self._number + 1), more=False)

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            await self._exchange.begin(_KIND, (b"x-headrace-version", b"%d" % self._version.number))

    async def _read(self) -> None:
        """Cut what comes into chunks, and have them computed. What the client cannot be answered to any more ends it."""
        exchange, most = self._exchange, self._limits.body_bytes
        rest = bytearray()
        try:
            while self._ended is None:
                async with asyncio.timeout(self._limits.body_s):
                    piece = await exchange.piece()
                if piece is None:
                    break
                end = piece.rfind(b"\n") + 1
                if end:
                    await self._compute(bytes(rest) + piece[:end])
                    rest.clear()
                rest += piece[end:]
                if len(rest) > most:
                    await self._compute(bytes(rest))
            if self._ended is None and exchange.unread:
                self._ended = GONE
            elif self._ended is None:
                await self._compute(bytes(rest))
        except TimeoutError:
            self._ended = Failure(408, "timeout_reading", "no further line came in time")
        await self._chunks.put(None)

    async def _compute(self, data: bytes) -> None:
        """Have whole lines computed; waits while there is no room for more chunks."""
        for chunk in self._cut(data.split(b"\n")):
            self._exchange.hold(chunk.size)
            self._start(self._answer(chunk, patient=self._taken))
            self._taken = True
            await self._chunks.put(chunk)

    def _cut(self, lines: list[bytes]) -> Iterator[Chunk]:
        """Chunks of the lines that are not blank. A line that is too long ends the stream."""
        most = min(CHUNK_ROWS, self._limits.rows)
        chunk = Chunk()
        for line in lines[:-1] if lines[-1] == b"" else lines:
            if len(line) > self._limits.body_bytes:
                self._ended = Failure(413, "too_large", f"the line has more than {self._limits.body_bytes:,} bytes, which is the most")
                break
            self._number += 1
            if line.isspace() or not line:
                continue
            if chunk.lines and (len(chunk.lines) >= most or chunk.size + len(line) > CHUNK_BYTES):
                yield chunk
                chunk = Chunk()
            chunk.add(line, self._number)
        if chunk.lines:
            yield chunk

    async def _answer(self, chunk: Chunk, *, patient: bool) -> None:
        """Find out what becomes of each line. Lines that the service says are wrong are answered so, and the others computed without them."""
        faults = [check(line) for line in chunk.lines]
        chunk.answers = [b"" if fault is None else error_line(fault, chunk.numbers[at]) for at, fault in enumerate(faults)]
        groups = [[at for at, fault in enumerate(faults) if fault is None]]
        while groups:
            group = groups.pop()
            if not group:
                continue
            outcome = await self._rows.compute_chunk(self._ask, self._version, b'{"rows":[%s]}' % b",".join(chunk.lines[at] for at in group), patient=patient)
            if isinstance(outcome, Answer):
                parts = split(outcome.body, len(group))
                if parts is None:
                    chunk.fail(group, _UNREADABLE)
                else:
                    for at, part in zip(group, parts, strict=True):
                        chunk.answers[at] = part
                continue
            if outcome.status in _TURNED_AWAY and not patient:
                chunk.refused = outcome
                break
            patient = True
            groups += self._blame(chunk, group, outcome)
        chunk.done.set()

    @staticmethod
    def _blame(chunk: Chunk, group: list[int], failure: Failure) -> list[list[int]]:
        """Fail the lines that a failure speaks of; those that are to be tried again, without them."""
        if failure.status in _OF_ROWS or failure.code == "stage_failed":
            named = {row for detail in failure.details if (row := named_row(detail)) is not None and row < len(group)}
            if named:
                for row in named:
                    details = tuple({**detail, "loc": list(detail["loc"][2:])} for detail in failure.details if named_row(detail) == row)
                    chunk.fail([group[row]], Failure(failure.status, failure.code, failure.message, details))
                return [[at for row, at in enumerate(group) if row not in named]]
            if len(group) > 1:
                return [group[len(group) // 2 :], group[: len(group) // 2]]
        chunk.fail(group, failure)
        return []


def check(line: bytes) -> Failure | None:
    """Why a line is no row, as far as that can be told without knowing the columns."""
    try:
        value = json.loads(line)
    except RecursionError:
        return Failure(400, "not_json", "the line is nested too deeply")
    except ValueError as error:
        return Failure(400, "not_json", f"the line is not JSON: {error}")
    return None if isinstance(value, dict) else Failure(422, "invalid_row", "the line is not a JSON object")


def split(body: memoryview, count: int) -> list[bytes] | None:
    """The rows of an answer as lines, word for word; None if it does not hold `count` rows."""
    text = str(body, "utf-8")
    opening = _OPENING.match(text)
    if opening is None:
        return None
    at = opening.end()
    rows: list[bytes] = []
    try:
        for _ in range(count):
            _, end = _scan(text, at)
            rows.append(text[at:end].encode() + b"\n")
            between = _BETWEEN.match(text, end)
            at = between.end() if between is not None else end
    except ValueError:
        return None
    return rows if text.startswith("]", at) else None


def error_line(failure: Failure, number: int) -> bytes:
    """The line that stands in for an answer to the line with this number, counted from 1."""
    return json.dumps({"error": {**heads.failure_fields(failure), "line": number}}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def named_row(detail: dict[str, Any]) -> int | None:
    """The row that a detail speaks of."""
    loc = detail.get("loc")
    if isinstance(loc, list | tuple) and len(loc) >= 2 and loc[0] == "rows" and isinstance(loc[1], int):
        return loc[1]
    return None
