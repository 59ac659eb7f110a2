"""Hardware: what may be asked for, what a node holds, and what is chosen."""

import math

import pytest

from headrace import cpu, gpu
from headrace.errors import DefinitionError, HardwareError
from headrace.hardware import Choice, Cluster, Hardware, Node, choose, share

L4 = Node("l4", cpus=8, gpus=2, kinds=("L4",), memory_gb=32)
H100 = Node("h100", cpus=16, gpus=8, kinds=("H100",))
PLAIN = Node("plain", cpus=4, memory_gb=16)


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (lambda: gpu(0), ["hr.gpu(count, *kinds)", "above 0", "got 0"]),
        (lambda: gpu("L4"), ["hr.gpu(count, *kinds)", "above 0", "got 'L4'"]),
        (lambda: gpu(1, 4), ["accelerator names as text", "got 4"]),
        (lambda: gpu(1.5), ["whole number", "got 1.5"]),
        (lambda: gpu(math.nan), ["above 0", "got nan"]),
        (lambda: gpu(1, cpus=-1), ["cpus", "at least 0", "got -1"]),
        (lambda: gpu(1, memory_gb=0), ["memory_gb", "above 0", "got 0"]),
        (lambda: cpu(-1), ["cpus", "at least 0", "got -1"]),
        (lambda: cpu(0), ["hardware of nothing", "hr.cpu(n)", "n > 0"]),
        (lambda: cpu("4"), ["cpus", "got '4'"]),
        (lambda: cpu(1, memory_gb=math.nan), ["memory_gb", "got nan"]),
    ],
)
def test_impossible_hardware_is_refused(mistake, parts):
    """A count that no machine can have is refused where it is written, with the value and what is allowed."""
    with pytest.raises(DefinitionError) as caught:
        mistake()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("hardware", "device", "text"),
    [
        (cpu(), "cpu", "cpu(1)"),
        (cpu(0.5, memory_gb=2), "cpu", "cpu(0.5) with 2 GB"),
        (gpu(), "cuda", "gpu(1)"),
        (gpu(2, "L4", "A10G", cpus=4), "cuda", "gpu(2, L4, A10G, cpus=4)"),
    ],
)
def test_device_and_text(hardware, device, text):
    """Hardware knows the device that setup is given, and is printed as it is asked for."""
    assert (hardware.device, str(hardware)) == (device, text)


@pytest.mark.parametrize(
    ("node", "hardware", "kind", "held"),
    [
        (PLAIN, cpu(1), None, 4),
        (PLAIN, cpu(0.1), None, 40),
        (PLAIN, cpu(1, memory_gb=6), None, 2),
        (PLAIN, gpu(), None, 0),
        (L4, gpu(1, "L4"), "L4", 2),
        (L4, gpu(1, "H100"), "H100", 0),
        (L4, gpu(1, cpus=5), None, 1),
        (L4, gpu(0.5), None, 4),
        (L4, gpu(0.6), None, 2),
        (L4, gpu(0.1, cpus=0), None, 20),
        (H100, gpu(3), None, 2),
        (H100, gpu(1, cpus=0, memory_gb=1000), None, 8),
    ],
)
def test_a_node_holds(node, hardware, kind, held):
    """The scarcest of cores, accelerators and memory limits the replicas; a fraction never spans two accelerators."""
    assert node.fits(hardware, kind) == held


@pytest.mark.parametrize(
    ("on", "nodes", "chosen"),
    [
        ([gpu(1), cpu(1)], [PLAIN, L4], Choice(gpu(1), None, 2)),
        ([gpu(1), cpu(1)], [PLAIN], Choice(cpu(1), None, 4)),
        ([gpu(1, "H100", "L4")], [L4, L4, PLAIN], Choice(gpu(1, "H100", "L4"), "L4", 4)),
        ([gpu(1, "L4", "H100")], [L4, H100], Choice(gpu(1, "L4", "H100"), "L4", 2)),
        ([gpu(1, "H100", "L4")], [L4, H100], Choice(gpu(1, "H100", "L4"), "H100", 8)),
    ],
)
def test_the_first_entry_that_fits_is_chosen(on, nodes, chosen):
    """Entries are tried in the user's order, and within one its kinds; replicas are counted over all nodes."""
    assert choose(on, Cluster(tuple(nodes)), stage="embed") == chosen


def test_a_choice_prints_the_kind_that_was_taken():
    """Of several kinds only the chosen one is printed."""
    assert str(choose([gpu(1, "H100", "L4", memory_gb=8)], Cluster((L4,)), stage="embed")) == "gpu(1, L4) with 8 GB"


@pytest.mark.parametrize(
    ("nodes", "there"), [((), "no nodes"), ((PLAIN, L4), "plain: 4 CPUs, 16 GB; l4: 8 CPUs, 2 x L4, 32 GB"), ((Node("x", 2, 1),), "x: 2 CPUs, 1 x GPU")]
)
def test_refused_with_what_there_is(nodes, there):
    """The error names the stage, all that it accepts, all that the cluster has, and what would help."""
    with pytest.raises(HardwareError) as caught:
        choose([gpu(4, "A100"), cpu(64)], Cluster(nodes), stage="embed")
    parts = ["'embed'", "gpu(4, A100) or cpu(64)", there, "add such a node", "hr.cpu(1)"]
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("wishes", "counts"),
    [
        ([(gpu(1), 1, None)], [2]),
        ([(cpu(4), 1, None)], [3]),
        ([(cpu(4), 1, 2)], [2]),
        ([(gpu(1), 1, None), (cpu(1), 1, None)], [2, 10]),
        ([(gpu(1), 1, None), (gpu(1), 1, None)], [1, 1]),
        ([(cpu(1), 8, None), (cpu(1), 1, None)], [10, 2]),
        ([(gpu(0.5), 1, None), (gpu(1), 1, 1)], [2, 1]),
        ([], []),
    ],
)
def test_share(wishes, counts):
    """Everyone gets the least, then one more in turn while there is room; no node is asked for more than it has."""
    cluster = Cluster((L4, PLAIN))
    asked = [(f"stage{at}", choose([hardware], cluster, stage="s"), least, most) for at, (hardware, least, most) in enumerate(wishes)]
    assert share(asked, cluster) == counts


def test_too_little_for_all_is_refused():
    """The error names the stage without room, what all ask for at the same time, and what there is."""
    choice = choose([gpu(1)], Cluster((L4,)), stage="a")
    with pytest.raises(HardwareError) as caught:
        share([("a", choice, 2, None), ("b", choice, 1, None)], Cluster((L4,)))
    parts = ["replica 1 of stage 'b'", "2 of 'a' on gpu(1), 1 of 'b' on gpu(1)", "l4: 8 CPUs, 2 x L4, 32 GB", "replicas=(least, most)"]
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_cpus_of_a_cluster():
    """A cluster's cores are those of its nodes together."""
    assert Cluster((L4, PLAIN)).cpus == 12
    assert Hardware(cpus=1) == cpu(1)
