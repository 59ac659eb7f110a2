"""The export to Feast: a row at every change says the same as the join at any instant; what is refused, and what is written."""

import ast
import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import features as f
from headrace.errors import DefinitionError, WiringError
from headrace.features.feast import TIME, changes

DAY = dt.datetime(2024, 3, 30)


def view(source=None, **more) -> hr.FeatureView:
    features = {"n": f.count(over="1d"), "total": f.sum("x", over="3h", delay="1h", default=0.0), "word": "w", "vector": "v"}
    return hr.FeatureView("stays", source, **({"key": "k", "time": "t", "features": features, "delay": "2h", "ttl": "2d"} | more))


def table(rows: int, seed: int) -> pa.Table:
    numbers = np.random.default_rng(seed)
    hours = pa.array([DAY + dt.timedelta(hours=int(h)) for h in numbers.integers(0, 90, rows)], pa.timestamp("us"))
    columns = {"k": pa.array(numbers.integers(0, 4, rows), pa.int32()), "t": hours, "x": numbers.integers(-9, 9, rows) / 4}
    vectors = pa.array([[float(x), 0.5] for x in numbers.integers(0, 9, rows)], pa.list_(pa.float32(), 2))
    return pa.table(columns | {"w": [f"w{n}" for n in numbers.integers(0, 5, rows)], "v": vectors})


@pytest.mark.parametrize("seed", range(4))
def test_the_newest_row_of_changes_says_what_the_join_says(seed):
    events = table(40, seed)
    instants = changes(view(), events)
    rows = f.as_of(view(), instants, events, time=TIME).to_pylist()
    labels = pa.table({"k": pa.array([0, 1, 2, 3] * 160, pa.int32()), "t": [DAY + dt.timedelta(minutes=60 * hour) for hour in range(160) for _ in range(4)]})
    for label in f.as_of(view(), labels, events).to_pylist():
        before = [row for row in rows if row["k"] == label["k"] and row[TIME] <= label["t"].replace(tzinfo=dt.UTC)]
        newest = max(before, key=lambda row: row[TIME])
        assert {name: label[name] for name in view().specs} == {name: newest[name] for name in view().specs}


def test_changes_end_where_feast_does():
    events = pa.table({"k": [1], "t": [dt.datetime(2262, 4, 1)], "x": [1.0], "w": ["a"], "v": pa.array([[0.0, 0.0]], pa.list_(pa.float32(), 2))})
    found = changes(view(features={"n": f.count(over="3000d")}), events)[TIME].to_pylist()
    assert found == [dt.datetime(1700, 1, 1, tzinfo=dt.UTC), dt.datetime(2262, 4, 1, 2, tzinfo=dt.UTC), dt.datetime(2262, 4, 3, tzinfo=dt.UTC)]


def test_the_repository_is_definitions_settings_and_rows(tmp_path):
    pq.write_table(table(20, 0), tmp_path / "stays.parquet")
    f.export_feast(view(str(tmp_path / "stays.parquet")), str(tmp_path / "feast"), project="demo")
    text = (tmp_path / "feast/definitions.py").read_text()
    ast.parse(text)
    assert 'Entity(name="k", join_keys=["k"], value_type=ValueType.INT32)' in text
    assert 'Field(name="vector", dtype=Array(Float32), description="last(v, over=all)")' in text
    assert 'path="data/stays.parquet"' in text
    schema = pq.read_schema(tmp_path / "feast/data/stays.parquet")
    assert schema.names == ["k", TIME, "n", "total", "word", "vector"]
    assert schema.field(TIME).type == pa.timestamp("us", "UTC")
    settings = tmp_path / "feast/feature_store.yaml"
    assert "project: demo" in settings.read_text()
    settings.write_text("project: mine\n")
    f.export_feast(view(str(tmp_path / "stays.parquet")), str(tmp_path / "feast"))
    assert settings.read_text() == "project: mine\n"


def test_rows_that_are_known_are_taken_as_they_are(tmp_path):
    pq.write_table(table(20, 0), tmp_path / "stays.parquet")
    source = view(str(tmp_path / "stays.parquet"))
    labels = pa.table({"extra": [1, 2], "k": pa.array([1, 2], pa.int32()), "t": [DAY + dt.timedelta(days=1)] * 2})
    joined = hr.training_set(labels, source)
    pq.write_table(joined, tmp_path / "known.parquet")
    f.export_feast(source, str(tmp_path / "feast"), known={"stays": str(tmp_path / "known.parquet")})
    found = pq.read_table(tmp_path / "feast/data/stays.parquet")
    assert found.column_names == ["k", TIME, "n", "total", "word", "vector"]
    assert found["n"].to_pylist() == joined["n"].to_pylist()


@pytest.mark.parametrize(
    ("views", "more", "parts"),
    [
        ([], {}, ["at least one", "got []"]),
        (view(), {"project": "my project"}, ["identifier", "'my project'"]),
        ([view(), view()], {}, ["two feature views are called 'stays'"]),
        (view(), {"known": {"stay": "x.parquet"}}, ["'stay'", "did you mean 'stays'?"]),
        (view(features={TIME: f.count()}), {}, [f"'{TIME}'", "rename it"]),
    ],
)
def test_what_cannot_be_exported_is_refused(views, more, parts, tmp_path):
    with pytest.raises(DefinitionError) as caught:
        f.export_feast(views, str(tmp_path / "feast"), **more)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_feast_has_no_type_for_is_refused_before_anything_is_written(tmp_path):
    events = pa.table({"k": [dt.date(2024, 1, 1)], "t": [DAY], "s": [{"a": 1}]})
    pq.write_table(events, tmp_path / "e.parquet")
    by_date = view(str(tmp_path / "e.parquet"), features={"n": f.count()})
    with pytest.raises(WiringError, match="column 'k' is date32.*Int32, Int64, String"):
        f.export_feast(by_date, str(tmp_path / "feast"))
    pq.write_table(events.set_column(0, "k", pa.array(["a"])), tmp_path / "e.parquet")
    with pytest.raises(WiringError, match="column 's' is struct.*no type there"):
        f.export_feast(view(str(tmp_path / "e.parquet"), features={"s": "s"}), str(tmp_path / "feast"))
    assert not (tmp_path / "feast").exists()


def test_one_entity_has_one_type(tmp_path):
    pq.write_table(table(5, 0), tmp_path / "a.parquet")
    pq.write_table(table(5, 0).set_column(0, "k", pa.array(["a"] * 5)), tmp_path / "b.parquet")
    other = hr.FeatureView("other", str(tmp_path / "b.parquet"), key="k", time="t", features={"m": f.count()})
    with pytest.raises(WiringError, match="'k' is String in feature view 'other' but Int32 in 'stays'"):
        f.export_feast([view(str(tmp_path / "a.parquet")), other], str(tmp_path / "feast"))
