"""Rows in blocks whose columns fit into a core's cache, worked on by several threads: numpy and pyarrow let go of the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

ROWS = 1 << 17

_MOST_THREADS = 8

Given = TypeVar("Given")
Found = TypeVar("Found")


def spread(work: Callable[[Given], Found], over: Sequence[Given]) -> list[Found]:
    """What `work` gives of each, in order, by several threads."""
    if len(over) < 2 or threads() < 2:
        return [work(one) for one in over]
    with ThreadPoolExecutor(min(len(over), threads())) as pool:
        return list(pool.map(work, over))


def threads() -> int:
    """How many are worth while."""
    return min(os.cpu_count() or 1, _MOST_THREADS)


def blocks(rows: int, size: int = ROWS) -> list[slice]:
    """So many rows in blocks of a size; at least one, which may be empty."""
    return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def piece(column: pa.ChunkedArray, rows: slice) -> pa.Array:
    """Some rows of a column in one piece, without a copy where they are one already."""
    return in_one(column.slice(rows.start, rows.stop - rows.start))


def in_one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column in one piece."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
