"""A batch in the background of an LLM endpoint: what it takes from those who wait, and how much of the engine it gets. Part of `llm_serving.py --fill`.

Four loads of one service, one after the other in each round, all of equal lengths: streams in as many closed loops as the engine computes at a
time, which fill it; interactive requests alone, an open loop at a share of that rate; a batch alone, which was uploaded to `/v1/files` and ordered
from `/v1/batches`; and those interactive requests with such a batch behind them. Told are the interactive TTFT of the last over that of those alone,
and the tokens per second of all in the last over those of the first, and over those of a batch alone. A batch's tokens are its
`request_counts.completed` times the tokens of each answer, all of which are equally long; at the end every answer is looked at. With a small
model on a CPU, tokens that are streamed cost much more around the engine than a batch's, which the last ratio has in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from llm_load import PLACE, Job, drive, used

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
    parser.add_argument("--background", default="25%", help="with --fill: places of a batch beside better requests, of all")
    parser.add_argument("--share", type=float, default=0.25, help="with --fill: the interactive rate, of that at which the engine is full")
    parser.add_argument("--arrivals", choices=("poisson", "trace"), default="poisson", help="with --fill: of interactive requests")
    parser.add_argument("--fill-seconds", type=float, default=20, help="with --fill: of each load that are measured")


def measure(task: Task, look: Callable[[], tuple[float, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of each load in each round, and the ratios, medians over the rounds. `look` tells CPU times: see `llm_load.used`."""
    seconds, settle_s, output = arguments.fill_seconds, arguments.settle_s, arguments.output_tokens
    url = task.url + task.path
    job = Job(url=url, bodies=task.streamed, seconds=arguments.seconds, settle_s=settle_s, streams=arguments.sequences)
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        full, before, after = drive(replace(job, number=(number + 90) * 10_000_000), look)
        full |= used(before, after, job.seconds, full["load_cores"])
        per_s = full["tokens_per_s"] / output
        print(f"round {number + 1}: full, {arguments.sequences} streams: {per_s:.1f} requests/s {full}", flush=True)
        due_s = arrivals(arguments, arguments.share * per_s, settle_s + seconds, number)
        open_ = {"url": url, "bodies": task.streamed, "seconds": seconds, "settle_s": settle_s, "due_s": due_s}
        alone, before, after = drive(Job(**open_, number=(number + 1) * 10_000_000), look)
        alone |= used(before, after, seconds, alone["load_cores"])
        print(f"round {number + 1}: interactive alone {alone}", flush=True)
        batch = Batch.order(task, lines=round(per_s * (2 * (seconds + settle_s) + 15) * 1.5), number=number)
        try:
            batch.begun()
            time.sleep(settle_s)
            begun, before = batch.completed(), look()
            time.sleep(seconds)
            only = {"tokens_per_s": round(rate(begun, batch.completed()) * output, 1), **used(before, look(), seconds)}
            print(f"round {number + 1}: batch alone {only}", flush=True)
            both, early, late = drive(Job(**open_, number=(number + 1) * 10_000_000 + 5_000_000), lambda: (batch.completed(), look()))  # noqa: B023
        finally:
            batch.cancel()
        both |= used(early[1], late[1], seconds, both["load_cores"])
        both["batch_tokens_per_s"] = round(rate(early[0], late[0]) * output, 1)
        both["all_tokens_per_s"] = round(both["batch_tokens_per_s"] + both["tokens_per_s"], 1)
        print(f"round {number + 1}: interactive with a batch behind it {both}", flush=True)
        rounds.append({"full": full, "alone": alone, "batch": only, "both": both, "answers": batch.answers(output)})
    ratios = [
        {f"ttft_p{q}": one["both"][f"ttft_p{q}_ms"] / one["alone"][f"ttft_p{q}_ms"] for q in (50, 99)}
        | {f"tokens_of_{name}": one["both"]["all_tokens_per_s"] / one[name]["tokens_per_s"] for name in ("full", "batch")}
        for one in rounds
    ]
    middle = {key: round(statistics.median(one[key] for one in ratios), 3) for key in ratios[0]}
    return {"rounds": rounds, "ratios": middle}


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
    """The figures of each round, and the ratios."""
    for one in results["rounds"]:
        for name, part in (("interactive alone", one["alone"]), ("with a batch behind it", one["both"])):
            ttft = f"TTFT p50 {part['ttft_p50_ms']} ms, p99 {part['ttft_p99_ms']} ms"
            print(f"{name:24} {part['requests']:6} requests, {sum(part['failed'].values())} failed, {ttft}; others {part['other_cores']} cores")
        both = f"both {one['both']['all_tokens_per_s']}, of which the batch {one['both']['batch_tokens_per_s']}"
        bounds = f"full {one['full']['tokens_per_s']} tokens/s, batch alone {one['batch']['tokens_per_s']}"
        print(f"{bounds}; {both}; others beside the batch {one['batch']['other_cores']} cores")
        print(f"lines of the batch: {one['answers']['answered']} answered, {one['answers']['wrong']} of them not as asked")
    ratios = results["ratios"]
    tokens = f"tokens/s {ratios['tokens_of_full']} times those of a full engine, {ratios['tokens_of_batch']} times those of a batch alone"
    print(f"both over alone, medians: TTFT p50 {ratios['ttft_p50']} times, p99 {ratios['ttft_p99']} times; {tokens}")
