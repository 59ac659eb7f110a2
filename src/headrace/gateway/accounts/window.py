"""What was admitted in the last minute, counted by the second: the one data structure behind limits per minute.

A token bucket of the limit's size admits up to twice the limit in a minute: a full bucket at once, and what flows in meanwhile. This
window never does. It counts admissions in buckets of one second and keeps each until its *last* moment is 60 s old, so whatever lies within
any 60 s is counted. The price is that an admission counts for up to 61 s. The size is bounded, whatever the limit: 62 buckets at most.
"""

from __future__ import annotations

import json
import math

WINDOW_S = 60
_KEPT_S = WINDOW_S + 1  # from the first moment of a bucket to the time when its last moment has left the window


class Window:
    """Requests and tokens by the second in which they were admitted, oldest first.

    Its time never goes back: processes whose clocks differ a little share a window, and the one that is behind counts at the time
    of the one ahead. Two clocks that differ by s seconds shorten the window by as much, so machines that share one have to keep time (NTP).
    """

    __slots__ = ("_buckets", "requests", "tokens")

    def __init__(self, text: str = "[]") -> None:
        """The window that `str` wrote.

        Raises:
            ValueError: the text is not one.
        """
        self._buckets: dict[int, list[int]] = {int(second): [int(requests), int(tokens)] for second, requests, tokens in json.loads(text)}
        self.requests = sum(bucket[0] for bucket in self._buckets.values())
        self.tokens = sum(bucket[1] for bucket in self._buckets.values())

    def __str__(self) -> str:
        return json.dumps([[second, *bucket] for second, bucket in self._buckets.items()], separators=(",", ":"))

    def advance(self, now: float) -> float:
        """Let go of what has left the window by `now`, in seconds of Unix time; returns the time that the window is at, which may be later."""
        latest = next(reversed(self._buckets), None)
        if latest is not None and latest > now:
            if latest - now <= WINDOW_S:
                now = float(latest)
            else:  # some clock was far ahead: without this, what it counted would stay until that time comes
                self._buckets = {math.floor(now): [self.requests, self.tokens]}
        for second in list(self._buckets):
            if second + _KEPT_S > now:
                break
            requests, tokens = self._buckets.pop(second)
            self.requests -= requests
            self.tokens -= tokens
        return now

    def admit(self, now: float, tokens: int) -> int:
        """Count one request at `now`, which `advance` returned; what is returned is its second, for `correct`."""
        second = math.floor(now)
        bucket = self._buckets.setdefault(second, [0, 0])
        bucket[0] += 1
        bucket[1] += tokens
        self.requests += 1
        self.tokens += tokens
        return second

    def correct(self, second: int, *, requests: int = 0, tokens: int = 0) -> None:
        """Add to what was admitted in a second; nothing happens once that has left the window."""
        bucket = self._buckets.get(second)
        if bucket is None:
            return
        bucket[0] += requests
        bucket[1] += tokens
        self.requests += requests
        self.tokens += tokens
        if bucket == [0, 0]:
            del self._buckets[second]

    def wait_s(self, now: float, *, requests: int = 0, tokens: int = 0) -> float:
        """How long until that many requests and tokens have left, or all that is there; 0 if none have to."""
        wait_s = 0.0
        for second, bucket in self._buckets.items():
            if requests <= 0 and tokens <= 0:
                break
            requests -= bucket[0]
            tokens -= bucket[1]
            wait_s = max(second + _KEPT_S - now, 0.0)
        return wait_s
