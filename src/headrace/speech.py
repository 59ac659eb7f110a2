"""What a stage has that answers OpenAI's interface beside computing rows, so that doors and replicas need not know the engine.

Such a stage's object has `speaks()`, which gives a `Speech`, and once it is set up `speaker()`, which gives the `Speaker`. One whose rows can be
answered while they are written is a `Writer` besides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOKENIZE = "/tokenize"
"""Answered with the `count` of the tokens of the prompt of a body for any of these."""

RIDER, FILLER = 2, 3
"""Priorities of background requests in an engine that yields (`yields` of its figures): a rider takes part in the steps of better ones, but not in
those that read their prompts; a filler only in steps without better ones. Neither loses what it has computed."""


@dataclass(frozen=True, slots=True)
class Speech:
    """What is spoken: the model's public name, and the paths that it answers."""

    model: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as OpenAI's interface has it: an HTTP status, and a body of JSON."""

    status: int
    body: bytes


@dataclass(slots=True)
class Spent:
    """What a request came to so far; the engine writes it down while it computes.

    `cached_tokens` are those of the prompt that were computed before. `queue_s` is how long it waited for the engine's first step with it,
    `first_s` how long for its first token, from when the engine got it.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    first_s: float = 0.0


class Speaker(Protocol):
    """An engine. Its loop runs in a thread of its own."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where `speak` is called."""

    @property
    def alive(self) -> bool:
        """Whether it answers, as far as is known."""

    async def speak(
        self, path: str, body: bytes | Mapping[str, Any], *, priority: int = 1, request_id: str | None = None, spent: Spent
    ) -> Reply | AsyncIterator[str]:
        """The answer to a body under one of the paths; the text of server-sent events where it asks for a stream.

        Lower priorities go first. The body's own `model` and `priority` count for nothing. Cancelling the caller, or closing the iterator,
        ends the computation.

        Raises:
            EngineLostError: the engine died or hangs, and this process is not one that ends then.
        """

    def figures(self) -> dict[str, float]:
        """What it is doing, has done and has room for: see `headrace.readings`. May be called from any thread."""


@dataclass(frozen=True, slots=True)
class Writing:
    """What a stage writes piece by piece: the text of a column, of at most so many tokens a row."""

    column: str
    tokens: int


class Writer(Protocol):
    """A stage's object that can give the text that it makes of a row while it is written."""

    def writing(self) -> Writing | None:
        """What it writes so; None where its answers are of another kind."""

    def asks(self, **columns: Any) -> Any:
        """What a row asks, from its columns as the stage is called with them. For any thread; the user's code may run in it, and raise."""

    def write(self, asked: Any, *, priority: int = 1, request_id: str | None = None, spent: Spent) -> AsyncIterator[str]:
        """The pieces of the text, which joined are what a call of the stage writes. On the speaker's loop; arguments as `Speaker.speak` has them.

        Raises:
            EngineLostError: as `Speaker.speak`. Anything else is the row's fault, as in a call.
        """
