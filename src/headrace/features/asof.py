"""The point-in-time join: features as they were known at the instant of each label, and what is known now."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import DefinitionError, WiringError, listing, nearest
from headrace.features.blocks import spread
from headrace.features.keys import Ints
from headrace.features.order import Flags, Order, order
from headrace.features.view import FeatureView, check_key, check_time, schema_of
from headrace.features.windows import Windows


class Columns(Protocol):
    """What is asked of events: a table, or something that fetches each column when it is needed."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types."""

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """A column."""


def as_of(view: FeatureView, labels: pa.Table, events: Columns, *, key: str | Sequence[str] | None = None, time: str | None = None) -> pa.Table:
    """The labels in their order, and beside them each feature as it was known at the label's own time; see `FeatureView`.

    Args:
        events: what happened, behind the view's pipeline if it has one; in any order.
        key: the labels' columns that say whom they are about, if they are called otherwise than in the view.
        time: the labels' column that says when.

    Raises:
        WiringError: labels or events lack a column, or have one of a type that will not do; a feature is called like a column of the labels.
        SourceError: a time or a sum does not fit into 64 bits.
    """
    what = f"feature view {view.name!r}"
    types = schema_of(view, events.schema)
    columns = _columns_of(view, labels.schema, key, time, what)
    if taken := [name for name in types.names if name in labels.column_names]:
        raise WiringError(f"{what}: the labels have a column {taken[0]!r}, as a feature is called; rename one of them")
    placed = order(
        {name: labels[column] for name, column in zip((*view.key, view.time), columns, strict=True)},
        {name: events[name] for name in (*view.key, view.time)},
        view=what,
    )
    for name, values in _features(view, types, placed, events).items():
        labels = labels.append_column(types.field(name), values)
    return labels


def latest(view: FeatureView, events: Columns, *, at: dt.datetime, keys: pa.Table | None = None) -> pa.Table:
    """What is known at an instant: a row for each key of which anything is known, sorted by key.

    The columns are those of the key, the time of the newest event that is known, and the features. `at` without a zone is UTC.
    With `keys`, a table with the columns of the key, only these are looked at.

    Raises:
        WiringError, SourceError: as `as_of`.
    """
    types = schema_of(view, events.schema)
    told = keys if keys is not None else pa.table({name: events[name] for name in view.key})
    keys = told.select(list(view.key)).group_by(list(view.key), use_threads=False).aggregate([]).drop_null()
    keys = keys.sort_by([(name, "ascending") for name in view.key]) if keys.num_rows else keys
    instant = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
    when = pa.array([instant], pa.timestamp("us", "UTC")).take(pa.array(np.zeros(keys.num_rows, np.int64)))
    asked = {name: keys[name] for name in view.key} | {view.time: pa.chunked_array([when])}
    placed = order(asked, {name: events[name] for name in (*view.key, view.time)}, view=f"feature view {view.name!r}")
    back = [slice(None) if block.back is None else block.back for block in placed.labels]
    newest, there = (np.concatenate([of[at] for of, at in zip(every, back, strict=True)]) for every in zip(*_newest(view, placed), strict=True))
    columns = {name: keys[name] for name in view.key}
    columns[view.time] = (
        events[view.time].take(pa.array(placed.rows[newest], mask=~there)) if len(placed.rows) else pa.nulls(len(there), events[view.time].type)
    )
    columns |= _features(view, types, placed, events)
    fields = [keys.schema.field(name) for name in view.key] + [events.schema.field(view.time), *types]
    return pa.table(columns, pa.schema(fields)).filter(pa.array(there)).sort_by([(name, "ascending") for name in view.key])


def left_out(view: FeatureView, events: pa.Table) -> int:
    """How many events have no time, or no key, and count for nothing."""
    there = np.ones(events.num_rows, np.bool_)
    for name in (*view.key, view.time):
        there &= pc.is_valid(events[name]).to_numpy()
    return int((~there).sum())


def _columns_of(view: FeatureView, labels: pa.Schema, key: str | Sequence[str] | None, time: str | None, what: str) -> tuple[str, ...]:
    """The labels' columns of key and time."""
    keys = view.key if key is None else ((key,) if isinstance(key, str) else tuple(key))
    if len(keys) != len(view.key):
        raise DefinitionError(f"{what} has the key {listing(view.key)}; name as many columns of the labels, got {listing(keys)}")
    columns = (*keys, view.time if time is None else time)
    for name in columns:
        if labels.names.count(name) != 1:
            few = "lack" if name not in labels.names else "have twice"
            raise WiringError(f"{what} needs column {name!r} of the labels, which they {few}; they have {listing(labels.names)}" + nearest(name, labels.names))
    check_key(labels, keys, f"{what}: the labels'")
    check_time(labels.field(columns[-1]).type, f"{what}: the labels' column {columns[-1]!r}")
    return columns


def _newest(view: FeatureView, placed: Order) -> list[tuple[Ints, Flags]]:
    """For each label the position of the newest event that any feature may know, and whether there is one."""
    late = min(map(view.delay_of, view.specs))
    return [(np.where(until > first, until - 1, 0), until > first) for first, until in placed.spans(late, None)]


def _features(view: FeatureView, types: pa.Schema, placed: Order, events: Columns) -> dict[str, pa.ChunkedArray]:
    """The values of each feature, in the order of the labels' rows."""
    alive = _alive(view, placed)
    column, windows = None, None
    values: dict[str, pa.ChunkedArray] = {}
    for name, feature in sorted(view.specs.items(), key=lambda item: item[1].column or ""):  # so that one column is held at a time
        what, type = f"feature view {view.name!r}, feature {name!r}", types.field(name).type
        spans = placed.spans(view.delay_of(name), feature.over)
        if alive is not None:
            spans = [(lo, np.where(still, hi, lo)) for still, (lo, hi) in zip(alive, spans, strict=True)]
        if feature.column is None:
            found = [(pa.array(hi - lo), np.ones(len(lo), np.bool_)) for lo, hi in spans]
        else:
            if windows is None or feature.column != column:
                windows, column = None, feature.column
                windows = Windows(events[feature.column], placed)
            found = windows.aggregate(feature, spans, what=what)
        parts = [(*of_block, block.back) for of_block, block in zip(found, placed.labels, strict=True)]
        values[name] = pa.chunked_array(spread(partial(_filled, feature.default_as(type, what)), parts), type)
    return {name: values[name] for name in view.specs}


def _alive(view: FeatureView, placed: Order) -> list[Flags] | None:
    """Whether the newest event that is known is no older than the view's time to live; None where it may be of any age."""
    if view.ttl is None:
        return None
    assert isinstance(view.ttl, dt.timedelta)
    spans = placed.spans(dt.timedelta(0), view.ttl)
    return [there & (newest >= first) for (newest, there), (first, _) in zip(_newest(view, placed), spans, strict=True)]


def _filled(default: pa.Scalar, block: tuple[pa.Array, Flags, Ints | None]) -> pa.Array:
    """The values at their places, and the default where there is none."""
    values, there, back = block
    if there.all():
        return values if back is None else values.take(pa.array(back))
    if back is None:
        back = np.arange(len(there))
    if not default.is_valid:
        return values.take(pa.array(back, mask=~there[back]))
    return pa.concat_arrays([values, pa.array([default.as_py()], values.type)]).take(pa.array(np.where(there[back], back, len(back))))
