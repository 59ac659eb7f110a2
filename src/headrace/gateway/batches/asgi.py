"""`api.answer` behind any ASGI server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qsl

from headrace.gateway.batches import api
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.refusal import RefusedError

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_NO_KEY = RefusedError(401, "The API key is missing or not known.", code="invalid_api_key")


class App:
    """An application of ASGI. It has no life of its own: the depot is opened before it, and closed after it."""

    def __init__(self, depot: Depot, owner_of: Callable[[Mapping[str, str]], str | None]) -> None:
        """Answer from this depot.

        Args:
            depot: where files and batches are.
            owner_of: the owner of a request's key, from its headers; None where it is missing or not known.
        """
        self._depot, self._owner_of = depot, owner_of

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise NotImplementedError(f"only HTTP is answered here, not {scope['type']}")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        owner = self._owner_of(headers)
        try:
            if owner is None:
                response = api.refused(_NO_KEY)
            else:
                query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
                request = api.Request(method=scope["method"], path=scope["path"], owner=owner, query=query, headers=headers, body=_pieces(receive))
                response = await api.answer(self._depot, request)
        except ConnectionResetError:
            return  # the client has gone, and what it had begun is undone
        await _reply(response, send)


async def _pieces(receive: _Receive) -> AsyncIterator[bytes]:
    """The body as it comes."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client has gone")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _reply(response: api.Response, send: _Send) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items()]
    if isinstance(response.body, bytes):
        headers.append((b"content-length", b"%d" % len(response.body)))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    if isinstance(response.body, bytes):
        await send({"type": "http.response.body", "body": response.body})
        return
    async with aclosing(response.body) as pieces:
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
