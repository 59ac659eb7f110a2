"""A service with an engine in each replica: the commands around it, and requests that survive an engine's death."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ENGINE, SOURCE

import headrace as hr
from headrace.errors import FailedError

FILE = """
import headrace as hr

say = hr.LLM(out="said", model={model!r}, prompt="Say: {{text}}", on=hr.cpu(1), replicas=2, sampling=hr.Sampling(max_tokens=16), engine={engine!r}, stall_s=4.0)
talk = hr.Pipeline("talk", say)
"""


WRITING = """
import headrace as hr

@hr.stage(out={{"text": str}})
def clean(text: hr.Column[str]):
    return {{"text": [" ".join(t.split()) for t in text]}}

say = hr.LLM(out="said", model={model!r}, prompt="Say: {{text}}", on=hr.cpu(1), sampling=hr.Sampling(max_tokens=48), engine={engine!r})
talk = hr.Pipeline("talk", clean, say)
"""


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    (tmp_path / "talk.py").write_text(FILE.format(model=tiny.lm, engine=ENGINE))
    (tmp_path / "golden.jsonl").write_text("".join(json.dumps({"text": f"{'word ' * at}{at}"}) + "\n" for at in range(8)))
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", "XDG_RUNTIME_DIR": str(folder)}
    return {name: value for name, value in variables.items() if name != "RAY_ADDRESS"}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """Where the service answers, and its process."""
    command = [sys.executable, "-m", "headrace", "serve", "talk.py", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"answers at (http://[^/\s]+)", line):
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield found[1], process.pid
                    return
            raise AssertionError("".join(said))
        finally:
            process.terminate()
            process.wait(60)


def engines(pid: int) -> list[psutil.Process]:
    """The engines of a service's replicas."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()) and "ray::ServeReplica" in " ".join(process.parent().cmdline()):  # type: ignore[union-attr]
                found.append(process)
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_costs_no_request(folder: Path, number: signal.Signals):
    with serving(folder) as (url, pid):

        def ask(at: int) -> tuple[int, str]:
            request = urllib.request.Request(f"{url}/talk", json.dumps({"text": f"room {at % 7}"}).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=100) as answer:
                return at % 7, json.loads(answer.read())["said"]

        expected = dict(ask(at) for at in range(7))
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, at) for at in range(400)]
            answers[40].result()
            struck = engines(pid)[0]
            struck.send_signal(number)
            found = [answer.result() for answer in answers]  # raises for any status but 200
        assert not struck.is_running() and all(expected[at] == said for at, said in found)
    assert not psutil.pid_exists(struck.pid)


def test_the_parity_gate(folder: Path):
    command = [sys.executable, "-m", "headrace", "check", "talk.py", "--input", "golden.jsonl"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_row_is_streamed_as_it_is_written(tiny: Any, folder: Path):
    (folder / "talk.py").write_text(WRITING.format(model=tiny.lm, engine=ENGINE))
    rows = [{"text": f"  {'word ' * at} room   {at} "} for at in range(24)]
    with serving(folder) as (url, _), hr.Client(url, timeout_s=60) as client:
        expected = client.talk(rows)

        def write(row: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
            answer = client.talk.write(row)
            return list(answer), answer.row

        with ThreadPoolExecutor(12) as pool:
            written = list(pool.map(write, rows))
        assert [row for _, row in written] == expected and expected[3]["text"] == "word word word room 3"
        assert all("".join(pieces) == row["said"] for pieces, row in written) and sum(len(pieces) for pieces, _ in written) > 24 * 20
        with pytest.raises(FailedError, match="PromptTooLong: .*maximum context length is 512 tokens"):
            list(client.talk.write({"text": "word " * 2000}))
