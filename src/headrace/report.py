"""The report of a run: a pure summary of its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.events import BlockDone, BudgetHalved, Event, FileWritten, ReplicaReady, RunFinished, UnitRead


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What one group did. `busy_s` adds up over replicas; `padding` is the share of tokens that were padding (0 to 1)."""

    name: str
    rows: int
    busy_s: float
    replicas: int
    setup_s: float
    padding: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did. `steady_rows_per_s` is that of the slowest group, set-up excluded."""

    pipeline: str
    output: str
    rows_in: int
    rows_out: int
    files: int
    bytes: int
    wall_s: float
    steady_rows_per_s: float
    groups: tuple[GroupReport, ...]
    budgets_halved: tuple[BudgetHalved, ...]

    @property
    def rows_per_s(self) -> float:
        """Rows per second of the whole run, start-up included."""
        return self.rows_out / self.wall_s if self.wall_s else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.rows_out:,} rows in {self.wall_s:.1f} s: {self.rows_per_s:,.0f} rows/s, {self.steady_rows_per_s:,.0f} in steady state",
            f"{self.files} files, {self.bytes / 1e6:,.1f} MB in {self.output}",
        ]
        for group in self.groups:
            kept = f" on {group.replicas} replicas, ready after {group.setup_s:.1f} s" if group.replicas else " in tasks"
            padding = f", {group.padding:.0%} padding" if group.padding else ""
            lines.append(f"   {group.name}: {group.busy_s:.1f} s busy{kept}{padding}")
        for halved in self.budgets_halved:
            lines.append(f"   {halved.stage}: out of memory, batches of {halved.rule} divided by {halved.divisor}")
        return "\n".join(lines)


def summarise(events: Sequence[Event], *, pipeline: str, output: str, groups: Sequence[str]) -> Report:
    """The report of a finished run from its events, whatever order they came in."""
    finished = next(event for event in events if isinstance(event, RunFinished))
    files = [event for event in events if isinstance(event, FileWritten)]
    blocks = {name: [event for event in events if isinstance(event, BlockDone) and event.group == name] for name in groups}
    ready = {name: [event for event in events if isinstance(event, ReplicaReady) and event.group == name] for name in groups}
    slowest = max(groups, key=lambda name: sum(block.busy_s for block in blocks[name]))
    return Report(
        pipeline=pipeline,
        output=output,
        rows_in=finished.rows_in,
        rows_out=finished.rows_out,
        files=len(files),
        bytes=sum(file.bytes for file in files),
        wall_s=finished.wall_s,
        steady_rows_per_s=_steady(blocks[slowest]),
        groups=tuple(_group(name, blocks[name], ready[name]) for name in groups),
        budgets_halved=tuple(event for event in events if isinstance(event, BudgetHalved)),
    )


def rows_read(events: Sequence[Event]) -> int:
    """Rows that the source gave. A unit that was read twice, because its first reader died, counts once."""
    return sum({event.unit: event.rows for event in events if isinstance(event, UnitRead)}.values())


def _group(name: str, blocks: Sequence[BlockDone], ready: Sequence[ReplicaReady]) -> GroupReport:
    padded, real = sum(block.padded_tokens for block in blocks), sum(block.tokens for block in blocks)
    return GroupReport(
        name=name,
        rows=sum(block.rows for block in blocks),
        busy_s=sum(block.busy_s for block in blocks),
        replicas=len(ready),
        setup_s=max((event.setup_s for event in ready), default=0.0),
        padding=1 - real / padded if padded else 0.0,
    )


def _steady(blocks: Sequence[BlockDone]) -> float:
    """Rows per second from the start of the first block to the end of the last, over all replicas."""
    if not blocks:
        return 0.0
    span = max(block.at_s for block in blocks) - min(block.at_s - block.busy_s for block in blocks)
    return sum(block.rows for block in blocks) / max(span, 1e-9)
