"""The choice of hardware: the first entry that some node holds, or a refusal that shows what there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace as hr
from headrace.errors import HardwareError
from headrace.hardware import Cluster, Hardware, Node, choose, share

KINDS = ["L4", "A10G", "H100"]
MEMORY = st.none() | st.integers(1, 64)
GPUS = st.builds(
    lambda count, kinds, cpus, memory: hr.gpu(count, *kinds, cpus=cpus, memory_gb=memory),
    st.sampled_from([0.1, 0.25, 0.5, 0.6, 1, 2, 8]),
    st.lists(st.sampled_from(KINDS), max_size=2, unique=True),
    st.sampled_from([0, 0.5, 1, 4]),
    MEMORY,
)
CPUS = st.builds(lambda count, memory: hr.cpu(count, memory_gb=memory), st.sampled_from([0.1, 1, 3, 16]), MEMORY)
ON = st.lists(GPUS | CPUS, min_size=1, max_size=4)
NODES = st.builds(
    lambda cpus, gpus, kind, memory: Node("n", cpus, gpus, (kind,) if gpus else (), memory),
    st.integers(1, 32),
    st.sampled_from([0, 0, 1, 4, 8]),
    st.sampled_from(KINDS),
    st.integers(4, 256),
)
CLUSTERS = st.lists(NODES, max_size=4).map(lambda nodes: Cluster(tuple(nodes)))


def holds(node: Node, hardware: Hardware, kind: str | None) -> bool:
    """Whether a node holds one replica, from first principles."""
    enough = node.cpus >= hardware.cpus and node.gpus >= hardware.gpus and node.memory_gb >= (hardware.memory_gb or 0)
    return enough and (kind is None or kind in node.kinds)


@given(ON, CLUSTERS)
def test_the_first_entry_that_fits_is_chosen(on, cluster):
    """The choice is the first pair of entry and kind that any node holds; without one, the error shows both sides."""
    pairs = [(hardware, kind) for hardware in on for kind in hardware.kinds or (None,)]
    fitting = [(hardware, kind) for hardware, kind in pairs if any(holds(node, hardware, kind) for node in cluster.nodes)]
    if fitting:
        choice = choose(on, cluster, stage="embed")
        assert (choice.hardware, choice.kind) == fitting[0]
        assert choice.fits == sum(node.fits(*fitting[0]) for node in cluster.nodes) > 0
    else:
        with pytest.raises(HardwareError) as caught:
            choose(on, cluster, stage="embed")
        assert all(part in str(caught.value) for part in ["'embed'", " or ".join(map(str, on)), str(cluster)]), str(caught.value)


@given(GPUS | CPUS, NODES)
def test_as_many_replicas_as_fit_and_not_one_more(hardware, node):
    """The replicas that fit are within every resource of the node, and one more is not."""
    kind = hardware.kinds[0] if hardware.kinds else None
    count = node.fits(hardware, kind)
    if kind is not None and kind not in node.kinds:
        assert count == 0
        return

    def within(replicas):
        per_gpu = int(1 / hardware.gpus + 1e-9) if 0 < hardware.gpus < 1 else 0
        gpus = replicas <= per_gpu * node.gpus if per_gpu else replicas * hardware.gpus <= node.gpus
        cpus = replicas * hardware.cpus <= node.cpus + 1e-6
        return gpus and cpus and replicas * (hardware.memory_gb or 0) <= node.memory_gb

    assert within(count)
    assert not within(count + 1)


@given(st.lists(st.tuples(GPUS | CPUS, st.integers(1, 3), st.none() | st.integers(3, 6)), max_size=3), CLUSTERS)
def test_replicas_that_live_together_fit_together(wishes, cluster):
    """Shared out replicas are within every stage's bounds, and together within what the cluster has."""
    try:
        asked = [(f"s{at}", choose([hardware], cluster, stage="s"), least, most) for at, (hardware, least, most) in enumerate(wishes)]
        counts = share(asked, cluster)
    except HardwareError:
        return
    assert all(least <= count <= (most or count) for (_, _, least, most), count in zip(asked, counts, strict=True))
    for need, has in (("cpus", cluster.cpus), ("gpus", sum(node.gpus for node in cluster.nodes))):
        assert sum(count * getattr(choice.hardware, need) for (_, choice, _, _), count in zip(asked, counts, strict=True)) <= has + 1e-6
