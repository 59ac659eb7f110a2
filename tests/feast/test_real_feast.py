"""What real Feast makes of an export: the values of the point-in-time join, and online those of now."""

import datetime as dt
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import features as f

pytestmark = pytest.mark.feast

VERSION = "0.67.0"
DAY = dt.datetime(2024, 3, 30)
ASK = """
import sys
import pandas as pd, pyarrow.parquet as pq
from datetime import datetime
from feast import FeatureStore
import definitions
labels, found, online, *names = sys.argv[1:]
store = FeatureStore(repo_path=".")
store.apply([definitions.entity_0, definitions.entity_1, definitions.view_stays])
rows = pq.read_table(labels).to_pandas()
rows = rows.rename(columns={"t": "event_timestamp"})
store.get_historical_features(entity_df=rows, features=["stays:" + name for name in names]).to_df().to_parquet(found)
store.materialize(datetime(2024, 3, 1), datetime(2024, 4, 1))
keys = rows[["k", "g"]].drop_duplicates().to_dict("records")
pd.DataFrame(store.get_online_features(features=["stays:" + name for name in names], entity_rows=keys).to_dict()).to_parquet(online)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """A Python with Feast: that of HEADRACE_FEAST_PYTHON, or a new environment."""
    if there := os.environ.get("HEADRACE_FEAST_PYTHON"):
        return there
    folder = tmp_path_factory.mktemp("feast")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    done = subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", f"feast=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Feast cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin/python")


def rows(numbers: np.random.Generator, count: int) -> dict[str, pa.Array]:
    hours = pa.array([DAY + dt.timedelta(minutes=30 * int(h)) for h in numbers.integers(0, 200, count)], pa.timestamp("us"))
    return {"k": pa.array(numbers.integers(0, 3, count)), "g": pa.array([f"g{n}" for n in numbers.integers(0, 2, count)]), "t": hours}


def plain(value):
    return None if value is None or (isinstance(value, float) and np.isnan(value)) else value


def test_feast_finds_what_the_join_finds(tmp_path, python):
    numbers = np.random.default_rng(0)
    events = pa.table(rows(numbers, 60) | {"x": numbers.integers(-9, 9, 60) / 4, "w": [f"w{n}" for n in numbers.integers(0, 5, 60)]})
    pq.write_table(events, tmp_path / "events.parquet")
    features = {"n": f.count(over="1d"), "total": f.sum("x", over="3h", delay="1h"), "least": f.min("x", over="6h"), "word": "w"}
    stays = hr.FeatureView("stays", str(tmp_path / "events.parquet"), key=("k", "g"), time="t", features=features, delay="2h", ttl="2d")
    f.export_feast(stays, str(tmp_path / "repository"))
    labels = pa.table(rows(numbers, 200)).group_by(["k", "g", "t"]).aggregate([])  # Feast gives but one of those that are alike
    labels = labels.append_column("id", pa.array(range(len(labels))))
    pq.write_table(labels, tmp_path / "labels.parquet")
    command = [python, "-c", ASK, *(str(tmp_path / name) for name in ("labels.parquet", "found.parquet", "online.parquet")), *features]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")} | {"FEAST_USAGE": "False"}
    subprocess.run(command, cwd=tmp_path / "repository", env=env, check=True)
    found = {row["id"]: row for row in pq.read_table(tmp_path / "found.parquet").to_pylist()}
    assert len(found) == len(labels) > 100
    known = {(row["k"], row["g"], row["id"]) for row in labels.to_pylist()}
    assert {(row["k"], row["g"], row["id"]) for row in found.values()} == known
    for row in hr.training_set(labels, stays).to_pylist():
        assert {name: plain(found[row["id"]][name]) for name in features} == {name: row[name] for name in features}
    online = pq.read_table(tmp_path / "online.parquet").to_pylist()
    asked = pa.table({"k": [row["k"] for row in online], "g": [row["g"] for row in online], "t": pa.array([dt.datetime(2024, 4, 1)] * len(online))})
    for theirs, row in zip(online, hr.training_set(asked, stays).to_pylist(), strict=True):
        assert {name: plain(theirs[name]) for name in features} == {name: row[name] for name in features}
