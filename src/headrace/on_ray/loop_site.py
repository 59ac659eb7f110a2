"""A training's loop on one of Ray Train's workers: its site, and what runs there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from headrace.calls import run_loop
from headrace.errors import HeadraceError, OutputError
from headrace.events import Event, RowsFailed, WorkersStarted
from headrace.filesystems import locate
from headrace.lineage import FAULT, Fault
from headrace.loops import position
from headrace.loops.checkpoints import read
from headrace.loops.run import Agreement, Halted, Notes, Run
from headrace.loops.shard import Shard
from headrace.on_ray import trainers
from headrace.on_ray.operators import limit_threads
from headrace.on_ray.translation import translated
from headrace.training import Training


class OnWorker:
    """The site of a loop on one of several workers."""

    def __init__(self, log: Any, last: Path | None) -> None:
        self.rank, self.workers = trainers.whoami()
        self.log, self.last = log, last
        self.accelerator_share = trainers.Load()

    def restored(self) -> Path | None:
        """See `Site`."""
        return self.last

    def agree(self, mine: Agreement) -> tuple[Agreement, bool]:
        """See `Site`."""
        return mine if self.workers == 1 else trainers.agree(mine), trainers.doomed()

    def told_to_stop(self) -> bool:
        """See `Site`."""
        return bool(ray.get(self.log.told_to_stop.remote()))

    def keep(self, write: Callable[[Path], object], notes: Notes, *, final: bool) -> None:
        """See `Site`."""
        trainers.keep(write, dict(notes.metrics), wait=final)

    def tell(self, event: Event) -> None:
        """See `Site`."""
        self.log.add.remote(event)


def work(config: dict[str, Any]) -> None:
    """What every worker runs: the loop of `config["training"]` over its part of the rows, from where the last checkpoint was."""
    training: Training = config["training"]
    limit_threads(max(1, int(config["cpus"])))
    with trainers.restored() as last:
        site = OnWorker(config["log"], last)
        notes, taken = read(locate(str(last), error=OutputError)) if last else (Notes(), {})
        before = taken if site.rank == 0 else {}
        shard = Shard(
            _tables, epoch_rows=config["epoch_rows"], epochs=training.epochs, workers=site.workers, step=notes.batches, given=notes.rows, taken=before
        )
        run = Run(shard, site, every=training.every, notes=notes)
        if site.rank == 0:
            site.tell(WorkersStarted(site.workers, notes.step))
        try:
            run_loop(training.name, training.loop, shard, training.settings, run)
        except Halted:
            return
        except HeadraceError:
            trainers.flush()  # what is still on its way is where the next run begins
            raise
        run.finish()


def _tables() -> Iterator[pa.Table]:
    try:
        for data in trainers.stream():
            if data.num_rows:
                yield data
    except ray.exceptions.RayError as error:
        raise translated(error) from error


class Settled:
    """The end of the last step before the workers: rows that failed are told of and left out, the others put into the epoch's order."""

    def __init__(self, log: Any, *, shuffle: bool, seed: int) -> None:
        self.log, self.shuffle, self.seed = log, shuffle, seed

    def __call__(self, data: pa.Table) -> pa.Table:
        """A block, without its failed rows."""
        if data.num_rows and data[FAULT].null_count < data.num_rows:
            faults = [Fault.from_json(text) for text in data[FAULT].drop_null().to_pylist()]
            self.log.add.remote(RowsFailed(tuple(Counter(f"{fault.error} in {fault.stage}" for fault in faults).items())))
            data = data.filter(pc.is_null(data[FAULT]))
        return position.mixed(data, seed=self.seed) if self.shuffle else data
