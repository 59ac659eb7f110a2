"""A worker's part of the rows: batches of arrays out of a stream of tables, and how long the loop waited for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import ContractError, SettingError, check_number
from headrace.lineage import HIDDEN
from headrace.loops.position import Position, Taken

Batch = dict[str, Any]


class Shard:
    """The rows of all epochs that one worker is given.

    Every worker gets as many as every other, so all of them make the same number of steps. A batch may have the last rows of one epoch and
    the first of the next. A resumed loop gets what was not given before its checkpoint.

    Attributes:
        step: batches given so far, over all runs of the training.
        rows: rows that this worker was given in this run.
        wait_s: how long the loop has waited for them, of this run, from the first batch on.
    """

    def __init__(
        self,
        tables: Callable[[], Iterator[pa.Table]],
        *,
        epoch_rows: int,
        epochs: int,
        workers: int = 1,
        step: int = 0,
        given: int = 0,
        taken: Taken | None = None,
    ) -> None:
        self._tables = tables
        self._epoch_rows, self._epochs, self._workers, self._given = epoch_rows, epochs, workers, given
        self._opened = False
        self._position = Position(taken)
        self._current: tuple[pa.Table, int, int] | None = None  # a table, and the rows of it that were given since they were noted
        self.step = step
        self.rows = 0
        self.wait_s = 0.0
        self.tick: Callable[[], object] = lambda: None  # called when a batch is about to be given

    @property
    def epoch(self) -> float:
        """How often every row was given so far, such as 1.25; the same for all workers at the same step."""
        return (self._given + self.rows * self._workers) / max(1, self._epoch_rows)

    @property
    def whole_epochs(self) -> int:
        """Epochs in all."""
        return self._epochs

    def steps(self, size: int) -> int:
        """About how many batches of `size` rows a worker is given in all, for schedules of learning rates."""
        check_number(size, "shard.steps(size)", whole=True)
        left = self._epoch_rows * self._epochs - self._given
        return self.step + math.ceil(max(0, left) / self._workers / size)

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Batch]:
        """The rows in batches of `size`, each a dictionary of columns; the last one may be smaller.

        Numbers are numpy arrays of shape (rows,), vectors of one length are (rows, length); both may be written to, and
        `torch.from_numpy` takes them without a copy. Vectors of several lengths are a list of arrays, and all else is a list. A null is NaN
        among floating-point numbers, and None in a list; whole numbers and truth values must have none.

        Args:
            size: rows in a batch, of this worker.
            drop_last: leave out a last batch that is smaller.

        Raises:
            ContractError: a column of whole numbers or truth values has nulls.
        """
        check_number(size, "shard.batches(size)", whole=True)
        parts: list[tuple[Batch, int, int]] = []
        filled = 0
        asked_s = time.perf_counter()
        for data in self._opening("batches"):
            columns, at = _columns(data) if data.num_rows else {}, 0
            while at < data.num_rows:
                taken = min(size - filled, data.num_rows - at)
                parts.append((columns, at, at + taken))
                self._note(data, at, at + taken)
                filled, at = filled + taken, at + taken
                if filled == size:
                    yield self._give(parts, filled, asked_s)
                    asked_s, parts, filled = time.perf_counter(), [], 0
        if filled and not drop_last:
            yield self._give(parts, filled, asked_s)

    def table(self) -> pa.Table:
        """The rows of one epoch as an Arrow table, in memory: for libraries that take their data as a whole, such as boosted trees.

        A resumed loop gets all of them again.

        Raises:
            SettingError: the training has more than one epoch.
        """
        if self._epochs != 1:
            raise SettingError(f"shard.table() gives the rows of one epoch, and the training has epochs={self._epochs}; count rounds in the loop itself")
        tables = [data.drop_columns([name for name in HIDDEN if name in data.column_names]) for data in self._opening("table")]
        whole = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
        self.tick()
        self.rows += whole.num_rows
        return whole

    def position(self) -> Position:
        """The rows given so far, the last batch among them."""
        if self._current is not None:
            data, start, stop = self._current
            self._position.take(data.slice(start, stop - start))
            self._current = (data, stop, stop)
        return self._position

    def _opening(self, by: str) -> Iterator[pa.Table]:
        if self._opened:
            raise SettingError(
                f"shard.{by}() was called a second time; the rows of all {self._epochs} epochs come from one call: say epochs=... in hr.Training"
            )
        self._opened = True
        return self._tables()

    def _note(self, data: pa.Table, start: int, stop: int) -> None:
        if self._current is not None and self._current[0] is data:
            start = self._current[1]
        elif self._current is not None:
            self.position()
        self._current = (data, start, stop)

    def _give(self, parts: list[tuple[Batch, int, int]], rows: int, asked_s: float) -> Batch:
        batch = {name: _joined([columns[name][start:stop] for columns, start, stop in parts]) for name in parts[0][0]}
        if self.rows:
            self.wait_s += time.perf_counter() - asked_s
        else:
            self.tick()  # until the first batch is there, it is start-up
        self.step += 1
        self.rows += rows
        self.tick()
        return batch


def _columns(data: pa.Table) -> Batch:
    return {name: _values(name, data[name]) for name in data.column_names if name not in HIDDEN}


def _values(name: str, column: pa.ChunkedArray) -> Any:
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_number(array.type):
        return _numbers(name, array)
    vectors = pa.types.is_fixed_size_list(array.type) or pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if array.null_count or not vectors or not _is_number(array.type.value_type):
        return array.to_pylist()
    flat = _numbers(name, array.flatten())
    if pa.types.is_fixed_size_list(array.type):
        return flat.reshape(len(array), array.type.list_size)
    bounds = array.offsets.to_numpy()
    return np.split(flat, (bounds - bounds[0])[1:-1])


def _numbers(name: str, array: pa.Array) -> np.ndarray[Any, Any]:
    if array.null_count and not pa.types.is_floating(array.type):
        raise ContractError(f"column {name!r} of the training has {array.null_count} nulls, and {array.type} has no value for them; fill them in a stage")
    filled = pc.fill_null(array, pa.scalar(math.nan, array.type)) if array.null_count else array
    numbers: np.ndarray[Any, Any] = filled.to_numpy(zero_copy_only=False)
    return numbers


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _joined(parts: list[Any]) -> Any:
    """One column of a batch, in memory of its own."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts) if len(parts) > 1 else parts[0].copy()
    return [value for part in parts for value in part]
