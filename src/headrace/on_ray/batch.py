"""The lowering of a plan: a plan and a source become one native `ray.data.Dataset`. `headrace.on_ray.job` runs it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ray

from headrace import resume
from headrace.batching import Tokens
from headrace.on_ray import compat
from headrace.on_ray.operators import EventLog, Finish, Functions, Reader, Replica, pack
from headrace.plan import Group, Plan
from headrace.resume import Todo
from headrace.state import State
from headrace.units import Source

_BLOCK_BYTES = 32 << 20
_HEAVIEST_BLOCK_BYTES = 512 << 20  # where the rows of one part of the input are far longer than the rest
_BLOCKS_PER_REPLICA = 6
_UNSORTED_ROWS = 16  # rows that are taken for a slice where a rule counts rows: a stage may sort them itself


def lower(plan: Plan, source: Source, *, todo: Todo | None = None, log: Any = None, rows: int | None = None, finish: Finish | None = None) -> compat.Dataset:
    """The plan over the source as a native dataset: a reading operator, then one operator per group.

    Functions become tasks, models become actor pools between the plan's bounds, each with resources of its own, so that
    what prepares the input of a model runs beside it. Go on with Ray's own API from here, if you like: the rows have the
    hidden columns of `headrace.lineage`, and a row that failed has a fault there. `todo` are the rows to run, all when left
    out; `log` is an `EventLog` actor, one of its own when left out. `rows` are those of a block, as far as memory and the
    number of replicas allow, where no stage has its rows sorted by length; `finish` is called with every block of the last operator.
    """
    if todo is None:
        todo = resume.todo(State(request={}, facts={}, units="", unreadable=dict(source.unreadable)), source.units)
    log = log or EventLog.remote()  # type: ignore[attr-defined]
    count = _count(todo)
    rows = block_rows(plan, source, count=count, wanted=rows)
    dataset: compat.Dataset = ray.data.from_arrow(pack(todo, rows))
    # The readers get their units task by task, so the source itself travels without them.
    reader = Reader(dataclasses.replace(source, units=()), plan.source, rows, log, None if plan.groups else finish)
    # Ray fuses these two into one operator. Its block rule is a number of bytes, which would leave one block of 8,192
    # reviews, and one actor busy; a number of rows gives every replica its share.
    dataset = dataset.map_batches(reader, batch_size=None, batch_format="pyarrow").repartition(target_num_rows_per_block=rows)
    for group in plan.groups:
        # A model after a function needs no fence: the function has one, and a second would make the two alike again.
        fence = compat.fence() if group.replicas is None or group is plan.groups[0] else {}
        dataset = _operator(dataset, group, count, rows, log, fence, finish if group is plan.groups[-1] else None)
    return dataset


def _count(todo: Todo) -> int | None:
    """How many rows there are to run, or None when only reading tells."""
    stops = [(start, stop) for _, rows in todo for start, stop in rows]
    return sum(stop - start for start, stop in stops if stop is not None) if all(stop is not None for _, stop in stops) else None


def _operator(dataset: compat.Dataset, group: Group, count: int | None, rows: int, log: Any, fence: dict[str, Any], finish: Finish | None) -> compat.Dataset:
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
        return dataset.map_batches(Functions(group, log, finish), batch_size=size, batch_format="pyarrow", **options)
    least, most = group.replicas
    useful = most if count is None else min(most, max(1, math.ceil(count / rows)))
    # See Replica. What waits for something else is given a second block, so that it has work while the first one's last rows are done.
    at_once = 2 if hardware.gpus or group.stages[0].concurrency > 1 else 1
    pool = compat.ActorPoolStrategy(
        min_size=min(least, useful),
        max_size=most,
        initial_size=useful,
        max_tasks_in_flight_per_actor=at_once + 1,
        max_concurrent_calls_per_actor=at_once,
        enable_true_multi_threading=at_once > 1,
    )
    given = {"group": group, "log": log, "finish": finish}
    return dataset.map_batches(Replica, fn_constructor_kwargs=given, compute=pool, batch_size=size, batch_format="pyarrow", **options)


def block_rows(plan: Plan, source: Source, *, count: int | None, wanted: int | None = None) -> int:
    """Rows per block of a run over `count` rows: large enough to sort by length within, small enough to share out and to hold.

    Sorted within n rows and cut into slices of s, about s / n of the tokens are padding (measured on reviews: 9 % for 13 / 167,
    4 % for 13 / 384). Of m rows per replica, the last block leaves replicas idle for half a block on average, n / 2m of the run. The sum of
    the two is least at n = sqrt(2 s m). Where no stage is sorted by length, `wanted` takes the place of that.
    """
    models = [group for group in plan.groups if group.replicas]
    replicas = sum(group.replicas[1] for group in models if group.replicas) or int(plan.cluster.cpus) or 1
    stages = [stage for group in models for stage in group.stages]
    ideal = 16_384
    if models:
        call_rows = max(stage.concurrency * _slice_rows(stage.batch, source) for stage in stages)
        slice_rows = max(_slice_rows(s.batch, source) if isinstance(s.batch, Tokens) else min(_UNSORTED_ROWS, s.batch.count) for s in stages)
        best = 8 * call_rows if count is None else math.isqrt(2 * slice_rows * count // replicas)
        ideal = min(4096, max(best, min(512, 2 * call_rows)))
    if wanted is not None and not any(isinstance(stage.batch, Tokens) for group in models for stage in group.stages):
        ideal = wanted
    if count is not None:
        ideal = min(ideal, math.ceil(count / (_BLOCKS_PER_REPLICA * replicas)))
    return max(1, min(max(32, ideal), _BLOCK_BYTES // max(1, source.row_bytes), _HEAVIEST_BLOCK_BYTES // max(1, source.heaviest_bytes)))


def _slice_rows(rule: Any, source: Source) -> int:
    if isinstance(rule, Tokens):
        return max(1, int(rule.budget * rule.bytes_per_token / max(1, source.row_bytes)))
    return int(rule.count)
