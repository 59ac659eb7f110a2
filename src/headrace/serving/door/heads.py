"""What the head of an HTTP request asks for, and the head of its answer."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from headrace.serving.wire import Content, Failure

ARROW_TYPE, JSON_TYPE, NDJSON_TYPE = b"application/vnd.apache.arrow.stream", b"application/json", b"application/x-ndjson"
EVENTS_TYPE = b"text/event-stream"
PRIORITIES = {b"interactive": 0, b"normal": 1, b"batch": 2}
NORMAL = PRIORITIES[b"normal"]

RawHeaders = Iterable[tuple[bytes, bytes]]

_WANTED = frozenset(
    (
        b"accept", b"authorization", b"content-encoding", b"content-length", b"content-type", b"deadline", b"expect", b"traceparent",
        b"x-api-key", b"x-headrace-version", b"x-priority", b"x-request-id", b"x-request-timeout",
    )
)  # fmt: skip
_SECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?")
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")
_LONGEST_ID = 128


class HeadError(Exception):
    """The head asks for something that there is not."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Head:
    """What the headers of a request for rows say. `content` is None for NDJSON; `timeout_s` and `version` are None where nothing is asked for.

    `events` is whether the answer is to be sent as it is written, which who takes another form as well is not sent.
    """

    content: Content | None
    accept: Content
    timeout_s: float | None
    priority: int
    version: int | None
    trace: str | None
    length: int | None
    events: bool = False


def scan(headers: RawHeaders) -> dict[bytes, bytes]:
    """The headers that mean something here."""
    return {name: value for name, value in headers if name in _WANTED}


def presented(found: dict[bytes, bytes]) -> bytes:
    """The API key that comes with the request, or nothing."""
    value = found.get(b"authorization", b"")
    if value[:7].lower() == b"bearer ":
        return value[7:].strip()
    return found.get(b"x-api-key", b"").strip()


def request_id(found: dict[bytes, bytes]) -> str | None:
    """The id that the client gave the request, if it is one."""
    value = found.get(b"x-request-id")
    if value is None or not 0 < len(value) <= _LONGEST_ID:
        return None
    text = value.decode("latin-1")
    return text if text.isascii() and text.isprintable() else None


def read(found: dict[bytes, bytes], *, now: dt.datetime | None = None) -> Head:
    """What a request for rows asks for.

    Raises:
        HeadError: a header has a value that it cannot have, or the body is of a type that is not understood.
    """
    content: Content | None = Content.JSON
    accept, events = Content.JSON, False
    priority = NORMAL
    version = length = None
    if (value := found.get(b"content-type")) is not None and value != JSON_TYPE:
        content = _content(value)
    if (value := found.get(b"accept")) is not None:
        accept, events = _accepted(value.lower())
    if (value := found.get(b"x-priority")) is not None:
        level = PRIORITIES.get(value.strip().lower())
        if level is None:
            raise _bad("X-Priority", value, "interactive, normal or batch")
        priority = level
    if (value := found.get(b"x-headrace-version")) is not None:
        if not (value.isdigit() and len(value) <= 9):
            raise _bad("X-Headrace-Version", value, "the number of a version")
        version = int(value)
    if (value := found.get(b"content-encoding")) is not None and value.strip().lower() not in (b"", b"identity"):
        raise HeadError(Failure(415, "unsupported_media_type", f"bodies are not taken with the content encoding {_shown(value)}: send them as they are"))
    if (value := found.get(b"content-length")) is not None:
        length = int(value)  # the parser of the protocol lets nothing but digits through
    trace = found.get(b"traceparent")
    return Head(content, accept, _timeout_s(found, now), priority, version, None if trace is None else trace.decode("latin-1"), length, events)


def failure_body(failure: Failure, request_id: str) -> bytes:
    """The JSON that tells a client what went wrong."""
    return json.dumps({"error": failure_fields(failure), "request_id": request_id}, ensure_ascii=False).encode("utf-8", "replace")


def failure_fields(failure: Failure) -> dict[str, Any]:
    """What a client is told of a failure."""
    fields: dict[str, Any] = {"code": failure.code, "message": failure.message}
    if failure.details:
        fields["details"] = list(failure.details)
    return fields


def _accepted(kinds: bytes) -> tuple[Content, bool]:
    """How the answer is to be written, and whether as events."""
    if ARROW_TYPE in kinds:
        return Content.ARROW, False
    return Content.JSON, EVENTS_TYPE in kinds and JSON_TYPE not in kinds and b"*/*" not in kinds


def _content(value: bytes) -> Content | None:
    kind = value.partition(b";")[0].strip().lower()
    if kind in (b"", JSON_TYPE) or (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return Content.JSON
    if kind == ARROW_TYPE:
        return Content.ARROW
    if kind == NDJSON_TYPE:
        return None
    known = ", ".join(each.decode() for each in (JSON_TYPE, NDJSON_TYPE, ARROW_TYPE))
    raise HeadError(Failure(415, "unsupported_media_type", f"bodies of type {_shown(kind)} are not understood; there are {known}"))


def _timeout_s(found: dict[bytes, bytes], now: dt.datetime | None) -> float | None:
    if (value := found.get(b"x-request-timeout")) is not None:
        return _seconds("X-Request-Timeout", value)
    if (value := found.get(b"deadline")) is not None:
        return _deadline(value, now)
    return None


def _seconds(name: str, value: bytes) -> float:
    text = value.strip()
    if not _SECONDS.fullmatch(text) or not (seconds := float(text)) > 0:
        raise _bad(name, value, "seconds, above 0, such as 1.5")
    return seconds


def _deadline(value: bytes, now: dt.datetime | None) -> float:
    """Seconds, or an instant of RFC 3339, which may be over: then what is left is below zero."""
    text = value.strip().decode("latin-1")
    if not _INSTANT.fullmatch(text):
        return _seconds("Deadline", value)
    try:
        left_s = (dt.datetime.fromisoformat(text.upper()) - (now or dt.datetime.now(dt.UTC))).total_seconds()
    except (ValueError, OverflowError):
        raise _bad("Deadline", value, "seconds from now, such as 1.5, or an instant, such as 2030-01-31T12:00:00Z") from None
    return left_s


def _bad(name: str, value: bytes, allowed: str) -> HeadError:
    return HeadError(Failure(400, "bad_header", f"{name} is {_shown(value)}; allowed: {allowed}"))


def _shown(value: bytes) -> str:
    return repr(value[:80].decode("latin-1"))
