"""The stage that adds features: what it reads and writes, its defaults, and that it says the same as the point-in-time join."""

from __future__ import annotations

import dataclasses
import datetime as dt
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import features
from headrace.errors import ContractError, DefinitionError, OnlineStoreError, SettingError, StageError, WiringError
from headrace.events import Event
from headrace.online_store import Written, open_store, publish
from headrace.readings import Readings
from headrace.report import GroupReport
from headrace.settings import override
from headrace.stage import Stage
from headrace.tally import Tally
from headrace.worker import Worker

NOW = dt.datetime(2026, 1, 10, tzinfo=dt.UTC)
STAYS = hr.FeatureView(
    "stays",
    key="listing_id",
    time="booked_at",
    features={
        "stays_30d": features.count(over="30d"),
        "price": features.mean("price", over="7d", default=-1.0),
        "host": "host",
        "vector": "vector",
    },
)
TYPES = {"listing_id": str, "host": str, "vector": hr.Vector(2)}


def events() -> pa.Table:
    return pa.table({
        "listing_id": ["a", "a", "b", "a", "c"],
        "booked_at": [NOW - dt.timedelta(days=day) for day in (1, 2, 20, 40, -1)],
        "price": [10.0, 20.0, 30.0, 40.0, 50.0],
        "host": ["Ana", "Bea", None, "Cid", "Dan"],
        "vector": pa.array([[1, 2], [3, 4], None, [5, 6], [7, 8]], pa.list_(pa.float32(), 2)),
    })  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> str:
    where = str(tmp_path / "features.db")
    assert publish(STAYS, features.latest(STAYS, events(), at=NOW), where, at=NOW) == Written(2, 2, 0)
    return where


def lookup(place: str, **options: object) -> hr.Lookup:
    return hr.Lookup(STAYS, store=place, **{"types": TYPES, **options})


def values(pipeline: hr.Pipeline, *keys: object) -> list[dict[str, object]]:
    rows = pipeline.local([{"listing_id": key} for key in keys])
    return [{name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()} for row in rows]


def test_features_of_each_row_and_defaults_for_the_unknown(place: str) -> None:
    score = hr.Pipeline("score", lookup(place))
    assert {name: str(column) for name, column in score.outputs.items()} == {
        "stays_30d": "int", "price": "float", "host": "str | None", "vector": "Vector(2) | None",
    }  # fmt: skip
    assert {name: str(column) for name, column in score.inputs.items()} == {"listing_id": "str"}
    assert score.stages[0].name == "lookup_stays"
    assert values(score, "b", "nobody", "a", "b") == [
        {"stays_30d": 1, "price": -1.0, "host": None, "vector": None},
        {"stays_30d": 0, "price": -1.0, "host": None, "vector": None},
        {"stays_30d": 2, "price": 15.0, "host": "Ana", "vector": [1.0, 2.0]},
        {"stays_30d": 1, "price": -1.0, "host": None, "vector": None},
    ]


def test_the_same_columns_as_the_point_in_time_join(place: str) -> None:
    """One definition, no skew: what is looked up now is what the join says of now."""
    stage = lookup(place, prefix="l_")
    rows = [{"listing_id": key} for key in ("a", "nobody", "b", "c")]
    online = hr.Pipeline("score", stage).local(rows)
    joined = stage.join(pa.table({"listing_id": ["a", "nobody", "b", "c"], "at": [NOW] * 4}), events(), time="at")
    assert joined.column_names == ["listing_id", "at", *stage.writes]
    for name, column in stage.writes.items():
        assert joined[name].type == column.arrow
        assert [value.tolist() if hasattr(value, "tolist") else value for value in (row[name] for row in online)] == joined[name].to_pylist()
    earlier = stage.join(pa.table({"listing_id": ["a"], "at": [NOW - dt.timedelta(days=1, seconds=1)]}), events(), time="at")
    assert earlier["l_host"].to_pylist() == ["Bea"]


