"""Whether a request is tried again after its replica was lost, and when it is held to be what kills replicas."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from headrace.serving.door.journey import Hop
from headrace.serving.door.link import Link
from headrace.serving.routes import Endpoint
from headrace.serving.wire import Failure

MOST_TOKENS = 1_000.0
TOKENS_PER_REQUEST = 0.2
UNSAID_DEATHS = 5
MOST_DEATHS = 8
FULL_MEMORY = 0.8
WORDS_S = 2.0  # for an answer from another machine

AskWords = Callable[[Endpoint], Awaitable[str | None]]


class Retries:
    """A door's budget of further attempts, and its judgement of requests whose replicas die.

    The first loss of each request is always made good, also when the budget is used up: one replica's death with thousands of requests
    on board fails none of them. It still takes tokens, so that further losses soon after are bounded.
    """

    def __init__(self, *, ask_words: AskWords | None = None, retried: Callable[[int, str], None]) -> None:
        self.tokens = MOST_TOKENS
        self._ask_words = ask_words
        self._retried = retried
        self._full_bytes = FULL_MEMORY * _memory_bytes()

    def earn(self) -> None:
        """A request was accepted."""
        if self.tokens < MOST_TOKENS:
            self.tokens = min(MOST_TOKENS, self.tokens + TOKENS_PER_REQUEST)

    def spend(self, hop: Hop, why: str, *, version: int) -> bool:
        """Whether the request, which this version computes, may be tried once more."""
        if self.tokens < 1 and hop.journey.retries:
            return False
        self.tokens = max(0.0, self.tokens - 1)
        self._retried(version, why)
        return True

    def evidence(self, link: Link) -> str | None:
        """What shows that a replica on this machine, which is lost, ended by its own doing; None where nothing does, or on other machines."""
        if not link.local:
            return None
        from headrace.serving.words import read  # not needed until something dies

        words = read(link.endpoint.pid) if link.endpoint.pid else None
        memory_bytes = link.stats.memory_bytes if link.stats is not None else 0
        if words is None and memory_bytes > self._full_bytes:
            return f"it held {memory_bytes / 1e9:.1f} GB of memory, more than {FULL_MEMORY:.0%} of what the machine has"
        return words

    async def ask(self, link: Link) -> str | None:
        """The same of a replica on another machine, which takes its time."""
        if self._ask_words is None:
            return None
        asking = asyncio.ensure_future(self._ask_words(link.endpoint))
        done, _ = await asyncio.wait({asking}, timeout=WORDS_S)
        if not done:
            asking.cancel()
            return None
        return asking.result() if not asking.cancelled() and asking.exception() is None else None

    def verdict(self, hop: Hop, words: str | None) -> Failure | None:
        """What to answer to a request in whose computation, alone, a replica died; None to try it again.

        `words` are what shows that the process ended by its own doing, if anything does; then a second death convicts.
        """
        if words is not None and hop.deaths >= 2:
            said = words.strip()[:1_000]
            return Failure(500, "deadly_row", f"the request ended the process that computed it, {hop.deaths} times; of the last one is known: {said}")
        if hop.deaths >= MOST_DEATHS:
            return Failure(500, "deadly_row", f"{hop.deaths} replicas died or hung while they computed the request; it is not tried again")
        return None


def _memory_bytes() -> int:
    """How much memory this machine has, or this container may use."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            have = min(have, int(text))
    return have
