"""The online store: the latest features of each key, in an SQLite file or a Redis, where a service reads them in a millisecond."""

from headrace.online_store.lookup import Lookup
from headrace.online_store.opening import open_store
from headrace.online_store.publishing import publish
from headrace.online_store.store import Freshness, OnlineStore, Written

__all__ = ["Freshness", "Lookup", "OnlineStore", "Written", "open_store", "publish"]
