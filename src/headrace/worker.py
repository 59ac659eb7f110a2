"""What one replica does with one block: run a group's stages over a table, slice by slice.

Free of any engine: `local` and every target on Ray run this same code, so they cannot drift apart.

A block with the column `lineage.FAULT` isolates: rows that fail get a `Fault` and go past the further stages, the others go
on. In any other block a failure is raised. A row that kills the process is found with a `Guard`, in the block's next lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.arrays import to_arrow, to_stage
from headrace.batching import Indices, Tokens
from headrace.columns import from_arrow
from headrace.errors import ContractError, HeadraceError, StageError, WiringError, listing, nearest
from headrace.events import BlockDone, BudgetHalved, Event
from headrace.lineage import FAULT, HIDDEN, ROW, UNIT, Fault
from headrace.stage import Stage

DEATHS = 2
"""From how many deaths on a block is watched call by call, and a row that ran alone is at fault.

A single death is usually somebody else's doing (a node taken away, a neighbour that used up the memory), and must not bury
a good row: two such deaths, both while the same row ran alone, are no coincidence.
"""

_MOST_DEATHS = 200  # in one block; more than its rows explain, unless dozens of them are deadly

_DIED = "ProcessDied"
_MESSAGE_CHARS, _FRAMES_CHARS = 2_000, 8_000
_PACKAGE = __name__.partition(".")[0]

T = TypeVar("T")
Outcome = dict[str, pa.Array] | Fault
"""What a call comes to: the columns that the stage writes, or why there are none."""


class Guard(Protocol):
    """Remembers, longer than a process lives, what it was doing."""

    def enter(self, key: str) -> int:
        """Note that the work `key` begins; returns how many earlier entries of it were never left: processes that died in it."""

    def leave(self, key: str) -> None:
        """Note that the work `key` has ended, well or with an exception. Whether earlier entries are forgotten with it is open."""


class Worker:
    """A group's stages, set up on one device.

    Instances of classes are copied before `setup`, so that a pipeline object can be run many times. `note` is what their
    `setup` returned, if that is text.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        group: str = "",
        device: str = "cpu",
        overlap: bool = True,
        emit: Callable[[Event], object] = lambda event: None,
        guard: Guard | None = None,
    ) -> None:
        ready = [set_up(stage, device) for stage in stages]
        self.stages = [stage for stage, _ in ready]
        self.note = "; ".join(note for _, note in ready if note)
        self.group = group
        self.overlap = overlap
        self.emit = emit
        self.guard = guard
        self.shrink = {stage.name: 1 for stage in stages}

    def __call__(self, data: pa.Table, carries: Iterable[str] | None = None) -> pa.Table:
        """`data` with every stage's columns set, cut down to `carries` and lineage if given; as many rows, in the same order.

        Where `data` isolates, the columns of a row at fault are null, and nothing that a stage does with a row is raised.

        Raises:
            StageError: a stage raised, or (ContractError) returned something other than it declared.
        """
        if self.guard is None or FAULT not in data.column_names or not data.num_rows:
            return self._block(data, carries, None)
        key = _key(f"block of {self.group}", data, range(data.num_rows))
        deaths = self.guard.enter(key)
        with _leaving(self.guard, key):
            if deaths > _MOST_DEATHS:
                raise StageError(f"the process died {deaths} times in the {key}; the cause lies outside of single rows", self.group)
            return self._block(data, carries, self.guard if deaths >= DEATHS else None)

    def _block(self, data: pa.Table, carries: Iterable[str] | None, watch: Guard | None) -> pa.Table:
        """One stage after the other; `watch` is told of every call, and keeps those that were deadly from being made again."""
        started, padded, real = time.perf_counter(), 0, 0
        for stage in self.stages:
            data = data.combine_chunks()
            lengths, rows = measure(stage, data), _good(data)
            widths = _widths(stage, data, lengths)
            results: list[tuple[Indices, dict[str, pa.Array]]] = []
            faults: dict[int, Fault] = {}
            for indices, outcome in self._run(stage, data, self._slices(stage, lengths, rows), lengths, watch):
                if isinstance(outcome, Fault):
                    faults[int(indices[0])] = outcome
                else:
                    results.append((indices, outcome))
                padded += len(indices) * int(widths[indices].max(initial=0))
            real += int(widths[rows].sum())
            data = _mark(_merge(data, stage, results), faults)
        self.emit(BlockDone(self.group, data.num_rows, time.perf_counter() - started, real, padded))
        return data if carries is None else data.select([name for name in dict.fromkeys((*carries, *HIDDEN)) if name in data.column_names])

    def _slices(self, stage: Stage, lengths: Indices, rows: Indices) -> list[Indices]:
        return [rows[part] for part in stage.batch.slices(lengths[rows], shrink=self.shrink[stage.name])]

    def _run(self, stage: Stage, data: pa.Table, slices: list[Indices], lengths: Indices, watch: Guard | None) -> Iterator[tuple[Indices, Outcome]]:
        """Every slice's row indices and outcome, where a fault is always that of a single row.

        A slice that fails is called again in halves, down to its rows; one that killed the process at once row by row, since a
        death costs more than a call. An accelerator out of memory halves the budget for all rows not yet done.
        """
        calls = np.zeros(data.num_rows, np.int64)  # that failed, for each row
        while slices:
            done = 0
            again: list[Indices] = []
            try:
                for outcome in self._stream(stage, data, slices, watch):
                    indices = slices[done]
                    if isinstance(outcome, Fault):
                        calls[indices] += outcome.attempts
                        outcome = dataclasses.replace(outcome, stage=stage.name, attempts=int(calls[indices[0]]))
                    if isinstance(outcome, Fault) and len(indices) > 1:
                        again += np.array_split(indices, len(indices) if outcome.error == _DIED else 2)
                    else:
                        yield indices, outcome
                    done += 1
            except StageError as error:
                if not _out_of_memory(error.__cause__) or len(slices[done]) == 1:
                    raise
            else:
                slices = again
                continue
            # The traceback, and with it the failed call's tensors, is gone by now: only then does freeing help.
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
                sys.modules["torch"].cuda.empty_cache()
            failed = slices[done]
            calls[failed] += 1
            while len(self._slices(stage, lengths, failed)[0]) > len(failed) // 2:
                self.shrink[stage.name] *= 2  # more than once where the slice was smaller than the rule allows
            self.emit(BudgetHalved(stage.name, str(stage.batch), self.shrink[stage.name]))
            slices = [part for rows in (*slices[done:], *again) for part in self._slices(stage, lengths, rows)]

    def _stream(self, stage: Stage, data: pa.Table, slices: Sequence[Indices], watch: Guard | None) -> Iterator[Outcome]:
        """Outcomes in order. With `overlap`, a thread cuts out the next slice and encodes the last while the stage computes."""
        isolate = FAULT in data.column_names
        if watch is not None or not self.overlap or len(slices) == 1:
            for indices in slices:
                yield _slice(stage, data, indices, isolate) if watch is None else _watched(stage, data, indices, watch)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="headrace-overlap") as side:
            ahead = side.submit(_gather, stage, data, slices[0])
            encoding: Future[Outcome] | None = None
            for at, indices in enumerate(slices):
                inputs = ahead.result()
                if at + 1 < len(slices):
                    ahead = side.submit(_gather, stage, data, slices[at + 1])
                try:
                    outputs = _attempt(isolate, len(indices), _call, stage, inputs)
                finally:  # the slice before is complete whatever this one does: hand it over first
                    before, encoding = encoding, None
                    if before is not None:
                        yield before.result()
                encoding = side.submit(_attempt, isolate, len(indices), _encode, stage, outputs, len(indices))
            if encoding is not None:
                yield encoding.result()