def test_a_training_set_has_the_columns_that_the_store_gives(place: str, tmp_path: Path) -> None:
    """Two lookups of one view under other names, a view as it is, or the pipeline: the columns are those that the stages write, bit by bit."""
    pq.write_table(events(), tmp_path / "stays.parquet")
    view = dataclasses.replace(STAYS, source=str(tmp_path / "stays.parquet"))
    left = hr.Lookup(view, store=place, key="who", prefix="l_", types={"who": str, "host": str, "vector": hr.Vector(2)}, name="left")
    right = hr.Lookup(view, store=place, features=["price", "vector"], prefix="r_", types={"listing_id": str | None, "vector": hr.Vector(2)}, name="right")

    @hr.stage(out={"score": float})
    def rate(l_price: hr.Column[float], r_price: hr.Column[float]) -> dict[str, object]:
        return {"score": l_price + r_price}

    pipeline = hr.Pipeline("score", left, right, rate)
    labels = pa.table({"listing_id": ["a", "nobody", "b", None], "who": ["b", "a", "a", "c"], "at": [NOW] * 4})
    found = hr.training_set(labels, [left, right], time="at")
    assert found.column_names == [*labels.column_names, *left.writes, *right.writes]
    assert found.equals(hr.training_set(labels, pipeline, time="at"))
    online = hr.Pipeline("both", left, right).local(labels.select(["listing_id", "who"]).to_pylist())
    for name, column in (left.writes | right.writes).items():
        assert found[name].type == column.arrow
        assert [value.tolist() if hasattr(value, "tolist") else value for value in (row[name] for row in online)] == found[name].to_pylist()
    beside = hr.training_set(labels.rename_columns(["listing_id", "who", "booked_at"]), [view, right])
    assert beside.column_names == ["listing_id", "who", "booked_at", *STAYS.specs, *right.writes]
    assert beside["vector"].to_pylist() == beside["r_vector"].to_pylist()


def test_a_mean_of_vectors_is_looked_up_as_a_vector(tmp_path: Path) -> None:
    view = dataclasses.replace(STAYS, features={"center": features.mean("vector", default=[0.0, 0.0])})
    publish(view, features.latest(view, events(), at=NOW), tmp_path / "f.db", at=NOW)
    stage = hr.Lookup(view, store=str(tmp_path / "f.db"), types={"listing_id": str, "center": hr.Vector(2)})
    assert {name: str(column) for name, column in stage.writes.items()} == {"center": "Vector(2)"}
    rows = hr.Pipeline("p", stage).local([{"listing_id": key} for key in ("a", "b", "nobody")])
    assert [row["center"].tolist() for row in rows] == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]


def test_training_sets_that_cannot_be_are_refused(place: str, tmp_path: Path) -> None:
    pq.write_table(events(), tmp_path / "stays.parquet")
    view = dataclasses.replace(STAYS, source=str(tmp_path / "stays.parquet"))
    labels = pa.table({"listing_id": ["a"], "at": [NOW]})

    @hr.stage(out={"n": int})
    def count(text: hr.Column[str]) -> dict[str, object]:
        return {"n": [len(one) for one in text]}

    with pytest.raises(DefinitionError, match="lookups of a pipeline read, and 'bare' has none: 'count'"):
        hr.training_set(labels, hr.Pipeline("bare", count), time="at")
    with pytest.raises(DefinitionError, match=r"hr.FeatureViews and hr.Lookups, or a pipeline with lookups, got <"):
        hr.training_set(labels, [count], time="at")  # type: ignore[list-item]
    with pytest.raises(DefinitionError, match="'stays' has no source"):
        hr.training_set(labels, lookup(place), time="at")
    right = hr.Lookup(view, store=place, types=TYPES)
    with pytest.raises(WiringError, match="rows have a column 'price', as one that it writes"):
        hr.training_set(labels.append_column("price", pa.array([1.0])), right, time="at")
    with pytest.raises(WiringError, match="reads column 'booked_at', which the rows lack"):
        hr.training_set(labels, right)
    with pytest.raises(WiringError, match="feature 'host' is string, and the lookup is wired for float"):
        hr.training_set(labels, hr.Lookup(view, store=place, types=TYPES | {"host": float}), time="at")


def test_it_counts_what_is_missing(place: str) -> None:
    worker = Worker([Stage.of(lookup(place))])
    for keys in (["a", "x", "y"], ["b"]):
        worker(pa.table({"listing_id": keys}))
    found = worker.stages[0].call
    assert (found.asked, found.missing) == (4, 2)
    assert worker.note == f"view 'stays' of 2 keys, newest event 2026-01-09 00:00:00+00:00, in {place}"


def test_the_report_says_how_many_were_missing(place: str) -> None:
    heard: list[Event] = []
    worker = Worker([Stage.of(lookup(place))])
    readings = Readings(worker.stages, group="score", emit=heard.append)
    for keys in (["a", "x", "y"], ["b"]):
        worker(pa.table({"listing_id": keys}))
        readings.tell()
    readings.tell()
    assert [(event.view, event.keys, event.missing) for event in heard] == [("stays", 3, 2), ("stays", 1, 0)]
    tally = Tally()
    tally.add(heard)
    group = GroupReport.of(tally.groups["score"], tally)
    assert group.said == ("view 'stays': 4 keys looked up, 2 (50.0%) not found",)


