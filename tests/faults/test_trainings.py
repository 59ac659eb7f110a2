"""Machines that go away under a training, and come back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

import headrace as hr
from headrace.events import CheckpointSaved, Event, WorkersStarted

pytestmark = pytest.mark.faults

ROWS = 6_000
NODE = {"num_cpus": 2, "resources": {"seat": 1}, "object_store_memory": 128 << 20}


@dataclasses.dataclass(frozen=True)
class Settings:
    nap_s: float = 0.05


def descend(shard: Any, settings: Settings, run: Any) -> None:
    """Linear regression, each worker on its own; what the first one has is saved."""
    weights = np.zeros(2)
    if folder := run.resume():
        weights = np.load(folder / "weights.npy")

    def save(folder: Path) -> None:
        np.save(folder / "weights.npy", weights)

    for batch in shard.batches(25):
        x = np.stack([batch["a"], batch["b"]], axis=1)
        error = x @ weights - batch["y"]
        weights -= 0.05 * x.T @ error / len(error)
        run.report(loss=(error**2).mean(), workers=run.workers)
        time.sleep(settings.nap_s)
        run.checkpoint(save)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with cores for what prepares rows, and this process joined to it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 256 << 20})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_it_goes_on_with_fewer_workers_when_a_node_goes(cluster: Cluster, tmp_path: Path) -> None:
    """Four workers on two nodes of two cores; one node is killed, and what is left goes on from the last checkpoint. Every row is given once."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, ROWS))
    pq.write_table(pa.table({"a": a, "b": b, "y": 2 * a - 3 * b}), tmp_path / "in.parquet", row_group_size=500)
    nodes = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    events: list[Event] = []

    def strike(new: Sequence[Event]) -> None:
        events.extend(new)
        if len(nodes) == 2 and any(isinstance(event, CheckpointSaved) and event.step >= 10 for event in events):
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    training = hr.Training("line", descend, workers=(1, 4), settings=Settings(), checkpoint_every=5)
    result = hr.train(training, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), watch=strike)
    starts = [event.workers for event in events if isinstance(event, WorkersStarted)]
    assert len(nodes) == 1 and len(starts) >= 2 and min(starts[1:]) < starts[0]
    assert result.record.state == "succeeded" and result.metrics["loss"] < 0.01
