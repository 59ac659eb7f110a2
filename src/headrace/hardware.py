"""Acceptable hardware, and the choice among it on a given cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.errors import DefinitionError, HardwareError, check_number


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one replica of a stage needs: CPU cores, accelerators of one of `kinds` (any when empty), host memory."""

    cpus: float
    gpus: float = 0.0
    kinds: tuple[str, ...] = ()
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        check_number(self.cpus, "cpus", zero=True)
        check_number(self.gpus, "gpus", zero=True)
        if self.cpus == 0 and self.gpus == 0:
            raise DefinitionError("hardware of nothing: ask for hr.cpu(n) or hr.gpu(n) with n > 0")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise DefinitionError(f"more than one accelerator must be a whole number, got {self.gpus}")
        if self.memory_gb is not None:
            check_number(self.memory_gb, "memory_gb")

    @property
    def device(self) -> str:
        """The device that `setup` is called with: `"cuda"` or `"cpu"`."""
        return "cuda" if self.gpus else "cpu"

    def __str__(self) -> str:
        kinds = "".join(f", {kind}" for kind in self.kinds) + (f", cpus={self.cpus:g}" if self.cpus != 1 else "")
        need = f"gpu({self.gpus:g}{kinds})" if self.gpus else f"cpu({self.cpus:g})"
        return need + (f" with {self.memory_gb:g} GB" if self.memory_gb else "")


def gpu(count: float = 1, *kinds: str, cpus: float = 1, memory_gb: float | None = None) -> Hardware:
    """`count` accelerators of one of `kinds` (Ray's names: `"L4"`, `"A10G"`, `"H100"`...; any kind when none is named).

    A fraction shares one accelerator among replicas. `cpus` cores come with each replica.
    """
    check_number(count, "hr.gpu(count, *kinds): count")
    if wrong := [kind for kind in kinds if not isinstance(kind, str)]:
        raise DefinitionError(f"hr.gpu takes accelerator names as text after the count, got {wrong[0]!r}")
    return Hardware(cpus=cpus, gpus=count, kinds=kinds, memory_gb=memory_gb)


def cpu(count: float = 1, *, memory_gb: float | None = None) -> Hardware:
    """`count` CPU cores. A replica's thread pools are held to that many threads."""
    return Hardware(cpus=count, memory_gb=memory_gb)


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a cluster and all that it has."""

    name: str
    cpus: float
    gpus: float = 0.0
    kinds: tuple[str, ...] = ()
    memory_gb: float = math.inf

    def fits(self, hardware: Hardware, kind: str | None) -> int:
        """How many replicas of `hardware`, on accelerators of `kind`, this node holds when it is empty."""
        if kind is not None and kind not in self.kinds:
            return 0
        rooms = [self.cpus / hardware.cpus] if hardware.cpus else []
        if hardware.gpus >= 1:
            rooms.append(self.gpus / hardware.gpus)
        elif hardware.gpus:
            # A fraction never spans two accelerators: 0.6 of a GPU fits once on each.
            rooms.append(int(self.gpus) * int(1 / hardware.gpus + 1e-9))
        if hardware.memory_gb:
            rooms.append(self.memory_gb / hardware.memory_gb)
        return int(min(rooms) + 1e-9)

    def __str__(self) -> str:
        accelerators = f", {self.gpus:g} x {'/'.join(self.kinds) or 'GPU'}" if self.gpus else ""
        memory = f", {self.memory_gb:.0f} GB" if math.isfinite(self.memory_gb) else ""
        return f"{self.name}: {self.cpus:g} CPUs{accelerators}{memory}"


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that a plan is made for."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes together."""
        return sum(node.cpus for node in self.nodes)

    def __str__(self) -> str:
        return "; ".join(map(str, self.nodes)) or "no nodes"


@dataclass(frozen=True, slots=True)
class Choice:
    """The hardware chosen for a stage: one entry of its `on`, the accelerator kind, how many replicas the cluster holds."""

    hardware: Hardware
    kind: str | None
    fits: int

    def __str__(self) -> str:
        return str(replace(self.hardware, kinds=(self.kind,) if self.kind else ()))


def choose(on: Sequence[Hardware], cluster: Cluster, *, stage: str) -> Choice:
    """The first entry of `on`, and within it the first kind, that some node of `cluster` can hold.

    Raises:
        HardwareError: no node can hold any of them; says what was asked for and what there is.
    """
    for hardware in on:
        for kind in hardware.kinds or (None,):
            fits = sum(node.fits(hardware, kind) for node in cluster.nodes)
            if fits:
                return Choice(hardware, kind, fits)
    wanted = " or ".join(map(str, on))
    raise HardwareError(
        f"stage {stage!r} asks for {wanted}, and no node has it; the cluster has {cluster}; "
        "add such a node, or an entry to the stage's on=[...] that this cluster can hold, such as hr.cpu(1)"
    )


def share(wishes: Sequence[tuple[str, Choice, int, int | None]], cluster: Cluster) -> list[int]:
    """How many replicas each stage gets when all of them live on `cluster` at once.

    A wish is (stage, choice, least, most), a most of None meaning as many as there is room for. Everyone gets the least
    that was asked for, then the stages take one more each in turn, until nothing more fits.

    Raises:
        HardwareError: the least of all stages together is more than the cluster has.
    """
    # What needs no accelerator goes to the nodes with the fewest of them.
    rooms = [(node, [node.cpus, node.gpus, node.memory_gb]) for node in sorted(cluster.nodes, key=lambda node: node.gpus)]

    def place(choice: Choice) -> bool:
        need = (choice.hardware.cpus, choice.hardware.gpus, choice.hardware.memory_gb or 0)
        for node, room in rooms:
            if choice.kind in (None, *node.kinds) and all(has + 1e-9 >= asked for has, asked in zip(room, need, strict=True)):
                room[:] = [has - asked for has, asked in zip(room, need, strict=True)]
                return True
        return False

    for stage, choice, least, _ in wishes:
        for count in range(least):
            if not place(choice):
                others = ", ".join(f"{wish[2]} of {wish[0]!r} on {wish[1]}" for wish in wishes)
                raise HardwareError(
                    f"no room for replica {count + 1} of stage {stage!r} on {choice}: the stages need at least {others} at the same time, "
                    f"and the cluster has {cluster}; lower replicas=(least, most), ask for less in on=[...], or add a node"
                )
    counts = [least for _, _, least, _ in wishes]
    growing = list(range(len(wishes)))
    while growing:
        for at in list(growing):
            _, choice, _, most = wishes[at]
            if counts[at] < min(choice.fits, choice.fits if most is None else most) and place(choice):
                counts[at] += 1
            else:
                growing.remove(at)
    return counts
