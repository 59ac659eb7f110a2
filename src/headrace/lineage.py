"""Lineage: hidden columns that travel with every row of a batch job. Stages never see them, outputs never hold them.

`UNIT` and `ROW` say which row of which input unit a row is. `FAULT` is null until a row fails; then it holds a `Fault`, the
row's other values no longer count, and the row goes past all further stages to the dead letters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

UNIT, ROW, FAULT = "__headrace_unit", "__headrace_row", "__headrace_fault"
HIDDEN = (UNIT, ROW, FAULT)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row could not be done: the stage, the kind of error, its message, the user's frames, and how often it was tried."""

    stage: str
    error: str
    message: str
    frames: str = ""
    attempts: int = 1

    def to_json(self) -> str:
        """As the text that travels in the column `FAULT`."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Fault:
        """The inverse of `to_json`."""
        return Fault(**json.loads(text))


def trace(data: pa.Table, unit: int, rows: np.ndarray, faults: pa.Array | None = None) -> pa.Table:
    """`data` with its lineage: row `rows[i]` of `unit` each, and no fault unless `faults` says so."""
    data = data.append_column(UNIT, pa.array(np.full(data.num_rows, unit, np.int32)))
    data = data.append_column(ROW, pa.array(rows.astype(np.int64, copy=False)))
    return data.append_column(FAULT, pa.nulls(data.num_rows, pa.string()) if faults is None else faults)


def spans(data: pa.Table) -> Mapping[int, list[tuple[int, int]]]:
    """The rows in `data` as ascending intervals per unit.

    Raises:
        ValueError: a row is there twice.
    """
    units, rows = data[UNIT].to_numpy(), data[ROW].to_numpy()
    order = np.lexsort((rows, units))
    units, rows = units[order], rows[order]
    same = np.diff(units) == 0
    if (same & (np.diff(rows) == 0)).any():
        raise ValueError("a row is there twice")
    breaks = np.flatnonzero(~(same & (np.diff(rows) == 1))) + 1
    starts, stops = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(rows)]])
    found: dict[int, list[tuple[int, int]]] = {}
    if len(rows):
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            found.setdefault(int(units[start]), []).append((int(rows[start]), int(rows[stop - 1]) + 1))
    return found