def test_other_names_and_some_features(place: str) -> None:
    two = hr.Pipeline(
        "two",
        lookup(place, key="left", prefix="l_", features=["host"], types={"left": str, "host": str}, name="left"),
        lookup(place, key="right", prefix="r_", features=["stays_30d"], types={"right": str | None}, name="right"),
    )
    assert two.local([{"left": "a", "right": None}, {"left": "b", "right": "a"}]) == [{"l_host": "Ana", "r_stays_30d": 0}, {"l_host": None, "r_stays_30d": 2}]


def test_a_key_of_several_columns(tmp_path: Path) -> None:
    view = hr.FeatureView("nights", key=("listing_id", "day"), time="at", features={"taken": features.count()})
    table = pa.table({"listing_id": [1, 1], "day": [dt.date(2026, 1, 1), dt.date(2026, 1, 2)], "at": [NOW, NOW], "taken": [3, 4]})
    publish(view, table, tmp_path / "f.db")
    stage = hr.Lookup(view, store=str(tmp_path / "f.db"), types={"listing_id": int, "day": dt.date})
    rows = [{"listing_id": 1, "day": dt.date(2026, 1, day)} for day in (2, 3, 1)]
    assert [row["taken"] for row in hr.Pipeline("p", stage).local(rows)] == [4, 0, 3]


def test_types_follow_from_the_views_pipeline() -> None:
    @hr.stage(out={"vector": hr.Vector(3), "clean": str | None})
    def clean(text: hr.Column[str], stars: hr.Column[int], listing_id: hr.Column[int]) -> dict[str, object]:
        return {"vector": text, "clean": text}

    view = hr.FeatureView(
        "texts",
        key="listing_id",
        time="at",
        pipeline=hr.Pipeline("rows", clean),
        features={
            "vector": "vector",
            "best": features.max("stars", default=0),
            "sum": features.sum("stars"),
            "kinds": features.distinct("clean"),
            "clean": "clean",
        },
    )
    stage = hr.Lookup(view, store="features.db")
    assert {name: str(column) for name, column in stage.writes.items()} == {
        "vector": "Vector(3) | None", "best": "int", "sum": "int | None", "kinds": "int", "clean": "str | None",
    }  # fmt: skip
    assert {name: str(column) for name, column in stage.reads.items()} == {"listing_id": "int"}
    hr.Lookup(view, store="features.db", types={"best": int, "vector": hr.Vector(3)})
    with pytest.raises(DefinitionError, match="feature 'best' is int by the view, and types says float; leave it away"):
        hr.Lookup(view, store="features.db", types={"best": float})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"view": "stays"}, "hr.Lookup(view, ...) takes an hr.FeatureView, got 'stays'"),
        ({"store": "postgresql://x"}, "no online store is known as postgresql://"),
        ({"key": ("a", "b")}, "hr.Lookup of view 'stays': key must name 1 columns, for 'listing_id' of the view, got ('a', 'b')"),
        ({"features": "host"}, "features is a list, such as features=['host'], got 'host'"),
        ({"features": ["hosts"]}, "there is no feature 'hosts'; it has 'stays_30d', 'price', 'host', 'vector'; did you mean 'host'?"),
        ({"features": []}, "features must name at least one of"),
        ({"prefix": "a b"}, "prefix must be the beginning of an identifier, such as 'host_', got 'a b'"),
        ({"types": {"hots": str}}, "types names 'hots', no key column or feature; there are 'listing_id', 'stays_30d', 'price', 'host', 'vector'; did you"),
        ({"types": {}}, "feature 'host' is the last of column 'host', whose type the view does not tell; say types={'host': float}, or whatever it is"),
        ({"types": {"host": dict}}, "hr.Lookup of view 'stays': types: column 'host': no column type for"),
        ({"batch": 0}, "hr.rows"),
    ],
)
def test_what_is_written_wrongly_is_told_when_it_is_defined(options: dict[str, object], said: str) -> None:
    with pytest.raises((DefinitionError, OnlineStoreError)) as raised:
        Stage.of(hr.Lookup(**{"view": STAYS, "store": "features.db", "types": TYPES, **options}))
    assert said in str(raised.value)


def test_a_default_of_another_type_is_refused() -> None:
    view = hr.FeatureView("v", key="k", time="t", features={"host": features.last("host", default=3)})
    with pytest.raises(WiringError, match="default=3 is no value of type string"):
        hr.Lookup(view, store="f.db", types={"host": str})


