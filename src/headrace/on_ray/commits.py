"""The driver's side of a batch job: blocks that Ray has finished become files, files become commits, commits are published.

Blocks stay in Ray's object store; this process handles references only. They are gathered until they fill a file, or until
waiting longer would risk too much work, written by tasks, and settled in the ledger by this process alone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from headrace import letters, sinks
from headrace.columns import ColumnType
from headrace.errors import DeadLetterError, HeadraceError, StoppedError
from headrace.events import Committed, Event, FileWritten, GroupSampled, UnitLost, UnitRead
from headrace.ledger import Ledger
from headrace.lineage import FAULT, HIDDEN, Fault, spans
from headrace.on_ray import compat
from headrace.on_ray.machines import machines
from headrace.record import Record
from headrace.state import Change, DataFile
from headrace.tally import WRITER
from headrace.units import Source, Unit
from headrace.weights import Weights

_WRITES = 4  # files written at once; each holds FILE_BYTES of rows and what they encode to
_OLDEST_S = (1.0, 60.0)  # rows wait at least and at most so long for a file to fill; in between, 1 % of the time that the run took
_TICK_S = 0.1
_EVENTS_S = 0.5
_MACHINES_S = 10.0
_SMALL_BYTES = sinks.FILE_BYTES // 8  # encoded; smaller files are merged before they are published
_MERGED_BYTES = sinks.FILE_BYTES // 2
_PUBLISHERS = 16  # threads; on an object store publishing is a copy by the server
_MOST_FAIL = 1000  # rows; if more than half of so many fail, the job is broken as a whole


@dataclass(frozen=True, slots=True)
class Written:
    """What a writing task did: a file of rows, one of dead letters, and which rows they settle."""

    file: DataFile | None
    letters: DataFile | None
    done: Mapping[int, Sequence[tuple[int, int]]]
    dead: Mapping[int, Sequence[tuple[int, int]]]
    causes: Mapping[str, int]
    busy_s: float
    example: str = ""


@ray.remote(num_cpus=0, max_retries=20)
def write(sink: sinks.Sink, run: str, schema: pa.Schema, inputs: list[Any], *blocks: pa.Table) -> Written:
    """Write blocks as one file, and their dead letters as another. `inputs` holds the reference to what dead letters are read from."""
    started = time.perf_counter()
    good, bad = letters.split(sinks.joined(compat.BlockAccessor.for_block(block).to_arrow() for block in blocks))
    file = sinks.write(sink, run, _shaped(good, schema)) if good.num_rows else None
    if not bad.num_rows:
        return Written(file, None, spans(good), {}, {}, time.perf_counter() - started)
    source, units, wanted = ray.get(inputs[0])
    faults = [Fault.from_json(text) for text in bad[FAULT].to_pylist()]
    causes = Counter(f"{fault.error} in {fault.stage}" for fault in faults)
    buried = sinks.write(sink, run, letters.table(bad, source, units, wanted), kind="letters")
    busy_s = time.perf_counter() - started
    return Written(file, buried, spans(good), spans(bad), causes, busy_s, f"{faults[0].stage}: {faults[0].error}: {faults[0].message}\n{faults[0].frames}")


def _shaped(data: pa.Table, schema: pa.Schema) -> pa.Table:
    """The output's own columns and types; a column that nobody declared keeps its own."""
    data = data.drop_columns(list(HIDDEN))
    fields = [field if field.type != pa.null() else data.schema.field(field.name) for field in schema]
    return data.select(schema.names).cast(pa.schema(fields))


@ray.remote(num_cpus=0, max_retries=20)
def merge(sink: sinks.Sink, run: str, files: Sequence[DataFile]) -> DataFile:
    """Small staged files as one."""
    return sinks.merge(sink, run, files)


