"""Positions: whoever took what, in whatever pieces, and however often it was cut off, every row of every epoch is given once."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from headrace.lineage import ROW, UNIT, trace
from headrace.loops import position
from headrace.loops.position import Position, left, mixed, united
from headrace.loops.shard import Shard
from headrace.units import Unit

UNITS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=1, max_size=4)


def units_of(shapes):
    return [Unit(at, (f"{at}.parquet",), 0, start, count, 1, 1) for at, (start, count) in enumerate(shapes)]


def rows_of(todo):
    return [(unit.id, row) for unit, gaps in todo for start, stop in gaps for row in range(start, stop)]


def blocks(todo, size, seed):
    """What readers make of it: blocks of at most so many rows of one unit, each mixed."""
    for unit, gaps in todo:
        rows = [row for start, stop in gaps for row in range(start, stop)]
        for at in range(0, len(rows), size):
            part = np.array(rows[at : at + size])
            yield mixed(trace(pa.table({"x": part}), unit.id, part), seed=seed)


@given(UNITS, st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_from_the_start_every_row_is_left_once_in_every_epoch(shapes, epochs, shuffle, seed):
    todo = left(units_of(shapes), epochs=epochs, shuffle=shuffle, seed=seed, taken={})
    expected = [(epoch * len(shapes) + at, row) for epoch in range(epochs) for at, (start, count) in enumerate(shapes) for row in range(start, start + count)]
    assert sorted(rows_of(todo)) == expected
    if not shuffle:
        assert rows_of(todo) == expected


@given(UNITS, st.integers(1, 3), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(0, 6)), max_size=4), st.integers(1, 5), st.booleans())
def test_cut_off_again_and_again_with_any_number_of_workers_nothing_is_lost_or_doubled(shapes, epochs, runs, size, shuffle):
    """Each run has some workers, which take batches in turn until it dies; the next goes on from what they said."""
    units, taken, given_rows = units_of(shapes), {}, []
    for workers, batch, steps in [*runs, (1, 5, 10_000)]:
        todo = left(units, epochs=epochs, shuffle=shuffle, seed=1, taken=taken)
        shares = [[] for _ in range(workers)]
        for at, block in enumerate(blocks(todo, size, 1)):
            shares[at % workers].append(block)
        positions = []
        for share in shares:
            shard = Shard(lambda share=share: iter(share), epoch_rows=1, epochs=1, taken=None if positions else taken)
            got, batches = 0, shard.batches(batch)
            for _ in range(steps):
                if (one := next(batches, None)) is None:
                    break
                got += len(one["x"])
            order = [(u, r) for block in share for u, r in zip(block[UNIT].to_pylist(), block[ROW].to_pylist(), strict=True)]
            given_rows += order[:got]
            positions.append(position.from_json(position.to_json(shard.position().taken())))
        taken = united(positions)  # the first worker keeps what was taken before
    assert sorted(given_rows) == sorted(rows_of(left(units, epochs=epochs, shuffle=False, seed=0, taken={})))
    assert not left(units, epochs=epochs, shuffle=shuffle, seed=1, taken=taken)


@given(st.lists(st.integers(0, 40), unique=True, max_size=30), st.lists(st.integers(1, 5), max_size=10))
def test_pieces_are_noted_in_any_order(rows, cuts):
    data = trace(pa.table({"x": rows}), 3, np.array(rows, np.int64))
    noted, at = Position(), 0
    for cut in cuts:
        noted.take(data.slice(at, cut))
        at += cut
    found = noted.taken()
    assert sorted(row for start, stop in found.get(3, []) for row in range(start, stop)) == sorted(rows[:at])
