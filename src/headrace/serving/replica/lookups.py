"""What a replica tells of the features that its stages look up: the keys found and not found, and how new the store's values are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from headrace.errors import OnlineStoreError

_EACH_S = 10.0  # the store is asked how new its values are


class Lookups:
    """The stages with a method `lookups()`, see `headrace.readings`, and what their stores hold.

    A store is asked by a thread of its own, never by a request. While it is away, what it said last stands, and grows older.
    """

    def __init__(self, calls: Iterable[Callable[..., Any]], *, each_s: float = _EACH_S) -> None:
        self._stages: list[Any] = [call for call in calls if hasattr(call, "lookups")]
        self._before: dict[str, tuple[int, int]] = {}
        self._newest_s: dict[str, float | None] = {}
        self._closed = threading.Event()
        self.ask()
        if self._stages:
            threading.Thread(target=self._keep_asking, args=(each_s,), name="headrace-freshness", daemon=True).start()

    def told(self) -> dict[str, tuple[int, int, float | None]] | None:
        """By view, the keys found and not found so far, and the newest event time, in seconds since 1970; None where nothing is looked up."""
        counts = {view: (found - was[0], missing - was[1]) for view, (found, missing) in self._counts().items() for was in [self._before.get(view, (0, 0))]}
        return {view: (*each, self._newest_s.get(view)) for view, each in counts.items()} or None

    def forget(self) -> None:
        """Count from now on, as if nothing had been looked up before."""
        self._before = self._counts()

    def ask(self) -> None:
        """Have each store say how new its values are."""
        for stage in self._stages:
            try:
                self._newest_s[stage.lookups()[0]] = stage.newest_s()
            except OnlineStoreError:
                continue  # requests say so, and the age does

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _counts(self) -> dict[str, tuple[int, int]]:
        counts: dict[str, tuple[int, int]] = {}
        for view, asked, missing in (stage.lookups() for stage in self._stages):
            before = counts.get(view, (0, 0))
            counts[view] = before[0] + asked - missing, before[1] + missing
        return counts

    def _keep_asking(self, each_s: float) -> None:
        while not self._closed.wait(each_s):
            self.ask()
