"""A running service under bodies that a machine makes up from its OpenAPI document, and under the load of a real load generator."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from online import Headrace, body

pytestmark = pytest.mark.faults

PIPELINE = """
import datetime as dt

import headrace as hr

KINDS = {"n": int, "note": str, "blob": bytes, "at": dt.datetime, "day": dt.date, "point": hr.Vector(3), "line": hr.Vector(), "tags": list[str]}


@hr.stage(out={"y": float})
def work(x: hr.Column[float], pause_s: hr.Column[float], deed: hr.Column[str]):
    return {"y": x * 2}


@hr.stage(out={name + "_again": kind | None for name, kind in KINDS.items()})
def again(
    n: hr.Column[int | None],
    note: hr.Column[str | None],
    blob: hr.Column[bytes | None],
    at: hr.Column[dt.datetime | None],
    day: hr.Column[dt.date | None],
    point: hr.Column[hr.Vector(3) | None],
    line: hr.Column[hr.Vector() | None],
    tags: hr.Column[list[str] | None],
):
    return {name + "_again": list(values) for name, values in locals().items()}


work = hr.Pipeline("work", work, again)
"""


class Kinds(Headrace):
    """A pipeline with a column of every type, whose stages take any value of it."""

    def command(self) -> list[str]:
        command = super().command()
        (self.folder / "work.py").write_text(PIPELINE)
        return command


@pytest.fixture(scope="module")
def service() -> Iterator[Headrace]:
    """A service of two replicas."""
    with Kinds(name="generated", replicas=2) as running:
        yield running


def test_no_generated_body_is_answered_with_a_server_error(service: Headrace, tmp_path: Path) -> None:
    """Valid ones, damaged ones, and sequences of them, for every operation of the document.

    The deadline is given: one that is made up may lie before any answer, which rightly is a 504.
    """
    pytest.importorskip("schemathesis")
    document = f"http://127.0.0.1:{service.port}/openapi.json"
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance"
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", document]
    done = subprocess.run(
        [
            *command,
            "--checks",
            checks,
            "--max-examples",
            "200",
            "--phases",
            "examples,coverage,fuzzing",
            "--seed",
            "1",
            "--request-timeout",
            "30",
            "-H",
            "X-Request-Timeout: 30",
        ],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_load_generator(service: Headrace, tmp_path: Path) -> None:
    """wrk, on 64 connections: every answer is a 200 or a 429, and no connection fails."""
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed (tools/apt.sh wrk)")
    script = tmp_path / "post.lua"
    row = body(3.0, pause_s=0.002).decode().replace('"', '\\"')
    script.write_text(
        f'wrk.method = "POST"\nwrk.body = "{row}"\nwrk.headers["content-type"] = "application/json"\n'
        "local threads = {}\nfunction setup(thread) table.insert(threads, thread) end\nodd = 0\n"
        "function response(status) if status ~= 200 and status ~= 429 then odd = odd + 1 end end\n"
        'function done() local sum = 0 for _, one in ipairs(threads) do sum = sum + one:get("odd") end io.write("odd: " .. sum .. "\\n") end\n'
    )
    done = subprocess.run(["wrk", "-t1", "-c64", "-d10", "-s", str(script), service.url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "odd: 0" in done.stdout and "Socket errors" not in done.stdout, done.stdout
    assert float(re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)[1]) > 0
