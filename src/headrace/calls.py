"""One call of a stage: from a table's columns to what the user's code receives, and from what it returns to Arrow arrays.

The one boundary to the user's code: whatever it raises becomes a `StageError` with the user's own frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from headrace.arrays import to_arrow, to_stage
from headrace.batching import Indices
from headrace.errors import ContractError, HeadraceError, StageError, listing, nearest
from headrace.lineage import Fault
from headrace.stage import Stage

_MESSAGE_CHARS, _FRAMES_CHARS = 2_000, 8_000
_HERE = "/{}/{}.py".format(*__name__.split("."))

T = TypeVar("T")
Outcome = dict[str, pa.Array] | Fault
"""What a call comes to: the columns that the stage writes, or why there are none."""


def set_up(stage: Stage, device: str) -> tuple[Stage, str]:
    """The stage with an instance of its own on which `setup` has run, if it is a class; and what `setup` had to say."""
    if not stage.is_model:
        return stage, ""
    call, note = dataclasses.replace(stage.call), None  # type: ignore[type-var]
    if hasattr(call, "setup"):
        with _user_code(f"stage {stage.name!r}", stage.name, "setup failed"):
            note = call.setup(device)
    return dataclasses.replace(stage, call=call), note if isinstance(note, str) else ""


def gather(stage: Stage, data: pa.Table, indices: Indices) -> dict[str, Any]:
    """The slice's columns as the stage receives them. Neighbouring rows are cut without a copy."""
    read = data.select(list(stage.reads))
    adjoining = len(indices) and indices[-1] - indices[0] + 1 == len(indices) and (np.diff(indices) == 1).all()
    part = read.slice(int(indices[0]), len(indices)) if adjoining else read.take(pa.array(indices))
    return {name: to_stage(whole(part[name]), column) for name, column in stage.reads.items()}


def whole(array: pa.ChunkedArray) -> pa.Array:
    """The column in one piece, without a copy if it is."""
    return array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()


def call(stage: Stage, inputs: dict[str, Any]) -> Any:
    """What the stage returns, as it returns it."""
    with _user_code(f"stage {stage.name!r}", stage.name, "raised"):
        return stage.call(**inputs)


def call_when_ready(stage: Stage, inputs: Future[dict[str, Any]]) -> Any:
    """The same, with inputs that another thread is still cutting out."""
    return call(stage, inputs.result())


def run_loop(name: str, loop: Callable[..., Any], *given: Any) -> None:
    """Call the loop of a training; what it raises is a StageError that bears the training's name."""
    with _user_code(f"the loop of training {name!r}", name, "raised"):
        loop(*given)


async def written(stage: Stage, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """The pieces of what the stage writes of a row, as it writes them."""
    async with aclosing(pieces) as texts:  # type: ignore[type-var]
        with _user_code(f"stage {stage.name!r}", stage.name, "raised"):
            async for text in texts:
                yield text


def encode(stage: Stage, outputs: Any, rows: int) -> Outcome:
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


def attempt(isolate: bool, rows: int, step: Callable[..., T], *given: Any) -> T | Fault:
    """What the step makes of what it is given; its StageError as a fault if `isolate`, unless fewer rows may fit an accelerator's memory."""
    try:
        return step(*given)
    except StageError as error:
        if not isolate or (rows > 1 and out_of_memory(error.__cause__)):
            raise
        return fault_of(error)


def fault_of(error: StageError) -> Fault:
    """The error as text alone: its traceback would keep the failed call's tensors."""
    cause = error if isinstance(error, ContractError) else error.__cause__ or error
    return Fault(error.stage, type(cause).__name__, _shorten(str(cause), _MESSAGE_CHARS), _shorten(error.frames, _FRAMES_CHARS))


def _shorten(text: str, most: int) -> str:
    """The text without its middle, if it is long, and without lone surrogates, which UTF-8 cannot hold."""
    text = text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    return text.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def _user_code(who: str, name: str, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a StageError that shows the user's own frames."""
    try:
        yield
    except HeadraceError:
        raise
    except BaseException as error:  # the user's code may raise anything: this is the boundary to it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # as Rust libraries raise when they fail on a row
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.endswith(_HERE)]
        lines = traceback.format_list(frames) + traceback.format_exception_only(error)
        raise StageError(f"{who} {what}: {type(error).__name__}: {error}", name, "".join(lines)) from error


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an accelerator ran out of memory; known by name and text, since no framework is imported here."""
    if error is None:
        return False
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch, cupy
    text = str(error)
    return named or "RESOURCE_EXHAUSTED" in text or ("CUDA" in text and "out of memory" in text)  # JAX, older CUDA callers
