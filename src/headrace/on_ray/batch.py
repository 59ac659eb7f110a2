"""The batch target: a plan and a source become one native `ray.data.Dataset`; `run` writes it and accounts for every row."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import ray

from headrace import sinks
from headrace.batching import Tokens
from headrace.columns import ANY, ColumnType
from headrace.errors import HeadraceError, RunError
from headrace.events import Event, FileWritten, RunFinished, RunStarted
from headrace.formats import Input, Output
from headrace.hardware import Cluster
from headrace.on_ray import compat
from headrace.on_ray.cluster import connected
from headrace.on_ray.operators import EventLog, Functions, Reader, Replica, Writer, pack
from headrace.pipeline import Pipeline
from headrace.plan import Group, Plan, resolve
from headrace.record import Record
from headrace.report import Report
from headrace.sources import open_source, select
from headrace.units import Source, plain

_BLOCK_BYTES = 32 << 20
_HEAVIEST_BLOCK_BYTES = 512 << 20  # where the rows of one part of the input are far longer than the rest
_BLOCKS_PER_REPLICA = 6
_POLL_S = 0.5


def run(
    pipeline: Pipeline,
    *,
    input: str | Sequence[str] | Input,
    output: str | Output,
    keep: str | Sequence[str] = (),
    connect: Callable[[], AbstractContextManager[Cluster]] = connected,
    watch: Callable[[Sequence[Event], int | None], None] = lambda events, rows: None,
) -> Report:
    """Run a pipeline over files as a streaming batch job, on the Ray that is connected, or on one started here.

        hr.run(reviews, input=hr.Input("in/*.parquet", where="stars >= 4"), output="out", keep=["review_id"])

    Args:
        input: paths, folders, globs or URIs of Parquet, CSV, JSON Lines or image files, or an `Input` that says more.
        output: a folder or URI that does not exist or is empty, or an `Output` that says more.
        keep: input columns to carry to the output untouched; `"all"` for every one.
        connect: gives the connection to Ray for the length of the run; see `headrace.on_ray.cluster`.
        watch: called twice a second, from a thread, with the new events and the number of rows in all, if known.

    Raises:
        SourceError, OutputError, HardwareError, WiringError: before any hardware is used.
        StageError: a stage raised; with the user's own frames.
        RunError: the engine failed, or rows are missing; the output has no `_SUCCESS` then.
    """
    started = time.perf_counter()
    input = input if isinstance(input, Input) else Input(input)
    output = output if isinstance(output, Output) else Output(output)
    source = open_source(input)
    kept = tuple(source.schema.names) if keep == "all" else ((keep,) if isinstance(keep, str) else tuple(keep))
    wanted = {**dict.fromkeys(kept, ANY), **pipeline.inputs}
    source = select(source, wanted, pipeline=pipeline.name, where=input.where, limit=input.limit)
    sink, schema = sinks.open_sink(output), _schema({**pipeline.kept(kept), **pipeline.outputs}, source)
    sinks.vacant(sink, schema, pipeline=pipeline.name)
    joined = ray.is_initialized()
    with connect() as cluster:
        for stage in pipeline.stages:
            compat.ship(stage.call, importable=not joined and compat.started_here())
        plan = resolve(pipeline, cluster, keep=kept)
        sinks.prepare(sink, schema, pipeline=pipeline.name)
        with Record(sink, lambda new: watch(new, source.rows)) as record:
            record.add([RunStarted(pipeline.name, input.uris, output.path)])
            files = _execute(plan, source, sink, record)
            rows_in, rows_out = record.tally.rows_read, sum(file.rows for file in files)
            if rows_in != rows_out or source.rows not in (None, rows_in):
                promised = "" if source.rows is None else f" of {source.rows:,} in the files"
                raise RunError(f"{rows_in:,} rows were read{promised}, but {rows_out:,} written to {output.path!r}; the output is not marked as a success")
            sinks.finish(sink, files, schema)
            record.add([*files, RunFinished(rows_in, rows_out, time.perf_counter() - started)])
    return record.tally.report(pipeline=pipeline.name, output=output.path, groups=[group.name for group in plan.groups])


def lower(plan: Plan, source: Source, *, log: Any = None) -> compat.Dataset:
    """The plan over the source as a native dataset: a reading operator, then one operator per group.

    Functions become tasks, models become actor pools between the plan's bounds, each with resources of its own, so that
    what prepares the input of a model runs beside it. Go on with Ray's own API from here, if you like. `log` is an
    `EventLog` actor; one of its own when left out.
    """
    log = log or EventLog.remote()  # type: ignore[attr-defined]
    rows = block_rows(plan, source)
    dataset: compat.Dataset = ray.data.from_arrow(pack(source.units, rows))
    # The readers get their units task by task, so the source itself travels without them.
    reader = Reader(dataclasses.replace(source, units=()), plan.source, rows, log)
    # Ray fuses these two into one operator. Its block rule is a number of bytes, which would leave one block of 8,192
    # reviews, and one actor busy; a number of rows gives every replica its share.
    dataset = dataset.map_batches(reader, batch_size=None, batch_format="pyarrow").repartition(target_num_rows_per_block=rows)
    for group in plan.groups:
        # A model after a function needs no fence: the function has one, and a second would make the two alike again.
        fence = compat.fence() if group.replicas is None or group is plan.groups[0] else {}
        dataset = _operator(dataset, group, source, rows, log, fence)
    return dataset


def _operator(dataset: compat.Dataset, group: Group, source: Source, rows: int, log: Any, fence: dict[str, Any]) -> compat.Dataset:
    hardware, kind = group.choice.hardware, group.choice.kind
    options: dict[str, Any] = {"num_cpus": hardware.cpus, **fence}
    if hardware.gpus:
        options["num_gpus"] = hardware.gpus
    if kind:
        options["accelerator_type"] = kind
    if hardware.memory_gb:
        options["memory"] = hardware.memory_gb * 1e9
    options |= dict(group.stages[0].ray)
    size = rows if options.get("num_gpus") else None  # whole blocks; beside accelerators Ray insists on a number
    if group.replicas is None:
        return dataset.map_batches(Functions(group, log), batch_size=size, batch_format="pyarrow", **options)
    least, most = group.replicas
    useful = most if source.rows is None else min(most, max(1, math.ceil(source.rows / rows)))
    pool = compat.ActorPoolStrategy(min_size=least, max_size=most, initial_size=max(least, useful), max_tasks_in_flight_per_actor=2)
    return dataset.map_batches(Replica, fn_constructor_kwargs={"group": group, "log": log}, compute=pool, batch_size=size, batch_format="pyarrow", **options)


def block_rows(plan: Plan, source: Source) -> int:
    """Rows per block: large enough to sort by length within, small enough to share out and to hold in memory.

    Blocks of many slices pad little, many blocks per replica leave little of the run to the replica that finishes last.
    """
    models = [group for group in plan.groups if group.replicas]
    replicas = sum(group.replicas[1] for group in models if group.replicas) or int(plan.cluster.cpus) or 1
    ideal = 16_384
    if models:
        ideal = min(4096, max(512, 8 * max(_slice_rows(stage.batch, source) for group in models for stage in group.stages)))
    if source.rows is not None:
        ideal = min(ideal, math.ceil(source.rows / (_BLOCKS_PER_REPLICA * replicas)))
    return max(1, min(max(32, ideal), _BLOCK_BYTES // max(1, source.row_bytes), _HEAVIEST_BLOCK_BYTES // max(1, source.heaviest_bytes)))


def _slice_rows(rule: Any, source: Source) -> int:
    if isinstance(rule, Tokens):
        return max(1, int(rule.budget * rule.bytes_per_token / max(1, source.row_bytes)))
    return int(rule.count)


def _execute(plan: Plan, source: Source, sink: sinks.Sink, record: Record) -> list[FileWritten]:
    """Run the dataset into the sink, recording events meanwhile; returns the files that belong to the output."""
    log: Any = EventLog.remote()  # type: ignore[attr-defined]
    writer = Writer(sink)
    done = threading.Event()

    def follow() -> None:
        while not done.wait(_POLL_S):
            record.add(ray.get(log.drain.remote()))

    follower = threading.Thread(target=follow, name="headrace-events", daemon=True)
    follower.start()
    try:
        with compat.DataContext.current(compat.context(compat.DataContext.get_current())):
            lower(plan, source, log=log).write_datasink(writer, ray_remote_args={"num_cpus": 0.5})
    except ray.exceptions.RayError as error:
        raise _translated(error) from error
    finally:
        done.set()
        follower.join()
    record.add(ray.get(log.drain.remote()))
    return writer.files


def _translated(error: BaseException) -> HeadraceError:
    """The HeadraceError that a worker raised, dug out of Ray's wrapping; else a RunError with Ray's own words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HeadraceError) and not isinstance(seen, ray.exceptions.RayError):  # Ray's wrapper is both, and prints its own frames
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    first = str(error).strip().splitlines()
    return RunError(f"Ray stopped the run: {type(error).__name__}: {first[-1] if first else 'no message'}")


def _schema(columns: Mapping[str, ColumnType], source: Source) -> pa.Schema:
    """The Arrow schema of the output; a kept column has the source's own type."""
    kinds = {name: plain(source.schema.field(name).type) if column.kind == "any" else column.arrow for name, column in columns.items()}
    return pa.schema(list(kinds.items()))
