"""Trainings on Ray: a loop over files, on workers that are started again where they stopped. Checks, takes the output, runs, accounts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from pyarrow import fs

from headrace import __version__, fingerprint, units
from headrace.columns import ANY
from headrace.cost import Prices
from headrace.errors import ChangedError, HardwareError, HeadraceError, OutputError, RunError, SettingError, SourceError, StoppedError, StorageError, listing
from headrace.events import Event, RunFinished, RunStarted
from headrace.filesystems import Place, locate
from headrace.formats import Input
from headrace.hardware import Choice, Cluster, Node, choose
from headrace.heartbeat import Heartbeat, wait_until_free
from headrace.ledger import HOME, SUCCESS, Ledger, claim_of
from headrace.loops.checkpoints import read
from headrace.loops.position import left
from headrace.loops.record import TrainingRecord
from headrace.loops.result import Result, Sums, TrainingReport
from headrace.loops.run import Notes
from headrace.on_ray import compat, trainers
from headrace.on_ray.batch import lower
from headrace.on_ray.cluster import connected
from headrace.on_ray.commits import told_to_stop
from headrace.on_ray.job import Connect
from headrace.on_ray.loop_site import Settled, work
from headrace.on_ray.machines import machines
from headrace.on_ray.operators import EventLog
from headrace.on_ray.translation import translated
from headrace.pipeline import Pipeline
from headrace.plan import Plan, resolve
from headrace.resume import Mode
from headrace.sources import open_source, select
from headrace.store import Folder
from headrace.training import Training
from headrace.units import Source

LAST = "checkpoint"  # in the output, when the training has ended
_ABOUT = f"{HOME}/training.json"
_MODES = (Mode.RESUME, Mode.ACCEPT_CHANGE, Mode.RESTART)
_ALL = 1 << 62  # rows: counted to the last
_LOOK_S = 0.5
_BLOCK_ROWS = 16_384  # a loop takes rows faster than a model of a job does, and what Ray does for each block would not keep up
_CLAIMED = 20  # looks between two whether the output is still this run's

Watch = Callable[[Sequence[Event]], object]


def train(
    training: Training,
    *,
    input: str | Sequence[str] | Input,
    output: str,
    workers: int | tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    mode: str = "resume",
    price: str | Sequence[str] = (),
    watch: Watch = lambda events: None,
) -> Result:
    """Run a training over files on Ray Train, on the Ray that is connected, or on one started here.

        hr.train(prices, input="features/*.parquet", output="out", settings={"lr": 0.05})

    The pipeline's stages run beside the workers, which share the rows. Checkpoints go to the output; called again, the same training goes
    on from the last one, with the rows that were not given before it. A finished one is left alone.

    Args:
        input: paths, folders, globs or URIs of files, or an `Input` that says more, as for `hr.run`.
        output: a folder or URI that does not exist, is empty, or holds this training. The last checkpoint ends up in its folder `checkpoint`.
        workers: instead of the training's own.
        settings: values for some of the training's settings.
        mode: `resume` refuses an output that was begun with other input, code or settings; `accept-change` goes on from its checkpoint, as
            long as the input is the same; `restart` throws it away.
        price: what machines cost, in the words of `headrace train --price`; listed prices where nothing is said.
        watch: called about twice a second with the new events.

    Raises:
        SourceError, OutputError, HardwareError, WiringError, SettingError: before any hardware is used.
        ChangedError: the output was begun with something else, and `mode` does not say what to do.
        StageError: the loop raised, or the set-up of a stage; with the user's own frames.
        StoppedError: Ctrl-C or SIGTERM. It is saved.
        RunError: the engine failed, or workers died more often than `retries` allows.
    """
    if mode not in list(_MODES):
        raise SettingError(f"mode must be one of {listing(one.value for one in _MODES)}, got {mode!r}")
    prices = Prices.parse([price] if isinstance(price, str) else price)
    training = training.with_settings(**(settings or {}))
    if workers is not None:
        training = dataclasses.replace(training, workers=workers)
    fit = Fit.of(training, input=input, output=output)
    return fit.run(mode=Mode(mode), connect=connected, watch=watch, prices=prices)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A training, what it reads, and where it writes; checked, and nothing touched yet."""

    training: Training
    pipeline: Pipeline
    source: Source
    kept: tuple[str, ...]
    place: Place
    request: Mapping[str, Any]

    @staticmethod
    def of(training: Training, *, input: str | Sequence[str] | Input, output: str) -> Fit:
        """The training with the errors that `train` raises before it uses hardware."""
        wanted = input if isinstance(input, Input) else Input(input)
        source = open_source(wanted)
        pipeline = training.data or Pipeline.without_stages(training.name)
        kept = training.kept(source.schema.names)
        columns = {**dict.fromkeys(kept, ANY), **pipeline.kept(kept), **pipeline.inputs}
        countable = source.rows is not None and wanted.where is None
        source = select(source, columns, pipeline=training.name, where=wanted.where, limit=wanted.limit or (None if countable else _ALL))
        if source.unreadable:
            raise SourceError(f"{next(iter(source.unreadable.values()))}; a training reads every row of its input: mend the file, or leave it out")
        request = {
            "pipeline": training.name,
            "input": [uri if "://" in uri else os.path.abspath(uri) for uri in wanted.uris],
            "where": wanted.where,
            "limit": wanted.limit,
            "keep": list(kept),
        }
        return Fit(training=training, pipeline=pipeline, source=source, kept=kept, place=locate(output, error=OutputError), request=request)

    @property
    def home(self) -> Place:
        """Where headrace keeps what belongs to the training."""
        return self.place.child(HOME)

    def run(self, *, mode: Mode, connect: Connect, watch: Watch, prices: Prices | None = None) -> Result:
        """Run it; see `train` above."""
        store, asked_s = Folder(self.place), time.time()
        facts = self._facts()
        self._check(store, facts, mode)
        if mode is not Mode.RESTART and (done := self._finished(store, facts)):
            return done
        wait_until_free(store, uri=self.place.uri)
        joined = ray.is_initialized()
        with connect() as cluster:
            for call in (self.training.loop, *(stage.call for stage in self.pipeline.stages)):
                compat.ship(call, importable=not joined and compat.started_here())
            shape, rest = shape_of(self.training, cluster)
            plan = resolve(self.pipeline.pinned(), rest, keep=self.kept)
            held, _ = Ledger.claim(store)
            about = {"request": dict(self.request), "facts": facts, "settings": {name: repr(value) for name, value in self.training.values.items()}}
            with (
                Heartbeat(store, held.run),
                TrainingRecord(store, held.run, watch, prices=prices or Prices(), epochs=self.training.epochs, about=about) as record,
            ):
                self._begin(store, held, facts, mode)
                record.add([self._started(held.run, asked_s)])
                record.see(machines().values())
                notes = self._work(plan, shape, record, held)
                held.check()
                self._publish(store)
                record.add([RunFinished(notes.rows, notes.rows, 0, time.time() - asked_s)])
                store.put(SUCCESS, b"")
        return Result(notes.metrics, self.place.child(LAST).uri, record.report())

    def _facts(self) -> dict[str, str]:
        training = self.training
        found = fingerprint.facts(self.pipeline, self.request) | fingerprint.loop_facts(training)
        found |= {"the input": units.digest(self.source.units), "epochs": str(training.epochs)}
        return found | {"shuffle": str(training.shuffle), "seed": str(training.seed), "framework": str(training.framework)}

    def _check(self, store: Folder, facts: Mapping[str, str], mode: Mode) -> None:
        """Refuse an output that is something else, or was begun with something else."""
        held, uri = store.names(""), self.place.uri
        if not held or (mode is Mode.RESTART and HOME in held and _about(store)):
            return
        before = _about(store) if HOME in held else None
        if before is None:
            if set(held) == {HOME} and store.names(HOME) in ([], ["ledger"], ["alive.json", "ledger"]):
                return  # a run that died before it had begun
            raise OutputError(f"output {uri!r} holds no training of headrace: it has {listing(held)}; choose an empty folder")
        changes = fingerprint.differences(before["facts"], facts)
        if not changes:
            return
        told = f"output {uri!r} was begun with something else:\n" + "".join(f"  {line}\n" for line in changes)
        if any(before["facts"].get(name) != facts.get(name) for name in ("the input", "--where", "--limit", "--keep")):
            raise ChangedError(told + "Which rows had been given says nothing about another input: --restart throws the training away and begins again.")
        if mode is not Mode.ACCEPT_CHANGE:
            raise ChangedError(told + "Choose: --accept-change goes on from the last checkpoint; --restart throws it away and begins again.")

    def _finished(self, store: Folder, facts: Mapping[str, str]) -> Result | None:
        """The result of a training that ended before, and was this one."""
        before = _about(store)
        if before is None or before["facts"] != facts or SUCCESS not in store.names(""):
            return None
        notes, _ = read(self.place.child(LAST))
        report = TrainingReport.of(_empty(self.training.name, self.place.uri, notes), epochs=self.training.epochs)
        return Result(notes.metrics, self.place.child(LAST).uri, report)

    def _begin(self, store: Folder, held: Ledger, facts: Mapping[str, str], mode: Mode) -> None:
        """Take hold of the output: what a restart throws away goes, and what is begun is written down."""
        store.delete(SUCCESS)
        if mode is Mode.RESTART:
            for name in (LAST, f"{HOME}/{trainers.EXPERIMENT}"):
                store.delete(name)
        for older in [name for name in store.names(f"{HOME}/ledger/claims") if name < held.run]:
            store.delete(claim_of(older))
        trainers.mend(self.home)
        store.put(_ABOUT, (json.dumps({"facts": dict(facts), "request": dict(self.request), "run": held.run}, indent=2) + "\n").encode())

    def _started(self, run: str, asked_s: float) -> RunStarted:
        versions = (("headrace", __version__), ("ray", ray.__version__), ("pyarrow", pa.__version__), ("python", platform.python_version()))
        total = (self.source.rows or 0) * self.training.epochs
        last = trainers.latest(self.home)
        before = read(last)[0].rows if last else 0
        return RunStarted(self.training.name, tuple(self.request["input"]), self.place.uri, run, asked_s, total, before, versions)

    def _work(self, plan: Plan, shape: trainers.Shape, record: TrainingRecord, held: Ledger) -> Notes:
        """Run the loop to its end; what its last checkpoint says."""
        log = EventLog.remote()  # type: ignore[attr-defined]
        config = {"training": self.training, "log": log, "cpus": shape.choice.hardware.cpus, "epoch_rows": self.source.rows}
        rows = partial(_rows, plan, self.source, self.training, self.home, log)
        stop, asked = threading.Event(), False
        pool = ThreadPoolExecutor(1, thread_name_prefix="headrace-training")
        try:
            with told_to_stop(stop):
                fitting = pool.submit(trainers.fit, work, config, home=self.home, shape=shape, rows=rows)
                for look in itertools.count(1):
                    if fitting.done():
                        break
                    if look % _CLAIMED == 0:
                        held.check()
                    stop.wait(_LOOK_S) if not asked else time.sleep(_LOOK_S)
                    if stop.is_set() and not asked:
                        asked = True
                        log.stop.remote()
                    record.add(ray.get(log.drain.remote()))
                    record.see(machines().values())
                record.add(ray.get(log.drain.remote()))
                fitting.result()
        except trainers.TrainingFailedError as error:
            raise _told(error) from error
        except ray.exceptions.RayError as error:
            raise translated(error) from error
        finally:
            log.stop.remote()  # of workers that go on although nobody waits for them any more
            pool.shutdown(wait=False)
        return self._ended(stopped=asked, failures=record.sums.failures)

    def _ended(self, *, stopped: bool, failures: Mapping[str, int]) -> Notes:
        last = trainers.latest(self.home)
        notes = read(last)[0] if last else Notes()
        if stopped and not notes.done:
            raise StoppedError(f"stopped at step {notes.step:,}, which is saved in {self.place.uri}; the same command goes on from there")
        if not notes.done:
            raise RunError("the workers ended without a last checkpoint; the same command tries again")
        if not notes.step and failures:
            why, number = next(iter(failures.items()))
            raise RunError(f"the loop was given no rows: {number:,} failed with {why}")
        return notes

    def _publish(self, store: Folder) -> None:
        """The last checkpoint in its place in the output."""
        last = trainers.latest(self.home)
        assert last is not None
        target = self.place.child(LAST)
        store.delete(LAST)
        try:
            target.filesystem.create_dir(target.path, recursive=True)
            fs.copy_files(last.path, target.path, source_filesystem=last.filesystem, destination_filesystem=target.filesystem)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot copy the last checkpoint to {target.uri!r}: {error}") from error


