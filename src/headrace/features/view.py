"""A feature view: which events tell something of a key, and what of them at any instant."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType

import pyarrow as pa

from headrace.errors import DefinitionError, WiringError, listing, nearest
from headrace.features.aggregates import Feature, last
from headrace.features.durations import duration
from headrace.formats import Input
from headrace.pipeline import Pipeline
from headrace.stage import NAME
from headrace.units import plain


@dataclass(frozen=True, slots=True)
class FeatureView:
    """Features of a key, by the events that happened to it.

        stays = hr.FeatureView(
            "stays", "stays/*.parquet", key="listing_id", time="booked_at", delay="1d",
            features={"stays_30d": hr.features.count(over="30d"), "price": hr.features.mean("price", over="7d"), "host": "host"},
        )

    At an instant t, with a delay d and a window of length w, these events count: `t - d - w < time <= t - d`. So the end of the window
    is in it and its beginning is not, windows that follow each other share no event, and what happened after `t - d` is
    never looked at.

        ──────────────o━━━━━━━━━━ w ━━━━━━━━━━━●───────── d ─────────┬──────► time
                  out │ in                  in │ not known yet       t

    - `over="all"` has no beginning.
    - Nulls are skipped by every aggregate; `count()` without a column counts events. Where no value is left, `count` and `distinct` are
      0, and the others are the feature's `default`, null if none is given.
    - Events are counted as often as they are there: the view does not look for duplicates.
    - Of several values at one instant, `last` takes the greatest. No result depends on the order of rows, or on other keys.
    - NaN is a value: greater than every number and equal to itself in `min`, `max`, `last`, `quantile` and `distinct`, and what
      sums and means with it are. -0.0 is 0.0.
    - Sums of whole numbers are exact; those of floats within one unit in the last place, whatever the order.
    - A time with a zone is an instant, one without is UTC, a date is midnight UTC. Numbers are refused. An event without a time
      or a key (or a part of it) is left out; a label without gets the defaults.

    Attributes:
        name: an identifier; names the view in a store.
        source: where the events are: paths, folders, globs or URIs, or an `hr.Input`, as `hr.run` takes them; None for a view that is only given tables.
        key: the columns that say whom an event happened to, as a tuple; one name may be given as it is.
        time: the column that says when it happened.
        features: names and aggregates, see `hr.features`; a column's name alone is the last value of it.
        pipeline: row stages that the events pass first; the other columns may be what it writes.
        delay: how late an event is known after it happened, such as `"1d"`; features may say otherwise for themselves.
        ttl: for how long the newest event that is known tells something. From its time plus `ttl` on the key is as good as unknown, and
            every feature has its default. None for always.

    Raises:
        DefinitionError: a name, a feature or a duration is none, or names collide.
    """

    name: str
    source: str | Sequence[str] | Input | None = None
    _: KW_ONLY
    key: tuple[str, ...] | str
    time: str
    features: Mapping[str, Feature | str] = field(hash=False)
    pipeline: Pipeline | None = None
    delay: dt.timedelta | str = dt.timedelta(0)
    ttl: dt.timedelta | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise DefinitionError(f"the first argument of hr.FeatureView is its name, an identifier such as 'stays', got {self.name!r}")
        what = f"feature view {self.name!r}"
        _check_source(self.source, what)
        if self.pipeline is not None and not isinstance(self.pipeline, Pipeline):
            raise DefinitionError(f"{what}: pipeline must be an hr.Pipeline, got {self.pipeline!r}")
        key = (self.key,) if isinstance(self.key, str) else self.key
        if not isinstance(key, (tuple, list)) or not key or not all(isinstance(name, str) and name for name in key) or len(set(key)) < len(key):
            raise DefinitionError(f"{what}: key must be the name of a column, or a tuple of several, got {self.key!r}")
        if not isinstance(self.time, str) or not self.time or self.time in key:
            raise DefinitionError(f"{what}: time must be the name of a column that is not in the key, got {self.time!r}")
        put = object.__setattr__  # what was given, in normal form
        put(self, "key", tuple(key))
        put(self, "features", MappingProxyType(_features(self.features, (*key, self.time), what)))
        put(self, "delay", duration(self.delay, f"{what}: delay", zero=True))
        put(self, "ttl", None if self.ttl is None else duration(self.ttl, f"{what}: ttl"))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """A frozen mapping cannot be pickled; what it was made from can."""
        return _again, (self.name, self.source, self.key, self.time, dict(self.features), self.pipeline, self.delay, self.ttl)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the events must have, behind the pipeline: key, time, and what the features read."""
        return tuple(dict.fromkeys([*self.key, self.time, *(f.column for f in self.specs.values() if f.column is not None)]))

    @property
    def specs(self) -> Mapping[str, Feature]:
        """The features, as `Feature`s."""
        return self.features  # type: ignore[return-value]

    def delay_of(self, name: str) -> dt.timedelta:
        """How late the events of a feature are known."""
        own = self.specs[name].delay
        assert isinstance(self.delay, dt.timedelta)
        return self.delay if own is None else own