def set_up(stage: Stage, device: str) -> tuple[Stage, str]:
    """The stage with an instance of its own on which `setup` has run, if it is a class; and what `setup` had to say."""
    if not stage.is_model:
        return stage, ""
    call, note = dataclasses.replace(stage.call), None  # type: ignore[type-var]
    if hasattr(call, "setup"):
        with _user_code(stage, "setup failed"):
            note = call.setup(device)
    return dataclasses.replace(stage, call=call), note if isinstance(note, str) else ""


def measure(stage: Stage, data: pa.Table) -> Indices:
    """The length of each row in the unit of the stage's batch rule: tokens for a token budget, else 1. Shape (rows,)."""
    rule = stage.batch
    if not isinstance(rule, Tokens):
        return np.ones(data.num_rows, np.int64)
    array = data[rule.of]
    kind = from_arrow(array.type).kind
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(data.num_rows, array.type.list_size)
    elif pa.types.is_null(array.type):
        lengths = np.ones(data.num_rows)
    elif kind in ("str", "bytes"):
        lengths = np.ceil(pc.fill_null(pc.binary_length(array), 0).to_numpy() / rule.bytes_per_token)
    elif kind in ("list", "vector"):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    else:
        raise WiringError(f"stage {stage.name!r}: hr.tokens cannot measure {rule.of!r}, which is {array.type}; it measures text, vectors and lists")
    return np.clip(lengths, 1, rule.longest).astype(np.int64)


