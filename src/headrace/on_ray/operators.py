"""What runs inside Ray's workers: reading units, running groups, writing files. Each is one operator of the dataset."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import threadpoolctl

from headrace import sinks
from headrace.columns import ColumnType
from headrace.errors import StageError
from headrace.events import Event, FileWritten, ReplicaReady, UnitRead
from headrace.on_ray.compat import Block, BlockAccessor, Datasink, TaskContext
from headrace.plan import Group
from headrace.readers import read
from headrace.units import Source, Unit
from headrace.worker import Worker

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


@ray.remote(num_cpus=0, max_restarts=0)
class EventLog:
    """Collects the events of a run from all workers; the driver drains it."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, *events: Event) -> None:
        """Append."""
        self.events += events

    def drain(self) -> list[Event]:
        """All events since the last call."""
        events, self.events = self.events, []
        return events


class Reader:
    """Read the units named in a block, as blocks of `block_rows` rows."""

    def __init__(self, source: Source, wanted: dict[str, ColumnType], block_rows: int, log: Any) -> None:
        self.source, self.wanted, self.block_rows, self.log = source, wanted, block_rows, log

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for packed in block["units"].to_pylist():
            for unit in pickle.loads(packed):
                rows = 0
                for data in read(self.source, unit, self.wanted, block_rows=self.block_rows):
                    rows += data.num_rows
                    yield data
                # Waited for: the count must not be lost, since the run is held against it at the end.
                ray.get(self.log.add.remote(UnitRead(unit.id, rows)))


def pack(units: Iterable[Unit], block_rows: int) -> list[pa.Table]:
    """One table per read task; units are packed until they fill a block, so that many small files need few tasks."""
    tasks: list[list[Unit]] = []
    room = 0
    for unit in units:
        if unit.rows is None or room < unit.rows or not tasks:
            tasks.append([])
            room = block_rows
        tasks[-1].append(unit)
        room = 0 if unit.rows is None else room - unit.rows
    return [pa.table({"units": pa.array([pickle.dumps(task)], pa.binary())}) for task in tasks]


class Functions:
    """A group of functions, as the body of a task."""

    def __init__(self, group: Group, log: Any) -> None:
        self.group, self.log = group, log

    def __call__(self, block: pa.Table) -> pa.Table:
        if not block.num_rows:
            return block
        worker = Worker(self.group.stages, group=self.group.name, overlap=False, emit=self.log.add.remote)
        return worker(block, self.group.carries)


class Replica:
    """A group with a model, as an actor: set up once, then called with block after block."""

    def __init__(self, group: Group, log: Any) -> None:
        started = time.perf_counter()
        self.carries = group.carries
        self.failed: StageError | None = None
        hardware = group.choice.hardware
        limit_threads(max(1, int(hardware.cpus)))
        try:
            self.worker = Worker(group.stages, group=group.name, device=hardware.device, emit=log.add.remote)
        except StageError as error:
            # Raised at the first call instead: Ray turns an error of an actor's constructor into text, and starts it again.
            self.failed = error
        limit_threads(max(1, int(hardware.cpus)))  # again, for the libraries that setup has loaded
        node = ray.get_runtime_context().get_node_id()
        log.add.remote(ReplicaReady(group.name, node, hardware.device, time.perf_counter() - started))

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.failed is not None:
            raise self.failed
        return self.worker(block, self.carries) if block.num_rows else block


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


class Writer(Datasink[FileWritten | None]):
    """Ray's own sink interface over `headrace.sinks`: one file per write, and enough bytes per write for a good file."""

    def __init__(self, sink: sinks.Sink) -> None:
        self.sink = sink
        self.files: list[FileWritten] = []

    @property
    def min_bytes_per_write(self) -> int:
        """Blocks are gathered until they weigh this much."""
        return sinks.FILE_BYTES

    def get_name(self) -> str:
        """What Ray calls this operator."""
        return "Headrace"

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> FileWritten | None:
        """Write the blocks as one file; None when they hold no rows."""
        tables: Sequence[pa.Table] = [table for block in blocks if (table := BlockAccessor.for_block(block).to_arrow()).num_rows]
        return sinks.write(self.sink, tables) if tables else None

    def on_write_complete(self, write_result: Any) -> None:
        """Keep what the successful writes returned: the files that belong to the run."""
        self.files = [file for file in write_result.write_returns if file is not None]
