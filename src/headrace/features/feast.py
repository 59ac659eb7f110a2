"""Feature views as a repository of Feast: its definitions, and the values of each key from one change to the next.

Feast looks for the newest row of a key that is not after the instant asked for, and knows no windows. So there is a row at every
instant at which a value changes: when an event becomes known, and when it leaves a window. Between two such instants nothing does,
and what Feast finds is what `as_of` says. Each key has a row at the beginning of time as well, of what is known when nothing is:
Feast's own store for files drops labels that lie before all rows of their key.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.errors import DefinitionError, OutputError, SourceError, WiringError, listing, nearest
from headrace.features.asof import Columns, as_of
from headrace.features.order import instants
from headrace.features.reading import Paths, read_events, read_labels
from headrace.features.view import FeatureView
from headrace.filesystems import locate
from headrace.stage import NAME
from headrace.store import Folder

TIME = "event_timestamp"
"""The column of the exported tables that says from when on a row holds."""

_BEGIN = dt.datetime(1700, 1, 1, tzinfo=dt.UTC)
_SETTINGS = "feature_store.yaml"
_BITS = 63  # of nanoseconds since 1970, beyond which pandas, and so Feast, cannot go
_KEYS = ("Int32", "Int64", "String", "Bytes", "Bool")


@dataclass(frozen=True, slots=True)
class _Type:
    """A type by Feast's name, and the Arrow type that its values have."""

    name: str
    arrow: pa.DataType
    many: bool = False

    def __str__(self) -> str:
        return f"Array({self.name})" if self.many else self.name


def export_feast(views: FeatureView | Sequence[FeatureView], folder: str, *, project: str = "headrace", known: Mapping[str, Paths] | None = None) -> None:
    """Write a repository that `feast apply` takes: `feature_store.yaml`, `definitions.py`, and a Parquet file for each view.

        hr.features.export_feast([stays, reviews], "feast_repo")

    What Feast then gives for an instant is what the view says, with windows, delay, ttl and defaults; but null, where the view has 0 or
    a default, for keys of which there are no events. It runs in this process, with the events of one view at a time in memory.
    The two definition files are small; `feature_store.yaml` is yours once it is there, and is left as it is.

    Args:
        views: their sources are read, and their pipelines run.
        folder: a path or URI.
        project: Feast's name for the repository, an identifier.
        known: for views by name, files whose rows hold the key, the time and the features as known at that time, such as `headrace
            features --labels` writes. They are exported instead of a row per change; in between, Feast takes the last.

    Raises:
        DefinitionError: a name is none, twice there, or of no view.
        WiringError: events are not what a view needs, or there is no type of Feast for a column.
        SourceError: a file cannot be found or read, or a value does not fit.
        OutputError: the folder cannot be written to.
    """
    several = [views] if isinstance(views, FeatureView) else list(views)
    tables = dict(known or {})
    _check(several, project, tables)
    readings = [read_labels(tables[view.name]) if view.name in tables else read_events(view) for view in several]
    store = Folder(locate(folder, error=OutputError))
    # Mistakes are told before the first file is read or written.
    empty = [_rows(view, reading.schema.empty_table(), given=view.name in tables) for view, reading in zip(several, readings, strict=True)]
    types = [_types(view, table.schema) for view, table in zip(several, empty, strict=True)]
    _check_keys(several, types)
    for view, reading, typed in zip(several, readings, types, strict=True):
        table = _rows(view, reading.whole(), given=view.name in tables)
        sink = pa.BufferOutputStream()
        pq.write_table(_cast(view, table, typed), sink)
        store.put(_file(view), sink.getvalue())
    store.put("definitions.py", _definitions(several, types, "" if store.place.is_local else folder.rstrip("/") + "/").encode())
    if _SETTINGS not in store.names(""):
        store.put(_SETTINGS, _settings(project).encode())


