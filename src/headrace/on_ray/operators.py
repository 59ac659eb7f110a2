"""What runs inside Ray's workers while a dataset does: reading units and running groups. Each is one operator of it."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
import threadpoolctl

from headrace import expendable
from headrace.columns import ColumnType
from headrace.errors import HeadraceError, SourceError
from headrace.events import BlockDone, Event, ProcessDied, ReplicaReady, UnitLost, UnitRead
from headrace.plan import Group
from headrace.readers import read
from headrace.readings import Readings
from headrace.resume import Todo
from headrace.tally import READER
from headrace.units import Source
from headrace.worker import Worker

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


Finish = Callable[[pa.Table], pa.Table]
"""What the last operator does with each of its blocks; the next operator would take a task and a copy for each."""

_READER_DEATHS = 4  # of processes reading the same unit, until it is given up; fewer may be a machine's own trouble


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class EventLog:
    """Collects the events of a run from all workers, and notes which work has begun and not ended; the driver drains it.

    Should its process die, it starts again, empty. That loses figures, and notes on processes that died, but no rows.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.begun: Counter[str] = Counter()
        self.stopped = False

    def add(self, *events: Event) -> None:
        """Append."""
        self.events += events

    def drain(self) -> list[Event]:
        """All events since the last call."""
        events, self.events = self.events, []
        return events

    def enter(self, key: str) -> int:
        """Note that the work `key` begins; returns how often it was begun and not ended before, since its process died."""
        deaths = self.begun[key]
        self.begun[key] += 1
        if deaths:
            self.events.append(ProcessDied(key, deaths))
        return deaths

    def leave(self, key: str) -> None:
        """Note that the work `key` has ended, well or with an error."""
        self.begun.pop(key, None)

    def stop(self) -> None:
        """Note that the run is to stop; for workers that ask."""
        self.stopped = True

    def told_to_stop(self) -> bool:
        """Whether the run is to stop."""
        return self.stopped


class Journal:
    """The `Guard` of a worker: its notes are kept where they outlive its process."""

    def __init__(self, log: Any) -> None:
        self.log = log

    def enter(self, key: str) -> int:
        return int(ray.get(self.log.enter.remote(key)))

    def leave(self, key: str) -> None:
        self.log.leave.remote(key)


class Reader:
    """Read the rows named in a block, as blocks of `block_rows` rows with their lineage. What cannot be read is reported."""

    def __init__(self, source: Source, wanted: dict[str, ColumnType], block_rows: int, log: Any, finish: Finish | None = None) -> None:
        self.source, self.wanted, self.block_rows, self.log, self.finish = source, wanted, block_rows, log, finish

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        journal = Journal(self.log)
        for packed in block["scans"].to_pylist():
            for scan in pickle.loads(packed):
                key = f"read {scan[0][0].id}"
                if (deaths := journal.enter(key)) >= _READER_DEATHS:
                    self._lost(scan, f"the process died {deaths} times while it read {scan[0][0].paths[0]!r}")
                    continue
                counts: dict[int, int] = {}
                try:
                    yield from self._timed(read(self.source, scan, self.wanted, block_rows=self.block_rows, counted=counts.__setitem__))
                    # Waited for: the counts must not be lost, since the run is held against them at the end.
                    ray.get(self.log.add.remote(*(UnitRead(unit.id, counts.get(unit.id)) for unit, _ in scan)))
                except SourceError as error:
                    self._lost(scan, str(error))
                finally:
                    journal.leave(key)

    def _timed(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, each told of with the time that it took to make; not that in which nobody asked for the next."""
        started = time.perf_counter()
        for data in tables:
            self.log.add.remote(BlockDone(READER, data.num_rows, time.perf_counter() - started, 0, 0))
            yield data if self.finish is None else self.finish(data)
            started = time.perf_counter()

    def _lost(self, scan: Todo, why: str) -> None:
        ray.get(self.log.add.remote(*(UnitLost(unit.id, why) for unit, _ in scan)))


def pack(todo: Todo, block_rows: int) -> list[pa.Table]:
    """One table per read task. Units of one row group are read in one scan; scans are packed until they fill a block."""
    tasks: list[list[Todo]] = []
    room, last = 0, None
    for unit, rows in todo:
        place = (unit.paths, unit.row_group)
        known = None not in (unit.rows, rows[-1][1])
        count = sum(stop - start for start, stop in rows if stop is not None)
        follows = last is not None and place == (last.paths, last.row_group) and unit.start > last.start  # the same again is the next epoch of a training
        if follows and unit.row_group is not None:
            tasks[-1][-1].append((unit, rows))
        elif tasks and known and count <= room:
            tasks[-1].append([(unit, rows)])
        else:
            tasks.append([[(unit, rows)]])
            room = block_rows
        room = room - count if known else 0
        last = unit
    return [pa.table({"scans": pa.array([pickle.dumps(task)], pa.binary())}) for task in tasks]


class Functions:
    """A group of functions, as the body of a task."""

    def __init__(self, group: Group, log: Any, finish: Finish | None = None) -> None:
        self.group, self.log, self.finish = group, log, finish

    def __call__(self, block: pa.Table) -> pa.Table:
        if not block.num_rows:
            return block
        worker = Worker(self.group.stages, group=self.group.name, overlap=False, emit=self.log.add.remote, guard=Journal(self.log))
        done = worker(block, self.group.carries)
        return done if self.finish is None else self.finish(done)


class Replica:
    """A group with a model, as an actor: set up once, then called with block after block."""

    def __init__(self, group: Group, log: Any, finish: Finish | None = None) -> None:
        started = time.perf_counter()
        self.carries, self.finish = group.carries, finish
        self.failed: HeadraceError | None = None
        self.readings: Readings | None = None
        expendable.declare()
        hardware = group.choice.hardware
        limit_threads(max(1, int(hardware.cpus)))
        note = ""
        try:
            thread = None
            # An accelerator must not wait while the next block is made ready; a CPU has its hands full in any case.
            if hardware.gpus and group.stages[0].concurrency == 1:
                thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-device")
                sys.setswitchinterval(0.0005)  # s, instead of 0.005, for which other threads may keep it from the interpreter
            self.worker = Worker(group.stages, group=group.name, device=hardware.device, emit=log.add.remote, guard=Journal(log), thread=thread)
            note = self.worker.note
            self.readings = Readings(self.worker.stages, group=group.name, emit=log.add.remote)
        except HeadraceError as error:
            # Raised at the first call instead: Ray turns an error of an actor's constructor into text, and starts it again.
            self.failed = error
        limit_threads(max(1, int(hardware.cpus)))  # again, for the libraries that setup has loaded
        node = ray.get_runtime_context().get_node_id()
        log.add.remote(ReplicaReady(group.name, node, hardware.device, time.perf_counter() - started, note))

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.failed is not None:
            raise self.failed
        done = self.worker(block, self.carries) if block.num_rows else block
        if self.readings is not None:
            self.readings.tell()
        return done if self.finish is None else self.finish(done)


def limit_threads(count: int) -> None:
    """Hold every thread pool of this process to `count` threads, so that replicas do not fight over cores.

    The variables count for libraries that are loaded later (Rust tokenizers among them), threadpoolctl for those that are
    loaded already, and torch keeps a number of its own.
    """
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(count)))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    threadpoolctl.threadpool_limits(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
