"""Rows whose last stage is a language model that writes: the stages before it compute as for any row, and its text goes out as it is written.

A row is a request like those of OpenAI's interface, let in and sent as these are (`talks`); what it asks the engine is made here, and what the
engine says becomes the events of `bodies.events`. The stages before are those of the floor: in their calls it goes beside other requests' rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
import pyarrow as pa

from headrace.arrays import to_stage
from headrace.calls import attempt, call, encode, fault_of, whole, written
from headrace.errors import StageError
from headrace.lineage import Fault
from headrace.serving.bodies.codec import Codec, Incoming, Refused
from headrace.serving.bodies.events import ROW, TEXT, event
from headrace.serving.replica.jobs import Answer, Job, assemble
from headrace.serving.replica.lean import Contained, contained, with_columns
from headrace.serving.replica.parsing import LARGE_BYTES, parse
from headrace.serving.replica.station import Stations, failure
from headrace.serving.wire import ROW_PATHS, Content, Failure
from headrace.speech import Spent, Writer, Writing

T = TypeVar("T")

_CONTENTS = {path: content for content, path in ROW_PATHS.items()}
_THREADS = 8  # for bodies, and for what the user's code makes of rows


class Scribe:
    """Answers rows piece by piece. Lives on the speaker's loop. `tokens` is how many an answer has at most, `rows` how many were answered."""

    def __init__(self, stations: Stations, writer: Writer, writing: Writing) -> None:
        self.tokens, self.rows = writing.tokens, 0
        self._column, self._writer = writing.column, writer
        self._codec: Codec = stations.codec
        self._floor = stations.floor
        (self._stage,) = stations.floor.stations[-1].workers[0].stages
        self._asks = dataclasses.replace(self._stage, call=Contained(writer.asks))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="headrace-scribe")

    @staticmethod
    def of(stations: Stations) -> Scribe | None:
        """The one of these stations; None if the last of their stages does not write."""
        last: Any = contained(stations.floor.stations[-1].workers[0])[-1]
        writing = last.writing() if hasattr(last, "speaker") and hasattr(last, "writing") else None
        return None if writing is None else Scribe(stations, last, writing)

    async def speak(self, path: str, body: bytes, *, priority: int = 1, request_id: str | None = None, spent: Spent) -> AsyncIterator[str]:
        """The events that answer a row, once its first piece is there; arguments as `speech.Speaker.speak` has them.

        Raises:
            Refused: there is no answer, or while its events come, no end of it.
        """
        incoming = await self._done(len(body), self._read, body, _CONTENTS[path])
        data = await self._pass(incoming, len(body), priority)
        asked = await self._aside(attempt, True, 1, self._ask, data)
        if isinstance(asked, Fault):
            raise _refused(asked)
        pieces = written(self._stage, self._writer.write(asked, priority=priority, request_id=request_id, spent=spent))
        return self._events(data, await _next(pieces), pieces, single=incoming.single)

    def close(self) -> None:
        """End its threads."""
        self._threads.shutdown(wait=False)

    async def _pass(self, incoming: Incoming, size: int, priority: int) -> pa.Table:
        """The row as it comes to the last stage."""
        if len(self._floor.stations) == 1:
            return await self._done(size, self._codec.table, [incoming])
        visit = _Visit()
        job = Job(visit, 0, size, priority=priority, leaves=True, arrived_s=time.perf_counter(), incoming=incoming, rows=1, group=incoming.group)
        try:
            self._floor.put([job])
            why = await visit.left
        finally:
            self._floor.cancel([job])
        if why is not None:
            raise Refused(why)
        assert job.data is not None
        return assemble([job.data])

    async def _events(self, data: pa.Table, first: str | None, pieces: AsyncIterator[str], *, single: bool) -> AsyncIterator[str]:
        said: list[str] = []
        async with aclosing(pieces):  # type: ignore[type-var]
            piece = first
            while piece is not None:
                said.append(piece)
                yield event(TEXT, orjson.dumps({"column": self._column, "text": piece})).decode()
                piece = await _next(pieces)
        row = await self._done(data.nbytes, attempt, True, 1, self._row, data, "".join(said), single)
        if isinstance(row, Fault):
            raise _refused(row)
        self.rows += 1
        yield event(ROW, row).decode()

    async def _done(self, size: int, work: Callable[..., T], *given: Any) -> T:
        """Done here, or beside the loop if it is about so many bytes that it takes long."""
        return work(*given) if size < LARGE_BYTES else await self._aside(work, *given)

    async def _aside(self, work: Callable[..., T], *given: Any) -> T:
        """Done beside the loop, which goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    # On the loop, or in a thread

    def _read(self, body: bytes, content: Content) -> Incoming:
        incoming = parse(self._codec, body, content)
        if isinstance(incoming, Failure):
            raise Refused(incoming)
        if incoming.rows != 1:
            raise Refused(Failure(406, "not_acceptable", f"text/event-stream is the answer to one row, and there are {incoming.rows:,}; ask for each"))
        return incoming

    def _ask(self, data: pa.Table) -> Any:
        return call(self._asks, {name: to_stage(whole(data[name]), column) for name, column in self._stage.reads.items()})

    def _row(self, data: pa.Table, text: str, single: bool) -> bytes | memoryview:
        arrays = encode(self._stage, {self._column: [text]}, 1)
        assert isinstance(arrays, dict)  # only a fault gives a fault
        return self._codec.encode(with_columns(data, arrays), [(0, 1, single, Content.JSON)])[0]


class _Visit:
    """Who has a row pass the stations before the last one. `left` is None once it has, or why it has not."""

    def __init__(self) -> None:
        self.left: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()

    def answer(self, job: Job, answer: Answer) -> bool:
        """It has left; there is nothing to be sent."""
        if not self.left.done():
            self.left.set_result(answer if isinstance(answer, Failure) else None)
        return False


async def _next(pieces: AsyncIterator[str]) -> str | None:
    """The next piece; None at the end."""
    try:
        return await anext(pieces, None)
    except StageError as error:
        raise _refused(fault_of(error)) from None


def _refused(fault: Fault) -> Refused:
    return Refused(failure({0: fault}, single=True))
