"""From the table of a feature view to an online store."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterable

import pyarrow as pa

from headrace.errors import OnlineStoreError, nearest
from headrace.features import FeatureView
from headrace.online_store.opening import open_store
from headrace.online_store.store import OnlineStore, Written


def publish(
    view: FeatureView,
    table: pa.Table | Iterable[pa.Table],
    store: OnlineStore | str | os.PathLike[str],
    *,
    at: dt.datetime | None = None,
    replace: bool = False,
) -> Written:
    """Write what is known of a view's keys, as `headrace.features.latest` gives it, to an online store.

        publish(stays, latest(stays, events, at=now), "features.db", at=now)

    Whatever is there of a later event stays, see `OnlineStore.write`. Values live as long as the view's `ttl` says, and what has expired is removed.

    Args:
        view: the view; the store knows it by its name.
        table: its key, its time and its features, or several such tables; other columns are left out.
        store: an open store, or the path or URL of one.
        at: as of when the features were computed; now when left out.
        replace: write the view anew, with other columns or without keys that are no more; readers change over at the end, at once.

    Raises:
        OnlineStoreError: a table lacks a column, or the store refuses: the view has other columns there, say.
    """
    if not isinstance(store, OnlineStore):
        with open_store(store) as opened:
            return publish(view, table, opened, at=at, replace=replace)
    tables = (_of_view(view, each) for each in ([table] if isinstance(table, pa.Table) else table))
    assert isinstance(view.key, tuple)
    assert view.ttl is None or isinstance(view.ttl, dt.timedelta)
    ttl_s = None if view.ttl is None else view.ttl.total_seconds()
    if replace:
        return store.replace(view.name, tables, key=view.key, time=view.time, ttl_s=ttl_s, at=at)
    done = Written()
    for each in tables:
        done += store.write(view.name, each, key=view.key, time=view.time, ttl_s=ttl_s, at=at)
    if ttl_s is not None and done.rows:
        store.sweep(view.name)
    return done


def _of_view(view: FeatureView, table: pa.Table) -> pa.Table:
    names = [*view.key, view.time, *view.specs]
    if lacking := [name for name in names if name not in table.column_names]:
        raise OnlineStoreError(f"feature view {view.name!r}: the table to publish lacks column {lacking[0]!r}" + nearest(lacking[0], table.column_names))
    return table.select(names)
