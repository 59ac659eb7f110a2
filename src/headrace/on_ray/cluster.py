"""Join a Ray cluster, or start one in this process, and say what it has."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from headrace.errors import RunError
from headrace.hardware import Cluster, Node
from headrace.on_ray import compat

_SPARE_CPUS = 1  # for reading, preparing and writing beside replicas that take all the rest


@contextlib.contextmanager
def connected(address: str | None = None, *, verbose: bool = False) -> Iterator[Cluster]:
    """A connection for the length of the block: `address`, `RAY_ADDRESS`, a Ray that runs in this process, or a new one.

    A Ray that is started here has one logical CPU more than the machine has cores, because reading and writing wait more
    than they compute; on a cluster that is joined, one CPU is left to them.

    Raises:
        RunError: the address does not answer.
    """
    if ray.is_initialized():
        yield describe(spare_cpus=_SPARE_CPUS)
        return
    where = address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if verbose else logging.ERROR
    try:
        if where:
            ray.init(address=where, log_to_driver=verbose, logging_level=level)
        else:
            ray.init(num_cpus=compat.cores() + _SPARE_CPUS, include_dashboard=False, log_to_driver=verbose, logging_level=level)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise RunError(
            f"cannot join Ray at {where!r}: {error}. Check the address (ray://host:10001 or host:6379), or leave it away to start Ray here"
            if where
            else f"cannot start Ray: {error}"
        ) from error
    try:
        yield describe(spare_cpus=_SPARE_CPUS)
    finally:
        ray.shutdown()


def describe(*, spare_cpus: float = 0) -> Cluster:
    """What the connected cluster has, less `spare_cpus` of its largest node."""
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has = node["Resources"]
        kinds = tuple(name.partition(":")[2] for name in has if name.startswith("accelerator_type:"))
        nodes.append(Node(node["NodeManagerAddress"], has.get("CPU", 0), has.get("GPU", 0), kinds, has.get("memory", 0) / 1e9))
    largest = max(range(len(nodes)), key=lambda at: nodes[at].cpus, default=0)
    return Cluster(
        tuple(
            Node(node.name, max(1.0, node.cpus - spare_cpus) if at == largest else node.cpus, node.gpus, node.kinds, node.memory_gb)
            for at, node in enumerate(nodes)
        )
    )
