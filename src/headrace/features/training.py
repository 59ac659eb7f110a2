"""Training sets in this process: labels, and what was known at the time of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from headrace.errors import DefinitionError, listing
from headrace.features.asof import as_of
from headrace.features.reading import Paths, read_events, read_labels
from headrace.features.view import FeatureView
from headrace.formats import Input
from headrace.pipeline import Pipeline


@runtime_checkable
class Lookup(Protocol):
    """A stage that adds the features of a view, under names of its own: `hr.Lookup`."""

    @property
    def view(self) -> FeatureView:
        """Which features."""

    def join(self, rows: pa.Table, events: pa.Table, *, time: str) -> pa.Table:
        """The rows with the columns that the stage writes, as they were known at the time of each."""


def training_set(
    labels: pa.Table | Paths | Any,
    views: FeatureView | Lookup | Pipeline | Sequence[FeatureView | Lookup],
    *,
    key: str | Sequence[str] | None = None,
    time: str | None = None,
) -> pa.Table:
    """The labels in their order, and beside them the features of all views as they were known at each label's own time.

        rows = hr.training_set("labels.parquet", [stays, reviews])

    It runs in this process, and reads the events of one view after the other into memory; `headrace features --labels` does the
    same for what does not fit.

    Args:
        labels: a table (of pyarrow, Polars, pandas or whatever else hands over Arrow data), or files as `hr.run` takes them.
        views: which features; their sources are read, and their pipelines run. An `hr.Lookup` among them stands for the columns that it
            writes where it runs as a stage, of the labels' columns that it reads; its store is not asked. A pipeline stands for its lookups.
        key: the labels' columns that say whom they are about, if they are called otherwise than in the views; a lookup has a `key` of its own.
        time: the labels' column that says when, if it is called otherwise than in the views.

    Raises:
        DefinitionError: among the views is something else, or a view without a source, or the pipeline has no lookup.
        WiringError: labels or events lack a column or have one of a wrong type, or two features have one name.
        SourceError: a file cannot be found or read, or a value does not fit.
        StageError: a stage of a view's pipeline raised.
    """
    several = _several(views)
    readings = [read_events(_view(one)) for one in several]  # all of them before the first is read: mistakes are told early
    table = _table(labels)
    checked = table.slice(0, 0)
    for one, reading in zip(several, readings, strict=True):
        checked = _joined(one, checked, reading.schema.empty_table(), key, time)
    for one, reading in zip(several, readings, strict=True):
        table = _joined(one, table, reading.whole(), key, time)
    return table


def _several(views: Any) -> list[FeatureView | Lookup]:
    if isinstance(views, Pipeline):
        calls: list[Any] = [stage.call for stage in views.stages]
        if not (lookups := [call for call in calls if isinstance(call, Lookup)]):
            has = listing(stage.name for stage in views.stages)
            raise DefinitionError(f"hr.training_set joins what the lookups of a pipeline read, and {views.name!r} has none: {has}")
        return [*lookups]
    several = list(views) if isinstance(views, Sequence) else [views]
    if wrong := [one for one in several if not isinstance(one, (FeatureView, Lookup))]:
        raise DefinitionError(f"hr.training_set takes hr.FeatureViews and hr.Lookups, or a pipeline with lookups, got {wrong[0]!r}")
    return several


def _view(one: FeatureView | Lookup) -> FeatureView:
    return one if isinstance(one, FeatureView) else one.view


def _joined(one: FeatureView | Lookup, rows: pa.Table, events: pa.Table, key: str | Sequence[str] | None, time: str | None) -> pa.Table:
    if isinstance(one, FeatureView):
        return as_of(one, rows, events, key=key, time=time)
    return one.join(rows, events, time=one.view.time if time is None else time)


def _table(labels: Any) -> pa.Table:
    if isinstance(labels, pa.Table):
        return labels
    if hasattr(labels, "__arrow_c_stream__"):
        return pa.table(labels)
    if isinstance(labels, (str, Input)) or (isinstance(labels, Sequence) and labels and all(isinstance(one, str) for one in labels)):
        return read_labels(labels).whole()
    raise DefinitionError(f"labels are a table, or paths of files, got {labels!r}")
