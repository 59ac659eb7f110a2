"""Rows that go wrong in every way there is: exactly these become dead letters, all others come out, in bounded time."""

from __future__ import annotations

import time
from pathlib import Path

import harness
import poison
import psutil
import pyarrow as pa
import pytest
from harness import Figures, Output, Running

import headrace as hr

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("shared_ray")]

FORM = pytest.mark.parametrize("form", ["function", "model", "accelerated"])
BOUND_S = 180  # on a machine that others use as well; alone it takes a tenth of that
BAD = [3, 77, 1500]


def expect_letters(output: Output, bad: list[int]) -> harness.Count:
    """Hold that exactly the bad rows are dead letters, and that the output holds all others."""
    wanted = pa.table({"id": [row for row in range(harness.ROWS) if row not in bad], "y": [2 * row for row in range(harness.ROWS) if row not in bad]})
    assert sorted(letter["id"] for letter in output.letters()) == bad
    return output.check(wanted)


@FORM
@pytest.mark.parametrize("kind", [*poison.GENTLE, *poison.DEADLY])
def test_a_poison_row(tmp_path: Path, job_input: Path, figures: Figures, form: str, kind: str) -> None:
    """Three bad rows, two of them in one block."""
    started = time.monotonic()
    report = hr.run(poison.pipeline(form, kind, BAD), input=str(job_input), output=str(tmp_path / "out"), keep="id")
    took_s = time.monotonic() - started
    count = expect_letters(Output(str(tmp_path / "out")), BAD)
    figures.add(f"poison rows: {kind}", faults=len(BAD), runs=1, seconds=took_s, count=count)
    assert report.rows_out == harness.ROWS - len(BAD)
    assert took_s < BOUND_S


PIPELINE = """
import sys

sys.path.insert(0, {here!r})
import poison

job = poison.pipeline({form!r}, "memory", [77])
"""


@pytest.mark.parametrize("form", ["function", "model"])
def test_a_row_of_6_gb_that_rays_memory_monitor_kills(tmp_path: Path, job_input: Path, figures: Figures, form: str) -> None:
    """The monitor's threshold is set 4 GB above what the machine uses now, so that the row passes it and the machine lives."""
    memory = psutil.virtual_memory()
    if memory.available < 9e9:
        pytest.skip(f"only {memory.available / 1e9:.1f} GB of memory are free; this test needs 9")
    threshold = (memory.total - memory.available + 4e9) / memory.total
    (tmp_path / "job.py").write_text(PIPELINE.format(here=str(Path(__file__).parent), form=form))
    arguments = ["headrace", "run", "job.py", "--input", str(job_input), "--output", str(tmp_path / "out"), "--keep", "id"]
    run = Running(arguments, folder=tmp_path, RAY_memory_usage_threshold=f"{threshold:.3f}", RAY_memory_monitor_refresh_ms="100")
    try:
        code = run.wait(BOUND_S)
        assert code == 0, run.said
        letters = Output(str(tmp_path / "out")).letters()
        count = expect_letters(Output(str(tmp_path / "out")), [77])
        assert letters[0]["error"] == "ProcessDied"
        figures.add("poison rows: 6 GB, killed by Ray's monitor", faults=1, runs=1, seconds=time.monotonic() - run.started_s, count=count)
    finally:
        run.end()
