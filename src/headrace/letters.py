"""Dead letters: rows that could not be done, kept as Parquet with what they were read as, and why they failed."""

from __future__ import annotations

import io
import itertools
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.columns import ANY, ColumnType
from headrace.errors import SettingError, SourceError
from headrace.ledger import LETTERS, Ledger, new_name, staged
from headrace.lineage import FAULT, ROW, UNIT, Fault, spans
from headrace.readers import read
from headrace.state import Change, DataFile
from headrace.units import Source, Unit

_ABOUT = pa.schema(
    {
        "unit": pa.int32(),
        "row": pa.int64(),
        "file": pa.string(),
        "row_group": pa.int32(),
        "stage": pa.string(),
        "error": pa.string(),
        "message": pa.string(),
        "frames": pa.string(),
        "attempts": pa.int32(),
    }
)
_BLOCK_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many rows, and how many units, may fail before a run is stopped: a share of all, or a number.

    One is always allowed, however few there are: a job of fifty rows does not end for the first bad one.
    """

    share: float | None = 0.01
    count: int | None = None

    @staticmethod
    def parse(wanted: str | int) -> Allowance:
        """From `1%`, `0.5%` or `100`.

        Raises:
            SettingError: it is neither.
        """
        text = str(wanted).strip()
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            share = float(match[1]) / 100
            if share <= 1:
                return Allowance(share=share)
        elif re.fullmatch(r"\d+", text):
            return Allowance(share=None, count=int(text))
        raise SettingError(f"--max-dead-letters must be a share such as 1% (at most 100%) or a number of rows such as 100, got {wanted!r}")

    def of(self, total: int) -> int:
        """How many of `total` may fail."""
        if self.count is not None:
            return self.count
        return max(1, math.floor(self.share * total)) if self.share else 0


def split(data: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows without and with a fault, hidden columns included."""
    faults = data[FAULT]
    if faults.null_count == len(faults):
        return data, data.slice(0, 0)
    good = pc.is_null(faults)
    return data.filter(good), data.filter(pc.invert(good))


def table(bad: pa.Table, source: Source, units: Mapping[int, Unit], wanted: Mapping[str, ColumnType]) -> pa.Table:
    """Dead letters of the rows in `bad`: the input columns, read again, then what is known of each failure.

    An input column of the same name as one of ours is called `input_...`. One whose value cannot be read is null.
    """
    faults = {(unit, row): Fault.from_json(text) for unit, row, text in zip(*(bad[name].to_pylist() for name in (UNIT, ROW, FAULT)), strict=True)}
    images = source.format == "images"
    inputs = _inputs(bad, source, units, {**wanted, "path": ANY} if images else wanted)
    keys = list(zip(inputs[UNIT].to_pylist(), inputs[ROW].to_pylist(), strict=True)) if inputs is not None else []
    paths = inputs["path"].to_pylist() if images and inputs is not None else []  # behind a filter nothing else tells them
    absent = [key for key in faults if key not in set(keys)]  # what cannot be read a second time
    about = [
        {
            "unit": unit,
            "row": row,
            "file": file or units[unit].paths[0],
            "row_group": units[unit].row_group,
            "stage": faults[unit, row].stage,
            "error": faults[unit, row].error,
            "message": faults[unit, row].message,
            "frames": faults[unit, row].frames,
            "attempts": faults[unit, row].attempts,
        }
        for (unit, row), file in itertools.zip_longest((*keys, *absent), paths)
    ]
    data = pa.Table.from_pylist(about, _ABOUT)
    if inputs is None:
        return data
    columns = {f"input_{name}" if name in _ABOUT.names else name: inputs[name] for name in wanted}
    nothing = {name: pa.nulls(len(absent), column.type) for name, column in columns.items()}
    front = pa.concat_tables([pa.table(columns), pa.table(nothing)]) if absent else pa.table(columns)
    for name in _ABOUT.names:
        front = front.append_column(_ABOUT.field(name), data[name])
    return front


def _inputs(bad: pa.Table, source: Source, units: Mapping[int, Unit], wanted: Mapping[str, ColumnType]) -> pa.Table | None:
    """The input columns of the rows in `bad` as far as they can be read, or None."""
    found: list[pa.Table] = []
    for unit, rows in spans(bad).items():
        try:
            found += read(source, [(units[unit], rows)], wanted, block_rows=_BLOCK_ROWS)
        except SourceError:
            continue  # the file is damaged or gone: the dead letter says what failed, without the values
    return pa.concat_tables(found, promote_options="permissive") if found else None


def consolidate(held: Ledger) -> None:
    """Leave one letter per dead row: those of rows that a later try has done go, and of two tries the later one stays."""
    state = held.state
    if sum(file.rows for file in state.letters.values()) == state.rows_dead:
        return
    tables = [pq.read_table(io.BytesIO(held.store.read(f"{LETTERS}/{name}"))) for name in state.letters]  # in the order of their commits
    every = pa.concat_tables(tables, promote_options="permissive")
    last = {key: at for at, key in enumerate(zip(every["unit"].to_pylist(), every["row"].to_pylist(), strict=True))}
    still = [at for (unit, row), at in sorted(last.items()) if unit in state.dead and state.dead[unit].overlaps(row, row + 1)]
    kept = every.take(pa.array(still, pa.int64()))
    added = []
    if kept.num_rows:
        name = new_name(held.run, "letters", ".parquet")
        content = pa.BufferOutputStream()
        pq.write_table(kept, content, compression="zstd")
        buffer = content.getvalue()
        held.store.put(staged(name), buffer)
        added.append(DataFile(name, kept.num_rows, buffer.size, time.time()))
    held.settle(Change(letters=added, dropped=list(state.letters)))