def changes(view: FeatureView, events: Columns) -> pa.Table:
    """The keys, each with all instants at which one of its features may change, in the column `TIME`; sorted by both."""
    kind = events.schema.field(view.time).type
    unit = kind.unit if pa.types.is_timestamp(kind) and kind.unit == "ns" else "us"
    ticks, there = instants(events[view.time], unit, f"feature view {view.name!r}: the events' column {view.time!r}")
    rows = np.flatnonzero(there)
    ticks, per_us = ticks[rows], 1000 if unit == "ns" else 1
    last = ((1 << _BITS) - 1) // (1000 // per_us)
    begin = pa.array([_BEGIN], pa.timestamp(unit, "UTC")).take(pa.array(np.zeros(len(rows), np.int64)))
    parts = [pa.table({name: events[name].take(pa.array(rows)) for name in view.key} | {TIME: begin})]
    for later in sorted(_offsets(view)):
        late = later // dt.timedelta(microseconds=1) * per_us
        fits = np.flatnonzero((ticks <= last - late) & (ticks >= -last)) if late <= last else np.zeros(0, np.int64)
        columns = {name: events[name].take(pa.array(rows[fits])) for name in view.key}
        parts.append(pa.table(columns | {TIME: pa.array(ticks[fits] + late).cast(pa.timestamp(unit, "UTC"))}))
    names = [*view.key, TIME]
    return pa.concat_tables(parts).drop_null().group_by(names, use_threads=False).aggregate([]).sort_by([(name, "ascending") for name in names])


def _offsets(view: FeatureView) -> set[dt.timedelta]:
    """How long after an event a value may change because of it."""
    found = {view.delay_of(name) for name in view.specs}
    found |= {view.delay_of(name) + feature.over for name, feature in view.specs.items() if feature.over is not None}
    return found | ({view.ttl} if isinstance(view.ttl, dt.timedelta) else set())


def _rows(view: FeatureView, table: pa.Table, *, given: bool) -> pa.Table:
    """Key, time and features, of events or as they were given."""
    if not given:
        return as_of(view, changes(view, table), table, time=TIME)
    for name in (*view.key, view.time, *view.specs):
        if name not in table.column_names:
            raise WiringError(f"feature view {view.name!r}: the known rows lack column {name!r}" + nearest(name, table.column_names))
    return table.select([*view.key, view.time, *view.specs]).rename_columns([*view.key, TIME, *view.specs])


def _check(views: Sequence[FeatureView], project: str, known: Mapping[str, Paths]) -> None:
    if not views or any(not isinstance(view, FeatureView) for view in views):
        raise DefinitionError(f"hr.features.export_feast takes hr.FeatureViews, at least one, got {views!r}")
    if not isinstance(project, str) or not NAME.fullmatch(project):
        raise DefinitionError(f"a project of Feast is named by an identifier such as 'headrace', got {project!r}")
    names = [view.name for view in views]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DefinitionError(f"two feature views are called {twice[0]!r}; a repository of Feast has one of a name")
    if strange := [name for name in known if name not in names]:
        raise DefinitionError(f"known has rows of {strange[0]!r}, which is none of the views {listing(names)}" + nearest(strange[0], names))
    for view in views:
        if TIME in (*view.key, *view.specs):
            raise DefinitionError(f"feature view {view.name!r} has a key or feature {TIME!r}, which the export names the time of its rows by; rename it")


def _types(view: FeatureView, schema: pa.Schema) -> dict[str, _Type]:
    types = {}
    for name in (*view.key, *view.specs):
        what = f"feature view {view.name!r}, column {name!r}"
        kind = schema.field(name).type
        is_ = pa.types
        many = is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind)
        found = _scalar(kind.value_type if many else kind)
        if found is None or (name in view.key and (many or found.name not in _KEYS)):
            allowed = ", ".join(_KEYS) if name in view.key else "numbers, text, bytes, booleans, times, and lists of them"
            raise WiringError(f"{what} is {kind}, for which Feast has no type there; it has {allowed}: convert it in the view's pipeline, or leave it out")
        types[name] = _Type(found.name, pa.list_(found.arrow), many=True) if many else found
    return types


