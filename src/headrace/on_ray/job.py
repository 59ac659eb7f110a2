"""Batch jobs: a pipeline over files, into files, exactly once. Checks, takes the output, runs, accounts for every row."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from headrace import __version__, fingerprint, ledger, letters, resume, sinks
from headrace.columns import ANY, ColumnType
from headrace.cost import Prices
from headrace.errors import LedgerError, OutputError, RunError, SettingError, StageError, StorageError, listing
from headrace.events import Event, RunFinished, RunStarted
from headrace.formats import Input, Output
from headrace.hardware import Cluster
from headrace.heartbeat import Heartbeat, wait_until_free
from headrace.ledger import Ledger
from headrace.letters import Allowance
from headrace.on_ray import compat
from headrace.on_ray.batch import lower
from headrace.on_ray.cluster import connected
from headrace.on_ray.commits import Driver, inputs_for, told_to_stop
from headrace.on_ray.machines import machines
from headrace.on_ray.operators import EventLog
from headrace.on_ray.translation import translated
from headrace.pipeline import Pipeline
from headrace.plan import Plan, resolve
from headrace.record import Record
from headrace.report import Report
from headrace.resume import Mode, Start, Todo
from headrace.sources import open_source, select
from headrace.state import Change, State
from headrace.store import Store
from headrace.tally import READER
from headrace.units import Source, Unit, plain, read_units, write_units
from headrace.weights import Weights

Connect = Callable[[], AbstractContextManager[Cluster]]
Watch = Callable[[Sequence[Event], int | None], None]

_PASSES = 3  # over rows that the engine lost


def run(
    pipeline: Pipeline,
    *,
    input: str | Sequence[str] | Input,
    output: str | Output,
    keep: str | Sequence[str] = (),
    mode: str = "resume",
    max_dead_letters: str | int = "1%",
    price: str | Sequence[str] = (),
    watch: Watch = lambda events, rows: None,
) -> Report:
    """Run a pipeline over files as a streaming batch job, on the Ray that is connected, or on one started here.

        hr.run(reviews, input=hr.Input("in/*.parquet", where="stars >= 4"), output="out", keep=["review_id"])

    Every row ends up in the output exactly once, or among the dead letters in `_headrace/dead_letters`. Run again, the same
    job goes on where it stopped; a finished one is left alone.

    Args:
        input: paths, folders, globs or URIs of Parquet, CSV, JSON Lines or image files, or an `Input` that says more.
        output: a folder or URI that does not exist, is empty, or holds this job, or an `Output` that says more.
        keep: input columns to carry to the output untouched; `"all"` for every one.
        mode: `resume` refuses an output that was begun with other input, code or settings; `accept-change` goes on with it,
            leaving rows that are done as they are, and runs what failed again; `restart` throws it away; `retry` is `accept-change`
            that runs what failed again even if nothing changed.
        max_dead_letters: how many rows may fail before the run is stopped, as a share such as `1%` or a number.
        price: what machines cost, in the words of `headrace run --price`; listed prices where nothing is said.
        watch: called about twice a second with the new events and the number of rows in all, if known.

    Raises:
        SourceError, OutputError, HardwareError, WiringError: before any hardware is used.
        ChangedError: the output was begun with something else, and `mode` does not say what to do.
        StageError: the set-up of a stage raised; with the user's own frames.
        DeadLetterError: more rows failed than `max_dead_letters`.
        StoppedError: Ctrl-C or SIGTERM. What was done is committed.
        RunError: the engine failed, or rows are missing; the output has no `_SUCCESS` then.
    """
    if mode not in list(Mode):
        raise SettingError(f"mode must be one of {listing(one.value for one in Mode)}, got {mode!r}")
    allowance = Allowance.parse(max_dead_letters)
    prices = Prices.parse([price] if isinstance(price, str) else price)
    job = Job.of(pipeline, input=input, output=output, keep=keep)
    return job.run(mode=Mode(mode), allowance=allowance, connect=connected, watch=watch, prices=prices)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A pipeline, what it reads, and where it writes; checked, and nothing touched yet.

    `request` is kept with the output, so that the same job can be made again from there.
    """

    pipeline: Pipeline
    source: Source
    wanted: Mapping[str, ColumnType]
    kept: tuple[str, ...]
    sink: sinks.Sink
    schema: pa.Schema
    request: Mapping[str, Any]

    @staticmethod
    def of(
        pipeline: Pipeline, *, input: str | Sequence[str] | Input, output: str | Output, keep: str | Sequence[str] = (), origin: Mapping[str, Any] | None = None
    ) -> Job:
        """The job, with the errors that `run` raises before it uses hardware. `origin` says where the pipeline comes from."""
        input = input if isinstance(input, Input) else Input(input)
        output = output if isinstance(output, Output) else Output(output)
        source = open_source(input)
        kept = tuple(source.schema.names) if keep == "all" else ((keep,) if isinstance(keep, str) else tuple(keep))
        wanted = {**dict.fromkeys(kept, ANY), **pipeline.inputs}
        source = select(source, wanted, pipeline=pipeline.name, where=input.where, limit=input.limit)
        request = {
            "origin": dict(origin or {}),
            "pipeline": pipeline.name,
            "input": [uri if "://" in uri else os.path.abspath(uri) for uri in input.uris],
            "format": input.format,
            "columns": list(input.columns) if input.columns is not None else None,
            "where": input.where,
            "limit": input.limit,
            "keep": list(kept),
            "sink": output.format,
        }
        return Job(
            pipeline=pipeline,
            source=source,
            wanted=wanted,
            kept=kept,
            sink=sinks.open_sink(output),
            schema=_schema({**pipeline.kept(kept), **pipeline.outputs}, source),
            request=request,
        )

    @staticmethod
    def again(pipeline: Pipeline, output: str) -> Job:
        """The job that an output was made by, with a pipeline that may have been mended since.

        Raises:
            OutputError: there is no job in that folder.
        """
        request = request_of(output)
        input = Input(request["input"], **{name: request[name] for name in ("format", "columns", "where", "limit")})
        return Job.of(pipeline, input=input, output=Output(output, format=request["sink"]), keep=request["keep"], origin=request["origin"])

    def run(self, *, mode: Mode, allowance: Allowance, connect: Connect, watch: Watch, prices: Prices | None = None) -> Report:
        """Run it; see `run` above."""
        store, output = self.sink.store, self.sink.place.uri
        pipeline = self.pipeline.pinned()
        facts = fingerprint.facts(pipeline, self.request, {field.name: field.type for field in self.schema})

        def begin(before: State | None) -> Start:
            here = resume.start(before, self.source, request=self.request, facts=facts, old=partial(_unit_table, store))
            resume.check(here, output, mode)
            return here

        restart = mode is Mode.RESTART
        here = begin(sinks.inspect(self.sink, self.schema, restart=restart))
        if mode is not Mode.RETRY and not here.changes and ledger.complete(store, here.state):
            return Report.of_finished(self.pipeline.name, output, here.state, resume.given_up(here.state, here.units))
        prices = prices or Prices()
        started, asked_s = time.perf_counter(), time.time()
        wait_until_free(store, uri=output)
        joined = ray.is_initialized()
        with connect() as cluster:
            for stage in self.pipeline.stages:
                compat.ship(stage.call, importable=not joined and compat.started_here())
            plan = resolve(pipeline, cluster, keep=self.kept)
            held, before = Ledger.claim(store, restart=restart)
            with Heartbeat(store, held.run), Record(self.sink, held.run, lambda new: watch(new, self.source.rows), prices=prices) as record:
                here = begin(before)  # again, since another run may have gone on meanwhile
                record.begin(self._started(held.run, here, asked_s), plan, machines().values(), here.state)
                retry = mode is Mode.RETRY or bool(here.changes)
                try:
                    driver = self._settle(plan, held, here, record, allowance, retry=retry)
                    record.state = held.state
                    rows_out, dead, record.lost = self._account(held, here, driver)
                except (RunError, StageError, StorageError) as error:
                    known = getattr(held, "state", here.state)  # a full disk may have kept the ledger from being begun
                    settled = known.rows_done + known.rows_dead
                    error.add_note(f"{settled:,} rows are committed in {output}; the same command goes on from there")
                    raise
                letters.consolidate(held)
                held.finish(partial(self._before_success, held))
                record.add([RunFinished(rows_out + dead, rows_out, dead, time.perf_counter() - started)])
        return record.report()

    def _started(self, run: str, here: Start, asked_s: float) -> RunStarted:
        before = here.state.rows_done + here.state.rows_dead
        versions = (("headrace", __version__), ("ray", ray.__version__), ("pyarrow", pa.__version__), ("python", platform.python_version()))
        return RunStarted(self.pipeline.name, tuple(self.request["input"]), self.sink.place.uri, run, asked_s, self.source.rows, before, versions)

    def _settle(self, plan: Plan, held: Ledger, here: Start, record: Record, allowance: Allowance, *, retry: bool) -> Driver:
        """Run every row that is not settled yet, and publish the files that hold them."""
        todo = resume.todo(here.state, here.units, retry=retry)
        source, unreadable = resume.renumbered(self.source, here.units), here.state.unreadable
        if retry:
            unreadable = {unit: why for unit, why in unreadable.items() if unit in source.unreadable or resume.is_gone(why)}
        held.store.put(here.state.units, write_units(here.units))
        # A finished output stays finished while what failed in it is tried again: it is complete at any moment.
        held.begin(dataclasses.replace(here.state, finished=here.state.finished and not here.grew, unreadable=unreadable))
        if self.sink.format == "delta" and not held.state.files:
            held.store.delete("_delta_log")  # of a run that was thrown away: its files are gone by now
        driver = Driver(
            ledger=held,
            sink=self.sink,
            schema=self.schema,
            inputs=inputs_for(source, here.units, self.wanted),
            log=EventLog.remote(),  # type: ignore[attr-defined]
            record=record,
            allowance=allowance,
            total=self.source.rows,
            units=len(here.units),
            weights=Weights(todo),
            groups=[READER, *(group.name for group in plan.groups)],
            already_dead=0 if retry else here.state.rows_dead,
            lost={unit: why for unit, why in unreadable.items() if not resume.is_gone(why)},
        )
        with told_to_stop(driver.stop):
            _execute(plan, source, here.units, todo, driver)
            driver.publish_rest()
        return driver

    def _account(self, held: Ledger, here: Start, driver: Driver) -> tuple[int, int, Mapping[int, str]]:
        """Rows out, rows dead, and units given up; a RunError unless every row of the input is one of the three."""
        if driver.lost.keys() - held.state.unreadable.keys():
            held.commit(Change(unreadable=driver.lost))
        lost = resume.given_up(held.state, here.units)
        driver.lost = {unit: why for unit, why in lost.items() if not resume.is_gone(why)}
        driver.check_allowance(final=True)
        missing = [(unit, rows) for unit in here.units if unit.id not in lost and (rows := held.state.missing(unit.id, unit.start, unit.rows))]
        if missing:
            unit, rows = missing[0]
            raise RunError(
                f"rows of {len(missing)} input units never came out of the engine, among them {rows[0]} of {unit.paths[0]!r}; "
                "the output is not marked as a success. The same command tries them again"
            )
        return held.state.rows_done, held.state.rows_dead, lost

    def _before_success(self, held: Ledger) -> None:
        if self.sink.format == "delta":
            sinks.commit_delta(self.sink, held.state.files.values(), self.schema)


