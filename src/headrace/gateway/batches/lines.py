"""Lines of a batch: read within bounds, sent as `Line`, answered with an `Outcome`, and written as results in OpenAI's form."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from headrace.gateway.batches.records import Batch, Charge, Usage

TAKE_LINES = 512
TAKE_BYTES = 1 << 20

Raw = tuple[int, bytes | None]
"""A line's number, counted from 1, and its bytes; None where it is too long."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line to be sent: `body` goes to the batch's endpoint, for the batch's owner."""

    batch: Batch
    number: int
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Answered:
    """The engine has answered; `usage` is what is to be booked, if anything, under `model`, by default the name that the batch has for it."""

    status: int
    body: bytes
    usage: Usage | None = None
    request_id: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """The engine has no room: the line is to come again, after so long. That can be said any number of times."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Lost:
    """There was no answer, and nobody knows whether there was work. The line comes again, a few times."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The line was not computed, and is not to come again."""

    code: str
    message: str


Outcome = Answered | Retry | Lost | Failed


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a line: the text that stands for it in the output, or in the error file."""

    number: int
    text: bytes
    good: bool
    charge: Charge | None = None


class Lines:
    """The lines of an input file, in order. Of one that is not known to be valid, no more is held of a line than the bound, however long it is."""

    def __init__(self, file: BinaryIO, *, line_bytes: int = sys.maxsize - 1) -> None:
        self._file, self._most = file, line_bytes
        self._number = 0

    def take(self) -> list[Raw]:
        """The next lines, as many as fit; none at the end."""
        taken: list[Raw] = []
        size = 0
        while len(taken) < TAKE_LINES and size < TAKE_BYTES:
            line: bytes | None = self._file.readline(self._most + 1)
            if not line:
                break
            self._number += 1
            if len(line) > self._most and not line.endswith(b"\n"):
                size += len(line)
                self._skip()
                line = None
            else:
                size += len(line)
            taken.append((self._number, line))
        return taken

    def _skip(self) -> None:
        """Leave out the rest of a line."""
        while (piece := self._file.readline(TAKE_BYTES)) and not piece.endswith(b"\n"):
            pass


def open_line(batch: Batch, number: int, raw: bytes) -> Line:
    """A line of a file that was found valid."""
    found = orjson.loads(raw)
    return Line(batch, number, found["custom_id"], orjson.dumps(found["body"]))


def request_id(batch: Batch, number: int) -> str:
    """What the request of a line is called in the results: the same however often it is sent."""
    return f"batch_req_{batch.id.removeprefix('batch_')[:16]}{number:08x}"


def answer(line: Line, answered: Answered) -> Result | None:
    """The result that an answer makes; None if it is said to be good and is no JSON."""
    good = 200 <= answered.status < 300
    try:
        value: Any = orjson.loads(answered.body)
    except orjson.JSONDecodeError:
        if good:
            return None
        # A proxy's page, say. Its beginning tells what it was.
        value = {"error": {"message": answered.body[:1000].decode("utf-8", "replace"), "type": "server_error", "param": None, "code": None}}
        body = orjson.dumps(value)
    else:
        # Word for word, where it has no line breaks.
        body = orjson.dumps(value) if b"\n" in answered.body or b"\r" in answered.body else answered.body
    batch, name = line.batch, request_id(line.batch, line.number)
    text = b'{"id":"%s","custom_id":%s,"response":{"status_code":%d,"request_id":%s,"body":%s},"error":null}\n' % (
        name.encode(),
        orjson.dumps(line.custom_id),
        answered.status,
        orjson.dumps(answered.request_id or name),
        body,
    )
    charge = Charge(batch.id, batch.owner, answered.model or batch.model or "", line.number, answered.usage) if answered.usage is not None else None
    return Result(line.number, text, good, charge)


def failure(line: Line, code: str, message: str) -> Result:
    """The result of a line that has no answer."""
    about = {"id": request_id(line.batch, line.number), "custom_id": line.custom_id, "response": None, "error": {"code": code, "message": message}}
    return Result(line.number, orjson.dumps(about) + b"\n", good=False)
