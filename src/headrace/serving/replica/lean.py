"""One call's way through the stages of a station, with as little around the user's code as the worker's semantics allow.

A call that a station picks is a single slice of every stage's batch rule, so nothing of what `worker.Worker` does for whole blocks is
needed: no cutting, no merging, no turns. Where a call of several rows fails, the worker takes over, and finds out which rows fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace.arrays import to_stage
from headrace.calls import attempt, call, encode, out_of_memory, whole
from headrace.errors import StageError
from headrace.lineage import FAULT, Fault
from headrace.stage import Stage
from headrace.worker import Worker


@dataclass(frozen=True, slots=True)
class Contained:
    """A stage's code that cannot end the thread in which it runs: what would is an error like any other."""

    call: Callable[..., Any]

    def __call__(self, **columns: Any) -> Any:
        """What the stage returns."""
        try:
            return self.call(**columns)
        except (SystemExit, KeyboardInterrupt, GeneratorExit, CancelledError) as error:
            raise RuntimeError(f"{type(error).__name__}({error})") from error


def contain(worker: Worker) -> None:
    """Make the code of all its stages `Contained`."""
    worker.stages = [dataclasses.replace(stage, call=Contained(stage.call)) for stage in worker.stages]


def contained(worker: Worker) -> list[Callable[..., Any]]:
    """The code of its stages, as it was before: the user's own objects, set up."""
    return [stage.call.call for stage in worker.stages if isinstance(stage.call, Contained)]


def run(worker: Worker, data: pa.Table) -> tuple[pa.Table, dict[int, Fault]]:
    """`data` with the columns of all the worker's stages, and why rows failed, by row; the columns of those mean nothing."""
    rows, short_of_memory = data.num_rows, False
    try:
        outcome = attempt(rows == 1, rows, _through, worker.stages, data)
    except StageError as error:
        short_of_memory = out_of_memory(error.__cause__)
    else:
        return (data, {0: outcome}) if isinstance(outcome, Fault) else (outcome, {})
    # Only now, when the failed call's tensors are gone with its traceback. Of a call that just failed the halves are tried; the worker
    # lowers its budget only where it sees by itself that the whole does not fit.
    data = data.append_column(FAULT, pa.nulls(rows, pa.string()))
    done = worker(data) if short_of_memory else pa.concat_tables([worker(data.slice(0, rows // 2)), worker(data.slice(rows // 2))]).combine_chunks()
    faults = {at: Fault.from_json(text) for at, text in enumerate(done[FAULT].to_pylist()) if text is not None}
    return done.drop_columns(FAULT), faults


def _through(stages: Sequence[Stage], data: pa.Table) -> pa.Table:
    for stage in stages:
        outputs = call(stage, {name: to_stage(whole(data[name]), column) for name, column in stage.reads.items()})
        arrays = encode(stage, outputs, data.num_rows)
        assert isinstance(arrays, dict)  # only a fault gives a fault
        data = with_columns(data, arrays)
    return data


def with_columns(data: pa.Table, arrays: Mapping[str, pa.Array]) -> pa.Table:
    """`data` with these columns, in place of those of the same names."""
    for name, array in arrays.items():
        at = data.schema.get_field_index(name)
        data = data.append_column(name, array) if at < 0 else data.set_column(at, name, array)
    return data
