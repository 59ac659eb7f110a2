"""The services that are behind another one's doors, and the names by which clients ask each: its pipelines', and those of their models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headrace.errors import ServingError


def names_of(contract: Mapping[str, Any]) -> tuple[str, ...]:
    """By which names a pipeline is asked: its own, which is its path and its model's alias, and its model's."""
    speech = contract.get("speech")
    return tuple(dict.fromkeys(name for name in (contract.get("pipeline"), speech["model"] if speech else None) if name))


class Guests:
    """The guests of a service, each with the names that it has taken. No two services behind one address have a name in common."""

    def __init__(self, host: str, kept: Mapping[str, Iterable[str]] | None = None) -> None:
        self.host = host
        self.names: dict[str, tuple[str, ...]] = {guest: tuple(names) for guest, names in (kept or {}).items()}

    def check(self, service: str, names: Iterable[str], *, host: Iterable[str]) -> None:
        """Whether a service, which may be the host itself, may take these names, while the host has those.

        Raises:
            ServingError: another service has one of them.
        """
        taken = {name: owner for owner, theirs in ((self.host, host), *self.names.items()) for name in theirs if owner != service}
        for name in names:
            if name in taken:
                raise ServingError(
                    f"{service!r} would answer as {name!r} at an address where service {taken[name]!r} does already, and nobody could tell them apart; "
                    f"give the pipeline another name, make it a version of {taken[name]!r} with --name {taken[name]}, or serve it elsewhere, without --behind"
                )

    def seat(self, guest: str, names: Iterable[str], *, host: Iterable[str]) -> None:
        """Take a service in, or give one that is in other names.

        Raises:
            ServingError: another service has one of the names.
        """
        names = tuple(dict.fromkeys(names))
        self.check(guest, names, host=host)
        self.names[guest] = names

    def unseat(self, guest: str) -> None:
        """A service has ended, or ends."""
        self.names.pop(guest, None)
