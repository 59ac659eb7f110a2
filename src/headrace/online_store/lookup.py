"""The stage that adds the features of a view: from an online store where the pipeline runs, as of each row's time in a training set."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headrace.columns import ANY, Column, ColumnType, accepts, from_arrow, types_of
from headrace.errors import DefinitionError, OnlineStoreError, OtherFeaturesError, WiringError, WrongKeyError, listing, nearest
from headrace.features import FeatureView, as_of
from headrace.hardware import cpu
from headrace.online_store.opening import check_url, open_store
from headrace.online_store.store import OnlineStore
from headrace.stage import MARK, NAME, Stage, stage

_BATCH_ROWS = 1024  # in one question to the store
_NEEDS_COLUMN = ("sum", "min", "max", "last")  # whose types follow from the column that they are of


@dataclass
class Lookup:
    """A ready stage: a key in, the features of a view out.

        score = hr.Pipeline("score", hr.Lookup(stays, key="listing_id", store="features.db", types={"listing_id": str, "price": float}), Model())

    A batch of rows is one question to the store that `headrace features --publish` wrote. In `hr.training_set`, and by `join`, it gives the
    same columns as they were known at the time of each row: one definition of the features serves both. A key of which the store has nothing, or
    nothing that has not expired, gets the defaults that the view declares (null, where it declares none), and is counted.

    Attributes:
        view: the view, by whose name the store knows it.
        store: the path or URL of the store, see `headrace.online_store.open_store`. `$NAME` and `${NAME}` are filled in from the environment of the
            process that reads it, so that a password need not stand in a file.
        asked: after `setup`, how many keys were looked up by this instance.
        missing: after `setup`, how many of them were not found.

    Besides, once and not as settings: `key`, the columns of the row that say whose features are wanted, if they are called otherwise than in the view;
    `features`, which of the view's, all when left out; `prefix`, put before the names of the columns written; `types`, of features and key columns as
    annotations, where the view alone does not tell (a `last`, `min`, `max`, `sum` or a mean of vectors, of a column that its pipeline
    does not declare, and keys);
    `batch`, the most rows in one question; `name`, the stage's own, "lookup_" and the view's when left out.

    Raises:
        DefinitionError: the view has no such feature, a type is missing or wrong.
        OnlineStoreError: no store can be meant by `store`; at `setup`, it is not there, or has not these features.
    """

    view: FeatureView
    _: KW_ONLY
    store: str
    key: InitVar[str | Sequence[str] | None] = None
    features: InitVar[Sequence[str] | None] = None
    prefix: InitVar[str] = ""
    types: InitVar[Mapping[str, Any] | None] = None
    batch: InitVar[int] = _BATCH_ROWS
    name: InitVar[str | None] = None

    def __post_init__(self, key: Any, features: Any, prefix: str, types: Any, batch: int, name: str | None) -> None:
        # In the instance, where `dataclasses.replace` finds them again, but no fields: the wiring depends on them.
        vars(self).update(key=key, features=features, prefix=prefix, types=types, batch=batch, name=name)
        if not isinstance(self.view, FeatureView):
            raise DefinitionError(f"hr.Lookup(view, ...) takes an hr.FeatureView, got {self.view!r}")
        what = f"hr.Lookup of view {self.view.name!r}"
        check_url(self.store)
        self._keys = self.view.key if key is None else (key,) if isinstance(key, str) else tuple(key)
        if len(self._keys) != len(self.view.key) or not all(isinstance(one, str) and NAME.fullmatch(one) for one in self._keys):
            raise DefinitionError(f"{what}: key must name {len(self.view.key)} columns, for {listing(self.view.key)} of the view, got {key!r}")
        if isinstance(features, str):
            raise DefinitionError(f"{what}: features is a list, such as features=[{features!r}], got {features!r}")
        self._features = tuple(self.view.specs if features is None else features)
        if unknown := [one for one in self._features if one not in self.view.specs]:
            has = listing(self.view.specs)
            raise DefinitionError(f"{what}: there is no feature {unknown[0]!r}; it has {has}" + nearest(str(unknown[0]), self.view.specs))
        if not self._features:
            raise DefinitionError(f"{what}: features must name at least one of {listing(self.view.specs)}, got {features!r}")
        if not isinstance(prefix, str) or not NAME.fullmatch(f"{prefix}x"):
            raise DefinitionError(f"{what}: prefix must be the beginning of an identifier, such as 'host_', got {prefix!r}")
        declared = types_of(types or {}, f"{what}: types")
        known = (*self._keys, *self.view.specs)
        if unknown := [one for one in declared if one not in known]:
            raise DefinitionError(f"{what}: types names {unknown[0]!r}, no key column or feature; there are {listing(known)}" + nearest(unknown[0], known))
        self.reads = {name: declared.get(name) or self._of_key(at) for at, name in enumerate(self._keys)}
        self._types = {name: self._of_feature(name, declared.get(name), what) for name in self._features}
        self.asked = self.missing = 0
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was defined: what `setup` opened belongs to its process."""
        given = {field: vars(self)[field] for field in ("view", "store", "key", "features", "prefix", "types", "batch", "name")}
        return _made, (type(self), given)

    @property
    def writes(self) -> dict[str, ColumnType]:
        """The columns written, and their types."""
        return {f"{vars(self)['prefix']}{name}": column for name, column in self._types.items()}

    def setup(self, device: str) -> str:
        """Open the store, and see that it has the view with these features.

        Raises:
            OnlineStoreError: it is not there, out of reach, or has other features.
        """
        self._store: OnlineStore = open_store(os.path.expandvars(self.store), make=False)
        self._wanted = self._see_to_schema()
        freshness = self._store.freshness(self.view.name)
        return f"view {self.view.name!r} of {freshness.keys:,} keys, newest event {freshness.newest or 'none'}, in {self._store.name}"

    def __call__(self, **columns: Column[Any]) -> dict[str, pa.Array]:
        """The features of the keys, defaults where there are none."""
        keys = [_plain(columns[name]) for name in self._keys]
        asked = keys[0] if len(keys) == 1 else list(zip(*keys, strict=True))
        try:
            table = self._read(asked)
        except WrongKeyError as error:  # which is not the store's fault, but that of a row
            raise ValueError(str(error)) from None
        found = pc.sum(table["found"]).as_py() or 0
        with self._counting:
            self.asked += len(asked)
            self.missing += len(asked) - found
        return dict(zip(self.writes, (self._filled(name, table[name]) for name in self._features), strict=True))

    def lookups(self) -> tuple[str, int, int]:
        """The view's name, how many keys were looked up so far, and how many of them were not found; see `headrace.readings`."""
        with self._counting:
            return self.view.name, self.asked, self.missing

    def newest_s(self) -> float | None:
        """The newest event time that the store has of the view, in seconds since 1970; None if it has no event. It asks the store.

        Raises:
            OnlineStoreError: the store is out of reach, or has the view no more.
        """
        newest = self._store.freshness(self.view.name).newest
        return None if newest is None else newest.timestamp()

    def join(self, rows: pa.Table, events: pa.Table, *, time: str) -> pa.Table:
        """The rows in their order with the columns that this stage writes, as they were known at the time of each: the point-in-time join.

        Args:
            rows: what the stage would be given, with a column `time` of instants.
            events: those of the view, behind its pipeline.
            time: the column of `rows` that says as of when.

        Raises:
            WiringError: as `headrace.features.as_of`, or a feature has another type than `types` says.
            SourceError: as `headrace.features.as_of`.
        """
        what = f"hr.Lookup of view {self.view.name!r}"
        if taken := [name for name in self.writes if name in rows.column_names]:
            raise WiringError(f"{what}: the rows have a column {taken[0]!r}, as one that it writes is called; rename one of them, or give the lookup a prefix")
        asked = (*self._keys, time)
        if missing := [name for name in asked if rows.column_names.count(name) != 1]:
            said = f"{what} reads column {missing[0]!r}, which the rows lack or have twice; they have {listing(rows.column_names)}"
            raise WiringError(said + nearest(missing[0], rows.column_names))
        known = as_of(self.view, pa.table([rows[name] for name in asked], names=[*self.view.key, self.view.time]), events)
        for name, (out, column) in zip(self._features, self.writes.items(), strict=True):
            values = known[name]
            if not accepts(column, values.type):
                raise WiringError(f"{what}: feature {name!r} is {values.type}, and the lookup is wired for {column}; correct `types`")
            values = self._filled(name, values)
            rows = rows.append_column(out, values if column.kind == "any" else values.cast(column.arrow))
        return rows

    def _read(self, asked: list[Any]) -> pa.Table:
        try:
            return self._store.read(self.view.name, asked, features=self._wanted)
        except OtherFeaturesError:  # published anew, maybe with columns that will do as well
            self._wanted = self._see_to_schema()
            return self._store.read(self.view.name, asked, features=self._wanted)

    def _see_to_schema(self) -> pa.Schema:
        """The features as the store has them, if the stage can be given its keys and write them."""
        schema = self._store.schema(self.view.name)
        where = f"view {self.view.name!r} in {self._store.name!r}"
        kinds = [kind for _, kind in schema.keys]
        if len(kinds) != len(self._keys):
            raise OnlineStoreError(f"{where} has a key of {len(kinds)} columns, and the view of {len(self._keys)}; publish it as it is defined here")
        for (name, column), kind in zip(self.reads.items(), kinds, strict=True):
            if column.kind not in ("any", kind):
                raise OnlineStoreError(f"{where} has {kind} as key, and the pipeline is wired for {column} in column {name!r}; correct `types`, or convert it")
        return pa.schema([self._kept(schema.features, name) for name in self._features])

    def _of_key(self, at: int) -> ColumnType:
        """A key column's type, as far as the view's pipeline tells."""
        pipeline, name = self.view.pipeline, self.view.key[at]
        return ANY if pipeline is None else pipeline.outputs.get(name) or pipeline.inputs.get(name) or ANY

    def _of_feature(self, name: str, declared: ColumnType | None, what: str) -> ColumnType:
        """A feature's type: as it follows from the view, or else as it is declared; null is allowed where the view has no default."""
        spec, pipeline = self.view.specs[name], self.view.pipeline
        optional = spec.default is None
        told = ANY if pipeline is None or spec.column is None else pipeline.outputs.get(spec.column) or pipeline.inputs.get(spec.column) or ANY
        of_vectors = spec.kind == "mean" and declared is not None and declared.vector is not None
        if (spec.kind in _NEEDS_COLUMN or of_vectors) and told.kind == "any":
            if declared is None or declared.kind == "any":
                raise DefinitionError(
                    f"{what}: feature {name!r} is the {spec.kind} of column {spec.column!r}, whose type the view does not tell; "
                    f"say types={{{name!r}: float}}, or whatever it is"
                )
            spec.default_as(declared.arrow, f"{what}, feature {name!r}")
            return dataclasses.replace(declared, optional=optional)
        arrow = spec.type_over(pa.float64() if told.kind == "any" else told.arrow, f"{what}, feature {name!r}")
        column = dataclasses.replace(told if spec.kind in ("min", "max", "last") else from_arrow(arrow), optional=optional)
        if declared is not None and dataclasses.replace(declared, optional=optional) != column:
            raise DefinitionError(f"{what}: feature {name!r} is {column} by the view, and types says {declared}; leave it away")
        return column

    def _kept(self, features: pa.Schema, name: str) -> pa.Field:
        """The feature as the store has it, if the stage can write it."""
        column = self._types[name]
        if name not in features.names:
            where = f"view {self.view.name!r} in {self._store.name!r}"
            raise OnlineStoreError(f"{where} has no feature {name!r}; it has {listing(features.names)}; publish it as it is defined here")
        field = features.field(name)
        if not accepts(column, field.type):
            raise OnlineStoreError(
                f"view {self.view.name!r} in {self._store.name!r} has feature {name!r} as {field.type}, and the pipeline is wired for {column}; "
                "publish the view as it is defined here, or correct `types`"
            )
        return field

    def _filled(self, name: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """The values, with the view's default in place of nulls."""
        default = self.view.specs[name].default
        if default is None or not values.null_count:
            return values
        return pc.coalesce(values, self.view.specs[name].default_as(values.type, f"feature {name!r}"))


class _Spec:
    """The stage behind a `Lookup`: what `@hr.stage` leaves on other classes, here after the instance's own view and columns."""

    def __get__(self, lookup: Lookup | None, kind: type[Lookup]) -> Stage:
        given: Mapping[str, Any] = vars(kind) if lookup is None else vars(lookup)
        name = "lookup" if lookup is None else given["name"] or f"lookup_{lookup.view.name}"

        # It waits for the store most of the time, and several of them are to fit beside the models on a laptop.
        @stage(out={"features": float} if lookup is None else lookup.writes, batch=given["batch"], name=name, on=[cpu(0.25)])
        class Shape:
            def __call__(self, key: Column[Any]) -> None: ...

        spec = Stage.of(Shape())
        return dataclasses.replace(spec, call=kind) if lookup is None else dataclasses.replace(spec, reads=MappingProxyType(lookup.reads), call=lookup)


setattr(Lookup, MARK, _Spec())


def _made(kind: type[Lookup], given: Mapping[str, Any]) -> Lookup:
    return kind(**given)


def _plain(column: Any) -> list[Any]:
    return list(column.tolist() if hasattr(column, "tolist") else column)