@dataclass(slots=True, kw_only=True)
class Driver:
    """Settles what comes out of Ray. `total` are the rows, if known, and `groups` the names of its operators, in order."""

    ledger: Ledger
    sink: sinks.Sink
    schema: pa.Schema
    inputs: list[Any]
    log: Any
    record: Record
    allowance: letters.Allowance
    total: int | None
    units: int
    weights: Weights
    groups: Sequence[str] = ()
    already_dead: int = 0
    lost: dict[int, str] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    settled: int = 0
    dead: int = 0
    example: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    _pending: list[compat.Output] = field(default_factory=list)
    _since_s: float = 0.0
    _started_s: float = field(default_factory=time.monotonic)
    _writing: dict[Any, None] = field(default_factory=dict)
    _small: list[DataFile] = field(default_factory=list)
    _publishing: list[Future[None]] = field(default_factory=list)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_PUBLISHERS, thread_name_prefix="headrace-publish"))
    _events_at_s: float = 0.0
    _machines_at_s: float = field(default_factory=time.monotonic)

    def run(self, dataset: compat.Dataset) -> int:
        """Take everything that the dataset gives, and settle it; returns how many rows that were.

        Raises:
            StoppedError: `stop` was set. What was being written is committed.
            DeadLetterError: too many rows failed.
        """
        before = self.settled
        with compat.stream(dataset) as blocks:
            try:
                self._follow(blocks)
            except (HeadraceError, ray.exceptions.RayError, compat.ExecutionTimeoutError):
                # What is computed already is worth keeping, if that still goes; what stopped the run is told either way.
                with contextlib.suppress(HeadraceError, ray.exceptions.RayError):
                    self._write_pending()
                    while self._writing:
                        self._collect(_TICK_S)
                raise
        self._drain_events()
        counts, self.counts = self.counts, {}
        self.ledger.commit(Change(counts=counts))
        return self.settled - before

    def publish_rest(self) -> None:
        """Merge what is small, publish what is not published, and wait until all is in its place."""
        while len(self._small) > 1:
            self._merge_small(_MERGED_BYTES)
        self._wait_published()  # before the rest is told: two moves of one file would get in each other's way
        self._publish([file.name for file in self.ledger.unpublished()] + list(self.ledger.state.letters))
        self._wait_published()
        self._pool.shutdown()

    def adopt(self) -> None:
        """Take over the files that an earlier run committed and did not publish."""
        for file in self.ledger.unpublished():
            self._place(file)

    def _follow(self, blocks: compat.Stream) -> None:
        more = True
        while more or self._writing or self._pending:
            if more and len(self._writing) < _WRITES:
                try:
                    self._gather(blocks.take(0 if self._writing and self._due() else _TICK_S))
                except compat.Finished:
                    more = False
            elif self._writing:
                self._collect(_TICK_S)
            if self._pending and (not more or self._due()) and len(self._writing) < _WRITES:
                self._write_pending()
            self._collect(0)
            if time.monotonic() - self._events_at_s > _EVENTS_S:
                self._drain_events()
                self._sample(blocks)
            if self.stop.is_set():
                raise StoppedError("the run was told to stop")

    def _gather(self, block: compat.Output | None) -> None:
        if block is not None and block.rows:
            if not self._pending:
                self._since_s = time.monotonic()
            self._pending.append(block)

    def _due(self) -> bool:
        """Whether the pending blocks should be written: they fill a file, or have waited long enough."""
        if not self._pending:
            return False
        now = time.monotonic()
        patience = min(max(_OLDEST_S[0], 0.01 * (now - self._started_s)), _OLDEST_S[1])
        return sum(block.bytes for block in self._pending) >= sinks.FILE_BYTES or now - self._since_s > patience

    def _write_pending(self) -> None:
        if self._pending:
            refs = [block.ref for block in self._pending]
            self._writing[write.remote(self.sink, self.ledger.run, self.schema, self.inputs, *refs)] = None
            self._pending.clear()

    def _collect(self, timeout_s: float) -> None:
        """Commit what tasks have written."""
        if not self._writing:
            return
        ready, _ = ray.wait(list(self._writing), num_returns=1, timeout=timeout_s)
        if not ready:
            return
        ready, _ = ray.wait(list(self._writing), num_returns=len(self._writing), timeout=0)
        for ref in ready:
            del self._writing[ref]
        written: list[Written] = ray.get(ready)
        done, dead = _united(one.done for one in written), _united(one.dead for one in written)
        files = [one.file for one in written if one.file is not None]
        buried = [one.letters for one in written if one.letters is not None]
        counts, self.counts = self.counts, {}
        self.ledger.commit(Change(files=files, letters=buried, done=done, dead=dead, counts=counts))
        causes = sum((Counter(one.causes) for one in written), Counter())
        rows, failed = sum(file.rows for file in files), sum(causes.values())
        self.settled += rows + failed
        self.dead += failed
        self.example = self.example or next((one.example for one in written if one.example), "")
        for settled in (done, dead):
            self.weights.settle(settled)
        events: list[Event] = [FileWritten(one.file.name, one.file.rows, one.file.bytes, one.busy_s) for one in written if one.file is not None]
        self.record.add([*events, Committed(rows, failed, tuple(causes.items()), self.weights.share)])
        for file in files:
            self._place(file)
        self._publish([file.name for file in buried])
        self.check_allowance()

    def _place(self, file: DataFile) -> None:
        """Publish a file, or keep it until it can be merged with others."""
        if file.bytes >= _SMALL_BYTES:
            self._publish([file.name])
            return
        self._small.append(file)
        if sum(one.bytes for one in self._small) >= _MERGED_BYTES:
            self._merge_small(_MERGED_BYTES)

    def _merge_small(self, most_bytes: int) -> None:
        """Make one file of the oldest small ones, as many as fit."""
        chosen: list[DataFile] = []
        while self._small and (len(chosen) < 2 or sum(one.bytes for one in chosen) < most_bytes):
            chosen.append(self._small.pop(0))
        merged = ray.get(merge.remote(self.sink, self.ledger.run, chosen))
        self.ledger.settle(Change(files=[merged], dropped=[file.name for file in chosen]))
        self._publish([merged.name])

    def _publish(self, names: Sequence[str]) -> None:
        for future in [future for future in self._publishing if future.done()]:
            future.result()  # raises what went wrong
            self._publishing.remove(future)
        self._publishing += [self._pool.submit(self.ledger.publish, name) for name in names]

    def _wait_published(self) -> None:
        for future in self._publishing:
            future.result()
        self._publishing.clear()

    def _drain_events(self) -> None:
        self._events_at_s = time.monotonic()
        events = ray.get(self.log.drain.remote())
        for event in events:
            match event:
                case UnitRead(unit=unit, rows=rows) if rows is not None:
                    self.counts[unit] = rows
                    self.weights.count(unit, rows)
                case UnitLost(unit=unit, why=why):
                    self.lost[unit] = why
        self.record.add(events)
        self.check_allowance()

    def _sample(self, blocks: compat.Stream) -> None:
        """Note what every operator is doing at this moment, the writer among them."""
        found = zip(self.groups, blocks.occupancy(), strict=False)
        events: list[Event] = [GroupSampled(group, one.queued, one.running, one.ready, one.starting) for group, one in found]
        self.record.add([*events, GroupSampled(WRITER, len(self._pending), len(self._writing))])
        if time.monotonic() - self._machines_at_s > _MACHINES_S:
            self._machines_at_s = time.monotonic()
            self.record.see(machines().values())

    def check_allowance(self, *, final: bool = False) -> None:
        """Stop a job of which too much fails.

        Raises:
            DeadLetterError: says how much, what is allowed, and shows one failure.
        """
        dead = self.already_dead + self.dead
        of = max(self.total or 0, self.settled)
        rows, lost = self.allowance.of(of), self.allowance.of(self.units)
        why = ""
        if (self.total is not None or final) and dead > rows:
            why = f"{dead:,} rows of {of:,} failed, and --max-dead-letters allows {rows:,}"
        elif self.allowance.share is not None and self.allowance.share < 0.5 and self.dead >= _MOST_FAIL and 2 * self.dead > self.settled:
            why = f"{self.dead:,} of the first {self.settled:,} rows failed"
        elif len(self.lost) > lost or (final and self.lost and len(self.lost) == self.units):
            unit, message = next(iter(self.lost.items()))
            why = f"{len(self.lost):,} of {self.units:,} input units cannot be read, and --max-dead-letters allows {lost:,}; unit {unit}: {message}"
        if why:
            raise DeadLetterError(f"{why}. {self.example}".rstrip(". \n"))


def _united(parts: Any) -> dict[int, list[tuple[int, int]]]:
    united: dict[int, list[tuple[int, int]]] = {}
    for part in parts:
        for unit, rows in part.items():
            united.setdefault(unit, []).extend(rows)
    return united


@contextlib.contextmanager
def told_to_stop(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on Ctrl-C and SIGTERM instead of ending at once; a second one ends at once. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def note(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for one in (signal.SIGINT, signal.SIGTERM):
        before[one] = signal.signal(one, note)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def inputs_for(source: Source, units: Sequence[Unit], wanted: Mapping[str, ColumnType]) -> list[Any]:
    """What dead letters are read from, put once where every writing task can fetch it."""
    return [ray.put((source, {unit.id: unit for unit in units}, dict(wanted)))]
