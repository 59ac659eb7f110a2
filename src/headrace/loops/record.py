"""The record of a training beside its output: every event as a line, and the report as JSON and as a page."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pyarrow as pa

from headrace.cost import Machine, Meter, Prices
from headrace.errors import StorageError
from headrace.events import Event, MachinesSeen, RunFailed, to_json_lines
from headrace.ledger import HOME, REPORT
from headrace.loops.page import page
from headrace.loops.result import Sums, TrainingReport
from headrace.store import Folder

PAGE = f"{HOME}/report.html"


class TrainingRecord:
    """Collects a training's events. They are spooled to a local file, so that memory does not grow with the training.

    On leaving, these are written into `_headrace` beside the output, however it ended: `events-<run>.jsonl`, `report.json`, `report.html`.
    """

    def __init__(self, store: Folder, run: str, watch: Callable[[Sequence[Event]], object], *, prices: Prices, epochs: int, about: Mapping[str, Any]) -> None:
        self.store, self.run, self.watch, self.epochs, self.about = store, run, watch, epochs, about
        self.sums = Sums(Meter(prices))
        self._seen: tuple[Any, ...] = ()
        self._spool = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it lives as long as the run, and __exit__ closes it

    def add(self, events: Sequence[Event]) -> None:
        """Note events, and show them to whoever watches."""
        self._spool.write(to_json_lines(events).encode())
        self.sums.add(events)
        self.watch(events)

    def see(self, machines: Iterable[Machine]) -> None:
        """Note which machines there are, if they are others than before."""
        seen = tuple(map(dataclasses.astuple, machines))
        if seen != self._seen:
            self._seen = seen
            self.add([MachinesSeen(seen)])

    def report(self) -> TrainingReport:
        """The report of the training as it stands."""
        return TrainingReport.of(self.sums, epochs=self.epochs)

    def __enter__(self) -> TrainingRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.add([RunFailed(type(error).__name__, str(error).partition("\n")[0])])
        try:
            place = self.store.place.child(f"{HOME}/events-{self.run}.jsonl")
            self._spool.seek(0)
            try:
                with place.filesystem.open_output_stream(place.path) as stream:
                    shutil.copyfileobj(self._spool, stream)
            except (OSError, pa.ArrowException) as cause:
                raise StorageError(f"cannot write the record of the training to {place.uri!r}: {cause}") from cause
            report = self.report()
            self.store.put(REPORT, (json.dumps({**report.to_dict(), **self.about}, indent=2) + "\n").encode())
            self.store.put(PAGE, page(report).encode())
        except StorageError:
            if error is None:  # a failed run has its own, more telling error
                raise
        finally:
            self._spool.close()
