"""An HTTP load over keep-alive connections, light enough to drive a server from one core: closed loop and open loop.

Every request is accounted for: by its status, or by what its connection died of. Latencies of an open loop count from the moment at
which the request was due, so that a server that stalls cannot hide it by holding up the load (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

Check = Callable[[int, bytes], bool]
"""Whether the answer to the body of that number is right."""


@dataclass(slots=True)
class Result:
    """What became of the requests: `latencies_s` of those answered 200, counts by status, counts by failure of the connection."""

    latencies_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)  # when, in seconds since the epoch
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, int, bytes]] = field(default_factory=list)  # when, status, and body of the first answers that were not 200
    wall_s: float = 0.0

    @property
    def lost(self) -> int:
        """Requests that were neither answered nor turned away with a 429."""
        return sum(self.failures.values()) + sum(count for status, count in self.statuses.items() if status not in (200, 429))

    @property
    def per_s(self) -> float:
        """Answers with status 200 per second."""
        return len(self.latencies_s) / self.wall_s

    def ms(self, quantile: float) -> float:
        """A quantile of the latencies, in milliseconds."""
        return float(np.quantile(self.latencies_s, quantile)) * 1000 if self.latencies_s else float("nan")


class Connection(asyncio.Protocol):
    """One keep-alive connection, on which one request at a time is under way."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self.lost = True

    def connection_made(self, transport: Any) -> None:
        self.transport, self.lost = transport, False
        self.parser = httptools.HttpResponseParser(self)
        self.body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        status, body = self.parser.get_status_code(), b"".join(self.body)
        self.body.clear()
        keep = self.parser.should_keep_alive()
        self.parser = httptools.HttpResponseParser(self)
        if not keep:
            self.lost = True
            self.transport.close()
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result((status, body))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionError(type(error).__name__ if error else "closed without an answer"))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.waiting


class Client:
    """Connections to one address, and what became of everything sent over them."""

    def __init__(self, url: str, bodies: Sequence[bytes], headers: Mapping[str, str], timeout_s: float, check: Check | None) -> None:
        self.check = check
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self.timeout_s, self.result, self.sent = timeout_s, Result(), 0

    async def one(self, connection: Connection, since_s: float | None = None) -> None:
        """One request, on a connection that is opened if need be."""
        number = self.sent % len(self.requests)
        request = self.requests[number]
        self.sent += 1
        since_s = time.perf_counter() if since_s is None else since_s
        try:
            if connection.lost:
                await asyncio.get_running_loop().create_connection(lambda: connection, self.host, self.port)
            async with asyncio.timeout(self.timeout_s):
                status, body = await connection.ask(request)
        except TimeoutError:
            self.result.failures["no answer in time"] += 1
            connection.transport.abort()
            connection.lost = True
        except OSError as error:
            self.result.failures[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(0.02)
        else:
            self.result.statuses[status] += 1
            if status == 200 and self.check is not None and not self.check(number, body):
                self.result.failures["wrong answer"] += 1
            elif status == 200:
                self.result.latencies_s.append(time.perf_counter() - since_s)
                self.result.answered_s.append(time.time())
            elif len(self.result.samples) < 20:
                self.result.samples.append((time.time(), status, body[:300]))


async def closed(
    url: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60,
    check: Check | None = None,
) -> Result:
    """As many requests at once as there are connections, each sent when the one before it is answered."""
    client = Client(url, bodies, headers or {}, timeout_s, check)
    started = time.perf_counter()

    async def keep_on() -> None:
        connection = Connection()
        while time.perf_counter() - started < seconds:
            await client.one(connection)
        if not connection.lost:
            connection.transport.close()

    await asyncio.gather(*(keep_on() for _ in range(connections)))
    client.result.wall_s = time.perf_counter() - started
    return client.result


async def steady(
    url: str,
    bodies: Sequence[bytes],
    *,
    per_s: float,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60,
    check: Check | None = None,
) -> Result:
    """`per_s` requests a second at even distances, whether or not the ones before are answered: an open loop."""
    client = Client(url, bodies, headers or {}, timeout_s, check)
    idle: list[Connection] = []
    tasks: set[asyncio.Task[None]] = set()
    started = time.perf_counter()

    async def send(due_s: float) -> None:
        connection = idle.pop() if idle else Connection()
        await client.one(connection, due_s)
        idle.append(connection)

    for number in range(int(per_s * seconds)):
        due_s = started + number / per_s
        if (rest_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(rest_s)
        task = asyncio.create_task(send(due_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    client.result.wall_s = time.perf_counter() - started
    await asyncio.gather(*tasks)
    for connection in idle:
        if not connection.lost:
            connection.transport.close()
    return client.result


def run(load: Coroutine[Any, Any, Result]) -> Result:
    """The load's result, on a loop of its own."""
    return uvloop.run(load)
