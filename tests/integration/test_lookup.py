"""Lookups through every target: this process, a batch job, and a door and replica, on a file and on a Redis."""

from __future__ import annotations

import datetime as dt
import os
import re
import time
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doors import service
from openai_services import until
from redis_server import redis_url  # noqa: F401 - a fixture

import headrace as hr
from headrace import features
from headrace.cli.loading import load
from headrace.errors import UnavailableError
from headrace.online_store import open_store, publish

from conftest import Run  # isort: skip

FILE = """
import headrace as hr
import headrace as hr
from headrace import features

stays = hr.FeatureView("stays", key="listing_id", time="at", features={
    "stays": features.count(), "price": features.mean("price", default=-1.0), "host": "host", "vector": "vector",
})
types = {"listing_id": str | None, "host": str, "vector": hr.Vector(3)}


@hr.stage(out={"length": int})
def length(host: hr.Column[str | None]):
    return {"length": [len(name or "") for name in host]}


score = hr.Pipeline("score", hr.Lookup(stays, store="$STORE", types=types, name="lookup"), length)
"""
NOW = dt.datetime(2026, 1, 10, tzinfo=dt.UTC)


@pytest.fixture(params=["file", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "features.db") if request.param == "file" else f"{request.getfixturevalue('redis_url')}/1"


@pytest.fixture
def folder(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline file, its features in a store, and golden rows, every third of an unknown listing."""
    monkeypatch.setenv("STORE", place)
    (tmp_path / "score.py").write_text(FILE)
    keys = [f"l{number % 7}" for number in range(40)]
    events = pa.table({
        "listing_id": keys,
        "at": [NOW - dt.timedelta(hours=number) for number in range(40)],
        "price": [float(number) if number % 3 else None for number in range(40)],
        "host": [f"host {number}" if number % 5 else None for number in range(40)],
        "vector": pa.array([[number, -number, number / 3] for number in range(40)], pa.list_(pa.float32(), 3)),
    })  # fmt: skip
    pipeline = load(str(tmp_path / "score.py"))
    view = pipeline.stage("lookup").call.view
    publish(view, features.latest(view, events, at=NOW), place, at=NOW)
    asked = [None if number % 11 == 10 else f"l{number % 9}" for number in range(60)]
    pq.write_table(pa.table({"id": range(60), "listing_id": asked}), tmp_path / "golden.parquet")
    return tmp_path


def test_equal_in_every_way(folder: Path, command: Run) -> None:
    with service(load(str(folder / "score.py"))) as url:
        done = command("check", "score.py", "--input", "golden.parquet", "--url", url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "score: all values are equal (60 rows, columns stays, price, host, vector, length; local against" in done.stdout
    assert "batch, HTTP row by row, HTTP in batches, HTTP concurrently" in done.stdout


def test_a_job_without_its_store_stops_and_loses_no_row(folder: Path, command: Run) -> None:
    """The store is not the rows' fault: nothing becomes a dead letter, and the same command goes on."""
    job = ("run", "score.py", "--input", "golden.parquet", "--output", "out", "--keep", "id")
    without = command(*job, STORE=str(folder / "elsewhere.db"))
    assert without.returncode == 2 and "there is no online store in" in without.stderr, without.stdout + without.stderr
    done = command(*job, STORE=os.environ["STORE"])
    assert done.returncode == 0 and "view 'stays': 60 keys looked up, 16 (26.7%) not found" in done.stdout, done.stdout + done.stderr
    rows = pq.read_table(folder / "out").sort_by("id").to_pylist()
    assert [row["stays"] for row in rows[:9]] == [6, 6, 6, 6, 6, 5, 5, 0, 0] and not list((folder / "out" / "_headrace").glob("dead_letters/*"))


def test_a_service_whose_store_fails_says_so_until_it_does_not(folder: Path, place: str, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = load(str(folder / "score.py"))
    view = pipeline.stage("lookup").call.view
    with service(pipeline) as address, hr.Client(address, retries=0) as client, open_store(place) as store:
        assert client.score({"listing_id": "l0"})["stays"] == 6
        row = store.read("stays", ["l0"]).select(["stays", "price", "host", "vector"])
        row = row.append_column("listing_id", pa.array(["l0"])).append_column("at", pa.array([NOW]))
        store.replace("stays", [row.drop(["host"])], key="listing_id", time="at")
        for _ in range(3):
            with pytest.raises(UnavailableError, match="the store of features that this service reads cannot be used at the moment"):
                client.score({"listing_id": "l0"})
        assert "has no feature 'host'" in capfd.readouterr().err
        publish(view, row, store, replace=True)
        assert client.score([{"listing_id": "l0"}, {"listing_id": "l1"}])[0]["host"] == row["host"][0].as_py()


def test_a_service_tells_what_was_not_found_and_how_new_the_features_are(folder: Path, place: str) -> None:
    """In its metrics; not the row with which it warms up."""
    pipeline = load(str(folder / "score.py"))

    def told(address: str) -> dict[str, float]:
        lines = httpx2.get(f"{address}/metrics").text.splitlines()
        return {line.partition("{")[0] + "".join(re.findall(r',found="\w+"', line)): float(line.rpartition(" ")[2]) for line in lines if 'view="stays"' in line}

    with service(pipeline) as address, hr.Client(address) as client:
        client.score([{"listing_id": "l0"}, {"listing_id": "l1"}, {"listing_id": "nobody"}])
        until(lambda: told(address).get('headrace_lookup_keys_total,found="true"') == 2)
        figures = told(address)
        assert figures['headrace_lookup_keys_total,found="false"'] == 1
        assert figures["headrace_feature_age_seconds"] == pytest.approx(time.time() - NOW.timestamp(), abs=60)
