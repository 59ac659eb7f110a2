"""Acceptable hardware, and the choice among it on a given cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.errors import DefinitionError, HardwareError


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one replica of a stage needs: CPU cores, accelerators of one of `kinds` (any when empty), host memory."""

    cpus: float
    gpus: float = 0.0
    kinds: tuple[str, ...] = ()
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0 or not math.isfinite(self.cpus + self.gpus):
            raise DefinitionError(f"hardware counts must be finite and not negative, got cpus={self.cpus}, gpus={self.gpus}")
        if self.cpus == 0 and self.gpus == 0:
            raise DefinitionError("hardware of nothing: ask for hr.cpu(n) or hr.gpu(n) with n > 0")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise DefinitionError(f"more than one accelerator must be a whole number, got {self.gpus}")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise DefinitionError(f"memory_gb must be positive, got {self.memory_gb}")

    @property
    def device(self) -> str:
        """The device that `setup` is called with: `"cuda"` or `"cpu"`."""
        return "cuda" if self.gpus else "cpu"

    def __str__(self) -> str:
        need = f"gpu({self.gpus:g}{''.join(f', {kind}' for kind in self.kinds)})" if self.gpus else f"cpu({self.cpus:g})"
        return need + (f" with {self.memory_gb:g} GB" if self.memory_gb else "")


def gpu(count: float = 1, *kinds: str, cpus: float = 1, memory_gb: float | None = None) -> Hardware:
    """`count` accelerators of one of `kinds` (Ray's names: `"L4"`, `"A10G"`, `"H100"`...; any kind when none is named).

    A fraction shares one accelerator among replicas. `cpus` cores come with each replica.
    """
    if count <= 0:
        raise DefinitionError(f"hr.gpu(count) must be positive, got {count}")
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
        wanted = Hardware(self.hardware.cpus, self.hardware.gpus, (self.kind,) if self.kind else (), self.hardware.memory_gb)
        return str(wanted)


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
        f"stage {stage!r} asks for {wanted}, and no node has it; the cluster has {cluster}. "
        f"Add such a node, or an entry to the stage's on=[...] that this cluster can hold, such as hr.cpu(1)"
    )
