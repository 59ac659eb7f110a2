"""A loop's run: what it reports, when it is saved, from where it goes on. The same object in one process and on every worker."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from headrace.errors import ContractError
from headrace.events import CheckpointSaved, Event, MetricsReported, StepsDone
from headrace.loops import position
from headrace.loops.shard import Shard

NOTES = "_headrace.json"  # what a checkpoint says about itself, beside the loop's own files
POSITIONS = "_position-"  # and the rows that each worker had been given
_MEET_S = 1.0  # between agreements of the workers on saving and stopping: each is a message there and back
_MOST_CALLS = 10_000  # between two of them
_TELL_S = 0.5
_POINTS = 512  # of reports told at once; of more, as many evenly among them

Save = Callable[[Path], object]


class Halted(BaseException):
    """The training was told to stop, and is saved. Ends the loop; loops must not catch it."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the first worker says and all do: whether to save now, to stop after it, and after how many calls to meet again."""

    save: bool = False
    halt: bool = False
    again: int = 1


@dataclass(frozen=True, slots=True)
class Notes:
    """What a checkpoint says about itself.

    `step` is that of the run, `batches` and `calls` what it is counted by; `rows` are how many all workers had been given in batches, `done`
    whether the loop had ended, `metrics` the last reported.
    """

    step: int = 0
    batches: int = 0
    calls: int = 0
    rows: int = 0
    workers: int = 1
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """As the text that the checkpoint keeps."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Notes:
        """The inverse of `to_json`.

        Raises:
            TypeError, ValueError: it is no such text.
        """
        return Notes(**json.loads(text))


class Site(Protocol):
    """Where a loop runs: one process, or one of several workers on Ray."""

    rank: int
    workers: int

    def restored(self) -> Path | None:
        """The folder of the checkpoint that this run goes on from."""

    def agree(self, mine: Agreement) -> tuple[Agreement, bool]:
        """What the first worker says, and whether a machine of theirs is about to be taken away. All workers meet here."""

    def told_to_stop(self) -> bool:
        """Whether somebody wants the training to stop; asked of the first worker."""

    def keep(self, write: Callable[[Path], object], notes: Notes, *, final: bool) -> None:
        """Make a checkpoint of what every worker writes into a folder. All workers meet here; only a `final` one is waited for."""

    def accelerator_share(self) -> float | None:
        """How busy this worker's accelerators are, 0 to 1; None if it has none, or nobody knows."""

    def tell(self, event: Event) -> None:
        """Note what happened."""


