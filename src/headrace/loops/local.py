"""A training in this process: the loop on one worker, without an engine. What it gives is what the loop means."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.arrays import conform
from headrace.columns import ANY
from headrace.errors import OutputError, WiringError, listing, nearest
from headrace.events import Event, RunFinished, RunStarted, WorkersStarted
from headrace.filesystems import locate
from headrace.lineage import ROW, UNIT, trace
from headrace.loops import position
from headrace.loops.checkpoints import read
from headrace.loops.result import Result, Sums, TrainingReport
from headrace.loops.run import NOTES, Agreement, Notes, Run
from headrace.loops.shard import Shard
from headrace.training import Training
from headrace.worker import Worker

LAST = "checkpoint"  # in the folder of a training


class Here:
    """The site of a loop that runs alone. Its checkpoints replace each other in one folder."""

    rank, workers = 0, 1

    def __init__(self, folder: Path, tell: Callable[[Event], object]) -> None:
        self.folder, self._tell = folder, tell
        last = folder / LAST
        self._last = last if (last / NOTES).is_file() else None
        if self._last is not None:  # what the loop reads from must stay when the next one is saved
            self._last = Path(shutil.copytree(last, folder / f".{LAST}-{uuid.uuid4().hex[:8]}"))

    def restored(self) -> Path | None:
        """See `Site`."""
        return self._last

    def agree(self, mine: Agreement) -> tuple[Agreement, bool]:
        """See `Site`."""
        return mine, False

    def told_to_stop(self) -> bool:
        """See `Site`."""
        return False

    def keep(self, write: Callable[[Path], object], notes: Notes, *, final: bool) -> None:
        """See `Site`. The folder is complete or not there."""
        made = Path(tempfile.mkdtemp(prefix=f".{LAST}-", dir=self.folder))
        write(made)
        last, old = self.folder / LAST, made.with_name(f"{made.name}-old")
        if last.exists():
            os.rename(last, old)
        os.rename(made, last)
        shutil.rmtree(old, ignore_errors=True)

    def accelerator_share(self) -> float | None:
        """See `Site`."""
        return None

    def tell(self, event: Event) -> None:
        """See `Site`."""
        self._tell(event)

    def close(self) -> None:
        """Remove what only this run needed."""
        if self._last is not None:
            shutil.rmtree(self._last, ignore_errors=True)


def local(training: Training, rows: Any, *, folder: Any = None) -> Result:
    """See `Training.local`."""
    data = prepared(training, rows)
    place = Path(tempfile.mkdtemp(prefix="headrace-training-") if folder is None else os.fspath(folder))
    place.mkdir(parents=True, exist_ok=True)
    sums = Sums()
    site = Here(place, lambda event: sums.add([event]))
    try:
        last = site.restored()
        notes, taken = read(locate(str(last), error=OutputError)) if last else (Notes(), {})
        sums.add([RunStarted(training.name, (), str(place), rows=data.num_rows * training.epochs), WorkersStarted(1, notes.step)])
        if notes.done:
            sums.metrics.update(notes.metrics)
        else:
            shard = Shard(
                lambda: _tables(training, data, taken), epoch_rows=data.num_rows, epochs=training.epochs, step=notes.batches, given=notes.rows, taken=taken
            )
            run = Run(shard, site, every=training.every, notes=notes)
            training.loop(shard, training.settings, run)
            run.finish()
        sums.add([RunFinished(sums.rows, sums.rows, 0, 0.0)])
    finally:
        site.close()
    return Result({**notes.metrics, **sums.metrics}, str(place / LAST), TrainingReport.of(sums, epochs=training.epochs))


def prepared(training: Training, rows: Any) -> pa.Table:
    """The rows as the loop gets them: run through the pipeline, with the columns that it reads and lineage of a single unit.

    Raises:
        WiringError: a column is missing, or holds a value that its type forbids.
    """
    whole = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows)) if isinstance(rows, Sequence) else pa.table(rows)
    pipeline = training.data
    if not whole.num_rows:
        raise WiringError(f"training {training.name!r}: there are no rows")
    kept = training.kept(whole.column_names)
    wanted: Mapping[str, Any] = {**dict.fromkeys(kept, ANY), **(pipeline.kept(kept) | dict(pipeline.inputs) if pipeline else {})}
    arrays = {}
    for name, column in wanted.items():
        if name not in whole.column_names:
            raise WiringError(
                f"training {training.name!r} reads column {name!r}, which the rows lack; they have {listing(whole.column_names)}"
                + nearest(name, whole.column_names)
            )
        try:
            arrays[name] = conform(whole[name], column)
        except (ValueError, pa.ArrowException) as error:
            raise WiringError(f"training {training.name!r}: column {name!r} ({column}): {error}") from error
    data = pa.table(arrays)
    for stage in pipeline.stages if pipeline else ():
        data = Worker([stage], overlap=False)(data)
    data = data.select(list(dict.fromkeys([*kept, *(pipeline.outputs if pipeline else ())])))
    return trace(data, 0, np.arange(data.num_rows))


def _tables(training: Training, data: pa.Table, taken: position.Taken) -> Iterator[pa.Table]:
    """The rows of every epoch in one block each, less those that were given before."""
    for epoch in range(training.epochs):
        at = data.schema.get_field_index(UNIT)
        block = data.set_column(at, UNIT, pa.array(np.full(data.num_rows, epoch, np.int32)))
        block = position.mixed(block, seed=training.seed) if training.shuffle else block
        if (gone := taken.get(epoch)) is not None:
            keep = np.ones(data.num_rows, bool)
            for start, stop in gone:
                keep[start:stop] = False
            block = block.filter(pa.array(keep[block[ROW].to_numpy()]))
        if block.num_rows:
            yield block
