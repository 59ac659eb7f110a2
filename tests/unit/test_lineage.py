"""The hidden columns, and the intervals of rows that they tell of."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from headrace.lineage import FAULT, ROW, UNIT, Fault, spans, trace


def table(*rows: tuple[int, int]) -> pa.Table:
    units, numbers = [unit for unit, _ in rows], [row for _, row in rows]
    return pa.table({UNIT: pa.array(units, pa.int32()), ROW: pa.array(numbers, pa.int64())})


def test_a_block_is_traced() -> None:
    traced = trace(pa.table({"a": [1, 2]}), 7, np.array([40, 41]))
    assert traced.to_pylist() == [{"a": 1, UNIT: 7, ROW: 40, FAULT: None}, {"a": 2, UNIT: 7, ROW: 41, FAULT: None}]
    assert traced.schema.field(FAULT).type == pa.string()


def test_spans_are_told_per_unit_whatever_the_order() -> None:
    assert spans(table((2, 5), (1, 9), (2, 4), (1, 8), (2, 7))) == {1: [(8, 10)], 2: [(4, 6), (7, 8)]}
    assert spans(table()) == {}


def test_a_row_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a row is there twice"):
        spans(table((1, 4), (1, 5), (1, 4)))


def test_a_fault_travels_as_text() -> None:
    fault = Fault("embed", "ValueError", "too long: 'é'", "  File ...", attempts=3)
    assert Fault.from_json(fault.to_json()) == fault
