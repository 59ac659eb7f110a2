"""The record of a run beside its output: its plan, every event as a line, and the report as JSON and as a page."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from headrace import sinks
from headrace.advice import bottleneck
from headrace.console.page import page
from headrace.cost import Machine, Meter, Prices
from headrace.errors import StorageError
from headrace.events import Event, GroupPlanned, MachinesSeen, RunFailed, RunStarted, to_json_lines
from headrace.ledger import HOME
from headrace.plan import Group, Plan, explain
from headrace.report import Report
from headrace.state import State
from headrace.tally import READER, WRITER, Tally


class Record:
    """Collects a run's events. They are spooled to a local file, so that memory does not grow with the run.

    On leaving, these are written into `_headrace` beside the output, whether the run succeeded or not: `events-<run>.jsonl`,
    `report.json`, `report.html`. `state` is what the output holds, and `lost` units that are given up; set by the job. The report in
    the file also says what was run: `request` and `facts`, as the ledger has them.
    """

    def __init__(self, sink: sinks.Sink, run: str, watch: Callable[[Sequence[Event]], None], *, prices: Prices) -> None:
        self.sink = sink
        self.run = run
        self.watch = watch
        self.tally = Tally(Meter(prices))
        self.state: State | None = None
        self.lost: Mapping[int, str] = {}
        self._plan = ""
        self._about: dict[str, Any] = {"request": {}, "facts": {}, "units": ""}
        self._seen: tuple[Any, ...] = ()
        self._spool = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it lives as long as the run, and __exit__ closes it

    def begin(self, started: RunStarted, plan: Plan, machines: Iterable[Machine], here: State) -> None:
        """Note the start of the run from the state `here`, on which machines, and its parts in the order in which rows pass."""
        self._about = {"request": dict(here.request), "facts": dict(here.facts), "units": here.units}
        groups = [GroupPlanned(READER, "reader"), *(_planned(group) for group in plan.groups), GroupPlanned(WRITER, "writer")]
        self.add([started, *groups])
        self.see(machines)
        self._plan = explain(plan) + "\n"
        self._put("plan.txt", self._plan)

    def see(self, machines: Iterable[Machine]) -> None:
        """Note which machines there are, if they are others than before."""
        seen = tuple(map(dataclasses.astuple, machines))
        if seen != self._seen:
            self._seen = seen
            self.add([MachinesSeen(seen)])

    def add(self, events: Sequence[Event]) -> None:
        """Note events, and show them to whoever watches."""
        self._spool.write(to_json_lines(events).encode())
        self.tally.add(events)
        self.watch(events)

    def report(self) -> Report:
        """The report of the run as it stands."""
        return Report.of(self.tally, output=self.sink.place.uri, state=self.state, lost=self.lost or None)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.add([RunFailed(type(error).__name__, str(error).partition("\n")[0])])
        try:
            self._spool.seek(0)
            self._put(f"events-{self.run}.jsonl", self._spool)
            report = self.report()
            self._put("report.json", json.dumps({**report.to_dict(), "bottleneck": bottleneck(report), **self._about}, indent=2) + "\n")
            self._put("report.html", page(report, plan=self._plan))
        except StorageError:
            if error is None:  # a failed run has its own, more telling error
                raise
        finally:
            self._spool.close()

    def _put(self, name: str, content: str | IO[bytes]) -> None:
        place = self.sink.place.child(f"{HOME}/{name}")
        try:
            with place.filesystem.open_output_stream(place.path) as stream:
                shutil.copyfileobj(io.BytesIO(content.encode()) if isinstance(content, str) else content, stream)
        except (OSError, pa.ArrowException) as cause:
            raise StorageError(f"cannot write the record of the run to {place.uri!r}: {cause}") from cause


def _planned(group: Group) -> GroupPlanned:
    hardware = group.choice.hardware
    rules = tuple(dict.fromkeys(str(stage.batch) for stage in group.stages))
    return GroupPlanned(group.name, "model" if group.replicas else "tasks", hardware.cpus, hardware.gpus, rules)
