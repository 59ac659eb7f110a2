"""A load of streaming requests on an OpenAI endpoint, as a process of its own: a job as JSON on standard input, figures as JSON on standard output.

    python benchmarks/llm_load.py < job.json

It prints a line `begin` and a line `end` around the time that is measured, so that whoever started it can read the server's CPU time just
then, and the figures in a last line. Connections are kept alive; events are read as they come off the socket, one JSON value each.

TTFT is the time from sending a request to the first event with text in it: in an open loop from when it was due, whether or not the load was
late. ITL is the time from one event with text to the next of the same stream: several that come in one piece are 0 apart. An event may hold
more than one token, so TPOT is told as well: the time from a stream's first text to its last, per token after the first. Tokens are those that
the server counts in `usage`; those of a stream that reaches out of the measured time count by the share of its events that lies within.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import load
import numpy as np
import orjson
import uvloop

PLACE = "0000000000"
"""What a request's text begins with: a number of its own goes there, so that no server finds its prefix in a cache."""

PAUSE = 0.1
"""Of the time that an answer took, how much at most passes until its stream asks again, in a closed loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to send.

    Attributes:
        url: of the endpoint.
        bodies: JSON values of requests, sent in turn; each has `PLACE` in it once.
        seconds: that are measured.
        settle_s: before that, under the same load.
        streams: a closed loop of so many at once; or 0.
        due_s: when each request of an open loop is sent, from the start of `settle_s`.
        number: the first request's; nobody else's are near it.
        timeout_s: after which a request has failed.
    """

    url: str
    bodies: Sequence[dict[str, Any]]
    seconds: float
    settle_s: float = 2.0
    streams: int = 0
    due_s: Sequence[float] = ()
    number: int = 0
    timeout_s: float = 120.0


@dataclass(slots=True)
class Asked:
    """A request, and what has come of it."""

    due_s: float
    texts_s: list[float] = field(default_factory=list)  # when each event with text came
    tokens: int = 0
    prompt_tokens: int = 0
    finished: bool = False
    error: str = ""

    def take(self, event: bytes, now_s: float) -> None:
        """The next event of the stream."""
        if not event.startswith(b"data: "):
            return
        if event == b"data: [DONE]":
            self.finished = True
            return
        value = orjson.loads(event[6:])
        if error := value.get("error"):
            self.error = self.error or f"error in the stream: {error.get('message') if isinstance(error, dict) else error}"[:200]
        if usage := value.get("usage"):
            self.tokens, self.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        for choice in value.get("choices", ()):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                self.texts_s.append(now_s)


class Stream(load.Connection):
    """A connection whose answers are read event by event."""

    asked: Asked
    rest = b""

    def on_body(self, body: bytes) -> None:
        if self.parser.get_status_code() != 200:
            super().on_body(body)
            return
        now_s = time.perf_counter()
        *events, self.rest = (self.rest + body).split(b"\n\n")
        for event in events:
            self.asked.take(event, now_s)