def _widths(stage: Stage, data: pa.Table, lengths: Indices) -> Indices:
    """What each row is as wide as, where a call is as wide as its widest row: by the batch rule, else the one list of numbers that a model reads."""
    if isinstance(stage.batch, Tokens) or not stage.is_model:
        return lengths
    lists = [name for name in stage.reads if _is_ragged(data[name].type)]
    return np.clip(pc.fill_null(pc.list_value_length(data[lists[0]]), 0).to_numpy(), 1, None).astype(np.int64) if len(lists) == 1 else lengths


def _is_ragged(kind: pa.DataType) -> bool:
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)))


def _good(data: pa.Table) -> Indices:
    """The rows without a fault."""
    return np.flatnonzero(data[FAULT].is_null()) if FAULT in data.column_names else np.arange(data.num_rows)


def _gather(stage: Stage, data: pa.Table, indices: Indices) -> dict[str, Any]:
    """The slice's columns as the stage receives them. Neighbouring rows are cut without a copy."""
    whole = data.select(list(stage.reads))
    adjoining = len(indices) and indices[-1] - indices[0] + 1 == len(indices) and (np.diff(indices) == 1).all()
    part = whole.slice(int(indices[0]), len(indices)) if adjoining else whole.take(pa.array(indices))
    return {name: to_stage(_one(part[name]), column) for name, column in stage.reads.items()}


def _one(array: pa.ChunkedArray) -> pa.Array:
    return array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()


def _call(stage: Stage, inputs: dict[str, Any]) -> Any:
    with _user_code(stage, "raised"):
        return stage.call(**inputs)


def _encode(stage: Stage, outputs: Any, rows: int) -> Outcome:
    """The stage's result as Arrow arrays, checked against what it declared. A fault of the call stays one."""
    if isinstance(outputs, Fault):
        return outputs
    if not isinstance(outputs, dict):
        raise ContractError(
            f"stage {stage.name!r} returned {type(outputs).__name__}; it must return a dict of columns, such as {{{next(iter(stage.writes))!r}: [...]}}",
            stage.name,
        )
    if missing := [name for name in stage.writes if name not in outputs]:
        raise ContractError(
            f"stage {stage.name!r} did not return {missing[0]!r}, which its out declares; it returned {listing(outputs)}" + nearest(missing[0], outputs),
            stage.name,
        )
    if extra := [name for name in outputs if name not in stage.writes]:
        raise ContractError(f"stage {stage.name!r} returned {extra[0]!r}, which its out does not declare; add it to out, or leave it away", stage.name)
    arrays = {}
    for name, column in stage.writes.items():
        try:
            arrays[name] = to_arrow(outputs[name], column, rows=rows)
        except ValueError as error:
            raise ContractError(f"stage {stage.name!r} returned a wrong {name!r}, declared as {column}: {error}", stage.name) from error
    return arrays


def _slice(stage: Stage, data: pa.Table, indices: Indices, isolate: bool) -> Outcome:
    """What one call comes to, from the block's columns to the stage's."""
    outputs = _attempt(isolate, len(indices), _call, stage, _gather(stage, data, indices))
    return _attempt(isolate, len(indices), _encode, stage, outputs, len(indices))


