"""Shards: tables of any size become batches of one size, and what was given is known row by row."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from headrace.errors import ContractError, DefinitionError
from headrace.lineage import trace
from headrace.loops.shard import Shard


def shard(*blocks, rows=None, epochs=1, **more):
    """Tables one after the other, as one unit."""
    made, at = [], 0
    for block in blocks:
        data = pa.table(block)
        made.append(trace(data, 0, np.arange(at, at + data.num_rows)))
        at += data.num_rows
    return Shard(lambda: iter(made), epoch_rows=rows or at, epochs=epochs, **more)


def numbers(*sizes):
    ends = np.cumsum(sizes)
    return [{"x": np.arange(end - size, end)} for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("sizes", [(10,), (3, 3, 4), (1, 0, 9), (4, 4, 2)])
def test_batches_have_their_size_whatever_the_tables(sizes):
    batches = [batch["x"].tolist() for batch in shard(*numbers(*sizes)).batches(4)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(batch["x"]) for batch in shard(*numbers(*sizes)).batches(4, drop_last=True)] == [4, 4]


def test_every_kind_of_column_arrives_as_said():
    when = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    columns = {
        "f": pa.array([1.5, None]),
        "i": pa.array([1, 2], pa.int32()),
        "b": pa.array([True, False]),
        "v": pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)),
        "wide": pa.array([[1, None], [3, 4]], pa.list_(pa.float64(), 2)),
        "ragged": pa.array([[9], [1], [2, 3]]).slice(1),
        "words": pa.array([["a"], []]),
        "s": pa.array(["a", None]),
        "d": pa.array(["x", "x"]).dictionary_encode(),
        "t": pa.array([when, when]),
    }
    (batch,) = shard(columns).batches(2)
    assert np.isnan(batch["f"][1]) and batch["f"].dtype == float
    assert batch["i"].dtype == np.int32 and batch["b"].tolist() == [True, False]
    assert batch["v"].shape == (2, 2) and batch["v"].dtype == np.float32
    assert batch["wide"].shape == (2, 2) and np.isnan(batch["wide"][0, 1])
    assert [value.tolist() for value in batch["ragged"]] == [[1], [2, 3]] and batch["words"] == [["a"], []]
    assert (batch["s"], batch["d"], batch["t"]) == (["a", None], ["x", "x"], [when, when])


def test_arrays_may_be_written_to_and_are_nobody_elses():
    block = pa.table({"x": [1.0, 2.0], "v": pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))})
    (batch,) = shard(block).batches(2)
    batch["x"] += 1
    batch["v"][0] = 0
    assert block["x"].to_pylist() == [1.0, 2.0] and block["v"][0].as_py() == [1, 2]


@pytest.mark.parametrize("values", [pa.array([1, None]), pa.array([True, None]), pa.array([[1, None]], pa.list_(pa.int64(), 2))])
def test_a_null_where_no_number_stands_for_it_is_refused(values):
    with pytest.raises(ContractError, match="column 'x' of the training has 1 nulls, and .* has no value for them; fill them in a stage"):
        next(shard({"x": values}).batches(1))


def test_a_batch_counts_as_given_when_the_loop_has_it():
    one = shard(*numbers(3, 3, 4))
    batches = one.batches(4)
    assert not one.position().taken()
    for last in (4, 8):
        next(batches)
        assert list(one.position().taken()[0]) == [(0, last)]
        assert list(one.position().taken()[0]) == [(0, last)]  # asked again
    next(batches)
    assert list(one.position().taken()[0]) == [(0, 10)]


def test_steps_and_epochs_count_from_the_beginning_of_the_training():
    one = shard(*numbers(8), rows=16, epochs=3, workers=2, step=5, given=32)
    assert (one.step, one.epoch, one.steps(4)) == (5, 2.0, 7)
    batches = one.batches(4)
    next(batches)
    assert (one.step, one.epoch, one.rows) == (6, 2.5, 4)
    next(batches)
    assert (one.step, one.epoch, one.whole_epochs) == (7, 3.0, 3)


def test_the_time_until_the_first_batch_is_no_waiting(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("headrace.loops.shard.time.perf_counter", lambda: next(clock))
    one = shard(*numbers(4, 4))
    list(one.batches(4))
    assert one.wait_s == 10


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(DefinitionError, match=r"shard.batches\(size\) must be a whole number of at least 1"):
        next(shard(*numbers(4)).batches(size))
