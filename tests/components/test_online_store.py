"""What an online store keeps and gives. tests/integration runs the same on a Redis."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace
from headrace.errors import DefinitionError, OnlineStoreError
from headrace.online_store import Freshness, OnlineStore, Written, open_store

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
VECTOR = pa.list_(pa.float32(), 2)


class Clock:
    now = START.timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "features.db")


@pytest.fixture
def opened(place: str) -> Iterator[Callable[[], OnlineStore]]:
    """Opens the store anew each time it is called, as another process would."""
    stores = []

    def again() -> OnlineStore:
        stores.append(open_store(place))
        stores[-1].clock = Clock()
        return stores[-1]

    yield again
    for each in stores:
        each.close()


@pytest.fixture
def store(opened: Callable[[], OnlineStore]) -> OnlineStore:
    return opened()


def at(day: float) -> dt.datetime:
    return START + dt.timedelta(days=day)


def table(*rows: tuple[str | None, float | None, int | None]) -> pa.Table:
    """Rows of key, day and value."""
    keys, days, values = zip(*rows, strict=True) if rows else ((), (), ())
    times = pa.array([None if day is None else at(day) for day in days], pa.timestamp("us", tz="UTC"))
    return pa.table({"key": pa.array(keys, pa.string()), "time": times, "value": pa.array(values, pa.int64())})


def write(store: OnlineStore, *rows: tuple[str | None, float | None, int | None], **options: Any) -> Written:
    return store.write("stats", table(*rows), key="key", time="time", **options)


def values(store: OnlineStore, *keys: str | None) -> list[int | None]:
    return store.read("stats", list(keys))["value"].to_pylist()


def test_a_row_per_asked_key_in_the_order_asked(store: OnlineStore) -> None:
    assert write(store, ("a", 0, 1), ("b", 1, 2), ("c", 2, None)) == Written(3, 3, 0)
    got = store.read("stats", ["c", "nobody", "a", None, "a", "b"])
    assert got.column_names == ["value", "found", "event_time"]
    assert got["value"].to_pylist() == [None, None, 1, None, 1, 2]
    assert got["found"].to_pylist() == [True, False, True, False, True, True]
    assert got["event_time"].to_pylist() == [at(2), None, at(0), None, at(0), at(1)]
    got.validate(full=True)


def test_no_keys_and_very_many(store: OnlineStore) -> None:
    rows = [(f"k{number}", number / 1000, number) for number in range(2500)]
    assert write(store, *rows) == Written(2500, 2500, 0)
    assert store.read("stats", []).num_rows == 0
    asked = [f"k{number}" for number in range(2600)][::-1]
    assert values(store, *asked) == [None] * 100 + list(range(2500))[::-1]
    assert values(store, *["k7"] * 1100) == [7] * 1100


def test_a_value_never_goes_back(store: OnlineStore) -> None:
    write(store, ("a", 5, 1))
    assert write(store, ("a", 4, 2), ("b", 1, 3)) == Written(2, 1, 1)
    assert values(store, "a", "b") == [1, 3]
    assert write(store, ("a", 5, 4)) == Written(1, 1, 0), "of the same time: a correction"
    assert write(store, ("a", 6, 5), ("a", 8, 7), ("a", 7, 6)) == Written(3, 2, 1), "a key may come several times"
    assert values(store, "a") == [7]
    assert store.freshness("stats") == Freshness(at(8), START, 2)


def test_of_one_event_time_what_is_as_of_a_later_instant_stays(store: OnlineStore) -> None:
    """A window moves on though nothing happens, and a publication may be late."""
    assert write(store, ("a", 1, 2), at=at(3)) == Written(1, 1, 0)
    assert write(store, ("a", 1, 1), ("b", 1, 1), at=at(2)) == Written(2, 1, 1)
    assert values(store, "a", "b") == [2, 1]
    assert write(store, ("a", 1, 3), at=at(3).replace(tzinfo=None)) == Written(1, 1, 0)
    assert write(store, ("a", 2, 4), at=at(2)) == Written(1, 1, 0), "a later event is later in any case"
    assert values(store, "a", "b") == [4, 1]


def test_times_before_1970_and_to_the_microsecond(store: OnlineStore) -> None:
    day = 1 / 86_400_000_000
    for order in ((-30_000, 1), (-40_000, 0), (-30_000 + 2 * day, 3), (-30_000 + day, 2), (-1e5 / 7, 4)):
        write(store, ("a", *order))
    assert values(store, "a") == [4]
    assert store.freshness("stats").newest == at(-1e5 / 7)


def test_a_view_of_no_rows_has_its_columns(store: OnlineStore) -> None:
    assert write(store) == Written()
    assert store.views() == ["stats"] and store.freshness("stats") == Freshness(None, None, 0)
    assert store.read("stats", ["a"]).schema.field("value").type == pa.int64()


def test_what_has_expired_is_missing_and_can_be_swept(store: OnlineStore) -> None:
    write(store, ("a", 0, 1), ("b", 1, 2), ttl_s=86_400)
    write(store, ("c", 0, 3))
    store.clock.now = at(1).timestamp() - 1e-6  # type: ignore[attr-defined]
    assert values(store, "a", "b", "c") == [1, 2, 3]
    store.clock.now = at(1).timestamp()  # type: ignore[attr-defined]
    got = store.read("stats", ["a", None, "b", "c"])
    assert got["value"].to_pylist() == [None, None, 2, 3] and got["found"].to_pylist() == [False, False, True, True]
    assert got["event_time"].to_pylist()[0] is None
    assert store.freshness("stats").keys == 3
    assert store.sweep("stats") == 1 and store.sweep("stats") == 0
    assert store.freshness("stats").keys == 2
    write(store, *((f"old{number}", -10, number) for number in range(6000)), ttl_s=86_400)
    assert store.freshness("stats").keys == 6002 and store.sweep("stats") == 6000 and store.freshness("stats").keys == 2
    assert values(store, "a", "b", "c") == [None, 2, 3]
    with pytest.raises(DefinitionError, match="ttl_s must be a number above 0, got 0"):
        write(store, ("a", 0, 1), ttl_s=0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda t: t.append_column("extra", pa.array([1])), "it has no feature 'extra'; it has 'value'"),
        (lambda t: t.set_column(2, "valeu", t["value"]), "it has no feature 'valeu'; it has 'value'; did you mean 'value'?"),
        (lambda t: t.set_column(2, "value", t["value"].cast(pa.float64())), "its feature 'value' is int64, not double"),
        (lambda t: t.set_column(0, "key", pa.array([1])), "its key is 'key' (text), not 'key' (a whole number)"),
    ],
)
def test_other_columns_are_refused_by_name(store: OnlineStore, other: Callable[[pa.Table], pa.Table], said: str) -> None:
    write(store, ("a", 0, 1))
    with pytest.raises(OnlineStoreError) as raised:
        store.write("stats", other(table(("a", 1, 2))), key="key", time="time")
    assert f"has other columns than this table: {said}" in str(raised.value) and "`replace`" in str(raised.value)
    assert values(store, "a") == [1]


def test_a_feature_less_is_refused_and_another_order_is_not(store: OnlineStore) -> None:
    both = table(("a", 0, 1)).append_column("other", pa.array(["x"]))
    store.write("stats", both, key="key", time="time")
    store.write("stats", both.select(["other", "time", "value", "key"]), key="key", time="time")
    assert store.read("stats", ["a"]).select(["value", "other"]).to_pylist() == [{"value": 1, "other": "x"}]
    with pytest.raises(OnlineStoreError, match="its feature 'other' is not given"):
        write(store, ("a", 1, 2))


def test_features_wanted_by_name_and_type(store: OnlineStore) -> None:
    store.write("stats", table(("a", 0, 1)).append_column("other", pa.array(["x"])), key="key", time="time")
    wanted = pa.schema({"other": pa.string()})
    for _ in range(2):
        assert store.read("stats", ["a"], features=wanted).column_names == ["other", "found", "event_time"]
    with pytest.raises(OnlineStoreError, match="has other features than asked for: its feature 'other' is string, not int64"):
        store.read("stats", ["a"], features=pa.schema({"other": pa.int64()}))
    with pytest.raises(OnlineStoreError, match="it has no feature 'vlaue'.*did you mean 'value'"):
        store.read("stats", ["a"], features=pa.schema({"vlaue": pa.int64()}))


def test_a_change_of_columns_swaps_in_at_the_end(store: OnlineStore, opened: Callable[[], OnlineStore]) -> None:
    reader = opened()
    write(store, ("a", 9, 1), ("gone", 0, 2))
    assert values(reader, "a", "gone") == [1, 2]
    seen = []

    def tables() -> Iterator[pa.Table]:
        for number in range(3):
            seen.append(reader.read("stats", ["a", "gone"]).to_pylist())
            yield pa.table({"id": [number], "on": [dt.date(2026, 1, 1 + number)], "text": [f"t{number}"]})

    assert store.replace("stats", tables(), key="id", time="on") == Written(3, 3, 0)
    assert {str(rows) for rows in seen} == {str(seen[0])} and [row["value"] for row in seen[0]] == [1, 2]
    with pytest.raises(OnlineStoreError, match="key column 'id' is a whole number, got 'a'"):
        reader.read("stats", ["a"])
    for each in (reader, store, opened()):
        assert each.read("stats", [2, 3])["text"].to_pylist() == ["t2", None]
        assert each.freshness("stats") == Freshness(at(2), START, 3)
    with pytest.raises(OnlineStoreError, match=r"its key is 'id' \(a whole number\), not 'key' \(text\)"):
        write(reader, ("a", 10, 1))


def test_no_generation_is_taken_for_another_of_its_number(store: OnlineStore) -> None:
    """Somebody emptied the database, and the view was published again with other columns: what is known of it is not believed."""
    write(store, ("a", 0, 1))
    assert values(store, "a") == [1]
    known = store._views["stats"]
    store._views["stats"] = dataclasses.replace(known, generation=dataclasses.replace(known.generation, token=b"another"))
    assert store.engine.fetch(store._views["stats"].generation, [b"a"]) is None
    assert store.engine.put(store._views["stats"].generation, [b"a"], [bytes(40)], 0) is None
    assert values(store, "a") == [1] and write(store, ("a", 1, 2)).newer == 1


def test_a_view_can_begin_with_replace(store: OnlineStore) -> None:
    store.replace("stats", [table(("a", 0, 1)), table(("a", 1, 2))], key="key", time="time")
    assert values(store, "a") == [2]
    with pytest.raises(OnlineStoreError, match="there is no table to replace it with"):
        store.replace("stats", [], key="key", time="time")
    store.replace("stats", [table()], key="key", time="time")
    assert values(store, "a") == [None]


def test_whoever_replaces_later_wins(store: OnlineStore, opened: Callable[[], OnlineStore]) -> None:
    write(store, ("a", 0, 0))
    other = opened()

    def tables(between: Callable[[], object]) -> Iterator[pa.Table]:
        yield table(("a", 0, 1))
        between()
        yield table(("b", 0, 1))

    with pytest.raises(OnlineStoreError, match="somebody else has begun to replace it"):
        store.replace("stats", tables(lambda: other.replace("stats", [table(("a", 0, 2))], key="key", time="time")), key="key", time="time")
    assert values(store, "a", "b") == [2, None]
    with pytest.raises(OnlineStoreError, match="was written to, or replaced, while this replaced it"):
        store.replace("stats", tables(lambda: write(other, ("a", 1, 3))), key="key", time="time")
    assert values(store, "a", "b") == [3, None]
    with pytest.raises(ZeroDivisionError):
        store.replace("stats", tables(lambda: 1 / 0), key="key", time="time")
    assert values(store, "a", "b") == [3, None]


@pytest.mark.parametrize("number", [1, 2**63 - 1, -(2**63)])
def test_whole_numbers_as_keys(store: OnlineStore, number: int) -> None:
    rows = pa.table({"id": pa.array([number, 0]), "t": pa.array([START, START]), "v": [1.5, 2.5]})
    store.write("stats", rows, key="id", time="t")
    for keys in ([number, 7], np.array([number, 7]), pa.array([number, 7]), (np.int64(number), 7)):
        assert store.read("stats", keys)["v"].to_pylist() == [1.5, None]
    for wrong in ("1", 1.0, True):
        with pytest.raises(OnlineStoreError, match=f"key column 'id' is a whole number, got {wrong!r}"):
            store.read("stats", [0, wrong])


def test_keys_of_several_columns(store: OnlineStore) -> None:
    rows = pa.table({"city": ["ab", "a", "", "é:1"], "id": [1, 11, 5, 2], "t": [START] * 4, "v": [1, 2, 3, 4]})
    store.write("stats", rows, key=("city", "id"), time="t")
    assert store.read("stats", [("a", 11), ("ab", 1), ("", 5), ("é:1", 2), ("ab", 11), None, ("ab", None)])["v"].to_pylist() == [2, 1, 3, 4, None, None, None]
    with pytest.raises(OnlineStoreError, match=r"a key of this view is a tuple of 'city' \(text\) and 'id' \(a whole number\), got 'ab'"):
        store.read("stats", ["ab"])
    with pytest.raises(OnlineStoreError, match="key column 'id' is a whole number, got 'x'"):
        store.read("stats", [("ab", "x")])


def test_keys_of_dates_bytes_and_truth_values(store: OnlineStore) -> None:
    day, raw = dt.date(2026, 1, 31), b"\xff\x00"
    rows = pa.table({"on": [day, day], "raw": [raw, b""], "yes": [True, False], "t": [START] * 2, "v": [1, 2]})
    store.write("stats", rows, key=("on", "raw", "yes"), time="t")
    assert store.read("stats", [(day, b"", False), (day, raw, np.True_), (day, raw, False)])["v"].to_pylist() == [2, 1, None]
    with pytest.raises(OnlineStoreError, match="key column 'on' is a date, got datetime"):
        store.read("stats", [(START, raw, True)])


def test_keys_that_are_odd_text(store: OnlineStore) -> None:
    odd = ["", "a\0b", "a", "a b", "ÿ", "\U0001f600", "'; DROP", '"', "\\", "\n", "x" * 5000]
    write(store, *((key, 0, number) for number, key in enumerate(odd)))
    assert values(store, *odd) == list(range(len(odd)))
    assert values(store, "a b", "nobody", "ÿ", "x" * 5000) == [3, None, 4, len(odd) - 1], "without those that JSON writes otherwise"
    with pytest.raises(OnlineStoreError, match="is no text that UTF-8 can hold"):
        values(store, "\ud800")
    with pytest.raises(OnlineStoreError, match=r"keys is a list of keys, such as \['a'\], got 'a'"):
        store.read("stats", "a")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (table((None, 0, 1)), {}, "1 rows without a key: column 'key' is null"),
        (table(("a", None, 1)), {}, "1 rows without an event time: column 'time' is null"),
        (table(("a", 0, 1)), {"key": "kye"}, "key='kye' is no column of the table, which has 'key', 'time', 'value'; did you mean 'key'?"),
        (table(("a", 0, 1)), {"time": "value"}, "time='value' is a column of int64; event times are timestamps or dates"),
        (table(("a", 0, 1)), {"key": "time"}, "key and time must be different columns"),
        (table(("a", 0, 1)), {"key": ("key", "value")}, "the table has no features beside its key and its time"),
        (table(("a", 0, 1)).rename_columns(["key", "time", "found"]), {}, "a feature cannot be called 'found'"),
        (table(("a", 0, 1)).append_column("d", pa.array([{"x": 1}])), {}, "column 'd': values of type struct<x: int64> cannot be kept; allowed are bool"),
        (table(("a", 0, 1)).set_column(0, "key", pa.array([1.5])), {}, "key column 'key' is of type double; a key is text, a whole number, a date"),
        (table(("a", 0, 1)).append_column("v", pa.array([[1, None]], VECTOR)), {}, "column 'v': a vector with a null inside"),
        (table(("a", 0, 1)).set_column(1, "time", pa.array([2**62], pa.timestamp("us"))), {}, "event times beyond the years 1 to 9999"),
        (table(("a", 0, 1)).set_column(1, "time", pa.array([2**62], pa.timestamp("s"))), {}, "event times beyond the years 1 to 9999"),
    ],
)
def test_what_cannot_be_kept_is_told(store: OnlineStore, rows: pa.Table, options: dict[str, str], said: str) -> None:
    with pytest.raises(OnlineStoreError) as raised:
        store.write("stats", rows, **{"key": "key", "time": "time", **options})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "column", [pa.array([1767225600123456789, -1], pa.timestamp("ns")), pa.array([1767225600123456, -1], pa.timestamp("us", "Asia/Tokyo"))]
)
def test_event_times_of_other_units_and_zones(store: OnlineStore, column: pa.Array) -> None:
    store.write("stats", pa.table({"key": ["a", "b"], "time": column, "value": [1, 2]}), key="key", time="time")
    before = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) - dt.timedelta(microseconds=1)
    assert store.read("stats", ["a", "b"])["event_time"].to_pylist() == [START + dt.timedelta(microseconds=123456), before]


def test_other_encodings_of_a_type_are_the_type(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    plain = pa.table({"key": ["a"], "time": [START], "text": ["x"], "many": [["p"]]})
    store.write("plain", plain, key="key", time="time")
    encoded = pa.table({
        "key": pa.array(["a"], pa.large_string()),
        "time": pa.array([at(1)]),
        "text": pa.array(["y"]).dictionary_encode(),
        "many": pa.array([["q", None]], pa.large_list(pa.large_string())),
    })  # fmt: skip
    store.write("plain", encoded, key="key", time="time")
    assert store.read("plain", ["a"]).select(["text", "many"]).to_pylist() == [{"text": "y", "many": ["q", None]}]


def test_a_view_that_is_not_there(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    for ask in (store.freshness, store.sweep, store.schema, lambda view: store.read(view, ["a"])):
        with pytest.raises(OnlineStoreError, match="has no view 'stat'; it has 'stats'; did you mean 'stats'"):
            ask("stat")
    with pytest.raises(OnlineStoreError, match="the name of a feature view is an identifier such as 'listing_stats', got 'a b'"):
        store.write("a b", table(("a", 0, 1)), key="key", time="time")


def test_readers_see_whole_rows_while_another_writes(store: OnlineStore, opened: Callable[[], OnlineStore]) -> None:
    keys = [f"k{number}" for number in range(50)]

    def rows(number: int) -> pa.Table:
        same = [number] * len(keys)
        return pa.table(
            {"key": keys, "time": [at(number)] * len(keys), "a": same, "b": [str(number)] * len(keys), "c": pa.array([[number] * 2] * len(keys), VECTOR)}
        )

    store.write("stats", rows(0), key="key", time="time")
    reader, done, seen = opened(), threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            for row in reader.read("stats", keys).to_pylist():
                seen.add((row["a"], row["b"], tuple(row["c"]), row["event_time"]))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 40):
        store.write("stats", rows(number), key="key", time="time")
    done.set()
    for thread in threads:
        thread.join()
    assert seen <= {(number, str(number), (number, number), at(number)) for number in range(40)}


WRITER = """
import sys, datetime as dt, pyarrow as pa
from headrace.online_store import open_store
store = open_store(sys.argv[1])
at = lambda number: dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=number)
keys = [f"k{number}" for number in range(3000)]
for number in range(1, 1000):
    table = pa.table({"key": keys, "time": [at(number)] * len(keys), "a": [number] * len(keys), "b": [str(number)] * len(keys)})
    store.write("stats", table, key="key", time="time")
    print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_old_values_and_new_ones(opened: Callable[[], OnlineStore], place: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(headrace.__file__).parents[1])}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True, env=environment)
    assert writer.stdout is not None
    try:
        for line in writer.stdout:
            if int(line) == 3:
                break
    finally:
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
    done = int(rest[-1]) if rest else 3
    store = opened()
    got = store.read("stats", [f"k{number}" for number in range(3000)]).to_pylist()
    assert {row["a"] for row in got} <= {done, done + 1}
    assert all((row["b"], row["event_time"]) == (str(row["a"]), at(row["a"])) for row in got)
    assert store.freshness("stats").keys == 3000
    store.write("stats", pa.table({"key": ["k0"], "time": [at(5000)], "a": [0], "b": ["0"]}), key="key", time="time")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of Python 3.12 on; that it works all the same is the test
def test_a_forked_process_goes_on(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    assert values(store, "a") == [1]
    busy, done = threading.Event(), threading.Event()

    def read() -> None:
        while not done.is_set():
            values(store, "a")
            busy.set()

    thread = threading.Thread(target=read)
    thread.start()
    busy.wait()
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            write(store, (f"child{number}", 0, number))
            os._exit(0 if values(store, "a", f"child{number}") == [1, number] else 1)
        children.append(child)
    write(store, ("parent", 0, 7))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    done.set()
    thread.join()
    assert codes == [0, 0, 0]
    assert values(store, "a", "child0", "child1", "child2", "parent") == [1, 0, 1, 2, 7]
