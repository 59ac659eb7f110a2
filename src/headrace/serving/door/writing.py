"""One row at a door whose answer is sent as it is written: through the groups before the last one, and from there piece by piece."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from headrace.serving.bodies.events import ERROR, event
from headrace.serving.door import heads
from headrace.serving.door.journey import EXPIRED, Journey
from headrace.serving.door.talk import Talk, failure_of
from headrace.serving.wire import ROW_PATHS, Content, Failure, Question

if TYPE_CHECKING:
    from headrace.serving.door.exchange import Ask
    from headrace.serving.door.fleet import Version
    from headrace.serving.watch.metrics import DoorMetrics

_BYTES_PER_TOKEN = 4  # of usual text
_WITHOUT = "ask without Accept: text/event-stream"

NOT_OF_LINES = Failure(406, "not_acceptable", f"text/event-stream is the answer to one row, not to a stream of {heads.NDJSON_TYPE.decode()}; {_WITHOUT}")


class Writing:
    """The answer to a row, of one version after the other if the first one goes out of service.

    `talk` is how it came, once the last group was asked, at `asked_s`. What is counted of it goes to `metrics`.
    """

    def __init__(self, ask: Ask, journey: Journey, body: bytes, content: Content, *, metrics: DoorMetrics) -> None:
        self.talk: Talk | None = None
        self.asked_s = 0.0
        self._metrics = metrics
        self._ask, self._journey = ask, journey
        self._body, self._content = body, content

    @property
    def begun(self) -> bool:
        """Whether the client has been sent a part of the answer."""
        return self.talk is not None and self.talk.begun

    async def through(self, version: Version) -> Failure | None:
        """Have a version answer; why there is no answer, or no end of it."""
        if (refused := refusal(version)) is not None:
            return refused
        body: bytes | memoryview = self._body
        content = self._content
        if len(version.pools) > 1:
            before = await self._journey.through(version.pools[:-1], body, content=content, accept=Content.ARROW)
            if isinstance(before, Failure):
                return before
            body, content = before.body, Content.ARROW
            self._journey.patient = True  # work was done for it, which is not thrown away
        question = Question(ROW_PATHS[content], self._ask.head.priority, len(body) // _BYTES_PER_TOKEN)
        self.talk = Talk(question, self._ask.exchange, broken=_broken, spoken=self._metrics.spoken(version.number))
        self.asked_s = time.monotonic()
        outcome = await self.talk.run(self._journey, version.pools[-1], body, (b"x-headrace-version", b"%d" % version.number))
        if isinstance(outcome, Failure):
            return outcome
        said, told = outcome
        if said.status == 200:
            return None
        return failure_of(said, told) if self.begun or told else EXPIRED


def refusal(version: Version) -> Failure | None:
    """Why a version does not answer so; None if it does."""
    if version.route.contract.get("streams"):
        return None
    why = f"the last stage of {version.pipeline!r} is no language model that writes text without a schema, so nothing can be sent before the row is done"
    return Failure(406, "not_acceptable", f"{why}; {_WITHOUT}")


def _broken(failure: Failure) -> bytes:
    return event(ERROR, json.dumps(heads.failure_fields(failure), ensure_ascii=False).encode("utf-8", "replace"))