def _watched(stage: Stage, data: pa.Table, indices: Indices, watch: Guard) -> Outcome:
    """The same, known to `watch`. What a process died in is not called again: several rows at once after one death, one row after `DEATHS`."""
    key, most = _key(f"call of {stage.name}", data, indices), 1 if len(indices) > 1 else DEATHS
    if watch.enter(key) >= most:  # and is not left: it must stay known while further deaths in the block are looked into
        return Fault(stage.name, _DIED, f"the process died {most} times while it ran this row alone (a crash, os._exit, or out of memory)", attempts=most)
    with _leaving(watch, key):
        return _slice(stage, data, indices, isolate=True)


@contextlib.contextmanager
def _leaving(guard: Guard, key: str) -> Iterator[None]:
    """Leave `key` at the end, also where an exception is raised."""
    try:
        yield
    finally:
        if not isinstance(sys.exception(), SystemExit):  # which ends a worker's process: a death, be it by the row or by SIGTERM
            guard.leave(key)


def _key(what: str, data: pa.Table, rows: Sequence[int] | Indices) -> str:
    """A name for work on those rows that is the same in every process."""
    first, last = (f"{data[UNIT][at]}:{data[ROW][at]}" for at in (int(rows[0]), int(rows[-1])))
    return f"{what}, rows {first} to {last}, {len(rows)} in all"


def _attempt(isolate: bool, rows: int, step: Callable[..., T], *given: Any) -> T | Fault:
    """What the step makes of what it is given; its StageError as a fault if `isolate`, unless fewer rows may fit an accelerator's memory."""
    try:
        return step(*given)
    except StageError as error:
        if not isolate or (rows > 1 and _out_of_memory(error.__cause__)):
            raise
        # Text alone: the traceback would keep the failed call's tensors.
        cause = error if isinstance(error, ContractError) else error.__cause__ or error
        return Fault(error.stage, type(cause).__name__, _shorten(str(cause), _MESSAGE_CHARS), _shorten(error.frames, _FRAMES_CHARS))


def _shorten(text: str, most: int) -> str:
    """The text without its middle, if it is long, and without lone surrogates, which UTF-8 cannot hold."""
    text = text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    return text.encode(errors="backslashreplace").decode()


def _mark(data: pa.Table, faults: dict[int, Fault]) -> pa.Table:
    """`data` with the faults of those rows."""
    if not faults:
        return data
    at = data.schema.get_field_index(FAULT)
    failed = np.isin(np.arange(data.num_rows), list(faults))
    texts = pa.array([faults[row].to_json() for row in sorted(faults)], data.schema.types[at])
    return data.set_column(at, FAULT, pc.replace_with_mask(_one(data[FAULT]), pa.array(failed), texts))


def _merge(data: pa.Table, stage: Stage, results: list[tuple[Indices, dict[str, pa.Array]]]) -> pa.Table:
    """`data` with the stage's columns, the slices put back into the rows' own order; null for rows without a result."""
    order = np.concatenate([indices for indices, _ in results]) if results else np.empty(0, np.int64)
    if len(order) < data.num_rows:
        absent = np.setdiff1d(np.arange(data.num_rows), order)
        results = [*results, (absent, {name: pa.nulls(len(absent), column.arrow) for name, column in stage.writes.items()})]
        order = np.concatenate([order, absent])
    back = None if (np.diff(order) == 1).all() else pa.array(np.argsort(order))
    for name, column in stage.writes.items():
        array = pa.concat_arrays([arrays[name] for _, arrays in results]) if results else pa.array([], column.arrow)
        array = array if back is None else array.take(back)
        at = data.schema.get_field_index(name)
        data = data.append_column(name, array) if at < 0 else data.set_column(at, name, array)
    return data


@contextlib.contextmanager
def _user_code(stage: Stage, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a StageError that shows the user's own frames."""
    try:
        yield
    except HeadraceError:
        raise
    except BaseException as error:  # the user's code may raise anything: this is the boundary to it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # as Rust libraries raise when they fail on a row
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"/{_PACKAGE}/worker.py" not in frame.filename]
        lines = traceback.format_list(frames) + traceback.format_exception_only(error)
        raise StageError(f"stage {stage.name!r} {what}: {type(error).__name__}: {error}", stage.name, "".join(lines)) from error


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an accelerator ran out of memory; known by name and text, since no framework is imported here."""
    if error is None:
        return False
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch, cupy
    text = str(error)
    return named or "RESOURCE_EXHAUSTED" in text or ("CUDA" in text and "out of memory" in text)  # JAX, older CUDA callers