def request_of(output: str) -> Mapping[str, Any]:
    """What the job in an output folder was asked for.

    Raises:
        OutputError: there is no job in that folder.
    """
    store = sinks.open_sink(Output(output)).store
    state = ledger.load(store)
    if state is None:
        raise OutputError(f"{output!r} holds no run of headrace; name the folder that a run wrote to")
    return state.request


def _unit_table(store: Store, name: str) -> Sequence[Unit]:
    try:
        return read_units(store.read(name))
    except FileNotFoundError:
        raise LedgerError(f"the unit table {name} of the output is gone; begin again with --restart") from None


def _execute(plan: Plan, source: Source, units: Sequence[Unit], todo: Todo, driver: Driver) -> None:
    """Run the rows in `todo` until all are settled. Rows that the engine lost are run again, as long as that brings some back."""
    driver.adopt()
    for _ in range(_PASSES):
        if not todo:
            return
        try:
            with compat.DataContext.current(compat.context(compat.DataContext.get_current())):
                settled = driver.run(lower(plan, source, todo=todo, log=driver.log))
        except (ray.exceptions.RayError, compat.ExecutionTimeoutError) as error:  # the latter after half an hour without progress
            raise translated(error) from error
        left = resume.todo(driver.ledger.state, units)
        todo = [(unit, rows) for unit, rows in left if unit.id not in driver.lost] if settled else []


def _schema(columns: Mapping[str, ColumnType], source: Source) -> pa.Schema:
    """The Arrow schema of the output; a kept column has the source's own type."""
    kinds = {name: plain(source.schema.field(name).type) if column.kind == "any" else column.arrow for name, column in columns.items()}
    return pa.schema(list(kinds.items()))
