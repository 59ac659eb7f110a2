"""Replicas that speak the wire and do what a test tells them, and a service made of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from headrace.serving import wire
from headrace.serving.door.app import Door
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute
from headrace.serving.wire import Content, Kind, Stats, Work

LIMITS = Limits()
_opened: list[FakeReplica] = []

IDLE = Stats(in_flight=0, queued=0, oldest_call_s=0.0, rows=0, calls=0, filled=0.0, memory_bytes=1, draining=False)


@dataclasses.dataclass(eq=False)
class Call:
    """A request that reached a replica."""

    connection: Connection
    number: int
    work: Work
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    def done(self, body: bytes = b'{"y":1}', *, rows: int = 1, times: tuple[float, float, float] = (0.001, 0.002, 0.003)) -> None:
        self.connection.send(Kind.DONE, self.number, (rows, *times, rows), body)

    def fail(self, status: int, code: str, message: str = "no", details: tuple[Any, ...] = ()) -> None:
        self.connection.send(Kind.FAIL, self.number, (status, code, message, details))

    def busy(self, retry_after_s: float = 0.2) -> None:
        self.connection.send(Kind.BUSY, self.number, (retry_after_s,))

    def started(self) -> None:
        self.connection.send(Kind.STARTED, self.number)


class Connection(asyncio.Protocol):
    def __init__(self, replica: FakeReplica) -> None:
        self.replica = replica
        self.decoder = wire.Decoder()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.replica.connections.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.replica.connections.remove(self)

    def data_received(self, data: bytes) -> None:
        for frame in self.decoder.feed(data):
            self.replica.frames.append(frame.kind)
            if frame.kind is Kind.PING:
                self.pong()
            elif frame.kind is Kind.CANCEL:
                self.replica.cancelled.append(frame.number)
                self.replica.noticed.set()
            else:
                content, accept, *rest = frame.head
                self.replica.take(Call(self, frame.number, Work(Content(content), Content(accept), *rest), bytes(frame.body)))

    def pong(self) -> None:
        if not self.replica.silent:
            self.send(Kind.PONG, 0, dataclasses.asdict(self.replica.stats))

    def send(self, kind: Kind, number: int = 0, head: Any = (), body: bytes = b"") -> None:
        self.transport.writelines(wire.encode(kind, number, head, body))


class FakeReplica:
    """Listens on a port of loopback; `behave` is told each request."""

    def __init__(self, name: str = "r", behave: Callable[[Call], None] = Call.done, *, pid: int = 0) -> None:
        self.name, self.behave, self.pid = name, behave, pid
        self.stats = IDLE
        self.silent = False
        self.calls: list[Call] = []
        self.frames: list[Kind] = []
        self.cancelled: list[int] = []
        self.connections: list[Connection] = []
        self.noticed = asyncio.Event()
        self.port = 0

    async def open(self) -> FakeReplica:
        self.server = await asyncio.get_running_loop().create_server(lambda: Connection(self), "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        _opened.append(self)
        return self

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.name, "127.0.0.1", self.port, pid=self.pid)

    def take(self, call: Call) -> None:
        self.calls.append(call)
        self.behave(call)
        self.noticed.set()

    async def got(self, number: int) -> Call:
        """The request with this number, counted from 1, once it is there."""
        await until(lambda: len(self.calls) >= number)
        return self.calls[number - 1]

    def drain(self) -> None:
        for connection in self.connections:
            connection.send(Kind.DRAIN)

    def die(self) -> None:
        """As if the process were killed: nobody listens, and all connections are reset."""
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()


async def until(holds: Callable[[], Any], *, within_s: float = 5.0) -> None:
    """Wait for something that is about to hold."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def version(number: int = 1, *groups: list[FakeReplica], weight: float = 1.0, shadow: float = 0.0, pipeline: str = "p") -> VersionRoute:
    routes = tuple(GroupRoute(f"g{at}", tuple(replica.endpoint for replica in group)) for at, group in enumerate(groups))
    return VersionRoute(number, weight, routes, {"pipeline": pipeline}, shadow)


def routes(*versions: VersionRoute, revision: int = 1, limits: Limits = LIMITS, keys: dict[str, str] | None = None) -> Routes:
    return Routes("s", revision, versions, limits, keys)


@dataclasses.dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


class FakeConnection:
    """The client's connection, as a server tells the door of it."""

    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole
        self.on_lost: Callable[[], None] | None = None
        self.aborted = self.paused = False

    async def drained(self) -> None:
        await asyncio.Event().wait()

    def abort(self) -> None:
        self.aborted = True

    def lose(self) -> None:
        assert self.on_lost is not None
        self.on_lost()


async def ask(
    door: Door,
    body: bytes | list[bytes | None] = b"{}",
    *,
    method: str = "POST",
    path: str = "/p",
    headers: dict[str, str] | None = None,
    connection: FakeConnection | None = None,
) -> Reply:
    """What the door answers to one request. A body in pieces comes chunked; a piece of None never comes."""
    pieces: list[bytes | None] = [body] if isinstance(body, bytes) else list(body)
    reply = Reply()

    async def receive() -> dict[str, Any]:
        if not pieces or pieces[0] is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += bytes(message["body"])

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    if isinstance(body, bytes):
        raw.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "headrace.connection": connection or FakeConnection(whole=isinstance(body, bytes))}
    await door(scope, receive, send)
    return reply


@contextlib.asynccontextmanager
async def service(*replicas: FakeReplica, limits: Limits = LIMITS, ready: bool = True) -> AsyncIterator[Door]:
    """A door before one version of one group of these replicas."""
    async with several(lambda: [version(1, list(replicas))], list(replicas), limits=limits, ready=ready) as door:
        yield door


@contextlib.asynccontextmanager
async def several(
    versions: Callable[[], list[VersionRoute]], replicas: list[FakeReplica], *, limits: Limits = LIMITS, ready: bool = True
) -> AsyncIterator[Door]:
    """A door before versions that are made once their replicas listen."""
    for replica in replicas:
        await replica.open()
    door = Door("s")
    door.update(routes(*versions(), limits=limits))
    try:
        if ready:
            await until(lambda: all(version.open for version in door.fleet.versions.values()))
        yield door
    finally:
        await door.close(timeout_s=0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on a loop of its own; nothing may be left behind on it."""

    async def whole() -> None:
        unraised: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unraised.append(context))
        try:
            await asyncio.wait_for(test(), 20)
        finally:
            while _opened:
                _opened.pop().die()
        await asyncio.sleep(0)
        assert not unraised, unraised

    asyncio.run(whole())
