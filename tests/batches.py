"""A depot of files and batches, asked as over HTTP, and an engine that does as it is told."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from headrace.gateway.batches import api
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.limits import Limits
from headrace.gateway.batches.lines import Answered, Line, Outcome
from headrace.gateway.batches.records import Charge, Usage
from headrace.gateway.batches.worker import Worker

CHAT = "/v1/chat/completions"
QUICK = {"poll_s": 0.003, "pause_s": 0.01, "retry_s": 0.001, "gather_s": 0.002, "free_bytes": 1, "floor_bytes": 1}


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def depot_in(folder: Path, clock: Callable[[], float] | None = None, **limits: float) -> Depot:
    return Depot(str(folder), limits=Limits(**QUICK | limits), clock=clock or Clock())


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


class Reply:
    """An answer, read to its end."""

    def __init__(self, response: api.Response, body: bytes) -> None:
        self.status, self.headers, self.body = response.status, response.headers, body

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | None, str | None]:
        told = self.value["error"]
        assert set(told) == {"message", "type", "param", "code"} and told["message"]
        return self.status, told["code"], told["param"]


async def ask(
    depot: Depot, method: str, path: str, value: Any = None, *, body: AsyncIterator[bytes] | None = None, owner: str = "ann", kind: str = "", **query: Any
) -> Reply:
    given = body if body is not None else pieces(json.dumps(value).encode())
    request = api.Request(
        method=method, path=path, owner=owner, query={name: str(one) for name, one in query.items()}, headers={"content-type": kind}, body=given
    )
    response = await api.answer(depot, request)
    if isinstance(response.body, bytes):
        return Reply(response, response.body)
    return Reply(response, b"".join([piece async for piece in response.body]))


def form(content: bytes, filename: str | None = "in.jsonl", **fields: str) -> tuple[str, bytes]:
    """A form with a file, as `(content type, body)`."""
    parts = [f'--frontier\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    head = 'form-data; name="file"' + (f'; filename="{filename}"' if filename is not None else "")
    parts.append(f"--frontier\r\nContent-Disposition: {head}\r\nContent-Type: application/octet-stream\r\n\r\n".encode() + content + b"\r\n")
    return "multipart/form-data; boundary=frontier", b"".join(parts) + b"--frontier--\r\n"


async def upload(depot: Depot, content: bytes, *, owner: str = "ann") -> str:
    kind, body = form(content, purpose="batch")
    reply = await ask(depot, "POST", "/v1/files", body=pieces(body), kind=kind, owner=owner)
    assert reply.status == 200, reply.body
    return reply.value["id"]


def request_line(custom_id: Any, *, model: Any = "m", url: Any = CHAT, **body: Any) -> bytes:
    value = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, "messages": [], **body}}
    return json.dumps(value).encode() + b"\n"


def requests(count: int) -> bytes:
    return b"".join(request_line(f"r{number}") for number in range(1, count + 1))


async def order(depot: Depot, content: bytes, *, owner: str = "ann", window: str = "24h", **more: Any) -> str:
    """Upload a file and begin a batch of it; the batch's id."""
    name = await upload(depot, content, owner=owner)
    reply = await ask(depot, "POST", "/v1/batches", {"input_file_id": name, "endpoint": CHAT, "completion_window": window, **more}, owner=owner)
    assert reply.status == 200, reply.body
    return reply.value["id"]


async def shown(depot: Depot, batch: str, owner: str = "ann") -> dict[str, Any]:
    return (await ask(depot, "GET", f"/v1/batches/{batch}", owner=owner)).value


async def text_of(depot: Depot, file: str | None, owner: str = "ann") -> list[dict[str, Any]]:
    """The lines of a file."""
    if file is None:
        return []
    reply = await ask(depot, "GET", f"/v1/files/{file}/content", owner=owner)
    assert reply.status == 200, reply.body
    assert len(reply.body) == int(reply.headers["content-length"])
    return [json.loads(line) for line in reply.body.splitlines()]


class FakeEngine:
    """Answers lines by `behave`, which is told the line and which time it comes; books like a ledger that takes an id once."""

    def __init__(self, behave: Callable[[Line, int], Outcome | Awaitable[Outcome]] | None = None) -> None:
        self.behave = behave or self.good
        self.sent: Counter[int] = Counter()
        self.booked: dict[str, Charge] = {}
        self.under_way = self.most_under_way = 0

    @staticmethod
    def good(line: Line, times: int) -> Outcome:
        """An answer whose usage tells which time it was."""
        body = json.dumps({"id": "x", "echo": line.custom_id, "usage": {"times": times}}).encode()
        return Answered(200, body, Usage(line.number, times))

    async def send(self, line: Line) -> Outcome:
        self.sent[line.number] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            found = self.behave(line, self.sent[line.number])
            return await found if isinstance(found, Awaitable) else found
        finally:
            self.under_way -= 1

    async def book(self, charges: Iterable[Charge]) -> None:
        for charge in charges:
            self.booked.setdefault(charge.id, charge)


@asynccontextmanager
async def working(depot: Depot, engine: FakeEngine, slots: Callable[[], int] = lambda: 8) -> AsyncIterator[asyncio.Event]:
    """A worker, for the length of the block; the event tells it to stop before that."""
    stopping = asyncio.Event()
    worker = asyncio.create_task(Worker(depot, send=engine.send, book=engine.book, slots=slots).run(stopping))
    try:
        yield stopping
    finally:
        stopping.set()
        await asyncio.wait_for(worker, 10)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await true():  # noqa: ASYNC110  what is waited for is in a database
            await asyncio.sleep(0.002)


async def over(depot: Depot, batch: str, owner: str = "ann") -> dict[str, Any]:
    """The batch, once it is over."""

    async def ended() -> bool:
        return (await shown(depot, batch, owner))["status"] in ("completed", "failed", "expired", "cancelled")

    await until(ended)
    return await shown(depot, batch, owner)
