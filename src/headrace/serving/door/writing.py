"""One row at a door whose answer is sent as it is written: through the groups before the last one, and from there piece by piece."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from headrace.serving.bodies.events import ERROR, event
from headrace.serving.door import heads
from headrace.serving.door.journey import EXPIRED, Journey
from headrace.serving.door.talk import Talk, failure_of
from headrace.serving.wire import ROW_PATHS, Content, Failure, Question

if TYPE_CHECKING:
    from headrace.serving.door.exchange import Ask
    from headrace.serving.door.fleet import Version

_BYTES_PER_TOKEN = 4  # of usual text


class Writing:
    """The answer to a row, of one version after the other if the first one goes out of service. `talk` is how it came, once the last group was asked."""

    def __init__(self, ask: Ask, journey: Journey, body: bytes, content: Content) -> None:
        self.talk: Talk | None = None
        self._ask, self._journey = ask, journey
        self._body, self._content = body, content

    @property
    def begun(self) -> bool:
        """Whether the client has been sent a part of the answer."""
        return self.talk is not None and self.talk.begun

    async def through(self, version: Version) -> Failure | None:
        """Have a version answer; why there is no answer, or no end of it."""
        refused = refusal(version, self._content)
        if refused is not None:
            return refused
        body: bytes | memoryview = self._body
        content = self._content
        if len(version.pools) > 1:
            before = await self._journey.through(version.pools[:-1], body, content=content, accept=Content.ARROW)
            if isinstance(before, Failure):
                return before
            body, content = before.body, Content.ARROW
        question = Question(ROW_PATHS[content], self._ask.head.priority, len(body) // _BYTES_PER_TOKEN)
        self.talk = Talk(question, self._ask.exchange, broken=_broken)
        outcome = await self.talk.run(self._journey, version.pools[-1], body, (b"x-headrace-version", b"%d" % version.number))
        if isinstance(outcome, Failure):
            return outcome
        said, told = outcome
        if said.status == 200:
            return None
        return failure_of(said, told) if self.begun or told else EXPIRED


def refusal(version: Version, content: Content | None) -> Failure | None:
    """Why a version does not answer rows of this form so; None if it does."""
    if not version.route.contract.get("streams"):
        why = f"the last stage of {version.pipeline!r} is no language model that writes text without a schema, so nothing can be sent before the row is done"
    elif content is None:
        why = f"text/event-stream is the answer to one row, not to a stream of {heads.NDJSON_TYPE.decode()}"
    else:
        return None
    return Failure(406, "not_acceptable", f"{why}; ask without Accept: text/event-stream")


def _broken(failure: Failure) -> bytes:
    return event(ERROR, json.dumps(heads.failure_fields(failure), ensure_ascii=False).encode("utf-8", "replace"))
