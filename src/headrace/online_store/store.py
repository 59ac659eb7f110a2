"""The latest features of each key, where a service finds them in a millisecond."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.errors import OnlineStoreError, OtherFeaturesError, check_number, listing, nearest
from headrace.online_store import records
from headrace.online_store.engine import Engine, Generation
from headrace.online_store.reading import Reader
from headrace.online_store.records import Layout
from headrace.online_store.views import ViewSchema, check_name, missing_from, plain

_BATCH_ROWS, _BATCH_BYTES = 1000, 4 << 20  # of one change: how long others wait for it
_ATTEMPTS = 5  # to read while generations change hands
_SECOND_US = 1_000_000
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_EARLIEST_US, _LATEST_US = -62_135_596_800 * _SECOND_US, 253_402_300_800 * _SECOND_US - 1  # the years 1 to 9999
_LONGEST_US = 2**62  # to live
_READERS = 64  # that are kept for a view, one for each choice of features


@dataclass(frozen=True, slots=True)
class Written:
    """What became of the rows of a table: `newer` were kept, `older` lost to a later event time that was there. `rows` is their sum."""

    rows: int = 0
    newer: int = 0
    older: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(self.rows + other.rows, self.newer + other.newer, self.older + other.older)


@dataclass(frozen=True, slots=True)
class Freshness:
    """How new the values of a view are: the newest event time, when something was last written, and how many keys there are, expired ones included."""

    newest: dt.datetime | None
    published: dt.datetime | None
    keys: int

    def age_s(self, now: dt.datetime) -> float | None:
        """The seconds since the newest event; None when there has been none."""
        return None if self.newest is None else (now - self.newest).total_seconds()


@dataclass(frozen=True, slots=True)
class _Known:
    """A view as it was when it was last looked up."""

    generation: Generation
    schema: ViewSchema
    layout: Layout
    readers: dict[int | None, tuple[pa.Schema | None, Reader]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Which instants go with values: the column of event times, how long values live, and as of when they are."""

    time: str
    ttl_us: int | None
    at_us: int

    @classmethod
    def of(cls, time: str, ttl_s: float | None, at_us: int) -> _Stamp:
        if ttl_s is None:
            return cls(time, None, at_us)
        check_number(ttl_s, "ttl_s")
        return cls(time, min(int(ttl_s * _SECOND_US), _LONGEST_US), at_us)


