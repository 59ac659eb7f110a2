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
from headrace.events import CheckpointSaved, Event, StepsDone, WorkersStarted

pytestmark = pytest.mark.faults

ROWS = 6_000
NODE = {"num_cpus": 2, "resources": {"seat": 1}, "object_store_memory": 128 << 20}


@dataclasses.dataclass(frozen=True)
class Settings:
    nap_s: float = 0.5


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
    """A head with a core, to which nodes are added: four workers need both of them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 256 << 20})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_it_goes_on_with_fewer_workers_when_a_node_goes_and_with_more_when_it_returns(cluster: Cluster, tmp_path: Path) -> None:
    """Four workers on two nodes of two cores; one is killed, what is left goes on from the last checkpoint, and another node comes. Every row is given once."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 2 * ROWS))
    pq.write_table(pa.table({"a": a, "b": b, "y": 2 * a - 3 * b}), tmp_path / "in.parquet", row_group_size=500)
    nodes = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    events: list[Event] = []
    struck: list[int] = []

    def strike(new: Sequence[Event]) -> None:
        events.extend(new)
        starts = [event for event in events if isinstance(event, WorkersStarted)]
        if not struck and any(isinstance(event, CheckpointSaved) and event.step >= 10 for event in events):
            struck.append(starts[-1].workers)
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        if len(nodes) == 1 and struck and starts[-1].workers < struck[0]:
            nodes.append(cluster.add_node(**NODE))

    training = hr.Training("line", descend, workers=(1, 4), settings=Settings(), checkpoint_every=5)
    result = hr.train(training, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), watch=strike)
    starts = [event.workers for event in events if isinstance(event, WorkersStarted)]
    fewest = starts.index(min(starts))
    assert 0 < fewest < len(starts) - 1 and starts[0] > starts[fewest] < starts[-1]
    assert result.record.state == "succeeded" and result.metrics["loss"] < 0.01


def test_before_a_machine_is_taken_away_it_is_saved(cluster: Cluster, tmp_path: Path) -> None:
    """Told by the cluster, with an hour between checkpoints otherwise: what is made again is a second's work, not all of it."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, ROWS))
    pq.write_table(pa.table({"a": a, "b": b, "y": 2 * a - 3 * b}), tmp_path / "in.parquet", row_group_size=500)
    nodes = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    events: list[Event] = []
    drained: list[str] = []

    def warn(new: Sequence[Event]) -> None:
        events.extend(new)
        if not drained and any(isinstance(event, StepsDone) and event.step >= 10 for event in events):
            drained.append(nodes[1].node_id)
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            accepted, why = GcsClient(address=cluster.address).drain_node(drained[0], reason, "taken away", int((time.time() + 20) * 1000))
            assert accepted, why

    training = hr.Training("line", descend, workers=(1, 4), settings=Settings(), checkpoint_every="1h")
    result = hr.train(training, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), watch=warn)
    saved = [event.step for event in events if isinstance(event, CheckpointSaved) and not event.done]
    starts = [event for event in events if isinstance(event, WorkersStarted)]
    assert drained and saved and result.record.state == "succeeded"
    assert len(starts) == 1 or starts[1].step == saved[0]
