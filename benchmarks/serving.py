"""The same pipeline behind HTTP: headrace beside FastAPI by hand, Ray Serve, LitServe, BentoML and three services behind each other.

    python benchmarks/serving.py --litserve-python .../bin/python --bentoml-python .../bin/python --save

Two pipelines. The echo strips a text, so that all that is measured is the way of a request: headrace with validation, an API key and
metrics on. The embedding cleans, tokenises and embeds guest reviews (or made-up texts of like lengths) with one model process of one
thread in every contender, so that a core is left to HTTP and to the load.

Every round starts each contender in turn, warms it up, drives it in a closed loop of 1, 16, 64 and 256 connections and in an open loop, and
ends it. Latencies are those of the answers; CPU is that of all processes of the contender, per answer. Figures are medians over the
rounds, and the ratios those of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load
import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
APPS = HERE / "serving"
RESULTS = HERE / "results"
PYTHON = sys.executable
WORDS = ("clean", "quiet", "noisy", "central", "breakfast", "host", "garden", "view", "stairs", "late", "metro", "kitchen", "bed", "shower", "street")
FAST_RAY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_LOG_TO_STDERR": "0"}


@dataclass(frozen=True, slots=True)
class Contender:
    """A service: its processes, each a command with variables, the last of which listens on the port."""

    name: str
    commands: tuple[tuple[list[str], dict[str, str]], ...]
    headers: dict[str, str] = field(default_factory=dict)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def uvicorn(app: str, port: int, **variables: str) -> tuple[list[str], dict[str, str]]:
    command = [PYTHON, "-m", "uvicorn", f"{app}:app", "--app-dir", str(APPS), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--log-level", "error", "--no-access-log"], variables


def contenders(kind: str, path: str, port: int, arguments: argparse.Namespace, folder: Path) -> list[Contender]:
    """Those that are asked for and installed."""
    ray = [PYTHON, str(APPS / "ray_main.py"), f"{kind}_ray", path, str(port)]
    keys = folder / f"{kind}-keys.json"
    key = (
        "none"
        if arguments.only and not any(name.startswith("headrace") for name in arguments.only)
        else subprocess.run(
            ["headrace", "keys", "create", f"round-{time.time_ns()}", "--file", str(keys)], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )
    options = ["--port", str(port), "--replicas", "1", "--keys", str(keys), "--log", "off", "--latency", "30s"]
    ours = {"headrace": f"{kind}_headrace.py"} | ({"headrace, embedder": "embed_embedder.py"} if kind == "embed" else {})
    found = [
        Contender("fastapi", (uvicorn(f"{kind}_fastapi", port),)),
        *(Contender(name, ((["headrace", "serve", str(APPS / app), *options], {}),), {"authorization": f"Bearer {key}"}) for name, app in ours.items()),
        Contender("ray serve", ((ray, {}),)),
        Contender("ray serve, haproxy", ((ray, FAST_RAY),)),
    ]
    if arguments.litserve_python:
        found.append(Contender("litserve", (([arguments.litserve_python, str(APPS / f"{kind}_litserve.py"), str(port)], {}),)))
    if arguments.bentoml_python:
        service = "Echo" if kind == "echo" else "Front"
        command = [arguments.bentoml_python, "-m", "bentoml", "serve", f"{kind}_bentoml:{service}", "--working-dir", str(APPS), "--port", str(port)]
        found.append(Contender("bentoml", (([*command, "--host", "127.0.0.1"], {"BENTOML_DO_NOT_TRACK": "True"}),)))
    if kind == "embed":
        pre, model = free_ports(2)
        chain = (
            uvicorn("embed_chain", model, PART="model"),
            uvicorn("embed_chain", pre, PART="pre", NEXT=f"http://127.0.0.1:{model}/model"),
            uvicorn("embed_chain", port, PART="post", NEXT=f"http://127.0.0.1:{pre}/pre"),
        )
        found.append(Contender("three services", chain))
    return [one for one in found if not arguments.only or one.name in arguments.only]


@contextlib.contextmanager
def served(contender: Contender, ready: Callable[[], bool], folder: Path, *, patience_s: float = 180) -> Iterator[list[psutil.Process]]:
    """The contender's processes, once it is ready; ended at the end, and what they have left behind as well."""
    processes: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(APPS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), environment["PATH"]])
    family: list[psutil.Process] = []
    log = folder / f"{contender.name.replace(' ', '-')}.log"
    try:
        with log.open("wb") as out:
            for command, variables in contender.commands:
                processes.append(subprocess.Popen(command, env=environment | variables, stdout=out, stderr=subprocess.STDOUT, cwd=folder))
        wait(ready, patience_s, contender, processes, log)
        family = tree(processes)
        yield family
    finally:
        family = [*family, *tree(processes)]
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)


