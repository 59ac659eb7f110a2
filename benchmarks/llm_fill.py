"""A batch in the background of an LLM endpoint: what it takes from those who wait, and how much of the engine it gets. Part of `llm_serving.py --fill`.

Three loads of one service, one after the other in each round, all of equal lengths: (1) interactive requests alone, an open loop at a share of
the rate at which the engine is full; (2) a batch alone, which was uploaded to `/v1/files` and ordered from `/v1/batches`; (3) both at once.
Told are the interactive TTFT of (3) over that of (1), and the tokens per second of all in (3) over those of (2). A batch's tokens are its
`request_counts.completed` times the tokens of each answer, all of which are equally long; at the end every answer is looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llm_load import PLACE, Job, drive

BOUNDARY = "headrace-benchmark"
BETWEEN_S = 0.2
WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of which endpoint: the lines of batches, and interactive requests."""

    url: str
    path: str
    lines: Sequence[dict[str, Any]]
    streamed: Sequence[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--share", type=float, default=0.25, help="with --fill: the interactive rate, of that at which the engine is full")
    parser.add_argument("--arrivals", choices=("poisson", "trace"), default="poisson", help="with --fill: of interactive requests")
    parser.add_argument("--fill-seconds", type=float, default=20, help="with --fill: of each load that are measured")


def measure(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of each load, medians over the rounds, and the two ratios."""
    url, seconds, settle_s = task.url + task.path, arguments.fill_seconds, arguments.settle_s
    job = Job(url=url, bodies=task.streamed, seconds=arguments.seconds, settle_s=settle_s, streams=arguments.sequences)
    full, _, _ = drive(job, time.perf_counter)
    per_s = full["tokens_per_s"] / arguments.output_tokens
    print(f"full, {arguments.sequences} streams: {per_s:.1f} requests/s {full}", flush=True)
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        due_s = arrivals(arguments, arguments.share * per_s, settle_s + seconds, number)
        open_ = {"url": url, "bodies": task.streamed, "seconds": seconds, "settle_s": settle_s, "due_s": due_s}
        alone, _, _ = drive(Job(**open_, number=(number + 1) * 10_000_000), time.perf_counter)
        print(f"round {number + 1}: interactive alone {alone}", flush=True)
        batch = Batch.order(task, lines=round(per_s * (2 * (seconds + settle_s) + 15) * 1.5), number=number)
        try:
            batch.begun()
            time.sleep(settle_s)
            before = batch.completed()
            time.sleep(seconds)
            batch_per_s = rate(before, batch.completed()) * arguments.output_tokens
            print(f"round {number + 1}: batch alone {batch_per_s:.1f} tokens/s", flush=True)
            both, before, after = drive(Job(**open_, number=(number + 1) * 10_000_000 + 5_000_000), batch.completed)
        finally:
            batch.cancel()
        both["batch_tokens_per_s"] = round(rate(before, after) * arguments.output_tokens, 1)
        both["all_tokens_per_s"] = round(both["batch_tokens_per_s"] + both["tokens_per_s"], 1)
        print(f"round {number + 1}: interactive with a batch behind it {both}", flush=True)
        rounds.append({"alone": alone, "batch_tokens_per_s": round(batch_per_s, 1), "both": both, "answers": batch.answers(arguments.output_tokens)})
    ratios = [
        {f"ttft_p{q}": one["both"][f"ttft_p{q}_ms"] / one["alone"][f"ttft_p{q}_ms"] for q in (50, 99)}
        | {"tokens": one["both"]["all_tokens_per_s"] / one["batch_tokens_per_s"]}
        for one in rounds
    ]
    middle = {key: round(statistics.median(one[key] for one in ratios), 3) for key in ratios[0]}
    return {"full": full, "rounds": rounds, "ratios": middle}


def arrivals(arguments: argparse.Namespace, per_s: float, seconds: float, number: int) -> list[float]:
    """When requests are due: at random, or as in a part of the trace, at that rate in the mean."""
    draw = np.random.default_rng(number)
    count = max(2, round(per_s * seconds))
    if arguments.arrivals == "poisson":
        due_s = np.cumsum(draw.exponential(1 / per_s, 2 * count + 50))
        return due_s[due_s < seconds].tolist()
    import pyarrow.parquet as pq

    if not Path(arguments.trace).is_file():
        raise SystemExit(f"--arrivals trace needs a trace, and there is no file {arguments.trace}; name one with --trace")
    at_ms = np.sort(pq.read_table(arguments.trace, columns=["t_ms"])["t_ms"].to_numpy())
    first = int(draw.integers(0, len(at_ms) - count))
    part = (at_ms[first : first + count] - at_ms[first]).astype(float)
    return (part / part[-1] * seconds * (count - 1) / count).tolist()


def rate(before: tuple[float, int], after: tuple[float, int]) -> float:
    """What was counted from one look to the next, per second."""
    return (after[1] - before[1]) / (after[0] - before[0])


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that was ordered."""

    url: str
    id: str

    @staticmethod
    def order(task: Task, *, lines: int, number: int) -> Batch:
        """Upload so many lines, each of them a request of its own, and have them carried out."""
        rows = []
        for at in range(lines):
            body = json.dumps(task.lines[at % len(task.lines)]).replace(PLACE, f"{(number + 50) * 10_000_000 + at:010d}")
            rows.append(f'{{"custom_id": "{at}", "method": "POST", "url": "{task.path}", "body": {body}}}\n')
        disposition = "Content-Disposition: form-data; name="
        head = f'--{BOUNDARY}\r\n{disposition}"purpose"\r\n\r\nbatch\r\n--{BOUNDARY}\r\n{disposition}"file"; filename="lines.jsonl"\r\n\r\n'
        form = f"{head}{''.join(rows)}\r\n--{BOUNDARY}--\r\n"
        file = ask(f"{task.url}/v1/files", form.encode(), f"multipart/form-data; boundary={BOUNDARY}")
        order = {"input_file_id": file["id"], "endpoint": task.path, "completion_window": "24h"}
        return Batch(task.url, ask(f"{task.url}/v1/batches", json.dumps(order).encode())["id"])

    def shown(self) -> dict[str, Any]:
        return ask(f"{self.url}/v1/batches/{self.id}")

    def completed(self) -> tuple[float, int]:
        """The time of a look, and how many lines were answered then."""
        shown = self.shown()
        if shown["status"] != "in_progress":
            raise RuntimeError(f"the batch should be in progress all along, and is {shown['status']}: {shown}")
        return time.perf_counter(), shown["request_counts"]["completed"]

    def begun(self) -> None:
        """Wait for its first answer."""
        until_s = time.monotonic() + WAIT_S
        while not ((shown := self.shown())["status"] == "in_progress" and shown["request_counts"]["completed"]):
            if shown["status"] not in ("validating", "in_progress") or time.monotonic() > until_s:
                raise RuntimeError(f"the batch does not begin: {shown}")
            time.sleep(BETWEEN_S)

    def cancel(self) -> None:
        """Cancel it, and wait until it is over."""
        ask(f"{self.url}/v1/batches/{self.id}/cancel", b"{}")
        until_s = time.monotonic() + WAIT_S
        while (shown := self.shown())["status"] != "cancelled":
            if time.monotonic() > until_s:
                raise RuntimeError(f"the batch does not end: {shown}")
            time.sleep(BETWEEN_S)

    def answers(self, output_tokens: int) -> dict[str, int]:
        """How many lines were answered, and how many of these not as asked."""
        with urllib.request.urlopen(f"{self.url}/v1/files/{self.shown()['output_file_id']}/content", timeout=60) as answer:
            rows = [json.loads(line)["response"] for line in answer]
        wrong = sum(row["status_code"] != 200 or row["body"]["usage"]["completion_tokens"] != output_tokens for row in rows)
        return {"answered": len(rows), "wrong": wrong}


def ask(url: str, body: bytes | None = None, kind: str = "application/json") -> dict[str, Any]:
    """The JSON that is answered; raises OSError where it is not 200."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": kind}), timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise OSError(f"{url}: {error.code} {error.read()[:500].decode(errors='replace')}") from error


def tell(results: dict[str, Any]) -> None:
    """The ratios, and the figures of the last round."""
    last = results["rounds"][-1]
    for name, one in (("interactive alone", last["alone"]), ("with a batch behind it", last["both"])):
        ttft = f"TTFT p50 {one['ttft_p50_ms']} ms, p99 {one['ttft_p99_ms']} ms"
        print(f"{name:24} {one['requests']:6} requests, {sum(one['failed'].values())} failed, {ttft}")
    both = last["both"]
    print(f"lines of batches that were answered in all {sum(one['answers']['answered'] for one in results['rounds'])}, ", end="")
    print(f"of these not as asked {sum(one['answers']['wrong'] for one in results['rounds'])}")
    print(f"batch alone {last['batch_tokens_per_s']} tokens/s; both {both['all_tokens_per_s']}, of which the batch {both['batch_tokens_per_s']}")
    ratios = results["ratios"]
    print(f"both over alone, medians: TTFT p50 {ratios['ttft_p50']} times, p99 {ratios['ttft_p99']} times; tokens/s {ratios['tokens']} times")
