"""Every target gives what `local` gives, for every kind of column and pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conformance import CASES, Case

import headrace as hr
from headrace.arrays import table, to_rows
from headrace.columns import ANY
from headrace.testing import same

Rows = Sequence[Mapping[str, Any]]
Target = Callable[[hr.Pipeline, Rows, Sequence[str]], list[dict[str, Any]]]


def batch(folder: Path) -> Target:
    """The batch target: rows to Parquet, a run, and the output's rows in the order of the input."""

    def run(pipeline: hr.Pipeline, rows: Rows, keep: Sequence[str]) -> list[dict[str, Any]]:
        numbered = [{**row, "row_id": at} for at, row in enumerate(rows)]
        types = {**dict.fromkeys(rows[0], ANY), **pipeline.inputs, "row_id": ANY}
        pq.write_table(table(numbered, types), folder / "in.parquet", row_group_size=max(1, len(rows) // 3))
        hr.run(pipeline, input=str(folder / "in.parquet"), output=str(folder / "out"), keep=[*keep, "row_id"])
        data = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "out").glob("part-*"))).sort_by("row_id")
        assert data["row_id"].to_pylist() == list(range(len(rows)))
        assert set(data.column_names) == {*keep, *pipeline.outputs, "row_id"}
        return to_rows(data, {**pipeline.kept(keep), **pipeline.outputs})

    return run


@pytest.fixture(params=["batch"])
def target(request: pytest.FixtureRequest, tmp_path: Path, shared_ray: None) -> Target:
    """A way to run a pipeline other than `local`."""
    return {"batch": batch}[request.param](tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_target_gives_what_local_gives(case: Case, target: Target) -> None:
    """The same rows, in the same order, with the same values."""
    expected = case.pipeline.local(case.rows, keep=case.keep)
    found = target(case.pipeline, case.rows, case.keep)
    assert len(found) == len(expected)
    for at, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert list(one) == list(other)
        for name in one:
            assert same(one[name], other[name], tolerance=1e-6), f"row {at}, column {name}: {one[name]!r} became {other[name]!r}"
