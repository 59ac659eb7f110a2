"""The answer to one row while a language model writes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from headrace.client.attempts import Lost, error_from
from headrace.client.loop import result, submit
from headrace.client.session import told
from headrace.errors import DeadlineError, ServiceError, UnavailableError
from headrace.serving.bodies.events import ERROR, ROW, TEXT, Events

if TYPE_CHECKING:
    import httpx2

MEDIA = "text/event-stream"

Put = Callable[[str], None]
"""Takes the next piece of a text."""


class Written:
    """The answer to a row, being written: the pieces of its text, for `for` or `async for`, and then the row.

        answer = client.reviews.write({"text": "A quiet room"})
        for piece in answer:
            print(piece, end="", flush=True)
        answer.row["summary"]                                          # what the pieces are together, with all other outputs

    What goes wrong is raised while it is read. `close` hangs up, and so does forgetting it: the service then stops writing.
    """

    def __init__(self, work: Callable[[Put], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._whole = submit(_filled(self._pieces, work))
        self._ended = False

    @property
    def row(self) -> dict[str, Any]:
        """The whole row, as a call gives it. Waits until it is there, so code that awaits should have read all pieces.

        Raises:
            ServiceError: there is none; as from a call.
        """
        return result(self._whole)

    def close(self) -> None:
        """Read no more of it."""
        self._whole.cancel()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = None if self._ended else result(submit(self._pieces.get()))
        if piece is None:
            self._ended = True
            self._whole.result()
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        piece = None if self._ended else await asyncio.wrap_future(submit(self._pieces.get()))
        if piece is None:
            self._ended = True
            await asyncio.wrap_future(self._whole)
            raise StopAsyncIteration
        return piece

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._whole.cancel()


async def _filled(pieces: asyncio.Queue[str | None], work: Callable[[Put], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any]:
    """The row. None in the queue is the end."""
    try:
        return await work(pieces.put_nowait)
    finally:
        pieces.put_nowait(None)


async def read(response: httpx2.Response, put: Put, *, left_s: float, request_id: str) -> bytes:
    """The row, as JSON, at the end of an answer whose pieces go to `put`.

    Raises:
        ServiceError: the service tells of an error in place of the row.
        UnavailableError, DeadlineError: the answer breaks off, or has not come to its end in time.
    """
    reader = Events()
    try:
        with told():
            async with asyncio.timeout(left_s), aclosing(response), aclosing(response.aiter_bytes()) as chunks:
                async for chunk in chunks:
                    for name, data in reader.feed(chunk):
                        if name == ROW:
                            return data
                        if name == ERROR:
                            raise error_from(json.loads(data), 0, request_id)
                        if name == TEXT:
                            put(str(json.loads(data)["text"]))
    except TimeoutError:
        raise DeadlineError("the answer was not written in time", 0, "deadline_exceeded", request_id) from None
    except Lost as lost:
        raise UnavailableError(f"the answer broke off: {lost}", 0, "unavailable", request_id) from lost
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"the answer is none of a headrace service: {error!r}", 200, "", request_id) from error
    raise UnavailableError("the answer broke off before the row", 0, "unavailable", request_id)