def schema_of(view: FeatureView, events: pa.Schema) -> pa.Schema:
    """The Arrow types of a view's features, in their order, over events of that schema.

    Raises:
        WiringError: the events lack a column, or have one of a type that the view cannot use.
    """
    what = f"feature view {view.name!r}"
    for name in view.columns:
        if events.names.count(name) != 1:
            few = "lack" if name not in events.names else "have twice"
            raise WiringError(f"{what} reads column {name!r}, which the events {few}; they have {listing(events.names)}" + nearest(name, events.names))
    check_key(events, view.key, f"{what}: the events'")
    check_time(events.field(view.time).type, f"{what}: the events' column {view.time!r}")
    fields = []
    for name, feature in view.specs.items():
        column = None if feature.column is None else events.field(feature.column).type
        fields.append(pa.field(name, feature.type_over(column, f"{what}, feature {name!r}")))
    return pa.schema(fields)


def check_key(schema: pa.Schema, key: Sequence[str], what: str) -> None:
    """Raise WiringError unless these columns can be a key: exact, and equal in one way only."""
    for name in key:
        kind = plain(schema.field(name).type)
        is_ = pa.types
        if not (is_.is_integer(kind) or is_.is_string(kind) or is_.is_large_string(kind) or is_.is_binary(kind) or is_.is_boolean(kind) or is_.is_date(kind)):
            raise WiringError(f"{what} key column {name!r} is {kind}; a key is made of whole numbers, text, bytes, booleans or dates: convert it first")


def check_time(kind: pa.DataType, what: str) -> None:
    """Raise WiringError unless a column of that type says when something happened."""
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        hint = "; a number does not say in which unit and since when: make a timestamp of it first" if pa.types.is_integer(kind) else ""
        raise WiringError(f"{what} must be a timestamp or a date, but it is {kind}{hint}")


def _check_source(source: object, what: str) -> None:
    several = isinstance(source, (list, tuple)) and source and all(isinstance(one, str) for one in source)
    if not (source is None or (isinstance(source, str) and source) or isinstance(source, Input) or several):
        raise DefinitionError(f"{what}: source must be a path, glob or URI, several of them, or an hr.Input, got {source!r}")


def _features(features: object, taken: Sequence[str], what: str) -> dict[str, Feature]:
    if not isinstance(features, Mapping) or not features:
        raise DefinitionError(f"{what}: features must be names and aggregates, such as {{'stays': hr.features.count()}}, got {features!r}")
    specs: dict[str, Feature] = {}
    for name, feature in features.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise DefinitionError(f"{what}: a feature is named by an identifier such as 'stays_30d', got {name!r}")
        if name in taken:
            raise DefinitionError(f"{what}: feature {name!r} has the name of a column of the key or of the time; give it another")
        if not isinstance(feature, (str, Feature)):
            raise DefinitionError(f"{what}: feature {name!r} must be an aggregate such as hr.features.count(), or a column's name, got {feature!r}")
        specs[name] = last(feature) if isinstance(feature, str) else feature
    return specs


def _again(name: str, source: object, key: tuple[str, ...], time: str, features: dict[str, Feature], *rest: object) -> FeatureView:
    pipeline, delay, ttl = rest
    return FeatureView(name, source, key=key, time=time, features=features, pipeline=pipeline, delay=delay, ttl=ttl)  # type: ignore[arg-type]
