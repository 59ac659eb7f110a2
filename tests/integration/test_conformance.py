"""Every target gives what `local` gives, for every kind of column and pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conformance import CANNOT, CASES, Case

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


def serve(folder: Path) -> Target:
    """A native application of Ray Serve, asked by handle: all rows at once, then one by one and at the same time."""

    def run(pipeline: hr.Pipeline, rows: Rows, keep: Sequence[str]) -> list[dict[str, Any]]:
        from ray import serve as ray_serve

        assert not keep
        handle = ray_serve.run(hr.serve(pipeline), name="conformance", route_prefix=None)
        try:
            together = handle.remote(rows).result()
            for one, other in zip(together, [answer.result() for answer in [handle.remote(row) for row in rows[:20]]], strict=False):
                assert all(same(one[name], other[name], tolerance=1e-6) for name in pipeline.outputs), f"{one} by itself is {other}"
            return list(together)
        finally:
            handle.shutdown()  # or its thread goes on when Ray is gone
            ray_serve.delete("conformance")

    return run


@pytest.fixture(scope="module")
def shared_serve(shared_ray: None) -> Iterator[None]:
    """Ray Serve without a proxy."""
    from headrace.on_ray import deployments

    deployments.start_serve()
    yield
    deployments.end_serve()


@pytest.fixture(params=["batch", "serve"])
def target(request: pytest.FixtureRequest, tmp_path: Path, shared_ray: None) -> Target:
    """A way to run a pipeline other than `local`. Columns that it cannot keep are joined from the rows."""
    if request.param == "batch":
        return batch(tmp_path)
    request.getfixturevalue("shared_serve")
    run, cannot = serve(tmp_path), CANNOT[request.param]

    def joined(pipeline: hr.Pipeline, rows: Rows, keep: Sequence[str]) -> list[dict[str, Any]]:
        kept = list(pipeline.kept(keep)) if "keep" in cannot else []
        answers = run(pipeline, rows, () if kept else keep)
        return [{**{name: row.get(name) for name in kept}, **answer} for row, answer in zip(rows, answers, strict=True)]

    return joined


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