def _about(store: Folder) -> dict[str, Any] | None:
    """What an output was begun with, if it is a training's."""
    try:
        values: dict[str, Any] = json.loads(store.read(_ABOUT))
        return values
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{store.place.child(_ABOUT).uri!r} is damaged: {error}; choose an empty folder") from error


def shape_of(training: Training, cluster: Cluster) -> tuple[trainers.Shape, Cluster]:
    """The workers on this cluster, and the cluster that they leave to the pipeline's stages.

    Raises:
        HardwareError: it has no room for the fewest workers.
    """
    choice = choose(training.hardware, cluster, stage=training.name)
    if choice.fits < training.least_workers:
        raise HardwareError(
            f"training {training.name!r} asks for {training.least_workers} workers on {choice}, and the cluster holds {choice.fits}: {cluster}; "
            "lower workers=, ask for less in on=[...], or add a node"
        )
    most = min(training.most_workers, choice.fits)
    elastic = training.least_workers != training.most_workers
    workers = (training.least_workers, training.most_workers) if elastic else training.most_workers
    return trainers.Shape(workers, choice, training.retries, training.framework), _less(cluster, choice, most)


def _less(cluster: Cluster, choice: Choice, workers: int) -> Cluster:
    """The cluster without what so many workers take, and at least one core of it: what prepares rows shares that with them."""
    nodes = []
    for node in cluster.nodes:
        taken = min(workers, node.fits(choice.hardware, choice.kind))
        workers -= taken
        need = choice.hardware
        nodes.append(Node(node.name, node.cpus - taken * need.cpus, node.gpus - taken * need.gpus, node.kinds, node.memory_gb - taken * (need.memory_gb or 0)))
    if not any(node.cpus >= 1 for node in nodes):
        nodes[0] = dataclasses.replace(nodes[0], cpus=1.0)
    return Cluster(tuple(nodes))


