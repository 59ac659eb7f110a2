"""A worker that dies once, at a certain row: the row is not to blame, and no row is lost or doubled."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("shared_ray")]


def die_once(mark: str, ids: Any) -> None:
    """Kill this very process with SIGKILL when row 500 comes by for the first time."""
    if 500 in ids and not os.path.exists(mark):
        with open(mark, "w"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)


@hr.stage(out={"y": int}, replicas=2)
class Actor:
    """A model that dies once."""

    mark: str = ""

    def __call__(self, id: hr.Column[int]) -> dict[str, Any]:
        """Twice the id."""
        die_once(self.mark, id)
        return {"y": 2 * id}


def pipeline_of(kind: str, mark: str) -> hr.Pipeline:
    """A pipeline whose task or actor dies once."""
    if kind == "actor":
        return hr.Pipeline("p", Actor(mark=mark))

    @hr.stage(out={"y": int})
    def task(id: hr.Column[int]) -> dict[str, Any]:
        die_once(mark, id)
        return {"y": 2 * id}

    return hr.Pipeline("p", task)


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_worker_is_killed(tmp_path: Path, kind: str) -> None:
    """Kill -9 of a task's worker, or of an actor, loses no row and doubles none."""
    (tmp_path / "in").mkdir()
    for file in range(4):
        ids = range(file * 500, file * 500 + 500)
        pq.write_table(pa.table({"id": ids}), tmp_path / f"in/{file}.parquet", row_group_size=100)
    mark = tmp_path / "died"
    report = hr.run(pipeline_of(kind, str(mark)), input=str(tmp_path / "in"), output=str(tmp_path / "out"), keep="id")
    assert mark.exists(), "nothing was killed: the test tests nothing"
    data = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "out").glob("part-*")).sort_by("id")
    assert (report.rows_in, report.rows_out) == (2000, 2000)
    assert data["id"].to_pylist() == list(range(2000)) and data["y"].to_pylist() == list(range(0, 4000, 2))
    assert (tmp_path / "out/_SUCCESS").exists()