def _scalar(kind: pa.DataType) -> _Type | None:
    is_ = pa.types
    if is_.is_boolean(kind):
        return _Type("Bool", pa.bool_())
    if is_.is_integer(kind):
        small = kind.bit_width < 32 or kind == pa.int32()
        return _Type("Int32", pa.int32()) if small else _Type("Int64", pa.int64())
    if is_.is_floating(kind):
        return _Type("Float64", pa.float64()) if kind == pa.float64() else _Type("Float32", pa.float32())
    if is_.is_string(kind) or is_.is_large_string(kind):
        return _Type("String", pa.string())
    if is_.is_binary(kind) or is_.is_large_binary(kind) or is_.is_fixed_size_binary(kind):
        return _Type("Bytes", pa.binary())
    if is_.is_timestamp(kind) or is_.is_date(kind):
        return _Type("UnixTimestamp", pa.timestamp("us", "UTC"))
    return None


def _check_keys(views: Sequence[FeatureView], types: Sequence[Mapping[str, _Type]]) -> None:
    """Views share an entity by the name of its column."""
    seen: dict[str, tuple[str, str]] = {}
    for view, typed in zip(views, types, strict=True):
        for name in view.key:
            other, kind = seen.setdefault(name, (view.name, str(typed[name])))
            if kind != str(typed[name]):
                raise WiringError(f"key column {name!r} is {typed[name]} in feature view {view.name!r} but {kind} in {other!r}; in Feast it is one entity")


def _cast(view: FeatureView, table: pa.Table, types: Mapping[str, _Type]) -> pa.Table:
    kind = table.schema.field(TIME).type
    fine = kind.unit if pa.types.is_timestamp(kind) else "us"
    fields = [(name, types[name].arrow) for name in view.key] + [(TIME, pa.timestamp(fine, "UTC"))] + [(name, types[name].arrow) for name in view.specs]
    try:
        return table.select([name for name, _ in fields]).cast(pa.schema(fields))
    except pa.ArrowInvalid as error:
        raise SourceError(f"feature view {view.name!r}: a value does not fit the type that Feast has for it: {error}") from error


def _file(view: FeatureView) -> str:
    return f"data/{view.name}.parquet"


def _settings(project: str) -> str:
    lines = [f"project: {project}", "provider: local", "registry: data/registry.db", "offline_store:", "  type: file"]
    lines += ["online_store:", "  type: sqlite", "  path: data/online_store.db", "entity_key_serialization_version: 3"]
    return "\n".join(lines) + "\n"


def _definitions(views: Sequence[FeatureView], types: Sequence[Mapping[str, _Type]], where: str) -> str:
    """Python that Feast reads. All names and texts are written as JSON, which Python reads the same way."""
    told = json.dumps
    used = sorted({name for typed in types for kind in typed.values() for name in (kind.name, "Array" if kind.many else kind.name)})
    text = ['"""Feature views, written by hr.features.export_feast: do not edit, export again."""', "", "from datetime import timedelta", ""]
    text += ["from feast import Entity, FeatureView, Field, FileSource, ValueType", f"from feast.types import {', '.join(used)}", ""]
    keys = {name: typed[name] for view, typed in zip(views, types, strict=True) for name in view.key}
    entity = {name: f"entity_{number}" for number, name in enumerate(keys)}
    for name, kind in keys.items():
        text.append(f"{entity[name]} = Entity(name={told(name)}, join_keys=[{told(name)}], value_type=ValueType.{kind.name.upper()})")
    for view, typed in zip(views, types, strict=True):
        fields = [f"        Field(name={told(name)}, dtype={typed[name]})," for name in view.key]
        fields += [f"        Field(name={told(name)}, dtype={typed[name]}, description={told(str(feature))})," for name, feature in view.specs.items()]
        source = f"FileSource(name={told(view.name)}, path={told(where + _file(view))}, timestamp_field={told(TIME)})"
        text += ["", f"view_{view.name} = FeatureView(", f"    name={told(view.name)},", f"    entities=[{', '.join(entity[name] for name in view.key)}],"]
        text += ["    ttl=timedelta(0),  # a row holds until the next one", "    schema=[", *fields, "    ],", f"    source={source},", ")"]
    return "\n".join(text) + "\n"
