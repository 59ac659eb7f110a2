"""The connections of a client, and what its requests share: address, headers, time allowed, retry budget."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.client.attempts import Answer, Budget, Lost, World, exchange
from headrace.client.lines import Lines
from headrace.client.loop import loop

if TYPE_CHECKING:
    import httpx2

_CONNECT_S = 5.0
_IDLE_S = 4.0  # servers commonly close idle connections after 5 s: be quicker


@dataclass(slots=True)
class Session:
    """Requests to one service. Its coroutines run in the clients' own loop."""

    url: str
    headers: Mapping[str, str]
    timeout_s: float
    hedge_s: float | None
    budget: Budget
    ca: str | None = None
    world: World = field(default_factory=World)
    _http: tuple[asyncio.AbstractEventLoop, httpx2.AsyncClient] | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        return self.url, self.headers, self.timeout_s, self.hedge_s, self.budget, self.ca, self.world

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.url, self.headers, self.timeout_s, self.hedge_s, self.budget, self.ca, self.world = state
        self._http = None

    def end_s(self, timeout_s: float | None = None) -> float:
        """When a call that begins now has to be over."""
        return self.world.now() + (timeout_s or self.timeout_s)

    async def exchange(self, method: str, path: str, headers: Mapping[str, str], body: bytes | Lines, end_s: float) -> Answer:
        """The answer to a request, tried until `end_s`; it may have an error's status. Of `Lines`, each attempt sends those still missing."""

        async def send(left_s: float) -> Answer:
            if isinstance(body, bytes):
                return await self._answered(method, path, headers, body, left_s)
            numbers, content = body.missing()
            return body.received(numbers, await self._answered(method, path, headers, content, left_s))

        request_id = headers.get("x-request-id", "")
        return await exchange(send, end_s=end_s, budget=self.budget, hedge_s=self.hedge_s, world=self.world, request_id=request_id, where=self.url)

    async def begin(self, path: str, headers: Mapping[str, str], body: bytes, end_s: float) -> tuple[Answer, httpx2.Response | None]:
        """The head of the answer to a POST, tried until `end_s`, and with status 200 the response, whose body is still to come; else its body."""
        begun: list[httpx2.Response] = []

        async def send(left_s: float) -> Answer:
            response = await self._send("POST", path, headers, body, left_s, stream=True)
            if response.status_code == 200:
                begun.append(response)
                return Answer(200, response.headers, b"")
            with told():
                async with asyncio.timeout(left_s):
                    return Answer(response.status_code, response.headers, await response.aread())

        answer = await exchange(send, end_s=end_s, budget=self.budget, world=self.world, request_id=headers.get("x-request-id", ""), where=self.url)
        return answer, begun[0] if begun else None

    async def _answered(self, method: str, path: str, headers: Mapping[str, str], body: bytes, left_s: float) -> Answer:
        """One attempt."""
        response = await self._send(method, path, headers, body, left_s)
        return Answer(response.status_code, response.headers, response.content)

    async def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes, left_s: float, *, stream: bool = False) -> httpx2.Response:
        http = self._open()
        import httpx2

        every = {**self.headers, **headers, "x-request-timeout": f"{max(left_s, 0.001):.3f}"}
        request = http.build_request(method, self.url + path, headers=every, content=body, timeout=httpx2.Timeout(None, connect=_CONNECT_S))
        with told():
            async with asyncio.timeout(left_s):
                return await http.send(request, stream=stream)

    def _open(self) -> httpx2.AsyncClient:
        """The connections of the loop that runs."""
        try:
            import httpx2  # a tenth of a second
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: hr.Client needs pip install 'headrace[client]'", name=error.name) from error

        here = asyncio.get_running_loop()
        if self._http is None or self._http[0] is not here:
            trusted = ssl.create_default_context(cafile=self.ca) if self.url.startswith("https") else False
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=_IDLE_S)
            self._http = here, httpx2.AsyncClient(verify=trusted, limits=limits, trust_env=False)
        return self._http[1]

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        if self._http is not None:
            (there, http), self._http = self._http, None
            if there is loop():
                asyncio.run_coroutine_threadsafe(http.aclose(), there).result()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Have connections that are lost tell so by `Lost`."""
    import httpx2

    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise Lost(str(error) or type(error).__name__, reached=False) from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise Lost(str(error) or type(error).__name__, reached=True) from error
