"""What the report says held a run back, on jobs that are made to be held back by one thing each."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.advice import bottleneck
from headrace.report import Report

pytestmark = pytest.mark.usefixtures("shared_ray")


def job(folder: Path, *stages: Any, rows: int = 4000, input: str | None = None) -> tuple[Report, str]:
    """A run of the stages, and the sentence on what held it back."""
    if input is None:
        (folder / "in").mkdir()
        for file in range(8):
            ids = range(file * rows // 8, (file + 1) * rows // 8)
            table = pa.table({"id": ids, "tokens": [[1] * (200 if row % 16 == 0 else 10) for row in ids]})
            pq.write_table(table, folder / f"in/{file}.parquet", row_group_size=100)
    report = hr.run(hr.Pipeline("p", *stages), input=input or str(folder / "in"), output=str(folder / "out"))
    said = bottleneck(report)
    assert json.loads((folder / "out/_headrace/report.json").read_text())["bottleneck"] == said
    return report, said


@hr.stage(out={"same": int})
def quick(id: hr.Column[int]):
    return {"same": id}


@hr.stage(out={"same": int}, batch=16)
def slow(id: hr.Column[int]):
    time.sleep(0.02 * len(id))
    return {"same": id}


@hr.stage(out={"y": float}, replicas=2, batch=50)
class Model:
    pause_s: float = 0.0001
    setup_s: float = 0.0

    def setup(self, device: str):
        time.sleep(self.setup_s)

    def __call__(self, same: hr.Column[int]):
        time.sleep(self.pause_s * len(same))
        return {"y": same * 1.0}


def test_a_slow_model(tmp_path: Path) -> None:
    """It is busy all the time."""
    report, said = job(tmp_path, quick, Model(pause_s=0.008))
    assert said.startswith("model was the bottleneck, busy ") and "more replicas (it had 2)" in said
    shares = report.stages[1].shares
    assert shares and shares.computing + shares.starved + shares.blocked + shares.between == pytest.approx(1)


@pytest.mark.faults  # for the time it takes
def test_a_slow_function_before_it(tmp_path: Path) -> None:
    """The model waits for it; and how many CPUs would keep the model busy is what follows from the time that it computed."""
    report, said = job(tmp_path, slow, Model(pause_s=0.002))
    assert "waited " in said and "% of the time for slow: give it " in said
    assert int(said.rpartition("give it ")[2].split()[0]) > 8, "it had all eight, and they did not suffice"
    assert report.stages[1].shares and report.stages[1].shares.starved > 0.2


@hr.stage(out={"big": hr.Vector(40_000)}, replicas=1, batch=50)
class Large:
    def setup(self, device: str):
        self.noise = np.random.default_rng(0).random((50, 40_000), np.float32)

    def __call__(self, same: hr.Column[int]):
        return {"big": self.noise[: len(same)]}


@pytest.mark.faults  # for the time it takes
def test_a_slow_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file at a time, of noise that does not compress, is more than the disk's side can do."""
    monkeypatch.setattr("headrace.on_ray.commits._WRITES", 1)
    _, said = job(tmp_path, quick, Large(), rows=16_000)
    assert said.startswith("the model large waited ") and "for the output to be written" in said


@hr.stage(out={"y": float}, replicas=1, batch=64)
class Padded:
    def __call__(self, tokens: hr.Column[hr.Vector]):
        time.sleep(0.00005 * len(tokens) * max(map(len, tokens)))
        return {"y": np.zeros(len(tokens))}


@pytest.mark.faults  # for the time it takes
def test_padding(tmp_path: Path) -> None:
    """Rows of 10 tokens among rows of 200, in batches as they come."""
    report, said = job(tmp_path, Padded(), rows=2000)
    assert report.stages[0].padding > 0.8
    assert "of the tokens that padded computed were padding (batches of 64 rows)" in said


def test_a_cold_start(tmp_path: Path) -> None:
    """The set-up takes longer than the work."""
    _, said = job(tmp_path, quick, Model(setup_s=6.0), rows=400)
    assert "went by before everything was up" in said and "of it the set-up of model" in said


class Slow(http.server.BaseHTTPRequestHandler):
    """One file, at two megabytes a second."""

    content: ClassVar[bytes] = b""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        first, last = 0, len(self.content) - 1
        if told := self.headers.get("Range"):
            first, last = (int(at) if at else len(self.content) - 1 for at in told.removeprefix("bytes=").split("-"))
        part = self.content[first : last + 1]
        self.send_response(206 if told else 200)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the reader looks at the start of the file, and leaves
            for at in range(0, len(part), 100_000):
                self.wfile.write(part[at : at + 100_000])
                time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_address() -> Iterator[str]:
    Slow.content = b"".join(b'{"id": %d, "pad": "%s"}\n' % (row, b"x" * 10_000) for row in range(2000))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/rows.jsonl"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.faults  # for the time it takes
def test_a_slow_reader(tmp_path: Path, slow_address: str) -> None:
    """The model waits for the input, whatever lies between."""
    _, said = job(tmp_path, quick, Model(), input=slow_address)
    assert said.startswith("the model model waited ") and "for input: cut it into more files" in said
