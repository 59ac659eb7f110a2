"""The record of a run beside its output: every event as a line, and the sums that the report is made of."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType

import pyarrow as pa

from headrace import sinks
from headrace.errors import StorageError
from headrace.events import Event, to_json_lines
from headrace.ledger import HOME
from headrace.report import Tally


class Record:
    """Collects a run's events. They are spooled to a local file, so that memory does not grow with the run.

    On leaving, `_headrace/events-<run>.jsonl` is written beside the output, whether the run succeeded or not.
    """

    def __init__(self, sink: sinks.Sink, run: str, watch: Callable[[Sequence[Event]], None]) -> None:
        self.sink = sink
        self.run = run
        self.watch = watch
        self.tally = Tally()
        self._spool = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it lives as long as the run, and __exit__ closes it

    def add(self, events: Sequence[Event]) -> None:
        """Note events, and show them to whoever watches."""
        self._spool.write(to_json_lines(events).encode())
        self.tally.add(events)
        self.watch(events)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        place = self.sink.place.child(f"{HOME}/events-{self.run}.jsonl")
        self._spool.seek(0)
        try:
            with place.filesystem.open_output_stream(place.path) as stream:
                shutil.copyfileobj(self._spool, stream)
        except (OSError, pa.ArrowException) as cause:
            if error is None:  # a failed run has its own, more telling error
                raise StorageError(f"cannot write the events of the run to {place.uri!r}: {cause}") from cause
        finally:
            self._spool.close()
