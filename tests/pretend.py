"""A service of a test's own, on loopback: answers with a pipeline, or with what a script says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import headrace as hr
from headrace.errors import HeadraceError
from headrace.local import prepare
from headrace.serving.bodies.codec import Codec, Refused
from headrace.serving.bodies.openapi import contract, schema
from headrace.serving.wire import Content

ARROW, LINES = "application/vnd.apache.arrow.stream", "application/x-ndjson"


@dataclass(frozen=True)
class Seen:
    """A request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer. With `cut`, the connection is closed before the body's end; with `drop`, before its beginning; `wait` is awaited first."""

    status: int = 200
    body: bytes | Mapping[str, Any] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    drop: bool = False
    wait: threading.Event | None = None


def refusal(status: int, code: str, message: str = "no", details: Sequence[Mapping[str, Any]] = (), **headers: str) -> Reply:
    """An answer that says why there is none."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"code": code, "message": message, "details": list(details)}, "request_id": "asked"}, named)


Script = Callable[[Seen], Reply | None]


class Pretend:
    """The service. What is in `script` answers the next POST requests, one each; None among it, and what comes after, is answered by the pipeline."""

    def __init__(self, pipeline: hr.Pipeline, *, rows: int = 4096, version: int = 1) -> None:
        self.rows = rows
        self.script: deque[Reply | Script | None] = deque()
        self.seen: list[Seen] = []
        self.change(pipeline, version)

    def change(self, pipeline: hr.Pipeline, version: int) -> None:
        """Another version."""
        self.pipeline, self.version = pipeline, version
        self._run = prepare(pipeline)
        self._codec = Codec(pipeline.inputs, pipeline.outputs, rows=self.rows)

    @property
    def posts(self) -> list[Seen]:
        """The requests that asked for rows."""
        return [one for one in self.seen if one.method == "POST"]

    def answer(self, seen: Seen) -> Reply:
        """What a request is answered."""
        self.seen.append(seen)
        step = self.script.popleft() if self.script and seen.method == "POST" else None
        reply = step(seen) if callable(step) else step
        return reply or self.honest(seen)

    def honest(self, seen: Seen) -> Reply:
        """What the pipeline answers."""
        if seen.path == f"/{self.pipeline.name}/schema":
            return Reply(200, schema(contract(self.pipeline)))
        if seen.path != f"/{self.pipeline.name}":
            return refusal(404, "not_found", f"no pipeline at {seen.path}")
        kind = seen.headers.get("content-type", "")
        if kind == LINES:
            return Reply(200, b"".join(self._line(line) + b"\n" for line in seen.body.splitlines()))
        content = Content.ARROW if kind == ARROW else Content.JSON
        accept = Content.ARROW if seen.headers.get("accept") == ARROW else Content.JSON
        try:
            incoming, data = self._decoded(seen.body, content)
        except Refused as refused:
            return refusal(refused.failure.status, refused.failure.code, refused.failure.message, refused.failure.details)
        except HeadraceError as error:
            return refusal(500, "stage_failed", str(error), [{"loc": [], "message": str(error)}])
        return Reply(200, bytes(self._codec.encode(data, [(0, incoming, content is Content.JSON and b'"rows"' not in seen.body[:8], accept)])[0]))

    def _decoded(self, body: bytes, content: Content) -> tuple[int, Any]:
        from headrace.arrays import table, to_rows

        incoming = self._codec.decode(body, content)
        rows = self._run(to_rows(self._codec.table([incoming]), self.pipeline.inputs))
        return incoming.rows, table(rows, self.pipeline.outputs)

    def _line(self, line: bytes) -> bytes:
        seen = Seen("POST", f"/{self.pipeline.name}", {}, line)
        reply = self.honest(seen)
        return reply.body if isinstance(reply.body, bytes) else json.dumps({"error": {**reply.body["error"], "status": reply.status}}).encode()


@contextlib.contextmanager
def serving(service: Pretend) -> Iterator[str]:
    """The address at which `service` answers for the length of the block."""

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet, or the client's delayed acknowledgement would cost 40 ms

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = service.answer(Seen(self.command, self.path, headers, body))
            if reply.wait is not None:
                reply.wait.wait(10)
            if reply.drop:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"x-headrace-version": str(service.version), **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # a client may have gone
                self.wfile.write(content[: len(content) // 2] if reply.cut else content)
                self.wfile.flush()
            if reply.cut:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        do_POST = do_GET  # noqa: N815

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that hung up

    server = Server(("127.0.0.1", 0), Answering)
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
