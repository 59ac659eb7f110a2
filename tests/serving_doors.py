"""A front door as small as can be: frames to a replica over a socket, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib

import orjson

from headrace.serving.replica.server import ReplicaServer
from headrace.serving.wire import Content, Decoder, Kind, encode

PATIENCE_S = 20


class Peer:
    """A connection to a replica, on a loop."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.decoder, self.number, self.heard = reader, writer, Decoder(), 0, []
        self.ahead = []

    def send(self, kind, number=0, head=(), body=b""):
        self.writer.writelines(encode(kind, number, head, body))

    def ask(self, data, *, left_s=None, priority=1, alone=False, content=Content.JSON, accept=Content.JSON):
        """Send a request; returns its number."""
        self.number += 1
        body = data if isinstance(data, bytes) else orjson.dumps(data)
        self.send(Kind.WORK, self.number, (content, accept, left_s, priority, alone, None, f"r{self.number}"), body)
        return self.number

    async def next(self, *kinds):
        """The next frame, of one of those kinds if any are given: others are passed over. None at the end of the connection."""
        while True:
            while self.ahead:
                frame = self.ahead.pop(0)
                if frame.kind in kinds or (not kinds and frame.kind is not Kind.PONG):
                    return frame
            data = await asyncio.wait_for(self.reader.read(1 << 20), PATIENCE_S)
            if not data:
                return None
            self.ahead += self.decoder.feed(data)

    async def answers(self, count):
        """That many answers, by number: a parsed body, or the kind and the list."""
        found = {}
        while len(found) < count:
            frame = await self.next(Kind.DONE, Kind.FAIL, Kind.BUSY)
            assert frame is not None, "the connection is gone"
            found[frame.number] = orjson.loads(frame.body) if frame.kind is Kind.DONE else (frame.kind, frame.head)
        return found

    async def close(self):
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def call(self, data, **options):
        """The answer to a request."""
        number = self.ask(data, **options)
        return (await self.answers(1))[number]


@contextlib.contextmanager
def serving(pipeline, **options):
    """A replica of the whole pipeline."""
    server = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs, group=pipeline.name, **options)
    try:
        yield server
    finally:
        server.close()


def visit(server, scenario, *, peers=1):
    """Run `scenario(peer, ...)` against the server."""

    async def main():
        address = server.start()
        there = [Peer(*await asyncio.open_connection(*address)) for _ in range(peers)]
        try:
            return await asyncio.wait_for(scenario(*there), 2 * PATIENCE_S)
        finally:
            for peer in there:
                await peer.close()

    return asyncio.run(main())


async def until(true):
    """Wait for what another thread is about to do."""
    for _ in range(10_000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("never came true")
