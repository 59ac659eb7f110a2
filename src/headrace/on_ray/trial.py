"""The batch job as a target of the parity gate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.arrays import table, to_rows
from headrace.errors import RunError, SettingError
from headrace.on_ray.job import run
from headrace.parity import Target
from headrace.pipeline import Pipeline

_NUMBER = "headrace_row"
_UNITS = 3  # row groups, so that rows are parted as in a real run


def batch(pipeline: Pipeline) -> Target:
    """Rows to a file, the file through a batch job on this machine (or on the Ray that this process has joined), and its output as rows.

    The job's files lie in a folder of its own, which is deleted again. A row that fails is a DeadLetterError.
    """
    if taken := {_NUMBER} & {*pipeline.inputs, *pipeline.outputs}:
        raise SettingError(f"pipeline {pipeline.name!r} has a column {taken.pop()!r}, which is the gate's own; rename it")

    def target(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="headrace-gate-") as name:
            folder = Path(name)
            data = table(rows, pipeline.inputs).append_column(_NUMBER, pa.array(range(len(rows)), pa.int64()))
            pq.write_table(data, folder / "in.parquet", row_group_size=max(1, -(-len(rows) // _UNITS)))
            address = os.environ.pop("RAY_ADDRESS", None)  # the folder is on this machine
            try:
                run(pipeline, input=str(folder / "in.parquet"), output=str(folder / "out"), keep=[_NUMBER], max_dead_letters=0)
            finally:
                if address is not None:
                    os.environ["RAY_ADDRESS"] = address
            found = pq.read_table(folder / "out").sort_by(_NUMBER)
            if found[_NUMBER].to_pylist() != list(range(len(rows))):
                raise RunError(f"the batch job gave {len(found):,} rows for {len(rows):,}, or others")
            return to_rows(found, pipeline.outputs)

    return target
