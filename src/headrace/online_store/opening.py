"""Which online store a path or a URL means."""

from __future__ import annotations

import os
from typing import Any

from headrace.errors import OnlineStoreError, nearest
from headrace.online_store.engine import Engine
from headrace.online_store.store import OnlineStore

FORMS = "give the path of an SQLite file, sqlite:///path, or redis://user:password@host:6379/0 (rediss:// for TLS)"

_SCHEMES = ("sqlite", "redis", "rediss")


def open_store(url: str | os.PathLike[str], *, make: bool = True) -> OnlineStore:
    """Open an online store.

    Args:
        url: a path, `sqlite:///features.db` (relative) or `sqlite:////srv/features.db`, for an SQLite file on this machine; or
            `redis://user:password@host:port/db`, with `rediss://` for TLS.
        make: whether to make an SQLite file that is not there, rather than raise.

    Raises:
        OnlineStoreError: no store can be meant by this, a package is missing, or the store is missing, damaged or out of reach.
    """
    return OnlineStore(_engine(url, make=make))


def check_url(url: Any) -> None:
    """Raise OnlineStoreError unless this can mean a store. Nothing is opened."""
    if not isinstance(url, (str, os.PathLike)) or not os.fspath(url) or os.fspath(url) == ":memory:":
        raise OnlineStoreError(f"{url!r} is no place for an online store: {FORMS}")
    scheme, is_url, rest = os.fspath(url).partition("://")
    if not is_url:
        return
    if scheme not in _SCHEMES:  # the rest is not repeated: a password may be in it
        raise OnlineStoreError(f"no online store is known as {scheme}://: {FORMS}" + nearest(scheme, _SCHEMES))
    if scheme == "sqlite" and (not rest.startswith("/") or len(rest) < 2):
        raise OnlineStoreError(f"{url!r} names no file: write sqlite:///features.db for a file in this folder, sqlite:////srv/features.db for one elsewhere")


def _engine(url: str | os.PathLike[str], *, make: bool) -> Engine:
    check_url(url)
    place = os.fspath(url)
    if place.startswith(("redis://", "rediss://")):
        from headrace.online_store.redis import RedisEngine

        return RedisEngine(place)
    from headrace.online_store.sqlite import SqliteEngine

    return SqliteEngine(place.removeprefix("sqlite:///"), make=make)
