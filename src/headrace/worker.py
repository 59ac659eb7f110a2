"""What one replica does with one block: run a group's stages over a table, slice by slice.

Free of any engine: `local` and every target on Ray run this same code, so they cannot drift apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.arrays import to_arrow, to_stage
from headrace.batching import Indices, Tokens
from headrace.columns import from_arrow
from headrace.errors import ContractError, HeadraceError, StageError, WiringError, listing, nearest
from headrace.events import BlockDone, BudgetHalved, Event
from headrace.stage import Stage

_PACKAGE = __name__.partition(".")[0]


class Worker:
    """A group's stages, set up on one device.

    Instances of classes are copied before `setup`, so that a pipeline object can be run many times.
    """

    def __init__(
        self, stages: Sequence[Stage], *, group: str = "", device: str = "cpu", overlap: bool = True, emit: Callable[[Event], object] = lambda event: None
    ) -> None:
        self.stages = [set_up(stage, device) for stage in stages]
        self.group = group
        self.overlap = overlap
        self.emit = emit
        self.shrink = {stage.name: 1 for stage in stages}

    def __call__(self, data: pa.Table, carries: Iterable[str] | None = None) -> pa.Table:
        """`data` with every stage's columns set, cut down to `carries` if given; as many rows, in the same order.

        Raises:
            StageError: a stage raised, or (ContractError) returned something other than it declared.
        """
        started, padded, real = time.perf_counter(), 0, 0
        for stage in self.stages:
            data = data.combine_chunks()
            lengths = measure(stage, data)
            results: list[tuple[Indices, dict[str, pa.Array]]] = []
            for indices, result in self._run(stage, data, lengths):
                results.append((indices, result))
                padded += len(indices) * int(lengths[indices].max(initial=0))
            real += int(lengths.sum())
            data = _merge(data, stage, results)
        self.emit(BlockDone(self.group, data.num_rows, time.perf_counter() - started, real, padded))
        return data if carries is None else data.select([name for name in carries if name in data.column_names])

    def _run(self, stage: Stage, data: pa.Table, lengths: Indices) -> Iterator[tuple[Indices, dict[str, pa.Array]]]:
        """Every slice's row indices and results. An accelerator out of memory halves the budget for the rows not yet done."""
        left = np.arange(data.num_rows)
        while len(left):
            slices = [left[part] for part in stage.batch.slices(lengths[left], shrink=self.shrink[stage.name])]
            done = 0
            try:
                for result in self._stream(stage, data, slices):
                    yield slices[done], result
                    done += 1
                return
            except StageError as error:
                if not _out_of_memory(error.__cause__) or len(slices[done]) == 1:
                    raise
            # The traceback, and with it the failed call's tensors, is gone by now: only then does freeing help.
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
                sys.modules["torch"].cuda.empty_cache()
            failed, left = len(slices[done]), np.sort(np.concatenate(slices[done:]))
            while len(next(stage.batch.slices(lengths[left], shrink=self.shrink[stage.name]))) > failed // 2:
                self.shrink[stage.name] *= 2  # more than once where the slice was smaller than the rule allows
            self.emit(BudgetHalved(stage.name, str(stage.batch), self.shrink[stage.name]))

    def _stream(self, stage: Stage, data: pa.Table, slices: Sequence[Indices]) -> Iterator[dict[str, pa.Array]]:
        """Results in order. With `overlap`, a thread cuts out the next slice and encodes the last while the stage computes."""
        if not self.overlap or len(slices) == 1:
            for indices in slices:
                yield _encode(stage, _call(stage, _gather(stage, data, indices)), len(indices))
            return
        with ThreadPoolExecutor(1, thread_name_prefix="headrace-overlap") as side:
            ahead = side.submit(_gather, stage, data, slices[0])
            encoding: Future[dict[str, pa.Array]] | None = None
            for at, indices in enumerate(slices):
                inputs = ahead.result()
                if at + 1 < len(slices):
                    ahead = side.submit(_gather, stage, data, slices[at + 1])
                try:
                    outputs = _call(stage, inputs)
                finally:  # the slice before is complete whatever this one does: hand it over first
                    before, encoding = encoding, None
                    if before is not None:
                        yield before.result()
                encoding = side.submit(_encode, stage, outputs, len(indices))
            if encoding is not None:
                yield encoding.result()


def set_up(stage: Stage, device: str) -> Stage:
    """The stage with an instance of its own on which `setup` has run, if it is a class."""
    if not stage.is_model:
        return stage
    call = dataclasses.replace(stage.call)  # type: ignore[type-var]
    if hasattr(call, "setup"):
        with _user_code(stage, "setup failed"):
            call.setup(device)
    return dataclasses.replace(stage, call=call)


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


def _encode(stage: Stage, outputs: Any, rows: int) -> dict[str, pa.Array]:
    """The stage's result as Arrow arrays, checked against what it declared."""
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


def _merge(data: pa.Table, stage: Stage, results: list[tuple[Indices, dict[str, pa.Array]]]) -> pa.Table:
    """`data` with the stage's columns, the slices put back into the rows' own order."""
    order = np.concatenate([indices for indices, _ in results]) if results else np.empty(0, np.int64)
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
    except Exception as error:  # the user's code may raise anything: this is the boundary to it
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
