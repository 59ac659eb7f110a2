"""How far a run is: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.status import Status

from headrace.events import BlockDone, Committed, Event, ProcessDied, ReplicaReady, UnitLost

_PLAIN_EVERY_S = 5.0


class Progress:
    """Watches a run's events; see the `watch` of `headrace.run`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.rows: dict[str, int] = {}
        self.replicas = self.committed = self.dead = 0
        self.started = self.printed = time.monotonic()
        self.status = Status("starting", console=self.console) if self.console.is_terminal and not quiet else None

    def __enter__(self) -> Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.status:
            self.status.stop()

    def update(self, events: Sequence[Event], total: int | None) -> None:
        """Take in new events and show where the run is."""
        for event in events:
            if isinstance(event, BlockDone):
                self.rows[event.group] = self.rows.get(event.group, 0) + event.rows
            self.replicas += isinstance(event, ReplicaReady)
            if isinstance(event, Committed):
                self.committed += event.rows + event.dead
                self.dead += event.dead
            if isinstance(event, ProcessDied):
                self.console.print(f"a process died in {event.work} ({event.deaths})", style="yellow", markup=False)
            if isinstance(event, UnitLost):
                self.console.print(f"unreadable: {event.why}", style="yellow", markup=False)
        now = time.monotonic()
        groups = ", ".join(f"{group} {rows:,}" for group, rows in self.rows.items())
        line = f"{now - self.started:5.0f} s  " + (groups + (f" of {total:,} rows" if total else " rows") if groups else "starting")
        if self.committed:
            line += f", {self.committed:,} committed" + (f", {self.dead:,} of them dead letters" if self.dead else "")
        if self.replicas:
            line += f"  ({self.replicas} replica{'s' * (self.replicas > 1)} ready)"
        if self.status:
            self.status.update(line)
        elif now - self.printed >= _PLAIN_EVERY_S:
            self.printed = now
            self.console.print(line, markup=False, soft_wrap=True)
