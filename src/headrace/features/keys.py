"""Keys of labels and events as whole numbers: equal keys have the same one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import WiringError
from headrace.features.blocks import blocks, piece, spread
from headrace.units import plain

Ints = npt.NDArray[np.int64]

_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(slots=True)
class Keys:
    """Numbers from 0 to `count` - 1 for the keys of the labels, and how to find those of any rows of labels or events.

    A key that is null, or of no label, has -1.
    """

    count: int = 1
    _steps: list[_Step] = field(default_factory=list)

    @staticmethod
    def of(labels: Sequence[pa.ChunkedArray], events: Sequence[pa.ChunkedArray], names: Sequence[str], view: str) -> Keys:
        """The keys in these columns.

        Raises:
            WiringError: labels and events have them in types that cannot be compared; `view` opens the message.
        """
        keys = Keys()
        for name, label, event in zip(names, labels, events, strict=True):
            one, other = _alike(label, event, name, view)
            column = dense(one, other) or hashed(one, other)
            keys.count *= column.count
            keys._steps.append(_Step(column))
            if keys.count > 4 * (len(one) + len(other)) + 1024:  # number only those that there are
                seen = np.unique(np.concatenate(spread(keys.of_labels, blocks(len(one)))))
                keys._steps[-1].seen = seen = seen[seen >= 0]
                keys.count = len(seen)
        return keys

    def of_labels(self, rows: slice) -> Ints:
        """The numbers of the labels in these rows."""
        return self._numbers(lambda column: column.ours, rows)

    def of_events(self, rows: slice) -> Ints:
        """The numbers of the events in these rows."""
        return self._numbers(lambda column: column.theirs, rows)

    def _numbers(self, side: Callable[[Column], pa.ChunkedArray], rows: slice) -> Ints:
        found: Ints | None = None
        for step in self._steps:
            here = step.column.numbers_of(piece(side(step.column), rows))
            found = here if found is None else np.where((found < 0) | (here < 0), -1, found * step.column.count + here)
            if step.seen is not None:
                found = _among(step.seen, found)
        assert found is not None
        return found


@dataclass(slots=True)
class Column:
    """A column of the key as whole numbers of labels and events, and the `count` numbers from 0 on that `numbers_of` makes of them."""

    ours: pa.ChunkedArray
    theirs: pa.ChunkedArray
    count: int
    numbers_of: Callable[[pa.Array], Ints]


@dataclass(slots=True)
class _Step:
    """One column more of the key; `seen` are the numbers that labels have so far, where others are left out."""

    column: Column
    seen: Ints | None = None


def dense(label: pa.ChunkedArray, event: pa.ChunkedArray) -> Column | None:
    """Whole numbers that lie close together, looked up in a table rather than hashed; None of others."""
    if not pa.types.is_integer(label.type) or label.null_count == len(label):
        return None
    least, most = pc.min_max(label).as_py().values()
    if least == _LEAST or most > _MOST or most - least > 4 * (len(label) + len(event)) + 1024:
        return None
    table = np.zeros(most - least + 2, np.int64)  # its last place is of nulls and strangers

    def places(column: pa.Array) -> npt.NDArray[np.uint64]:
        """Where in the table: as unsigned numbers those below the least are beyond the end as well."""
        whole = column.view(pa.int64()) if column.type == pa.uint64() else column.cast(pa.int64())
        at = np.asarray(whole.fill_null(least - 1) if whole.null_count else whole) - np.int64(least)
        return np.minimum(at.view(np.uint64), np.uint64(len(table) - 1))

    for rows in blocks(len(label)):
        table[places(piece(label, rows))] = 1
    table[-1] = 0
    count = int(table.sum())
    table = np.where(table == 1, np.cumsum(table) - 1, -1)
    return Column(label, event, count, lambda column: table[places(column)])


def hashed(label: pa.ChunkedArray, event: pa.ChunkedArray) -> Column:
    """Values of any type."""
    values = pc.unique(label).drop_null()
    ours, theirs = spread(lambda column: pc.index_in(column, value_set=values), [label, event])
    return Column(ours, theirs, len(values), lambda column: np.asarray(column.fill_null(-1) if column.null_count else column).astype(np.int64))


def _among(seen: Ints, codes: Ints) -> Ints:
    if not len(seen):
        return np.full_like(codes, -1)
    at = np.searchsorted(seen, codes).clip(max=len(seen) - 1)
    return np.where(seen[at] == codes, at, -1)


def _alike(label: pa.ChunkedArray, event: pa.ChunkedArray, name: str, view: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Both columns of a key in one type."""
    one, other = plain(label.type), plain(event.type)
    try:
        fields = [pa.schema([("key", one)]), pa.schema([("key", other)])]
        kind = pa.unify_schemas(fields, promote_options="permissive").field(0).type
        if {pa.types.is_integer(one), pa.types.is_integer(other)} == {True, False}:
            raise pa.ArrowTypeError("a number and none")
        return label.cast(kind), event.cast(kind)
    except pa.ArrowException as error:
        raise WiringError(f"{view}: key column {name!r} is {one} in the labels but {other} in the events; convert one of them") from error
