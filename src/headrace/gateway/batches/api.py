"""The HTTP face of files and batches, for any server: a `Request` in, a `Response` out, in the shapes that OpenAI's clients know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import orjson

from headrace.errors import StorageError
from headrace.gateway.batches import files, orders
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.records import Batch, File
from headrace.gateway.batches.refusal import RefusedError, refuse_storage

_MOST_ORDER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request of an owner, whose key was checked.

    Attributes:
        method: in capital letters.
        path: without the query; percent-escapes are resolved.
        owner: whose files and batches it is about.
        query: its parameters.
        headers: by their names in small letters.
        body: its pieces as they come. What it raises when the client goes passes through.
    """

    method: str
    path: str
    owner: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered. A body in pieces is to be read to its end, or closed."""

    status: int
    headers: Mapping[str, str]
    body: bytes | AsyncGenerator[bytes, None]


async def answer(depot: Depot, request: Request) -> Response:
    """Answer a request for a path under `/v1/files` or `/v1/batches`."""
    try:
        return await _route(depot, request)
    except RefusedError as error:
        return refused(error)
    except StorageError as error:
        return refused(refuse_storage(error))


def refused(refusal: RefusedError) -> Response:
    """The answer that says no."""
    headers = {"content-type": "application/json"}
    if refusal.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not wanted
    if refusal.status in (409, 507):
        headers["x-should-retry"] = "false"  # OpenAI's clients would, which does not help
    return Response(refusal.status, headers, refusal.body)


async def _route(depot: Depot, request: Request) -> Response:
    found: Response | None = None
    match request.path.strip("/").split("/"):
        case ["v1", "files", *rest]:
            found = await _about_files(depot, request, rest)
        case ["v1", "batches", *rest]:
            found = await _about_batches(depot, request, rest)
    if found is None:
        raise RefusedError(404, f"Invalid URL ({request.method[:20]} {request.path[:200]})", code="not_found")
    return found


async def _about_files(depot: Depot, request: Request, rest: list[str]) -> Response | None:
    match request.method, rest:
        case "POST", []:
            return await _upload(depot, request)
        case "GET", []:
            return await _list_files(depot, request)
        case "GET", [name]:
            return _shown(await asyncio.to_thread(files.find, depot, request.owner, name))
        case "DELETE", [name]:
            await asyncio.to_thread(files.remove, depot, request.owner, name)
            return _json({"id": name, "object": "file", "deleted": True})
        case "GET", [name, "content"]:
            return await _content(depot, await asyncio.to_thread(files.find, depot, request.owner, name))
        case _, [] | [_] | [_, "content"]:
            raise _not_allowed(request)
    return None


async def _about_batches(depot: Depot, request: Request, rest: list[str]) -> Response | None:
    match request.method, rest:
        case "POST", []:
            return _shown(await asyncio.to_thread(orders.place, depot, request.owner, await _order(request)))
        case "GET", []:
            return await _list_batches(depot, request)
        case "GET", [name]:
            return _shown(await asyncio.to_thread(orders.find, depot, request.owner, name))
        case "POST", [name, "cancel"]:
            return _shown(await asyncio.to_thread(orders.cancel, depot, request.owner, name))
        case _, [] | [_] | [_, "cancel"]:
            raise _not_allowed(request)
    return None


def _not_allowed(request: Request) -> RefusedError:
    return RefusedError(405, f"Not allowed to {request.method[:20]} on {request.path[:200]}.", code="method_not_allowed")


async def _upload(depot: Depot, request: Request) -> Response:
    length = request.headers.get("content-length", "")
    file = await files.receive(
        depot,
        request.owner,
        content_type=request.headers.get("content-type", ""),
        length=int(length) if length.isascii() and length.isdigit() else None,
        body=request.body,
    )
    return _shown(file)


async def _content(depot: Depot, file: File) -> Response:
    headers = {
        "content-type": "application/octet-stream",
        "content-length": str(file.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
    }
    return Response(200, headers, await files.content(depot, file))


async def _order(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for piece in request.body:
        body += piece
        if len(body) > _MOST_ORDER_BYTES:
            raise RefusedError(413, f"The body has more than {_MOST_ORDER_BYTES:,} bytes, which is the most.")
    try:
        order = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(400, f"The body is not JSON: {error}") from None
    if not isinstance(order, dict):
        raise RefusedError(400, "The body is not a JSON object.")
    return order


async def _list_files(depot: Depot, request: Request) -> Response:
    query, limit = request.query, _limit(request.query, most=10_000, usual=10_000)
    order, after, purpose = query.get("order", "desc"), query.get("after"), query.get("purpose")
    if order not in ("asc", "desc"):
        raise RefusedError(400, "Invalid value for 'order': it can be 'asc' or 'desc'.", param="order", code="invalid_value")

    def found() -> list[File]:
        return depot.catalog.files(request.owner, depot.clock(), limit=limit, after=after, purpose=purpose, oldest=order == "asc")

    return _listed(await asyncio.to_thread(found), limit)


async def _list_batches(depot: Depot, request: Request) -> Response:
    limit = _limit(request.query, most=100, usual=20)
    return _listed(await asyncio.to_thread(depot.catalog.batches, request.owner, limit=limit, after=request.query.get("after")), limit)


def _limit(query: Mapping[str, str], *, most: int, usual: int) -> int:
    wanted = query.get("limit", str(usual))
    if not (wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and 1 <= int(wanted) <= most):
        raise RefusedError(400, f"Invalid value for 'limit': it can be a whole number from 1 to {most}.", param="limit", code="invalid_value")
    return int(wanted)


def _listed(found: Sequence[File] | Sequence[Batch], limit: int) -> Response:
    shown = [one.shown() for one in found[:limit]]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return _json({"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": len(found) > limit})


def _shown(one: File | Batch) -> Response:
    return _json(one.shown())


def _json(value: dict[str, Any]) -> Response:
    return Response(200, {"content-type": "application/json"}, orjson.dumps(value))