def tree(processes: Sequence[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            found += [parent, *parent.children(recursive=True)]
    return found


def answers(url: str, body: bytes, contender: Contender) -> bool:
    """Whether the contender answers as it should; raises OSError where it does not answer at all."""
    request = urllib.request.Request(url, body, {"content-type": "application/json", **contender.headers})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.status == 200 and "text" in json.loads(answer.read())


def wait(ready: Callable[[], bool], patience_s: float, contender: Contender, processes: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Until the contender is ready, which raises OSError while it does not answer."""
    until, why = time.monotonic() + patience_s, "it has ended"
    while time.monotonic() < until:
        if any(process.poll() is not None for process in processes):
            break
        try:
            if ready():
                return
        except OSError as error:
            why = str(error)
        time.sleep(0.3)
    raise RuntimeError(f"{contender.name} does not answer ({why}):\n{log.read_text()[-3000:]}")


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def drive(url: str, bodies: Sequence[bytes], contender: Contender, processes: list[psutil.Process], loads: Sequence[tuple[str, float]], seconds: float) -> Any:
    """Each load's figures: answers per second, latencies, CPU per answer, and what was not answered 200."""
    found = {}
    load.run(load.closed(url, bodies, connections=16, seconds=min(3.0, seconds), headers=contender.headers))
    for kind, amount in loads:
        before = cpu_s(processes)
        if kind == "closed":
            result = load.run(load.closed(url, bodies, connections=int(amount), seconds=seconds, headers=contender.headers))
        else:
            result = load.run(load.steady(url, bodies, per_s=amount, seconds=seconds, headers=contender.headers))
        used_s, answers = cpu_s(processes) - before, max(1, len(result.latencies_s))
        failed = {**{str(status): n for status, n in result.statuses.items() if status != 200}, **result.failures}
        found[f"{kind} {amount:g}"] = {
            "per_s": round(result.per_s, 1),
            "p50_ms": round(result.ms(0.5), 3),
            "p99_ms": round(result.ms(0.99), 3),
            "cpu_us": round(used_s / answers * 1e6, 1),
            **({"failed": failed} if failed else {}),
        }
    return found


def texts(rows: int, data: Path) -> list[str]:
    """Guest reviews, or words in like numbers."""
    if data.is_file():
        import pyarrow.parquet as pq

        found = [text for text in pq.read_table(data, columns=["text"])["text"].to_pylist() if text]
        return [found[at] for at in np.random.default_rng(0).integers(0, len(found), rows)]
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.6, 0.8, rows), 4, 220).astype(int)
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


LIMIT = """
import json, sys, time
import numpy as np
from embedding import Encoder, clean, tokenizer
import headrace as hr
texts = json.load(sys.stdin)
encoder, loaded = Encoder(), tokenizer()
ids = [encoding.ids for encoding in loaded.encode_batch([clean(text) for text in texts])]
slices = list(hr.tokens(1024, of="x").slices(np.array([len(row) for row in ids])))
encoder([ids[0]])
started = time.perf_counter()
for part in slices:
    encoder([ids[at] for at in part])
print(len(ids) / (time.perf_counter() - started))
"""


def limit(some: list[str]) -> float:
    """Rows per second of the model alone: one process, one thread, rows of like length together, nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(APPS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([PYTHON, "-c", LIMIT], input=json.dumps(some), env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def median(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same figures, each the median over the rounds; what failed is added up."""
    merged: dict[str, Any] = {}
    for name in rounds[0]:
        figures = [one[name] for one in rounds]
        merged[name] = {key: round(statistics.median(one[key] for one in figures), 3) for key in ("per_s", "p50_ms", "p99_ms", "cpu_us")}
        failed: dict[str, int] = {}
        for one in figures:
            for why, count in one.get("failed", {}).items():
                failed[why] = failed.get(why, 0) + count
        if failed:
            merged[name]["failed"] = failed
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("echo", "embed"), action="append", help="both by default")
    parser.add_argument("--only", action="append", help="a contender's name; repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each load")
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--open", type=float, nargs="*", default=None, help="requests a second of the open loops; 200 and 1,000 for the echo, 8 and 16 else")
    parser.add_argument("--input", type=Path, default=HERE.parents[1] / "shared/data/reviews.parquet")
    parser.add_argument("--litserve-python")
    parser.add_argument("--bentoml-python")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving.json")
    arguments = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]])
    results: dict[str, Any] = {}
    for kind in arguments.kind or ("echo", "embed"):
        path = "/echo" if kind == "echo" else "/reviews"
        some = texts(2000, arguments.input) if kind == "embed" else ["  a quiet room, close to the station  "]
        bodies = [json.dumps({"text": text}).encode() for text in some]
        rates = arguments.open if arguments.open is not None else ((200.0, 1000.0) if kind == "echo" else (8.0, 16.0))
        loads = [("closed", float(n)) for n in arguments.connections] + [("open", rate) for rate in rates]
        rounds: dict[str, list[dict[str, Any]]] = {}
        limits = []
        with tempfile.TemporaryDirectory(prefix="headrace-serving-") as name:
            for number in range(arguments.rounds):
                if kind == "embed":
                    limits.append(limit(some[:600]))
                    print(f"{kind}, round {number + 1}: the model alone {limits[-1]:.1f} rows/s", flush=True)
                (port,) = free_ports(1)
                for contender in contenders(kind, path, port, arguments, Path(name)):
                    url = f"http://127.0.0.1:{port}{path}"
                    with served(contender, partial(answers, url, bodies[0], contender), Path(name)) as processes:
                        figures = drive(url, bodies, contender, processes, loads, arguments.seconds)
                    rounds.setdefault(contender.name, []).append(figures)
                    for label, one in figures.items():
                        print(f"{kind}, round {number + 1}: {contender.name:20} {label:12} {one}", flush=True)
        merged = {name: median(found) for name, found in rounds.items()}
        results[kind] = {"contenders": merged, **({"model_rows_per_s": round(statistics.median(limits), 1)} if limits else {})}
        tell(kind, results[kind])
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("headrace", "ray", "fastapi", "uvicorn", "torch")}
        for name, python in (("litserve", arguments.litserve_python), ("bentoml", arguments.bentoml_python)):
            if python:
                command = [python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
                versions[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        file = RESULTS / "serving.json"
        before = json.loads(file.read_text())["results"] if file.is_file() else {}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rounds": arguments.rounds, "seconds": arguments.seconds}
        file.write_text(json.dumps(content | {"results": before | results}, indent=1) + "\n")


def tell(kind: str, found: dict[str, Any]) -> None:
    """The ratios: headrace, in each of its forms, over each of the others, load by load."""
    for us, ours in found["contenders"].items():
        if not us.startswith("headrace"):
            continue
        for name, figures in found["contenders"].items():
            for label, theirs in figures.items() if figures is not ours else ():
                mine = ours[label]
                ratios = {key: round(mine[key] / theirs[key], 2) if theirs[key] else None for key in ("per_s", "p50_ms", "p99_ms", "cpu_us")}
                print(f"{kind}: {us} over {name:20} {label:12} {ratios}")
        if "model_rows_per_s" in found:
            for label, mine in ours.items():
                print(f"{kind}: {us} over the model alone, {label}: {mine['per_s'] / found['model_rows_per_s']:.2f}")


if __name__ == "__main__":
    main()
