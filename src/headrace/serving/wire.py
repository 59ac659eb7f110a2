"""The frames between a front door and a replica.

A frame is a fixed head, a msgpack list whose meaning belongs to its kind, and bytes that nobody in between looks into:

    4 bytes  length of all that follows          1 byte   kind
    8 bytes  number of the request, or 0         4 bytes  length of the list
    list     see `Kind`                          body     a request's or an answer's, as it came over HTTP or as Arrow IPC

All numbers are big-endian. Times are durations in seconds, never instants: two machines' clocks differ.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

_HEAD = struct.Struct("!IBQI")
_AFTER_LENGTH = _HEAD.size - 4
MOST_BYTES = 1 << 30  # of a frame; the front door bounds bodies far below


class Kind(enum.IntEnum):
    """What a frame says. Its list is given in brackets."""

    WORK = 1
    """Door to replica: compute this [content, accept, left_s or None, priority, alone, trace or None, request_id]. See `Work`."""
    CANCEL = 2
    """Door to replica: nobody waits for this request any more []."""
    PING = 3
    """Door to replica: are you there? []"""
    HELLO = 4
    """Door to replica, first of all where the replica asks for it: the token of its `Endpoint` [token]."""
    ASK = 5
    """Door to replica: answer this body of OpenAI's interface [path, left_s, priority, tokens, request_id, trace or None]. See `Question`."""
    BESIDE = 6
    """Door to replica on the same machine: my Unix socket beside this connection has this key [key]. See `replica.outlets`."""
    OFFER = 7
    """Door to replica: the client's socket is there; write the rest of this answer yourself []."""
    GO = 8
    """Door to replica, in answer to READY: all before it is with the client: go on [whether by yourself, or through the door as before]."""
    DONE = 16
    """Replica to door: the answer [rows, queue_s, wait_s, compute_s, batch_rows]. See `Done`."""
    FAIL = 17
    """Replica to door: no answer, and no replica would have one [status, code, message, details]. See `Failure`."""
    BUSY = 18
    """Replica to door: not taken, since its queue is full [retry_after_s]; another replica may have room."""
    STARTED = 19
    """Replica to door: the computation of a request that was sent with `alone` begins now []."""
    PONG = 20
    """Replica to door, in answer to PING and each second: what it is doing [stats: a map]. See `Stats`."""
    DRAIN = 21
    """Replica to door: send nothing more; what was taken is finished []."""
    PART = 22
    """Replica to door: a piece of a streamed answer, in server-sent events [prompt_tokens, cached_tokens, completion_tokens so far]."""
    READY = 24
    """Replica to door, in answer to OFFER: after this nothing comes until GO []."""
    SAID = 23
    """Replica to door: the answer to ASK, or the end of one that was streamed or cancelled [status, and what `Said` has].

    Of a stream that broke off by a fault of its own, the body says [code, message], as JSON.
    """


class Content(enum.IntEnum):
    """How a body is written."""

    JSON = 0
    ARROW = 1  # an Arrow IPC stream


ROW_PATHS = {Content.JSON: "row", Content.ARROW: "row/arrow"}
"""What a `Question` has in place of a path of OpenAI's interface if its body is one row, written so, whose text is to be streamed. See `bodies.events`."""


@dataclass(frozen=True, slots=True)
class Work:
    """A request for one group. `alone` asks that it share no call with others, and for `STARTED`."""

    content: Content
    accept: Content
    left_s: float | None = None
    priority: int = 1
    alone: bool = False
    trace: str | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """Of an answer: its rows, and how long it waited for a free worker, for company, and was computed; `batch_rows` of its largest call."""

    rows: int
    queue_s: float
    wait_s: float
    compute_s: float
    batch_rows: int


@dataclass(frozen=True, slots=True)
class Question:
    """A request of OpenAI's interface, as it is sent to a replica. `tokens` is what it may take of the engine's memory, prompt and answer together.

    Of a row (`ROW_PATHS`), `tokens` is what its prompt may take.
    """

    path: str
    priority: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Said:
    """Of an answer to a `Question`: its HTTP status, tokens, and times as the replica saw them.

    `cached_tokens` are those of the prompt that the engine had computed before. `queue_s` is from arrival to the engine's first step with it,
    `first_s` from arrival to the first token, `took_s` to the end; `gaps` are the seconds between tokens of what the replica wrote to the client
    itself, as 32-bit floats.
    """

    status: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    first_s: float = 0.0
    took_s: float = 0.0
    gaps: bytes = b""
    written: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer: an HTTP status, a word for programs, a sentence, and for status 422 what is wrong with each field."""

    status: int
    code: str
    message: str
    details: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Stats:
    """What a replica is doing.

    Requests taken and not answered, and those of them that no call has begun on; the age of the oldest call under way; rows answered and
    calls made since it started, and the sum over these calls of how full each was; its memory; whether it takes no more. `engine` are the
    figures of its language model's engine, if it has one: see `headrace.readings`; `lookups` what is looked up, see `replica.lookups`.
    """

    in_flight: int
    queued: int
    oldest_call_s: float
    rows: int
    calls: int
    filled: float
    memory_bytes: int
    draining: bool
    engine: dict[str, float] | None = None
    lookups: dict[str, tuple[int, int, float | None]] | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `body` is a view into what was received, valid as long as it is referred to."""

    kind: Kind
    number: int
    head: Any
    body: memoryview


def encode(kind: Kind, number: int = 0, head: Any = (), body: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """A frame as pieces for `transport.writelines`, so that a large body is not copied."""
    packed = msgpack.packb(head)
    start = _HEAD.pack(_AFTER_LENGTH + len(packed) + len(body), kind, number, len(packed)) + packed
    return [start, body] if len(body) else [start]


class Decoder:
    """Frames out of a stream of bytes."""

    __slots__ = ("_have", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._have = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """All frames that `data` completes.

        Raises:
            ValueError: this is no frame, or one of more than `MOST_BYTES`.
        """
        if self._pieces:
            self._pieces.append(data)
            self._have += len(data)
            if self._have < self._wanted():  # a large frame arrives in many pieces: they are joined once
                return
            data = b"".join(self._pieces)
            self._pieces.clear()
        view, at, size = memoryview(data), 0, len(data)
        while size - at >= _HEAD.size:
            length, kind, number, packed = _HEAD.unpack_from(data, at)
            if length > MOST_BYTES or _AFTER_LENGTH + packed > length:
                raise ValueError(f"a frame of {length} bytes with a list of {packed}")
            end = at + 4 + length
            if end > size:
                break
            body = at + _HEAD.size + packed
            yield Frame(Kind(kind), number, msgpack.unpackb(view[at + _HEAD.size : body]), view[body:end])
            at = end
        if at < size:
            self._pieces.append(data[at:] if at else data)
        self._have = size - at

    @property
    def pending(self) -> int:
        """Bytes that are held, since the frame they belong to is not complete."""
        return self._have

    def _wanted(self) -> int:
        first = self._pieces[0]
        if len(first) < 4:
            return _HEAD.size
        return 4 + int.from_bytes(first[:4], "big")
