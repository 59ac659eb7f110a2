"""A door on a port: uvicorn in a thread of its own, beside other doors on the same port."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn

from headrace.errors import ServingError
from headrace.serving.door.app import Door
from headrace.serving.door.guard import IDLE_S, GuardedProtocol

T = TypeVar("T")

BACKLOG = 4096
START_S = 30.0
SPARE_FILES = 256  # descriptors for all but clients


class DoorServer:
    """Runs a door on `host` and `port` (0: a free one), over TLS given the paths of a certificate and its key.

    Other processes may listen on the same port at the same time; the system then deals out connections among them.
    """

    def __init__(self, door: Door, *, host: str = "127.0.0.1", port: int = 0, tls: tuple[str, str] | None = None) -> None:
        self.door = door
        self._host = host
        self._port = port
        self._tls = tls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._stop_s = 0.0

    def start(self, prepare: Callable[[], Coroutine[Any, Any, None]] | None = None) -> int:
        """Listen, once what `prepare` does on the door's loop is done; the port.

        Raises:
            ServingError: the address is taken or not one of this machine, or the certificate cannot be used; and whatever `prepare` raises.
        """
        self.door.most_connections = raise_file_limit()
        listening = self._listen()
        try:
            config = self._config()
        except (OSError, ssl.SSLError) as error:
            listening.close()
            raise ServingError(f"the certificate {self._tls} cannot be used: {error}") from error
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, args=(self._server, listening, prepare), name="door", daemon=True)
        self._thread.start()
        if not self._started.wait(START_S):
            raise ServingError(f"the door did not open within {START_S:.0f} s")
        if self._failure is not None:
            raise self._failure
        return self._port

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that is called on the door's loop.

        Raises:
            ServingError: the door is closed.
        """

        async def called() -> T:
            return function(*arguments)

        return self.run(called())

    def stop(self, timeout_s: float = 30.0) -> None:
        """Take no more connections, finish what is under way, for so long at most, and end."""
        thread, server = self._thread, self._server
        if thread is None or server is None or not thread.is_alive():
            return
        self._stop_s = timeout_s
        with contextlib.suppress(ServingError):
            self.call(functools.partial(self._begin_stop, server))
        thread.join(timeout_s + 10.0)

    def _begin_stop(self, server: uvicorn.Server) -> None:
        self.door.leaving = True
        server.config.timeout_graceful_shutdown = max(1, round(self._stop_s))
        server.should_exit = True

    def _run(self, server: uvicorn.Server, listening: socket.socket, prepare: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        with asyncio.Runner(loop_factory=new_loop()) as runner:
            runner.run(self._serve(server, listening, prepare))

    async def _serve(self, server: uvicorn.Server, listening: socket.socket, prepare: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        self._loop = asyncio.get_running_loop()
        if prepare is not None:
            preparing = self._loop.create_task(prepare())
            await asyncio.wait({preparing})
            if (failure := preparing.exception()) is not None:
                self._failure = failure
                listening.close()
                self._started.set()
                return
        self._loop.call_soon(self._note_started, server)
        try:
            await server.serve(sockets=[listening])
        finally:
            await self.door.close(timeout_s=1.0)
            self._loop = None

    def _note_started(self, server: uvicorn.Server) -> None:
        if server.started:
            self._started.set()
        elif self._loop is not None:
            self._loop.call_later(0.005, self._note_started, server)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that runs on the door's loop.

        Raises:
            ServingError: the door is closed.
        """
        loop, thread = self._loop, self._thread
        if loop is None or loop.is_closed():
            work.close()
            raise ServingError("the door is closed")
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, loop)
        while True:
            done, _ = concurrent.futures.wait([future], timeout=1.0)
            if done:
                return future.result()
            if thread is None or not thread.is_alive():  # it ended before it came to this
                work.close()
                raise ServingError("the door is closed")

    def _config(self) -> uvicorn.Config:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        config = uvicorn.Config(
            self.door,
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=round(IDLE_S),
            ssl_certfile=self._tls[0] if self._tls is not None else None,
            ssl_keyfile=self._tls[1] if self._tls is not None else None,
        )
        config.load()
        return config

    def _listen(self) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listening = socket.socket(family, kind, protocol)
        except OSError as error:
            raise ServingError(f"{self._host!r} is no address to listen on: {error}") from error
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.bind(address)
        except OSError as error:
            listening.close()
            raise ServingError(f"cannot listen on {self._host}:{self._port}: {error.strerror or error}") from error
        listening.setblocking(False)
        self._port = listening.getsockname()[1]
        return listening


def raise_file_limit() -> int:
    """Let this process have as many connections as it is allowed to; how many clients that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return max(1, soft - SPARE_FILES)


def new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes an event loop: uvloop's, where that is installed."""
    try:
        import uvloop
    except ImportError:  # it is an extra on some platforms
        return asyncio.new_event_loop
    return uvloop.new_event_loop