class Run:
    """What a loop knows of where it runs, and what it tells.

    Attributes:
        rank: the number of this worker, from 0.
        workers: how many there are now.
        stopping: whether a machine of theirs is about to be taken away. It was saved for; the loop need do nothing.
    """

    def __init__(self, shard: Shard, site: Site, *, every: tuple[int | None, float | None], notes: Notes | None = None) -> None:
        self.rank, self.workers, self.stopping = site.rank, site.workers, False
        self._shard, self._site = shard, site
        self._every_calls, self._every_s = every
        before = notes or Notes()
        self._calls, self._metrics, self._rows = before.calls, dict(before.metrics), before.rows
        self._saved_calls, self._saved_s = self._calls, time.perf_counter()
        self._meeting, self._met = self._calls + 1, (self._calls, time.perf_counter())
        self._save: tuple[Save, bool] | None = None
        self._points: list[tuple[int, Mapping[str, float]]] = []
        self._told_s = time.perf_counter()
        self._told = (0, 0.0)  # rows and wait_s as told last
        shard.tick = self._tick

    @property
    def step(self) -> int:
        """Batches that the shard gave, over all runs; the calls of `checkpoint` where the loop takes its rows as a table."""
        return self._shard.step or self._calls

    def report(self, **metrics: float) -> None:
        """Tell how the loop fares at this step: `run.report(loss=0.3)`. Numbers, or what `float` makes one of. Costs next to nothing.

        Raises:
            ContractError: a value is no number.
        """
        try:
            values = {name: float(value) for name, value in metrics.items()}
        except (TypeError, ValueError) as error:
            raise ContractError(f"run.report takes numbers, such as loss=0.3, got {metrics!r}: {error}") from error
        self._metrics.update(values)
        if self.rank == 0:
            self._points.append((self.step, values))

    def resume(self) -> Path | None:
        """The folder of the last checkpoint, with what `save` wrote into it; None in a run from the start."""
        return self._site.restored()

    def checkpoint(self, save: Save, *, now: bool = False, every_worker: bool = False) -> None:
        """Save if it is time to. All workers call this, after every step.

        It is time as `checkpoint_every` of the training has it, when a machine is about to be taken away, and when the training is told to
        stop. When the loop has returned, the last `save` is called once more.

        Args:
            save: called with a new folder, writes into it what `resume` is to find. It reads what it saves when it is called.
            now: save in any case; all workers must say the same.
            every_worker: call `save` on every worker, not only on the first; each writes files of other names.
        """
        self._save = (save, every_worker)
        self._calls += 1
        due = now or (self._every_calls is not None and self._calls - self._saved_calls >= self._every_calls)
        halt = False
        if self._calls >= self._meeting:
            said, notice = self._site.agree(self._proposal())
            self._meeting, self._met = self._calls + said.again, (self._calls, time.perf_counter())
            due, halt = due or said.save or said.halt or (notice and not self.stopping), said.halt
            self.stopping = notice
        if due:
            self._keep(done=False, final=halt)
        if halt:
            raise Halted

    def finish(self) -> None:
        """Save for the last time, when the loop has returned."""
        self._flush()
        self._keep(done=True, final=True)

    def _proposal(self) -> Agreement:
        if self.rank:
            return Agreement()
        now = time.perf_counter()
        calls, since = self._met
        rate = (self._calls - calls) / max(now - since, 1e-6)
        again = min(_MOST_CALLS, max(1, int(rate * _MEET_S)), 2 * max(1, self._calls - calls))
        save = self._every_s is not None and now - self._saved_s >= self._every_s
        return Agreement(save, self._site.told_to_stop(), again)

    def _keep(self, *, done: bool, final: bool) -> None:
        given = self._rows + (self._shard.rows * self.workers if self._shard.step else 0)
        notes = Notes(self.step, self._shard.step, self._calls, given, self.workers, done, dict(self._metrics))
        taken = self._shard.position().taken()

        def write(folder: Path) -> None:
            if self._save is None and self.rank == 0:
                _carry(self._site.restored(), folder)  # a loop that was given no more rows has saved nothing: what it began with is what it has
            elif self._save is not None and (self.rank == 0 or self._save[1]):
                self._save[0](folder)
            (folder / f"{POSITIONS}{self.rank:05d}.json").write_text(position.to_json(taken), encoding="utf-8")
            if self.rank == 0:
                (folder / NOTES).write_text(notes.to_json(), encoding="utf-8")

        started = time.perf_counter()
        self._site.keep(write, notes, final=final)
        self._saved_calls, self._saved_s = self._calls, time.perf_counter()
        if self.rank == 0:
            self._site.tell(CheckpointSaved(self.step, self._saved_s - started, done))

    def _tick(self) -> None:
        """A batch is about to be given, or the first one was just made."""
        if not self._shard.rows:
            self._told_s = time.perf_counter()
        elif time.perf_counter() - self._told_s >= _TELL_S:
            self._flush()

    def _flush(self) -> None:
        """Tell what was not told yet."""
        (rows, wait_s), since_s, now_s = self._told, self._told_s, time.perf_counter()
        self._told, self._told_s = (self._shard.rows, self._shard.wait_s), now_s
        if self._shard.rows > rows:
            share = self._site.accelerator_share()
            self._site.tell(StepsDone(self.rank, self.step, self._shard.rows - rows, self._shard.wait_s - wait_s, now_s - since_s, share))
        if self._points:
            stride = math.ceil(len(self._points) / _POINTS)
            kept = self._points[::-1][::stride][::-1]  # the last one is among them
            self._points = []
            self._site.tell(MetricsReported(tuple(step for step, _ in kept), tuple(tuple(values.items()) for _, values in kept)))


def _carry(before: Path | None, folder: Path) -> None:
    """The loop's own files of a checkpoint, to the next one."""
    if before is not None:
        shutil.copytree(before, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(NOTES, f"{POSITIONS}*"))
