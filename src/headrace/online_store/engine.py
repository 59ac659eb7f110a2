"""What an online store needs of a database, and no more. `sqlite` and `redis` are the two there are.

The values of a view lie in a *generation*, together with its schema. One generation of a view is the current one, and readers see nothing else. A
deliberate change of a view's schema begins another beside it, which becomes the current one at the end, in one step. A marker, a key that no view can
have, lies beside the values of a generation until another takes its place: a reader that finds it has read current values, without asking twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

FORMAT = 1
"""Of what is kept; a store of a newer format is refused."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Where the values of a view lie: its number, and the schema as it is kept."""

    view: str
    number: int
    schema: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """What a generation holds: the newest event time, when it was last written to, both in microseconds since 1970, and the keys."""

    newest_us: int | None
    published_us: int | None
    keys: int


class Engine(Protocol):
    """A database of generations. Threads may share one; every method that changes something does it whole or not at all.

    What a database raises by itself arrives as an OnlineStoreError.
    """

    name: str
    """What it is called in messages, without a password."""

    def views(self) -> list[str]:
        """The names of all views that have a current generation."""

    def current(self, view: str) -> Generation | None:
        """The current generation of a view."""

    def make(self, view: str, schema: bytes) -> Generation:
        """The current generation of a view; if there is none, an empty one with that schema."""

    def begin(self, view: str, schema: bytes) -> Generation:
        """A new, empty generation beside the current one. Another that was begun before it is given up."""

    def swap(self, generation: Generation) -> bool:
        """Let a generation that was begun take the place of the current one, unless it was given up, or that one was written to meanwhile."""

    def drop(self, generation: Generation) -> None:
        """Give up a generation that was begun. Nothing happens to a current one."""

    def fetch(self, generation: Generation, keys: Sequence[bytes]) -> list[bytes | None] | None:
        """The values of keys, None for those that there are not; None altogether if the generation is not current any more."""

    def put(self, generation: Generation, keys: Sequence[bytes], values: Sequence[bytes], published_us: int) -> int | None:
        """Keep each value unless a later event time is there; how many were. None if the generation is gone."""

    def standing(self, generation: Generation) -> Standing:
        """What the generation holds."""

    def sweep(self, generation: Generation, before: bytes) -> int:
        """Remove values whose expiry is not after `before`, written as in a blob; how many."""

    def settle(self) -> None:
        """Many values were written: put them where they are read fastest."""

    def close(self) -> None:
        """Close all connections."""