class OnlineStore:
    """An open store; `open_store` opens one. Threads may share it, and a forked process may go on with it.

    Each key of a view has one value: all its features, with the time of the event that they are of. It changes whole, and never back to an
    earlier event time. What was written with a time to live counts as missing when that has passed since its event time.

    Args:
        engine: the database.
        clock: gives the seconds since 1970.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self.engine, self.clock = engine, clock
        self.name = engine.name
        self._views: dict[str, _Known] = {}

    def __enter__(self) -> OnlineStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.engine.close()

    def views(self) -> list[str]:
        """The names of the views that the store has, sorted."""
        return sorted(self.engine.views())

    def schema(self, view: str) -> ViewSchema:
        """The key columns and features of a view, as they are now.

        Raises:
            OnlineStoreError: the store has no such view.
        """
        return self._look_up(view).schema

    def write(self, view: str, table: pa.Table, *, key: str | Sequence[str], time: str, ttl_s: float | None = None, at: dt.datetime | None = None) -> Written:
        """Keep the latest value of each key, all its features from one row.

        A row takes the place of one with an earlier event time, or with the same time if it is not as of an earlier instant. So a table that is late, or
        comes twice, takes nothing back, and any order of the same tables ends alike.

        Rows go in batches, each of them whole or not at all. If something fails on the way, keys have their old value or their new one; writing the
        table again is the remedy. Arrow's other encodings of a type (large offsets, dictionaries) are taken for the plain one.

        Args:
            view: the view's name; the first write makes it, and settles its columns.
            table: one row per event or key. All columns but key and time are features.
            key: the key column, text or whole numbers, or several.
            time: the column of event times: timestamps (naive ones are UTC) or dates.
            ttl_s: the seconds after which, counted from its event time, a value is missing.
            at: as of when the values were computed, UTC if it has no zone; now when left out.

        Raises:
            OnlineStoreError: the view has other columns; a key or a time is null; the store refuses or is out of reach.
        """
        schema = ViewSchema.of(table, key=key, time=time)
        stamp = _Stamp.of(time, ttl_s, self._now_us() if at is None else _us(at))
        done, start = Written(), 0
        self._writable(view, schema)  # which makes a view of a table without rows, too
        batch = _batch_rows(table)
        while start < len(table):
            part = table.slice(start, batch)
            for _ in range(_ATTEMPTS):
                known = self._writable(view, schema)
                if (newer := self._put(known, part, stamp)) is not None:
                    break
                self._views.pop(view, None)
            else:
                raise self._lost(view)
            done += Written(len(part), newer, len(part) - newer)
            start += len(part)
        if len(table) > batch:
            self.engine.settle()
        return done

    def replace(
        self, view: str, tables: Iterable[pa.Table], *, key: str | Sequence[str], time: str, ttl_s: float | None = None, at: dt.datetime | None = None
    ) -> Written:
        """Write a view anew, with other columns or without keys that are no more. Readers go on with what is there, and change over at the end, at once.

        Whoever replaces a view at the same time and began earlier fails, and so does this, if somebody writes to the view meanwhile. Readers that ask
        for a feature by a type that it has no longer get an error from then on.

        Args:
            view: the view's name, known or not.
            tables: all its rows, in at least one table; arguments are those of `write`.

        Raises:
            OnlineStoreError: as for `write`, or somebody else wrote to the view; what was there stays.
        """
        check_name(view)
        stamp = _Stamp.of(time, ttl_s, self._now_us() if at is None else _us(at))
        done = Written()
        begun: _Known | None = None
        swapped = False
        try:
            for table in tables:
                schema = ViewSchema.of(table, key=key, time=time)
                if begun is None:
                    begun = self._known(self.engine.begin(view, schema.to_bytes()))
                if other := begun.schema.difference(schema):
                    raise OnlineStoreError(f"tables of view {view!r} have different columns: by the first of them, {other}")
                batch = _batch_rows(table)
                for part in (table.slice(start, batch) for start in range(0, len(table), batch)):
                    newer = self._put(begun, part, stamp)
                    if newer is None:
                        raise OnlineStoreError(f"view {view!r} in {self.name!r}: somebody else has begun to replace it; this one is given up")
                    done += Written(len(part), newer, len(part) - newer)
            if begun is None:
                raise OnlineStoreError(f"view {view!r}: there is no table to replace it with; give at least one, without rows to empty it")
            swapped = self.engine.swap(begun.generation)
            if not swapped:
                raise OnlineStoreError(
                    f"view {view!r} in {self.name!r} was written to, or replaced, while this replaced it, and stays as it is; stop the other, and begin again"
                )
        finally:
            if begun is not None and not swapped:
                self.engine.drop(begun.generation)
        self.engine.settle()
        self._views.pop(view, None)
        return done

    def read(self, view: str, keys: Iterable[Any], *, features: pa.Schema | None = None) -> pa.Table:
        """The features of keys: a row per key, in the order asked, from one question to the store.

        Besides the features, the table has `found`, whether there is a value that has not expired, and `event_time`, of which event it is. Where none
        was found both that and the features are null. A null key is never found.

        Args:
            view: the view's name.
            keys: text or whole numbers, or tuples of these where the key has several columns; a list, or an array of Arrow's or numpy's.
            features: those wanted, in this order, with the types that they must have; all when left out.

        Raises:
            OnlineStoreError: the store has no such view, the view has other features, a key is of another kind, or the store is out of reach or damaged.
        """
        keys = keys if isinstance(keys, list) else plain(keys)
        for _ in range(_ATTEMPTS):
            known = self._views.get(view) or self._look_up(view)
            asked = known.schema.encode(keys)
            there = [key for key in asked if key is not None] if None in asked else asked
            blobs = self.engine.fetch(known.generation, there)  # type: ignore[arg-type]
            if blobs is None:  # another generation took its place
                self._views.pop(view, None)
                continue
            if len(there) < len(asked):
                each = iter(blobs)
                blobs = [None if key is None else next(each) for key in asked]
            reader = self._reader(known, features)
            try:
                return reader.read(blobs, self._now_us())
            except ValueError as error:
                raise OnlineStoreError(f"view {view!r} in {self.name!r} is damaged: {error}; publish it again") from error
        raise self._lost(view)

    def freshness(self, view: str) -> Freshness:
        """How new the values of a view are.

        Raises:
            OnlineStoreError: the store has no such view, or is out of reach.
        """
        standing = self.engine.standing(self._look_up(view).generation)
        return Freshness(_instant(standing.newest_us), _instant(standing.published_us), standing.keys)

    def sweep(self, view: str) -> int:
        """Remove what has expired, which is missing already but takes room; how many keys that were. It reads the whole view.

        Raises:
            OnlineStoreError: the store has no such view, or refuses.
        """
        return self.engine.sweep(self._look_up(view).generation, records.coded(self._now_us()))

    def _now_us(self) -> int:
        return int(self.clock() * _SECOND_US)

    def _known(self, generation: Generation) -> _Known:
        try:
            schema = ViewSchema.from_bytes(generation.schema)
            return _Known(generation, schema, Layout(schema.features))
        except ValueError as error:
            where = f"the schema of view {generation.view!r} in {self.name!r}"
            raise OnlineStoreError(f"{where} is damaged ({error}); write the view anew with `replace`") from error

    def _look_up(self, view: str) -> _Known:
        """The view as it is now; what is kept of it is renewed."""
        generation = self.engine.current(view)
        if generation is None:
            self._views.pop(view, None)
            names = self.engine.views()
            raise OnlineStoreError(f"{self.name!r} has no view {view!r}; it has {listing(sorted(names))}" + nearest(str(view), names))
        known = self._views[view] = self._known(generation)
        return known

    def _writable(self, view: str, schema: ViewSchema) -> _Known:
        """The view, made if it is not there, for rows of a schema. Before a table is refused, the view is looked up again."""
        check_name(view)
        known = self._views.get(view)
        if known is None or known.schema.difference(schema):
            known = self._views[view] = self._known(self.engine.make(view, schema.to_bytes()))
        if other := known.schema.difference(schema):
            raise OnlineStoreError(
                f"view {view!r} in {self.name!r} has other columns than this table: {other}; if the change is meant, write the view anew "
                "with `replace`, or publish it under another name"
            )
        return known

    def _put(self, known: _Known, part: pa.Table, stamp: _Stamp) -> int | None:
        """Write a batch, and say how many rows were newer; None if the generation is gone."""
        times = _times_us(part, stamp.time)
        expiry = np.full(len(part), records.NEVER) if stamp.ttl_us is None else times + stamp.ttl_us
        names = [name for name, _ in known.schema.keys]
        columns = [part[name].to_pylist() for name in names]
        keys = known.schema.encode(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)))
        if None in keys:
            raise OnlineStoreError(f"{keys.count(None)} rows without a key: column {' or '.join(map(repr, names))} is null; leave them out")
        features = known.schema.features
        try:
            values = known.layout.encode(pa.table([part[field.name].cast(field.type) for field in features], schema=features), times, expiry, stamp.at_us)
        except ValueError as error:
            raise OnlineStoreError(f"view {known.generation.view!r}: {error}") from error
        return self.engine.put(known.generation, [key for key in keys if key is not None], values, self._now_us())

    def _reader(self, known: _Known, features: pa.Schema | None) -> Reader:
        """What reads these features of the view, all if None."""
        kept_reader = known.readers.get(None if features is None else id(features))
        if kept_reader is not None and kept_reader[0] is features:
            return kept_reader[1]
        kept = known.schema.features
        if features is not None and (other := missing_from(kept, features)):
            raise OtherFeaturesError(f"view {known.generation.view!r} in {self.name!r} has other features than asked for: {other}")
        names = kept.names if features is None else features.names
        reader = Reader(known.layout, [kept.names.index(name) for name in names])
        if len(known.readers) < _READERS:
            known.readers[None if features is None else id(features)] = features, reader
        return reader

    def _lost(self, view: str) -> OnlineStoreError:
        return OnlineStoreError(
            f"the values of view {view!r} in {self.name!r} are gone though the view is there: the database removed them, or somebody did; write the view anew "
            "with `replace`, and let no database of features evict keys"
        )


def _batch_rows(table: pa.Table) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * len(table) // max(1, int(table.nbytes))))


def _us(at: dt.datetime) -> int:
    return ((at if at.tzinfo else at.replace(tzinfo=dt.UTC)) - _EPOCH) // dt.timedelta(microseconds=1)


def _times_us(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """The event times in microseconds since 1970."""
    column = table[name]
    if column.null_count:
        raise OnlineStoreError(f"{column.null_count} rows without an event time: column {name!r} is null; leave them out")
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
        raise OnlineStoreError(f"time={name!r} is a column of {column.type}; event times are timestamps or dates: cast it")
    try:
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("us"))
        if column.type.unit == "ns":  # cut, as everywhere; a cast would cut those before 1970 upwards
            times = column.cast(pa.int64()).to_numpy() // 1000
        else:
            times = column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        times = np.array([_LATEST_US + 1])
    if len(times) and not (times.min() >= _EARLIEST_US and times.max() <= _LATEST_US):
        raise OnlineStoreError(f"column {name!r} has event times beyond the years 1 to 9999; is its unit ({column.type}) right?")
    return np.asarray(times, np.int64)


def _instant(us: int | None) -> dt.datetime | None:
    return None if us is None else _EPOCH + dt.timedelta(microseconds=us)
