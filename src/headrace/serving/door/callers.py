"""Who asks a door, and what they may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.serving.door import heads
from headrace.serving.keys import check
from headrace.serving.wire import Failure

NO_KEY = Failure(401, "unauthorized", "an API key is needed: Authorization: Bearer hr_..., or X-API-Key: hr_...")
WRONG_KEY = Failure(401, "unauthorized", "this API key is not valid")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the key, None where none is asked for.
        priority: the best class that it may ask for, 0 first.
        models: those that it may ask; None for all.
        rows: whether it may ask for rows, which count in no limit of tokens.
        logged: whether its owner agrees to prompts being logged.
        account: what whoever keeps accounts knows it by.
    """

    name: str | None = None
    priority: int = 0
    models: tuple[str, ...] | None = None
    rows: bool = True
    logged: bool = False
    account: Any = None


ANYBODY = Caller()
Doorman = Callable[[bytes], Awaitable[Caller | Failure]]
"""Tells whose key was presented, or why nobody with it is let in."""


async def admitted(found: dict[bytes, bytes], keys: Mapping[str, str] | None, doorman: Doorman | None) -> Caller | Failure:
    """Who asks, by the key that came with the request: one of `keys`, by their hashes, or one that the doorman knows."""
    if keys is None and doorman is None:
        return ANYBODY
    given = heads.presented(found)
    if not given:
        return NO_KEY
    if keys is not None and (name := check(keys, given)) is not None:
        return Caller(name)
    return WRONG_KEY if doorman is None else await doorman(given)
