"""What a door logs: one JSON object a line for every request, written by a thread of its own.

The door's loop puts what it knows into a bounded queue and goes on. If lines cannot be written as fast as they come (a full disk, a pipe that
nobody reads), they are dropped and counted, and a line says how many.
"""

from __future__ import annotations

import datetime as dt
import functools
import math
import threading
import time
from collections import deque
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol, TypedDict, Unpack

MOST_WAITING = 20_000

_EVERY_S = 0.1
_AT_ONCE = 1_000  # lines to a write
_LONGEST = {"path": 1024, "asked": 65_536}  # characters
_LONG = 256


class Stream(Protocol):
    """Where lines go: a file of text, standard error, ..."""

    def write(self, text: str, /) -> Any:
        """Write all of it."""

    def flush(self) -> Any:
        """Let none of it wait."""


class Shared:
    """A stream for the logs of several services: what each writes at once stays whole."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Write all of it, and let none of it wait."""
        with self._lock:
            self._stream.write(text)
            self._stream.flush()

    def flush(self) -> None:
        """Nothing waits."""


class Entry(TypedDict, total=False):
    """What may be said of a request; it is written in the order in which it is said. There is no place for keys or other headers.

    `asked`, the body of a request for a language model, is only said of a key whose owner has agreed.
    `key` is the name of the API key, `error` the code of the error answered, `trace_id` that of the trace that the request belongs to.
    """

    request_id: str
    method: str
    path: str
    status: int
    error: str | None
    took_ms: float
    version: int | None
    rows: int | None
    bytes_in: int
    bytes_out: int
    key: str | None
    replica: str | None
    attempts: int
    trace_id: str | None
    model: str | None
    first_ms: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    asked: str | None


_FIELDS = frozenset(Entry.__annotations__)


class AccessLog:
    """The log of one door. `request` is called on the door's loop, `close` once at the end."""

    def __init__(self, stream: Stream, *, service: str = "", door: str = "", most: int = MOST_WAITING) -> None:
        self._stream = stream
        self._head = f'"service":{_quoted(service[:_LONG])},"door":{_quoted(door[:_LONG])}'
        self._most = most
        self._waiting: deque[tuple[float, Entry]] = deque()
        self._dropped = 0  # counted on the loop
        self._unwritten = 0  # counted on the thread
        self._reported = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self._dropped + self._unwritten

    def request(self, **fields: Unpack[Entry]) -> None:
        """A request was answered; see `Entry`. What is None is left out."""
        if not fields.keys() <= _FIELDS:
            raise TypeError(f"nothing is logged as {', '.join(sorted(fields.keys() - _FIELDS))}")
        if len(self._waiting) >= self._most:
            self._dropped += 1
        else:
            self._waiting.append((time.time(), fields))

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Write what waits, for so long at most; nothing is logged after that."""
        self._closing.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        """Write every so often, and not at each line: the loop is not woken, and many lines share a write."""
        while not self._closing.wait(_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        while self._waiting:
            entries = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
            if not self._put("".join(self._line(at_s, entry) for at_s, entry in entries)):
                self._unwritten += len(entries)
        if (dropped := self.dropped) > self._reported:
            said = f'"message":"lines of this log were dropped","dropped":{dropped - self._reported}'
            if self._put(f'{{"time":"{_moment(time.time())}","level":"warning",{self._head},{said}}}\n'):
                self._reported = dropped

    def _put(self, text: str) -> bool:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False
        return True

    def _line(self, at_s: float, entry: Entry) -> str:
        """An entry as JSON, put together here, which is cheaper than filling a dict and encoding that."""
        status = entry.get("status", 0)
        level = "error" if status >= 500 else "warning" if status >= 400 else "info"
        parts = [f'{{"time":"{_moment(at_s)}","level":"{level}",{self._head}']
        for name, value in entry.items():
            if isinstance(value, str):
                parts.append(f'"{name}":{_quoted(value[: _LONGEST.get(name, _LONG)])}')
            elif isinstance(value, float):
                parts.append(f'"{name}":{round(value, 3) if math.isfinite(value) else "null"}')
            elif isinstance(value, int):
                parts.append(f'"{name}":{int(value)}')
        return f"{','.join(parts)}}}\n"


def _quoted(value: str) -> str:
    text = encode_basestring_ascii(value)  # escapes all but printable ASCII, DEL aside
    return text.replace("\x7f", r"\u007f") if "\x7f" in text else text


@functools.lru_cache(2)
def _second(at_s: int) -> str:
    return dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _moment(at_s: float) -> str:
    return f"{_second(int(at_s))}.{int(at_s % 1 * 1000):03d}Z"
