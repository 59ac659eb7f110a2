"""Files and batches of OpenAI's interface, behind a door's own exchange."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from headrace.gateway.batches import api
from headrace.serving.door.exchange import CLOSE
from headrace.serving.door.journey import GONE

if TYPE_CHECKING:
    from headrace.gateway.batches.depot import Depot
    from headrace.serving.door.callers import Caller
    from headrace.serving.door.exchange import Exchange

NOBODY = "-"
"""The owner of files and batches where no key is asked for."""

_WAITED_S = 60.0  # for a client to send the next piece of a file


class Files:
    """Answers the paths of files and batches from a depot."""

    def __init__(self, depot: Depot) -> None:
        self.depot = depot

    async def answer(self, exchange: Exchange, method: str, path: str, caller: Caller) -> None:
        """Answer a request. What belongs to another key is not there."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.scope["headers"]}
        query = dict(parse_qsl(exchange.scope["query_string"].decode("latin-1"), keep_blank_values=True))
        owner = NOBODY if caller.name is None else caller.name
        request = api.Request(method=method, path=path, owner=owner, query=query, headers=headers, body=_pieces(exchange))
        try:
            response = await api.answer(self.depot, request)
        except ConnectionResetError:
            exchange.status = GONE.status
            return
        more = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items() if name not in ("content-type", "content-length")]
        if exchange.unread and CLOSE not in more:
            more.append(CLOSE)
        kind = (b"content-type", response.headers["content-type"].encode("latin-1"))
        if isinstance(response.body, bytes):
            await exchange.reply(response.status, response.body, kind, *more)
            return
        await exchange.begin(kind, (b"content-length", response.headers["content-length"].encode("latin-1")), *more)
        async with aclosing(response.body) as pieces:
            async for piece in pieces:
                if not await exchange.send_piece(piece):
                    return
        await exchange.send_piece(b"", more=False)

    async def close(self) -> None:
        """Close the depot."""
        await asyncio.to_thread(self.depot.close)


async def _pieces(exchange: Exchange) -> AsyncIterator[bytes]:
    while exchange.unread:
        try:
            async with asyncio.timeout(_WAITED_S):
                piece = await exchange.piece()
        except TimeoutError:
            raise ConnectionResetError("the client sends nothing any more") from None
        if piece is None:
            raise ConnectionResetError("the client has gone")
        if piece:
            yield piece
