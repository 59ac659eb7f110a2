"""The access log: one JSON object a line, bounded and escaped, never in the way of the door."""

from __future__ import annotations

import datetime as dt
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from headrace.serving.watch.logs import AccessLog


def lines(text: str) -> list[dict[str, Any]]:
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_for_every_request(tmp_path: Path) -> None:
    with open(tmp_path / "access.jsonl", "w") as file:
        log = AccessLog(file, service="reviews", door="0")
        log.request(
            request_id="r1", method="POST", path="/reviews", status=200, took_ms=12.34567, version=3, rows=2, bytes_in=40, bytes_out=900,
            key="ana", replica="embed-1", attempts=1, trace_id="a" * 32, error=None,
        )  # fmt: skip
        log.request(request_id="r2", method="POST", path="/reviews", status=429, error="overloaded", took_ms=0.1)
        log.request(request_id="r3", method="POST", path="/reviews", status=500, error="stage_failed", took_ms=0.1)
        log.close()
    first, second, third = lines((tmp_path / "access.jsonl").read_text())
    assert list(first)[:4] == ["time", "level", "service", "door"]
    assert abs(dt.datetime.fromisoformat(first.pop("time")) - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=5)
    assert first == {
        "level": "info", "service": "reviews", "door": "0", "request_id": "r1", "method": "POST", "path": "/reviews", "status": 200, "took_ms": 12.346,
        "version": 3, "rows": 2, "bytes_in": 40, "bytes_out": 900, "key": "ana", "replica": "embed-1", "attempts": 1, "trace_id": "a" * 32,
    }  # fmt: skip
    assert (second["level"], second["error"], third["level"]) == ("warning", "overloaded", "error")
    assert "version" not in second and "key" not in second


def test_what_clients_send_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, service="reviews")
    log.request(path='/a\n{"forged": 1}\r\x1b[31m\x7f\u2028\ud800"' + "x" * 5000, request_id="é" * 5000, took_ms=float("nan"))
    log.close()
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.isascii() and all(one.isprintable() or one == "\n" for one in text)
    (only,) = lines(text)
    assert only["path"].startswith('/a\n{"forged": 1}\r\x1b[31m\x7f') and len(only["path"]) == 1024 and len(only["request_id"]) == 256
    assert only["took_ms"] is None


def test_nothing_else_can_be_logged() -> None:
    log = AccessLog(io.StringIO())
    with pytest.raises(TypeError, match="authorization, body"):
        log.request(body="secret", authorization="hr_x")  # type: ignore[call-arg]
    log.close()


class Stuck(io.StringIO):
    """A pipe that nobody reads, until somebody does."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def write(self, text: str, /) -> int:
        self.reached.set()
        assert self.go.wait(30)
        return super().write(text)


def test_a_stream_that_blocks_loses_lines_and_says_how_many() -> None:
    stream = Stuck()
    log = AccessLog(stream, most=10)
    log.request(request_id="first")
    assert stream.reached.wait(30)  # the thread hangs in its write, and nobody waits for it
    for at in range(25):
        log.request(request_id=f"{at}")
    assert log.dropped == 15
    log.close(timeout_s=0.0)
    stream.go.set()
    log.close()
    written = lines(stream.getvalue())
    assert [one.get("request_id") for one in written] == ["first", *map(str, range(10)), None]
    assert (written[-1]["level"], written[-1]["dropped"]) == ("warning", 15)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_stream_that_fails_is_no_end(error: Exception) -> None:
    class Full(io.StringIO):
        failing = True
        failed = threading.Event()

        def write(self, text: str, /) -> int:
            if self.failing:
                self.failed.set()
                raise error
            return super().write(text)

    stream = Full()
    log = AccessLog(stream)
    log.request(request_id="lost")
    assert stream.failed.wait(30)
    stream.failing = False
    log.close()
    assert [one["dropped"] for one in lines(stream.getvalue())] == [1]


def test_close_writes_all_that_waits() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    for at in range(5000):
        log.request(request_id=str(at))
    log.close()
    assert [one["request_id"] for one in lines(stream.getvalue())] == list(map(str, range(5000)))
