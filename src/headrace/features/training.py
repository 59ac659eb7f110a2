"""Training sets in this process: labels, and what was known at the time of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from headrace.errors import DefinitionError
from headrace.features.asof import as_of
from headrace.features.reading import Paths, read_events, read_labels
from headrace.features.view import FeatureView
from headrace.formats import Input


def training_set(
    labels: pa.Table | Paths | Any, views: FeatureView | Sequence[FeatureView], *, key: str | Sequence[str] | None = None, time: str | None = None
) -> pa.Table:
    """The labels in their order, and beside them the features of all views as they were known at each label's own time.

        rows = hr.training_set("labels.parquet", [stays, reviews])

    It runs in this process, and reads the events of one view after the other into memory; `headrace features --labels` does the
    same for what does not fit.

    Args:
        labels: a table (of pyarrow, Polars, pandas or whatever else hands over Arrow data), or files as `hr.run` takes them.
        views: which features; their sources are read, and their pipelines run.
        key: the labels' columns that say whom they are about, if they are called otherwise than in the views.
        time: the labels' column that says when.

    Raises:
        WiringError: labels or events lack a column or have one of a wrong type, or two features have one name.
        SourceError: a file cannot be found or read, or a value does not fit.
        StageError: a stage of a view's pipeline raised.
    """
    several = [views] if isinstance(views, FeatureView) else list(views)
    if wrong := [view for view in several if not isinstance(view, FeatureView)]:
        raise DefinitionError(f"hr.training_set takes hr.FeatureViews, got {wrong[0]!r}")
    readings = [read_events(view) for view in several]  # all of them before the first is read: mistakes are told early
    table = _table(labels)
    checked = table.slice(0, 0)
    for view, reading in zip(several, readings, strict=True):
        checked = as_of(view, checked, reading.schema.empty_table(), key=key, time=time)
    for view, reading in zip(several, readings, strict=True):
        table = as_of(view, table, reading.whole(), key=key, time=time)
    return table


def _table(labels: Any) -> pa.Table:
    if isinstance(labels, pa.Table):
        return labels
    if hasattr(labels, "__arrow_c_stream__"):
        return pa.table(labels)
    if isinstance(labels, (str, Input)) or (isinstance(labels, Sequence) and labels and all(isinstance(one, str) for one in labels)):
        return read_labels(labels).whole()
    raise DefinitionError(f"labels are a table, or paths of files, got {labels!r}")
