"""Run a pipeline in this process: the definition of correct for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from headrace.arrays import table, to_rows
from headrace.columns import ColumnType
from headrace.errors import WiringError
from headrace.pipeline import Pipeline
from headrace.worker import Worker


def local(pipeline: Pipeline, rows: Sequence[Mapping[str, Any]], *, keep: Sequence[str] = (), device: str = "cpu") -> list[dict[str, Any]]:
    """The pipeline's outputs, after the input columns named in `keep`, for each row, in order.

    Every stage is set up anew in this process, on `device`.

    Raises:
        WiringError: a row lacks a column, or holds a value that its type forbids; or a column to keep is overwritten.
        StageError: a stage raised, or returned something other than it declared.
    """
    return _run(pipeline, rows, pipeline.kept(keep), (Worker([stage], device=device, overlap=False) for stage in pipeline.stages))


def prepare(pipeline: Pipeline, *, device: str = "cpu") -> Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]:
    """`local` as a function of the rows alone, whose stages are set up once for all its calls. Errors are those of `local`."""
    workers = [Worker([stage], device=device, overlap=False) for stage in pipeline.stages]
    return lambda rows: _run(pipeline, rows, {}, workers)


def _run(pipeline: Pipeline, rows: Sequence[Mapping[str, Any]], kept: Mapping[str, ColumnType], workers: Iterable[Worker]) -> list[dict[str, Any]]:
    try:
        data = table(rows, {**kept, **pipeline.inputs})
    except ValueError as error:
        raise WiringError(f"pipeline {pipeline.name!r}: {error}") from error
    for worker in workers:
        data = worker(data)
    return to_rows(data, {**kept, **pipeline.outputs})
