"""What a node is, by what Ray tells of it; no Ray is started."""

from __future__ import annotations

from headrace.cost import Machine
from headrace.on_ray.machines import machine


def test_what_ray_tells_of_a_node() -> None:
    """Type, market and kind of accelerator from labels and resources; cores and memory of the machine."""

    def node(resources: dict[str, float], **labels: str) -> dict[str, object]:
        return {
            "NodeID": "ab",
            "NodeManagerAddress": "10.0.0.9",
            "Resources": resources,
            "Labels": {key.replace("__", "/"): value for key, value in labels.items()},
        }

    plain = {"CPU": 8.0, "memory": 20e9, "object_store_memory": 10e9}
    assert machine(node(plain)) == Machine("10.0.0.9", cpus=8, memory_gb=30)
    assert machine(node(plain), cores=4).cpus == 4
    gpus = plain | {"GPU": 2.0, "accelerator_type:L4": 1.0}
    labels = {"ray.io__node-group": "gpu-workers", "ray.io__market-type": "spot"}
    found = machine(node(gpus, **labels))
    assert (found.instance, found.market, found.gpus, found.accelerator) == ("gpu-workers", "spot", 2, "L4")
    assert machine(node(gpus, **labels), instance="g6.12xlarge").instance == "g6.12xlarge"
    own = labels | {"node.kubernetes.io__instance-type": "g6.24xlarge", "ray.io__market-type": "ON_DEMAND", "ray.io__accelerator-type": "A10G"}
    found = machine(node(gpus, **own), instance="g6.12xlarge")
    assert (found.instance, found.market, found.accelerator) == ("g6.24xlarge", "on-demand", "A10G")
    assert machine(node(plain | {"TPU": 4.0, "accelerator_type:TPU-V6E": 1.0})).gpus == 4
