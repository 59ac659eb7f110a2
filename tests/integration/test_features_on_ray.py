"""Features as a job on Ray: the same values as in this process, whatever dies on the way, with a key that is hot."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import headrace as hr
from headrace import features as f
from headrace.errors import DeadLetterError, SourceError
from headrace.features.job import HOME, FeatureJob
from headrace.on_ray import features as on_ray
from headrace.on_ray.cluster import connected

pytestmark = pytest.mark.usefixtures("shared_ray")

NOON = dt.datetime(2024, 3, 31, 12)
EVENTS, KEYS = 60_000, 500


@hr.stage(out={"vector": hr.Vector(4)}, batch=256, replicas=1)
class Embed:
    """A model."""

    size: int = 4

    def __call__(self, text: hr.Column[str]):
        if "poison" in text:
            raise ValueError("no vector for that")
        return {"vector": np.stack([np.full(self.size, len(one), np.float32) for one in text])}


EMBED = hr.Pipeline("embed", Embed())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Events, every tenth of which is of one key, and labels."""
    rng = np.random.default_rng(11)
    keys = np.where(rng.random(EVENTS) < 0.1, 0, rng.integers(0, KEYS, EVENTS))
    times = pa.array(np.datetime64(NOON, "us") - rng.integers(0, 90 * 86400, EVENTS).astype("timedelta64[s]"))
    text = pa.array(["x" * int(n) for n in rng.integers(1, 30, EVENTS)])
    events = pa.table({"k": keys, "t": times, "x": rng.normal(size=EVENTS), "text": text})
    (tmp_path / "events").mkdir()
    for at in range(4):
        pq.write_table(events.slice(at * EVENTS // 4, EVENTS // 4), tmp_path / f"events/{at}.parquet", row_group_size=5_000)
    asked = pa.array(np.datetime64(NOON, "us") - rng.integers(0, 90 * 86400, 2_000).astype("timedelta64[s]"))
    pq.write_table(pa.table({"id": range(2_000), "k": rng.integers(0, KEYS, 2_000), "t": asked}), tmp_path / "labels.parquet")
    return tmp_path


def view(folder: Path, **more) -> hr.FeatureView:
    features = {"n": f.count(over="7d"), "sum": f.sum("x", over="30d"), "half": f.quantile("x", 0.5, over="30d")}
    return hr.FeatureView("v", f"{folder}/events/*.parquet", **({"key": "k", "time": "t", "features": features, "delay": "1d"} | more))


def few(folder: Path, **changed: str) -> None:
    """Leave fewer events, which a slow model can do."""
    events = pq.read_table(folder / "events/0.parquet").slice(0, 2_000)
    for at in range(4):
        (folder / f"events/{at}.parquet").unlink()
    for name, value in changed.items():
        events = events.set_column(events.column_names.index(name), name, pa.array([value] * len(events)))
    pq.write_table(events, folder / "events/0.parquet", row_group_size=1_000)


def run(folder: Path, views: list[hr.FeatureView], **more):
    job = FeatureJob.of(views, output=str(folder / "out"), labels=str(folder / "labels.parquet"), parts=6)
    return on_ray.run(job, connect=connected, **more)


def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / "out").sort_by("id").to_pylist()


def test_values_are_those_of_this_process(data):
    """To the last bit, although sums are made elsewhere and of other parts."""
    second = view(data, features={"last": "x", "kinds": f.distinct("text", over="30d")}, delay="0s")
    report = run(data, [view(data), second])
    assert rows(data) == hr.training_set(str(data / "labels.parquet"), [view(data), second]).to_pylist()
    assert (report.rows, report.events) == (2_000, 2 * EVENTS)
    assert run(data, [view(data), second]) == report  # done already


def test_the_pipeline_of_a_view_is_a_batch_job_of_its_own(data):
    few(data)
    embedded = view(data, features={"vector": "vector", "n": f.count("vector", over="7d")}, pipeline=EMBED)
    run(data, [embedded])
    assert rows(data) == hr.training_set(str(data / "labels.parquet"), embedded).to_pylist()
    assert not (data / "out" / HOME / "rows").exists()


def test_an_event_that_fails_is_no_missing_event(data):
    few(data, text="poison")
    with pytest.raises(DeadLetterError):
        run(data, [view(data, features={"vector": "vector"}, pipeline=EMBED)])


def test_errors_of_tasks_are_told_as_they_are(data):
    job = FeatureJob.of([view(data)], output=str(data / "out"), labels=str(data / "labels.parquet"), parts=6)
    (data / "events/0.parquet").write_bytes((data / "events/1.parquet").read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"0\.parquet"):
        on_ray.run(job, connect=connected)


def test_a_worker_that_is_killed_costs_nothing(data, monkeypatch):
    """The process of the first cut and that of the first join are killed once each, in the middle of their work."""

    @ray.remote(num_cpus=1, max_retries=3)
    def deadly(task):
        name = f"{type(task).__name__}-{task.name}"
        if name in ("Cut-0-0-00000", "Join-0-00000") and not (data / name).exists():
            (data / name).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task()

    monkeypatch.setattr(on_ray, "_do", deadly)
    run(data, [view(data)])
    assert (data / "Cut-0-0-00000").exists() and (data / "Join-0-00000").exists()
    assert rows(data) == hr.training_set(str(data / "labels.parquet"), view(data)).to_pylist()


VIEWS = """
import headrace as hr

features = {"n": hr.features.count(over="7d"), "sum": hr.features.sum("x", over="30d")}
v = hr.FeatureView("v", "events/*.parquet", key="k", time="t", delay="1d", features=features)
"""
KILLED = """
import os, signal, sys
from headrace import store
put, step = store.Folder.put, sys.argv.pop(1)

def deadly(self, name, content):
    put(self, name, content)
    if name == step:
        os.kill(os.getpid(), signal.SIGKILL)

store.Folder.put = deadly
from headrace.cli import main
main()
"""


@pytest.mark.parametrize("step", ["request.json", "cut/0-0-00000.json", "joined/0-00001.json", "_headrace/report.json"])
def test_a_driver_that_is_killed_goes_on_where_it_was(data, step):
    """SIGKILL right after a step counts; the same command then ends with the same output. Without Ray, so that nothing is left behind."""
    (data / "views.py").write_text(VIEWS)
    (data / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(hr.__file__).parents[1]), "NO_COLOR": "1"}
    command = ["features", "views.py", "--labels", "labels.parquet", "--output", "out", "--parts", "3", "--local"]
    died = subprocess.run([sys.executable, "killed.py", step, *command], cwd=data, env=environment, capture_output=True, text=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (data / "out/_SUCCESS").exists()
    done = subprocess.run([sys.executable, "-m", "headrace", *command], cwd=data, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2,000 rows" in done.stdout
    expected = view(data, features={"n": f.count(over="7d"), "sum": f.sum("x", over="30d")})
    assert rows(data) == hr.training_set(str(data / "labels.parquet"), expected).to_pylist()
