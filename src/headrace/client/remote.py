"""A client of services: `hr.Client(url).reviews(rows)` gives what `reviews.local(rows)` gives, with retries, within a deadline.

All clients of a process share one thread with an event loop; what is called from ordinary code waits for it, and what is awaited, in whatever
loop, as well. A pipeline's column types come from the service itself, once for each version.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import re
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar, overload

import pyarrow as pa

from headrace import __version__
from headrace.client.attempts import Answer, Budget, error_of
from headrace.client.contract import MEDIA, Contract, Form, Row
from headrace.client.lines import MEDIA as LINES
from headrace.client.lines import Lines
from headrace.client.loop import result, submit
from headrace.client.session import Session
from headrace.client.writing import MEDIA as EVENTS
from headrace.client.writing import Put, Written, read
from headrace.errors import RowError, ServiceError, SettingError, check_number, listing, nearest

T = TypeVar("T")
Errors = Literal["raise", "yield"]

_ROWS = 4096  # a request, until the service says that this is too much
_AT_ONCE = 8  # requests that a long list, or a stream, is sent in at the same time
_PRIORITIES = ("interactive", "normal", "batch")


class Client:
    """A client of the service at `url`.

        client = hr.Client("http://127.0.0.1:8000")
        client.reviews({"text": "A quiet room"})                       # a row: its outputs
        client.reviews([{"text": "A quiet room"}, {"text": "Loud"}])   # rows: their outputs, in order
        await client.reviews.aio(rows)                                 # the same, from async code
        for row in client.reviews.stream(rows): ...                    # any number of rows, in bounded memory
        for piece in client.reviews.write(row): ...                    # text while a language model writes it

    The name of the pipeline is the attribute, or the key: `client["reviews"]`. Values are those of `Pipeline.local`: vectors are numpy arrays,
    instants datetimes, images bytes. Lost connections and the statuses 429, 502 and 503 are tried again, with growing pauses, never beyond
    the deadline. A client may be used by many threads and event loops at once; `close` it, or use it as a context.

    Args:
        url: where the service is: `http://host:port`.
        key: an API key, as `headrace keys` makes it.
        timeout_s: how long a call may take, retries included; the service drops work that would be late.
        retries: how many retries there may be beyond a tenth of the requests. One after a refused connection is free: it burdens nobody.
        hedge_s: after how long without an answer a request is sent a second time; never, unless given.
        priority: `interactive`, `normal` or `batch`: what the service serves first when it is busy.
        version: ask this version of the pipeline, whatever others there are.
        ca: a PEM file with the certificates to trust instead of the usual ones.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 100,
        hedge_s: float | None = None,
        priority: str = "normal",
        version: int | None = None,
        ca: str | None = None,
    ) -> None:
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
            raise SettingError(f"hr.Client(url) must be http://host:port or https://host, got {url!r}")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise SettingError("hr.Client(key) must be a key as headrace keys prints it, without spaces or line breaks")
        if priority not in _PRIORITIES:
            raise SettingError(f"hr.Client(priority) must be one of {listing(_PRIORITIES)}, got {priority!r}" + nearest(str(priority), _PRIORITIES))
        check_number(timeout_s, "hr.Client(timeout_s)")
        check_number(retries, "hr.Client(retries)", whole=True, zero=True)
        if hedge_s is not None:
            check_number(hedge_s, "hr.Client(hedge_s), when given,")
        headers = {"user-agent": f"headrace/{__version__}"}
        if priority != "normal":
            headers["x-priority"] = priority
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if version is not None:
            headers["x-headrace-version"] = str(version)
        self._session = Session(url.rstrip("/"), headers, timeout_s, hedge_s, Budget(retries), ca)
        self._remotes: dict[str, Remote] = {}

    def __getitem__(self, pipeline: str) -> Remote:
        """The pipeline of that name; whether there is one shows when it is called."""
        return self._remotes.setdefault(pipeline, Remote(self._session, pipeline))

    def __getattr__(self, pipeline: str) -> Remote:
        if pipeline.startswith("_"):
            raise AttributeError(pipeline)
        return self[pipeline]

    def __repr__(self) -> str:
        return f"Client({self._session.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_remotes": {}}  # a stage may hold a client, and travel

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self._session.close()


