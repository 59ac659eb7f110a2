"""What the nodes of the connected cluster are, as far as Ray can tell, so that they can be priced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from headrace.cost import Machine, Market
from headrace.on_ray import compat

_INSTANCE = ("node.kubernetes.io/instance-type", "instance-type")  # labels that a cluster's configuration may give a node
_GROUP = "ray.io/node-group"  # from RAY_NODE_TYPE_NAME: the autoscaler's node type, KubeRay's worker group
_MARKET = "ray.io/market-type"  # from RAY_NODE_MARKET_TYPE
_ACCELERATOR = "ray.io/accelerator-type"
_ACCELERATORS = ("GPU", "TPU", "neuron_cores", "NPU", "HPU")  # resources that count accelerators
_MARKETS: Mapping[str, Market] = {"spot": "spot", "preemptible": "spot", "on-demand": "on-demand", "ondemand": "on-demand"}


def machines() -> dict[str, Machine]:
    """The living nodes of the connected cluster, by Ray's id of the node.

    What cores count for is the machine: of a Ray that was started here, those of this machine, though Ray promises each twice.
    """
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    cores = compat.cores() if len(alive) == 1 and compat.started_here() else None
    instances = compat.instance_types()
    found = {key: machine(node, instance=instances.get(key), cores=cores) for key, node in alive.items()}
    names = Counter(one.name for one in found.values())  # nodes of a test may share a machine; each is paid for all the same
    return {key: replace(one, name=f"{one.name} {key[:8]}") if names[one.name] > 1 else one for key, one in found.items()}


def machine(node: Mapping[str, Any], *, instance: str | None = None, cores: float | None = None) -> Machine:
    """One entry of `ray.nodes()` as a machine. The type is that of a label, else `instance`, else the name of the node's group.

    Memory is what Ray has for tasks and objects together: a little less than the machine's.
    """
    has, labels = node["Resources"], node.get("Labels") or {}
    kinds = [name.partition(":")[2] for name in has if name.startswith("accelerator_type:")]
    return Machine(
        node["NodeManagerAddress"],
        instance=next(filter(None, (*(labels.get(key) for key in _INSTANCE), instance, labels.get(_GROUP))), None),
        market=_MARKETS.get(labels.get(_MARKET, "").lower().replace("_", "-")),
        cpus=has.get("CPU", 0.0) if cores is None else cores,
        memory_gb=(has.get("memory", 0.0) + has.get("object_store_memory", 0.0)) / 1e9,
        gpus=next((has[name] for name in _ACCELERATORS if has.get(name)), 0.0),
        accelerator=labels.get(_ACCELERATOR) or (kinds[0] if kinds else None),
    )
