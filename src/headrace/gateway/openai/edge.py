"""OpenAI's interface of a door: who asks, for which model, within which limits, and what is answered, counted and logged."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any

import orjson

from headrace.gateway.openai import asked as asking
from headrace.gateway.openai import refusals
from headrace.gateway.openai.models import Models, billed_as, length_of
from headrace.gateway.openai.notes import Case, attributes, note
from headrace.gateway.openai.refusals import Refused
from headrace.gateway.openai.tills import Declined
from headrace.serving.door import heads
from headrace.serving.door.exchange import CLOSE, too_large
from headrace.serving.door.journey import EXPIRED, Journey
from headrace.serving.door.talk import Talk, count
from headrace.serving.wire import Content, Failure, Question, Said
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from headrace.gateway.openai.files import Files
    from headrace.gateway.openai.tills import Till
    from headrace.serving.door.app import Door
    from headrace.serving.door.callers import Caller
    from headrace.serving.door.exchange import Exchange

_JSON = (b"content-type", heads.JSON_TYPE)
_PATHS = (CHAT, COMPLETIONS, EMBEDDINGS)
_CHALLENGE, _SOON = (b"www-authenticate", b"Bearer"), (b"retry-after", b"1")
_CLOSING = Failure(503, "unavailable", "the service shuts down")
_NO_BATCHES = Failure(404, "not_found", "this service keeps no files and runs no batches: it was started without a folder for them")


class Edge:
    """Answers all paths below `/v1/`, for all services behind the address whose door this is: the model's name says whose a request is.

    `till` keeps limits and accounts, if there are any; `files` are files and batches, if they are kept.
    """

    def __init__(self, door: Door, *, till: Till | None = None, files: Files | None = None, during: AsyncExitStack | None = None) -> None:
        self.door = door
        self._during = during
        self.models = Models(door.lobby.fleets)
        self.till = till
        self.files = files

    async def answer(self, exchange: Exchange, method: str, path: str, caller: Caller | Failure) -> None:
        """Answer a request; `caller` is who asks, or why that is nobody."""
        try:
            if isinstance(caller, Failure):
                await self._refuse(exchange, caller, _CHALLENGE if caller.status == 401 else _SOON)
            elif path in _PATHS:
                await self._ask(exchange, method, path, caller)
            elif path == "/v1/models" or path.startswith("/v1/models/"):
                await self._show_models(exchange, method, path, caller)
            elif path.startswith(("/v1/files", "/v1/batches")):
                if self.files is None:
                    await self._refuse(exchange, _NO_BATCHES)
                else:
                    await self.files.answer(exchange, method, path, caller)
            else:
                raise Refused(f"there is nothing at {method[:20]} {path[:200]}", status=404, code="not_found")
        except Refused as refused:
            await self._refuse(exchange, refused.failure)
        except heads.HeadError as error:
            await self._refuse(exchange, error.failure)

    @property
    def keeps_files(self) -> bool:
        """See `headrace.serving.door.app.Edge`."""
        return self.files is not None

    async def close(self) -> None:
        """Write down what is still to be written, and close what was opened for this."""
        if self._during is not None:
            await self._during.aclose()

    async def _show_models(self, exchange: Exchange, method: str, path: str, caller: Caller) -> None:
        if method not in ("GET", "HEAD"):
            raise Refused(f"{method[:20]} is not allowed here", status=405, code="method_not_allowed")
        name = path.removeprefix("/v1/models").lstrip("/")
        allowed = caller.models
        if name and allowed is not None and name not in allowed:
            raise Refused(f"the model {name[:100]!r} does not exist", "model", status=404, code="model_not_found")
        await exchange.reply(200, orjson.dumps(self.models.shown(name) if name else self.models.listed(allowed)), _JSON)

    async def _ask(self, exchange: Exchange, method: str, path: str, caller: Caller) -> None:
        if method != "POST":
            raise Refused(f"{method[:20]} is not allowed here; POST a JSON object", status=405, code="method_not_allowed")
        head = heads.read(exchange.found)
        if head.content is not Content.JSON:
            raise Refused("the body must be JSON, with Content-Type: application/json", status=415, code="unsupported_media_type")
        bounds = [door.limits for door in self.door.lobby.doors]  # only the body says which of them hold
        left_s = min(math.inf if head.timeout_s is None else head.timeout_s, max(limits.deadline_s for limits in bounds))
        case = Case(exchange, path, caller, max(caller.priority, head.priority if b"x-priority" in exchange.found else 0), self.door)
        whole = exchange.whole
        most_bytes, body_s = max(limits.body_bytes for limits in bounds), self.door.limits.body_s
        body = await exchange.body(length=head.length, most_bytes=most_bytes, until=exchange.began + body_s, expires=exchange.began + left_s)
        case.read_s = exchange.began if whole else self.door.now()
        try:
            if self.door.closing:
                case.failure = _CLOSING
            elif isinstance(body, Failure):
                case.failure = body
            elif left_s <= 0:
                case.failure = EXPIRED
            else:
                await self._converse(case, body, head)
        except Refused as refused:
            case.failure = refused.failure
        if case.failure is not None and not (case.talk is not None and case.talk.begun):
            waits = case.failure.status in (429, 503) and not case.declined
            more = ((b"retry-after", b"%d" % (case.version.retry_after_s() if case.version else 1)),) if waits else ()
            await self._refuse(exchange, case.failure, *more)
        note(case)

    async def _converse(self, case: Case, body: bytes, head: heads.Head) -> None:
        """Find out who is asked, and have them answer."""
        found = asking.parse(body)
        version = self.models.choose(asking.model_of(found), case.path, head.version)
        case.version, case.door = version, self.door.lobby.of(version)
        limits = case.door.limits
        if len(body) > limits.body_bytes:
            case.failure = too_large(limits.body_bytes)
            return
        deadline = case.exchange.began + min(limits.deadline_s, math.inf if head.timeout_s is None else head.timeout_s)
        with contextlib.nullcontext() if case.door is self.door else case.door.turnstile.passing():
            await self._put(case, found, body, head, deadline)

    async def _put(self, case: Case, found: dict[str, Any], body: bytes, head: heads.Head, deadline: float) -> None:
        """Ask a replica within the limits of the key, and pass its answer on."""
        version, name = case.version, found["model"]
        assert version is not None
        length = length_of(version)
        case.asked = asked = asking.read(case.path, body, found, length=length)
        case.body = body
        completion = asked.answer_tokens(case.path, length)
        question = Question(case.path, case.priority, asked.prompt_tokens + completion)
        if self.till is None or case.caller.account is None:
            await self._carry(case, question, head, deadline)
            return
        model = billed_as(name, version, case.caller.models)
        admitted = await self.till.admit(case.caller, model, prompt_tokens=asked.most_prompt_tokens, completion_tokens=completion)
        if isinstance(admitted, Declined) and admitted.tight and (exact := await self._count(case, head, deadline)) is not None:
            admitted = await self.till.admit(case.caller, model, prompt_tokens=exact, completion_tokens=completion)
        case.exchange.also(admitted.headers)
        if isinstance(admitted, Declined):
            case.failure, case.declined = admitted.failure, True  # with headers that say when to come back
            return
        try:
            await self._carry(case, question, head, deadline)
        finally:
            status = case.failure.status if case.failure is not None else case.exchange.status
            self.till.settle(admitted, case.talk, status=status, took_s=time.monotonic() - case.exchange.began)

    async def _count(self, case: Case, head: heads.Head, deadline: float) -> int | None:
        """How many tokens the prompt has exactly, as a replica counts it; None where it cannot be asked."""
        assert case.version is not None
        return await count(self._journey(case, head, deadline), case.version.pools[-1], case.body)

    def _journey(self, case: Case, head: heads.Head, deadline: float) -> Journey:
        """A request on its way, with its span where traces are on."""
        traces, request_id = case.door.traces, case.exchange.request_id
        prefix = None if case.asked is None else case.asked.prefix
        if traces is None:
            return Journey(deadline, case.priority, head.trace, request_id=request_id, prefix=prefix)
        span = traces.begin(head.trace, f"POST {case.path}", attributes=attributes(case.path, case.asked))
        return Journey(deadline, case.priority, span.traceparent, span, request_id, prefix)

    async def _carry(self, case: Case, question: Question, head: heads.Head, deadline: float) -> None:
        version, exchange = case.version, case.exchange
        assert version is not None
        case.journey = journey = self._journey(case, head, deadline)
        talk = case.talk = Talk(question, exchange, broken=refusals.last, spoken=case.door.metrics.spoken(version.number))
        version.report.in_flight += 1
        number = (b"x-headrace-version", b"%d" % version.number)
        try:
            outcome = await talk.run(journey, version.pools[-1], case.body, number)
        finally:
            version.report.in_flight -= 1
        if isinstance(outcome, Failure):
            case.failure = outcome
        elif not talk.begun:
            said, answer = outcome
            if said.status == EXPIRED.status and not answer:
                case.failure = EXPIRED
            else:
                await exchange.reply(said.status, answer, _JSON, number, _timing(said))

    async def _refuse(self, exchange: Exchange, failure: Failure, *more: tuple[bytes, bytes]) -> None:
        """Answer with an error, in OpenAI's form."""
        close = (CLOSE,) if exchange.unread or failure.status == 408 else ()
        if failure.status == 499:
            exchange.status = failure.status
        else:
            await exchange.reply(failure.status, refusals.error(failure), _JSON, *more, *close)


def _timing(said: Said) -> tuple[bytes, bytes]:
    return b"server-timing", b"queue;dur=%.2f, first;dur=%.2f, engine;dur=%.2f" % (said.queue_s * 1e3, said.first_s * 1e3, said.took_s * 1e3)
