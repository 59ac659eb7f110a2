"""What can be entered in the books, each checked when it is made, so that one that is wrong fails alone and not with those it shares a transaction with."""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import AccountsError
from headrace.gateway.accounts.limits import is_model, whole
from headrace.gateway.accounts.quotas import Grant

MOST_TOKENS = 10**8
"""Of one request: more is a mistake of whoever counted."""

_OWN_ID = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What a request came to.

    Attributes:
        prompt_tokens: of the prompt, those below included.
        completion_tokens: of the answer.
        cached_tokens: of the prompt, those that the engine had computed before.
        status: the HTTP status of its answer; 0 where nobody knows, because its process died.
        queue_s: how long it waited before an engine took it.
        ttft_s: from its arrival to the first token.
        took_s: from its arrival to the end of the answer.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    status: int = 200
    queue_s: float | None = None
    ttft_s: float | None = None
    took_s: float | None = None

    def __post_init__(self) -> None:
        _tokens(self.prompt_tokens, "prompt_tokens")
        _tokens(self.completion_tokens, "completion_tokens")
        whole(self.cached_tokens, "cached_tokens, which are among prompt_tokens,", most=self.prompt_tokens)
        whole(self.status, "status", most=999)
        for what in ("queue_s", "ttft_s", "took_s"):
            value = getattr(self, what)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0):
                raise AccountsError(f"{what} must be seconds from 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask whether a request may run, and set aside what it may use at most: a `Grant` or a `Refusal`.

    One that is not `paced` is counted in no limit per minute, and held to none.
    """

    key: int
    model: str
    prompt_tokens: int
    completion_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    paced: bool = True

    def __post_init__(self) -> None:
        _key(self.key)
        _model(self.model)
        _tokens(self.prompt_tokens, "prompt_tokens")
        _tokens(self.completion_tokens, "max_tokens")


@dataclass(frozen=True, slots=True)
class Settle:
    """Replace a grant's reservation by what was used: whether that was done now. It is done once, whoever tries."""

    grant: Grant
    used: Used


@dataclass(frozen=True, slots=True)
class Release:
    """Give a grant's reservation back, as if it had never been asked for: whether that was done now."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Book:
    """Book a request under an id of the caller's own: whether that was done now. A grant with this id is settled by it."""

    id: str
    key: int
    model: str
    used: Used

    def __post_init__(self) -> None:
        check_id(self.id)
        _key(self.key)
        _model(self.model)


@dataclass(frozen=True, slots=True)
class Expire:
    """End a grant whose time is over: whether that was done now. It is settled at its reservation; under an id of the caller's own it is given back."""

    id: str
    key: int


Entry = Reserve | Settle | Release | Book | Expire


def check_id(own: Any) -> None:
    """Raise AccountsError unless this can be an id of the caller's own. The colon keeps it apart from ids that are made here."""
    if not isinstance(own, str) or not _OWN_ID.fullmatch(own) or not is_own(own):
        shape = "printable ASCII without spaces, at most 200 characters, with a ':' among them, such as 'batch:b1:7'"
        raise AccountsError(f"{str(own)[:80]!r} cannot be the id of a request: {shape}")


def is_own(name: str) -> bool:
    """Whether an id is of the caller's own: it is remembered once it is booked."""
    return ":" in name


def key_of(entry: Entry) -> int:
    """The number of the key whose row an entry changes."""
    return entry.grant.key if isinstance(entry, Settle | Release) else entry.key


def _key(number: Any) -> None:
    whole(number, "the number of a key", least=1, most=2**62, instead="; it is the id of a Key")


def _model(name: Any) -> None:
    if not is_model(name):
        raise AccountsError(f"{str(name)[:80]!r} cannot be a model's name: printable ASCII without spaces, at most 200 characters")


def _tokens(value: Any, what: str) -> None:
    whole(value, what, most=MOST_TOKENS)