def _rows(plan: Plan, source: Source, training: Training, home: Place, log: Any) -> compat.Dataset:
    """The rows that no worker was given before the last checkpoint, of all epochs, as one dataset. Made anew whenever workers start."""
    last = trainers.latest(home)
    taken = read(last)[1] if last else {}
    todo = left(source.units, epochs=training.epochs, shuffle=training.shuffle, seed=training.seed, taken=taken)
    with compat.DataContext.current(compat.context(compat.DataContext.get_current())):
        if not todo:
            return ray.data.from_arrow(pa.table({name: pa.array([], pa.null()) for name in plan.columns}))
        settled = Settled(log, shuffle=training.shuffle, seed=training.seed)
        return lower(plan, source, todo=todo, log=log, rows=_BLOCK_ROWS, finish=settled)


def _told(error: trainers.TrainingFailedError) -> HeadraceError:
    found = trainers.innermost(error)
    if isinstance(found, HeadraceError):
        return found
    told = translated(found)
    return RunError(f"the workers came to nothing: {told}; the same command goes on from the last checkpoint")


def _empty(name: str, output: str, notes: Notes) -> Sums:
    """The sums of a run that found its training done."""
    sums = Sums(step=notes.step, metrics=dict(notes.metrics))
    sums.add([RunStarted(name, (), output), RunFinished(0, 0, 0, 0.0)])
    return sums
