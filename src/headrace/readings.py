"""What the stages of a replica say about themselves while they work, as events.

A stage may have a method `figures()`, which gives numbers by name and may be called from any thread. These are known, all of them optional:
`prompt_tokens`, `generated_tokens`, `prefix_tokens` (looked up in a cache of prefixes), `prefix_hits` (found there), `preempted` and
`kv_cache_peak` (the highest use, 0 to 1), which only ever grow; `running`, `waiting` and `kv_cache`, which are of the moment; and `sequences`,
`capacity`, `length` and `yields`, which stay: how many sequences it computes at a time, how many tokens it has room for, the most of one sequence,
and whether background requests make way in it (see `headrace.speech`).

One that looks features up may have a method `lookups()` as well, which gives a view's name, how many keys were asked for so far, and how many of them
were not there; and with it `newest_s()`, the newest event time that the store has of the view, in seconds since 1970, or None.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from headrace.events import EngineSampled, Event, LookedUp
from headrace.stage import Stage

_EACH_S = 1.0
GROWING = ("prompt_tokens", "generated_tokens", "prefix_tokens", "prefix_hits", "preempted")
"""The figures that only ever grow."""

_STATE: dict[str, type] = {"running": int, "waiting": int, "kv_cache": float, "kv_cache_peak": float}


class Readings:
    """Tells of a group's stages with figures once a second, and when asked to. Nothing happens where no stage has any."""

    def __init__(self, stages: Iterable[Stage], *, group: str, emit: Callable[[Event], object]) -> None:
        self.group, self.emit = group, emit
        stages = list(stages)
        self._read: list[Any] = [stage.call.figures for stage in stages if hasattr(stage.call, "figures")]
        self._before = [dict.fromkeys(GROWING, 0.0) for _ in self._read]
        self._lookups = {stage.call.lookups: (0, 0) for stage in stages if hasattr(stage.call, "lookups")}
        self._lock = threading.Lock()
        if self._read or self._lookups:
            threading.Thread(target=self._tell, name="headrace-readings", daemon=True).start()

    def tell(self) -> None:
        """Emit what has changed since the last time."""
        with self._lock:
            for read, before in zip(self._read, self._before, strict=True):
                now = {**before, **read()}
                grown: dict[str, Any] = {name: int(now[name] - before[name]) for name in GROWING}
                before.update({name: now[name] for name in GROWING})
                state: dict[str, Any] = {name: kind(now.get(name, 0)) for name, kind in _STATE.items()}
                if any(grown.values()) or state["running"] or state["waiting"]:
                    self.emit(EngineSampled(self.group, **grown, **state))

            for told, (keys, missing) in self._lookups.items():
                view, *now = told()
                self._lookups[told] = now[0], now[1]
                if now[0] > keys:
                    self.emit(LookedUp(self.group, view, now[0] - keys, now[1] - missing))

    def _tell(self) -> None:
        pause = threading.Event()
        while not pause.wait(_EACH_S):
            self.tell()
