"""What replicas tell of the features that they look up, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from headrace.serving.watch.exposition import escaped, line

HELP = {
    "headrace_lookup_keys_total": ("counter", "Keys whose features were looked up, by whether the store had them."),
    "headrace_feature_age_seconds": ("gauge", "Time since the newest event that the store has of a view."),
}

Told = Mapping[str, tuple[int, int, float | None]]
"""Of one replica: see `headrace.serving.replica.lookups`."""


class Lookups:
    """What the replicas of a service tell, by version and replica. Like those of engines, its series are of no door.

    Args:
        service: its name.
        clock: gives the seconds since 1970.
    """

    def __init__(self, service: str, *, clock: Callable[[], float] = time.time) -> None:
        self.told: Mapping[tuple[int, str], Told] = {}
        self._clock = clock
        self._labels = f'service="{escaped(service)}"'

    def lines(self) -> Iterator[tuple[str, list[str]]]:
        """Their series by the names of families."""
        newest: dict[tuple[int, str], float] = {}
        for (version, replica), views in sorted(self.told.items()):
            for view, (found, missing, newest_s) in sorted(views.items()):
                labels = f'{self._labels},version="{version}",replica="{escaped(replica)}",view="{escaped(view)}"'
                for there, number in (("true", found), ("false", missing)):
                    yield "headrace_lookup_keys_total", [line("headrace_lookup_keys_total", f'{labels},found="{there}"', number)]
                if newest_s is not None:
                    newest[version, view] = max(newest_s, newest.get((version, view), newest_s))
        for (version, view), newest_s in sorted(newest.items()):
            labels = f'{self._labels},version="{version}",view="{escaped(view)}"'
            yield "headrace_feature_age_seconds", [line("headrace_feature_age_seconds", labels, round(self._clock() - newest_s, 3))]