class Load:
    """One job under way."""

    def __init__(self, job: Job) -> None:
        self.job, self.asked = job, list[Asked]()
        parts = urlsplit(job.url)
        self.host, self.port = parts.hostname, parts.port
        self.head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n".encode()
        self.halves = [self._halves(body) for body in job.bodies]
        self.begin_s = time.perf_counter() + job.settle_s
        self.end_s = self.begin_s + job.seconds

    def _halves(self, body: dict[str, Any]) -> tuple[bytes, bytes]:
        before, place, after = json.dumps(body).partition(PLACE)
        assert place, f"no {PLACE} in {body}"
        return before.encode(), after.encode()

    async def one(self, stream: Stream, due_s: float, *, share: float = 1.0) -> None:
        """One request, to the end of its answer, which is cut to a share of what the job says."""
        number = len(self.asked)
        asked = stream.asked = Asked(due_s)
        self.asked.append(asked)
        stream.rest = b""
        before, after = self.halves[number % len(self.halves)]
        if share < 1:
            whole = self.job.bodies[number % len(self.halves)]
            tokens = max(2, round(share * whole["max_tokens"]))
            before, after = self._halves(whole | {"max_tokens": tokens, "min_tokens": tokens})
        body = before + b"%010d" % (self.job.number + number) + after
        try:
            if stream.lost:
                await asyncio.get_running_loop().create_connection(lambda: stream, self.host, self.port)
            async with asyncio.timeout(self.job.timeout_s):
                status, said = await stream.ask(b"%scontent-length: %d\r\n\r\n%s" % (self.head, len(body), body))
        except TimeoutError:
            asked.error = "no answer in time"
            stream.transport.abort()
            stream.lost = True
        except OSError as error:
            asked.error = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.02)
        else:
            if status != 200:
                asked.error = f"{status}: {said[:200].decode(errors='replace')}"
                await asyncio.sleep(0.02)
            elif not asked.error and not (asked.finished and asked.texts_s):
                asked.error = "the stream ended early" if asked.texts_s else "the stream had no text"

    async def closed(self) -> None:
        """As many streams at once as the job says.

        Each begins with a shorter answer, and pauses after each one for up to `PAUSE` of the time that it took. Without, streams whose answers are
        equally long would fall in step, and stay so: requests that meet in one step of the engine end in one, and begin again together. Then their
        prompts are read together, which flatters tokens per second, and tells of first tokens only how many have met.
        """
        shares = random.Random(self.job.number)

        async def keep_on(share: float) -> None:
            stream, now_s = Stream(), time.perf_counter()
            while now_s < self.end_s:
                await self.one(stream, now_s, share=share)
                share = 1.0
                await asyncio.sleep(shares.random() * PAUSE * (time.perf_counter() - now_s))
                now_s = time.perf_counter()
            if not stream.lost:
                stream.transport.close()

        await asyncio.gather(*(keep_on(shares.random()) for _ in range(self.job.streams)))

    async def open(self) -> None:
        """Each request when it is due, on a connection that is idle or new."""
        idle: list[Stream] = []
        started_s = self.begin_s - self.job.settle_s

        async def send(due_s: float) -> None:
            stream = idle.pop() if idle else Stream()
            await self.one(stream, due_s)
            idle.append(stream)

        async with asyncio.TaskGroup() as group:
            for due_s in self.job.due_s:
                if (rest_s := started_s + due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(rest_s)
                group.create_task(send(started_s + due_s))
        for stream in idle:
            if not stream.lost:
                stream.transport.close()

    async def tell(self) -> None:
        """Say when the measured time begins and ends."""
        for word, at_s in (("begin", self.begin_s), ("end", self.end_s)):
            await asyncio.sleep(at_s - time.perf_counter())
            print(word, flush=True)

    async def run(self) -> None:
        await asyncio.gather(self.tell(), self.closed() if self.job.streams else self.open())

    def figures(self) -> dict[str, Any]:
        """What was measured; times in milliseconds."""
        measured = [one for one in self.asked if self.begin_s <= one.due_s < self.end_s]
        whole = [one for one in measured if not one.error]
        gaps, tokens = [], 0.0
        for one in self.asked:
            if one.error or not one.texts_s:
                continue
            at = np.array(one.texts_s)
            within = (at >= self.begin_s) & (at < self.end_s)
            tokens += within.mean() * (one.tokens or len(at))
            gaps.append(np.diff(at)[within[1:]])
        long = [one for one in whole if one.tokens > 1]
        return {
            "requests": len(measured),
            "failed": dict(Counter(one.error for one in measured if one.error)),
            "tokens_per_s": round(tokens / self.job.seconds, 1),
            "tokens": round(tokens),
            "prompt_tokens": round(float(np.mean([one.prompt_tokens for one in whole])), 1) if whole else None,
            "output_tokens": round(float(np.mean([one.tokens or len(one.texts_s) for one in whole])), 1) if whole else None,
            "tokens_per_event": round(sum(one.tokens for one in whole) / max(1, sum(len(one.texts_s) for one in whole)), 3),
            **quantiles("ttft", [one.texts_s[0] - one.due_s for one in whole]),
            **quantiles("itl", np.concatenate(gaps) if gaps else []),
            **quantiles("tpot", [(one.texts_s[-1] - one.texts_s[0]) / (one.tokens - 1) for one in long]),
        }


def quantiles(name: str, times_s: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """The median and the 99th percentile of times, in milliseconds; None of none."""
    return {f"{name}_p{q}_ms": round(float(np.quantile(times_s, q / 100)) * 1000, 2) if len(times_s) else None for q in (50, 99)}


def drive(job: Job, between: Callable[[], Any]) -> tuple[dict[str, Any], Any, Any]:
    """Run a job in a process of its own: its figures, and what `between` returned when the measured time began and when it ended."""
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        json.dump(asdict(job), process.stdin)
        process.stdin.close()
        marks = []
        for word in ("begin", "end"):
            said = process.stdout.readline().strip()
            if said != word:
                raise RuntimeError(f"the load ended with exit code {process.wait()} instead of saying {word!r}")
            marks.append(between())
        return json.loads(process.stdout.readline()), *marks


def used(before: tuple[float, float], after: tuple[float, float], seconds: float, load_cores: float = 0.0) -> dict[str, float]:
    """The cores that a server used, and those that neither it nor the load did, from two looks at its CPU time and at the machine's."""
    own_s, busy_s = (late - early for early, late in zip(before, after, strict=True))
    return {"cores": round(own_s / seconds, 3), "other_cores": round((busy_s - own_s) / seconds - load_cores, 3)}


def main() -> None:
    work = Load(Job(**json.load(sys.stdin)))
    used_s, started_s = time.process_time(), time.perf_counter()
    uvloop.run(work.run())
    share = (time.process_time() - used_s) / (time.perf_counter() - started_s)
    print(json.dumps(work.figures() | {"load_cores": round(share, 3)}), flush=True)


if __name__ == "__main__":
    main()