class Remote:
    """A pipeline of a service: call it with a row, or with a list of rows."""

    def __init__(self, session: Session, pipeline: str) -> None:
        self.pipeline = pipeline
        self._session = session
        self._path = f"/{pipeline}"
        self._contracts: dict[str, Contract] = {}
        self._newest: Contract | None = None
        self._asking = asyncio.Lock()
        self._rows = _ROWS

    def __repr__(self) -> str:
        return f"Client({self._session.url!r}).{self.pipeline}"

    @overload
    def __call__(self, rows: Row, *, timeout_s: float | None = None, form: Form | None = None) -> dict[str, Any]: ...
    @overload
    def __call__(self, rows: Sequence[Row], *, timeout_s: float | None = None, form: Form | None = None) -> list[dict[str, Any]]: ...

    def __call__(self, rows: Row | Sequence[Row], *, timeout_s: float | None = None, form: Form | None = None) -> Any:
        """The outputs of a row, or of rows in order. A list longer than the service takes at once is sent in parts.

        Args:
            rows: the columns that the pipeline reads, and no others.
            timeout_s: instead of the client's own.
            form: how values travel, `json` or `arrow`; chosen by their number and types unless given.

        Raises:
            RowError: a row lacks a column, has one too many, or holds a value that its type forbids.
            FailedError: a stage raised.
            OverloadedError, UnavailableError, DeadlineError: no answer in time.
            UnauthorizedError, ServiceError: another refusal.
        """
        return result(submit(self._call(rows, timeout_s, form)))

    @overload
    async def aio(self, rows: Row, *, timeout_s: float | None = None, form: Form | None = None) -> dict[str, Any]: ...
    @overload
    async def aio(self, rows: Sequence[Row], *, timeout_s: float | None = None, form: Form | None = None) -> list[dict[str, Any]]: ...

    async def aio(self, rows: Row | Sequence[Row], *, timeout_s: float | None = None, form: Form | None = None) -> Any:
        """The same, to be awaited in any event loop. Cancelled, it hangs up, and the service drops the work."""
        return await asyncio.wrap_future(submit(self._call(rows, timeout_s, form)))

    def write(self, row: Row, *, timeout_s: float | None = None) -> Written:
        """The outputs of a row while they are written, where the pipeline's last stage is a language model that writes text.

        What it gives is an iterator of the pieces of that text, plain and asynchronous, and has the whole `row` at the end. Before the first piece
        it is tried again like a call; after that, an answer that breaks off is an error. `timeout_s` holds for the whole answer.

        Raises:
            ServiceError: while it is read, as from a call. Status 406: the pipeline writes no text so.
        """
        return Written(partial(self._write, row, timeout_s))

    def stream(self, rows: Iterable[Row], *, chunk: int = 256, errors: Errors = "raise") -> Iterator[Any]:
        """The outputs of any number of rows, in order, while `rows` is read: at most eight chunks are under way.

        Each chunk is a request of lines of JSON, with retries and a deadline of its own. A row that fails does not stop the others.

        Args:
            rows: an iterable, read in the calling thread.
            chunk: rows a request; 1 where a row must not wait for the next.
            errors: `raise` the error of the first row that failed, or `yield` it in the row's place.
        """
        waiting: collections.deque[Future[list[Any]]] = collections.deque()
        left, read = iter(rows), itertools.count()
        try:
            while (part := list(itertools.islice(left, _checked(chunk)))) or waiting:
                if part:
                    waiting.append(submit(self._lines(part, next(read) * chunk)))
                if not part or len(waiting) == _AT_ONCE:
                    yield from _given(result(waiting.popleft()), errors)
        finally:
            for one in waiting:
                one.cancel()

    async def stream_aio(self, rows: Iterable[Row] | AsyncIterable[Row], *, chunk: int = 256, errors: Errors = "raise") -> AsyncIterator[Any]:
        """The same for `async for`; `rows` may be an asynchronous iterable, too."""
        waiting: collections.deque[Future[list[Any]]] = collections.deque()
        left, read = rows if isinstance(rows, AsyncIterable) else _asynchronous(rows), itertools.count()
        try:
            async for part in _parts(left, _checked(chunk)):
                waiting.append(submit(self._lines(part, next(read) * chunk)))
                if len(waiting) == _AT_ONCE:
                    for one in _given(await asyncio.wrap_future(waiting.popleft()), errors):
                        yield one
            while waiting:
                for one in _given(await asyncio.wrap_future(waiting.popleft()), errors):
                    yield one
        finally:
            for future in waiting:
                future.cancel()

    def contract(self, *, timeout_s: float | None = None) -> Contract:
        """The columns that the pipeline reads and writes there, `inputs` and `outputs`, asked for anew. Errors as above."""
        return result(submit(self._told({}, self._session.end_s(timeout_s))))

    # In the clients' own loop

    async def _call(self, rows: Row | Sequence[Row], timeout_s: float | None, form: Form | None) -> Any:
        if timeout_s is not None:
            check_number(timeout_s, "timeout_s")
        end_s = self._session.end_s(timeout_s)
        if isinstance(rows, Mapping):
            contract, data = await self._encoded(lambda contract: contract.table([rows]), end_s)
            return (await self._ask(contract, data, [rows], form, end_s, single=True))[0]
        if not rows:
            return []
        contract, data = await self._encoded(lambda contract: contract.table(rows), end_s)
        turn = asyncio.Semaphore(_AT_ONCE)

        async def part(start: int, stop: int) -> list[dict[str, Any]]:
            try:
                async with turn:
                    return await self._ask(contract, data.slice(start, stop - start), rows[start:stop], form, end_s, first_row=start)
            except ServiceError as error:
                if error.status != 413 or stop - start == 1:
                    raise
            self._rows = min(self._rows, (stop - start + 1) // 2)
            return await every(start, stop, self._rows)

        async def every(start: int, stop: int, size: int) -> list[dict[str, Any]]:
            return list(itertools.chain.from_iterable(await _all([part(at, min(stop, at + size)) for at in range(start, stop, size)])))

        return await every(0, len(rows), self._rows)

    async def _ask(
        self, contract: Contract, data: pa.Table, rows: Sequence[Row], form: Form | None, end_s: float, *, single: bool = False, first_row: int = 0
    ) -> list[dict[str, Any]]:
        for other in (False, True):
            way = form or contract.form(len(rows))
            headers = {"content-type": MEDIA[way], "accept": MEDIA[way], "x-request-id": uuid.uuid4().hex}
            answer = await self._session.exchange("POST", self._path, headers, contract.body(data, way, single=single), end_s)
            answerer = await self._answerer(answer, contract, end_s)
            if answer.status != 422 or answerer.inputs == contract.inputs or other:
                break
            self._newest = contract = answerer  # another version, which reads other columns: once more, in its way
            data = contract.table(rows)
        if answer.status != 200:
            raise error_of(answer, headers["x-request-id"], first_row=first_row)
        return answerer.rows(answer.content, way, expected=len(rows))

    async def _write(self, row: Row, timeout_s: float | None, put: Put) -> dict[str, Any]:
        if timeout_s is not None:
            check_number(timeout_s, "timeout_s")
        end_s = self._session.end_s(timeout_s)
        contract, data = await self._encoded(lambda contract: contract.table([row]), end_s)
        for other in (False, True):
            way = contract.form(1)
            headers = {"content-type": MEDIA[way], "accept": EVENTS, "x-request-id": uuid.uuid4().hex}
            answer, response = await self._session.begin(self._path, headers, contract.body(data, way, single=True), end_s)
            if response is not None:
                written = await read(response, put, left_s=end_s - self._session.world.now(), request_id=headers["x-request-id"])
                answerer = await self._answerer(answer, contract, end_s)
                return answerer.rows(b'{"rows":[%b]}' % written, "json", expected=1)[0]  # by itself, a row of one column "rows" would look like several
            answerer = await self._answerer(answer, contract, end_s)
            if answer.status != 422 or answerer.inputs == contract.inputs or other:
                break
            self._newest = contract = answerer  # as in _ask
            data = contract.table([row])
        raise error_of(answer, headers["x-request-id"])

    async def _lines(self, rows: Sequence[Row], first_row: int) -> list[Any]:
        """The outputs of rows that are sent as lines, or the error of each that failed."""
        end_s = self._session.end_s()
        bad: dict[int, ServiceError] = {}
        try:
            contract, data = await self._encoded(lambda contract: contract.table(rows), end_s)
            sent = contract.lines(data)
        except RowError:
            contract = await self._contract(end_s)
            sent, bad = contract.good_lines(rows, first_row)
        lines, answerer = Lines(sent, columns=contract.outputs), contract
        headers = {"content-type": LINES, "accept": LINES, "x-request-id": uuid.uuid4().hex}
        try:
            if sent:
                answer = await self._session.exchange("POST", self._path, headers, lines, end_s)
                answerer = await self._answerer(answer, contract, end_s)
                if answer.status != 200:
                    raise error_of(answer, headers["x-request-id"], first_row=first_row)
        except ServiceError as error:
            bad |= dict.fromkeys(lines.missing()[0], error)
        found = {**bad, **lines.failed, **dict(zip(lines.good, answerer.parsed(list(lines.good.values())), strict=True))}
        return [found[at] for at in range(len(rows))]

    async def _encoded(self, encode: Callable[[Contract], T], end_s: float) -> tuple[Contract, T]:
        """What `encode` makes of the newest contract; if rows do not fit it, after a look whether there is a newer one."""
        contract = await self._contract(end_s)
        try:
            return contract, encode(contract)
        except RowError:
            newer = await self._told({}, end_s)
            if newer.inputs == contract.inputs:
                raise
            self._newest = newer
            return newer, encode(newer)

    async def _contract(self, end_s: float) -> Contract:
        async with self._asking:
            if self._newest is None:
                self._newest = await self._told({}, end_s)
            return self._newest

    async def _answerer(self, answer: Answer, asked: Contract, end_s: float) -> Contract:
        """The contract of the version that answered."""
        version = answer.headers.get("x-headrace-version", asked.version)
        if version != asked.version and version not in self._contracts:
            with contextlib.suppress(ServiceError):  # it is gone again: then the answer's own words must do
                await self._told({"x-headrace-version": version}, end_s)
        return self._contracts.get(version, asked)

    async def _told(self, headers: Mapping[str, str], end_s: float) -> Contract:
        headers = {**headers, "x-request-id": uuid.uuid4().hex}
        answer = await self._session.exchange("GET", f"{self._path}/schema", headers, b"", end_s)
        if answer.status != 200:
            raise error_of(answer, headers["x-request-id"])
        version = answer.headers.get("x-headrace-version", headers.get("x-headrace-version", ""))
        contract = self._contracts[version] = Contract.of(self.pipeline, version, answer.content)
        return contract


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all give, or the first error, after which the others are stopped."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _given(found: list[Any], errors: Errors) -> Iterator[Any]:
    for one in found:
        if isinstance(one, ServiceError) and errors == "raise":
            raise one
        yield one


def _checked(chunk: int) -> int:
    check_number(chunk, "stream(chunk)", whole=True)
    return chunk


async def _asynchronous(rows: Iterable[Row]) -> AsyncIterator[Row]:
    for row in rows:
        yield row


async def _parts(rows: AsyncIterable[Row], size: int) -> AsyncIterator[list[Row]]:
    part: list[Row] = []
    async for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