def test_a_store_that_does_not_fit_is_told_at_setup(tmp_path: Path, place: str) -> None:
    def told(stage: hr.Lookup, **row: object) -> str:
        with pytest.raises(OnlineStoreError) as raised:
            hr.Pipeline("p", stage).local([{"listing_id": "a", **row}])
        return str(raised.value)

    assert "there is no online store in" in told(lookup(str(tmp_path / "none.db")))
    assert "has feature 'host' as string, and the pipeline is wired for int | None; publish the view" in told(lookup(place, types=TYPES | {"host": int}))
    more = hr.FeatureView("stays", key="listing_id", time="booked_at", features={"hosts": features.distinct("host")})
    assert "has no feature 'hosts'; it has 'stays_30d', 'price', 'host', 'vector'; publish it" in told(hr.Lookup(more, store=place))
    other = hr.FeatureView("stay", key="listing_id", time="booked_at", features={"hosts": features.distinct("host")})
    assert "has no view 'stay'; it has 'stays'; did you mean 'stays'?" in told(hr.Lookup(other, store=place))
    pair = hr.FeatureView("stays", key=("listing_id", "day"), time="booked_at", features={"stays_30d": features.count()})
    assert "has a key of 1 columns, and the view of 2" in told(hr.Lookup(pair, store=place), day="b")
    number = lookup(place, types=TYPES | {"listing_id": int})
    assert "has str as key, and the pipeline is wired for int in column 'listing_id'; correct `types`" in told(number, listing_id=1)


def test_a_key_of_another_kind_is_the_rows_own_fault(place: str) -> None:
    types = {name: kind for name, kind in TYPES.items() if name != "listing_id"}
    with pytest.raises(StageError, match="key column 'listing_id' is text, got 1"):
        values(hr.Pipeline("score", lookup(place, types=types)), 1)


def test_a_view_published_anew_with_more_columns_is_read_on(place: str) -> None:
    score = Worker([Stage.of(lookup(place, features=["host"]))])
    ask = pa.table({"listing_id": ["a"]})
    assert score(ask)["host"].to_pylist() == ["Ana"]
    wider = hr.FeatureView("stays", key="listing_id", time="booked_at", features={"host": "host", "new": features.count()})
    with pytest.raises(OnlineStoreError, match="has other columns than this table"):
        publish(wider, features.latest(wider, events(), at=NOW), place)
    publish(wider, features.latest(wider, events(), at=NOW + dt.timedelta(days=2)), place, replace=True)
    assert score(ask)["host"].to_pylist() == ["Ana"]
    publish(
        hr.FeatureView("stays", key="listing_id", time="booked_at", features={"new": features.count()}),
        pa.table({"listing_id": ["a"], "booked_at": [NOW], "new": [1]}),
        place,
        replace=True,
    )
    with pytest.raises(OnlineStoreError, match="has no feature 'host'; it has 'new'"):
        score(ask)


def test_what_the_view_lets_expire_is_missing(tmp_path: Path) -> None:
    view = hr.FeatureView("stays", key="listing_id", time="booked_at", ttl="1d", features={"n": features.count()})
    now = dt.datetime.now(dt.UTC)
    table = pa.table({"listing_id": ["old", "new"], "booked_at": [now - dt.timedelta(days=2), now], "n": [1, 2]})
    assert publish(view, [table, table], tmp_path / "f.db") == Written(4, 4, 0)
    stage = hr.Lookup(view, store=str(tmp_path / "f.db"), types={"listing_id": str})
    assert values(hr.Pipeline("p", stage), "old", "new") == [{"n": 0}, {"n": 2}]
    with open_store(tmp_path / "f.db") as store:
        assert store.freshness("stays").keys == 1, "it was swept"
    with pytest.raises(OnlineStoreError, match="the table to publish lacks column 'n'"):
        publish(view, table.drop(["n"]), tmp_path / "f.db")


def test_it_travels_and_takes_another_store(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = lookup("$FOLDER/features.db")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    score = hr.Pipeline("score", stage)
    assert values(hr.Pipeline("score", pickle.loads(pickle.dumps(stage))), "a") == values(score, "a")
    assert values(override(hr.Pipeline("score", lookup("elsewhere.db")), [f"lookup_stays.store={place}"]), "a") == values(score, "a")
    with pytest.raises(SettingError, match="has no setting 'key'; it has 'view', 'store'"):
        override(score, ["lookup_stays.key=x"])
    with pytest.raises(OnlineStoreError, match="no online store is known as mysql"):
        override(score, ["lookup_stays.store=mysql://x"])


def test_nulls_where_the_pipeline_allows_none_are_told(tmp_path: Path) -> None:
    """Somebody else wrote the view: its features are held to what the pipeline is wired for."""
    view = hr.FeatureView("v", key="k", time="t", features={"n": features.count()})
    publish(view, pa.table({"k": ["a"], "t": [NOW], "n": ["text"]}), tmp_path / "f.db")
    with pytest.raises((OnlineStoreError, ContractError), match="has feature 'n' as string"):
        hr.Pipeline("p", hr.Lookup(view, store=str(tmp_path / "f.db"), types={"k": str})).local([{"k": "a"}])
