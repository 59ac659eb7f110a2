"""Guest reviews to sentence vectors, with plain Ray Data.

python ray_job.py --input reviews.parquet --output vectors --model MODEL
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray

ROWS_PER_SHARD = 8192


def clean(row):
    """The cleaned row, or the same row with what went wrong."""
    try:
        if not row["text"].strip():
            raise ValueError("empty review")
        return {"review_id": row["review_id"], "text": " ".join(row["text"].split()), "stage": "", "error": ""}
    except Exception as error:
        return {"review_id": row["review_id"], "text": row["text"], "stage": "clean", "error": f"{type(error).__name__}: {error}"}


class Embed:
    def __init__(self, model, device):
        from sentence_transformers import SentenceTransformer

        self.encoder = SentenceTransformer(model, device=device)

    def __call__(self, batch):
        vectors = np.zeros((len(batch["text"]), 384), "float32")
        stages, errors = batch["stage"].astype(object), batch["error"].astype(object)
        good = [at for at, error in enumerate(errors) if not error]
        try:
            vectors[good] = self.encoder.encode([batch["text"][at] for at in good])
        except Exception:
            for at in good:  # one by one, to find out which rows are at fault
                try:
                    vectors[at] = self.encoder.encode(batch["text"][at])
                except Exception as error:
                    stages[at], errors[at] = "embed", f"{type(error).__name__}: {error}"
        return {**batch, "vector": vectors, "stage": stages, "error": errors}


def run_shard(source, start, rows, target, model):
    """Embed rows of the input into the folder `target`, which appears when it is complete."""
    partial = Path(f"{target}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    table = pq.read_table(source, columns=["review_id", "text"]).slice(start, rows)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = gpus or max(1, int(ray.cluster_resources()["CPU"]) - 1)
    done = (
        ray.data.from_arrow(table)
        .repartition(4 * workers)
        .map(clean)
        .map_batches(
            Embed,
            fn_constructor_args=[model, "cuda" if gpus else "cpu"],
            batch_size=64,
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        .materialize()
    )
    done.filter(expr="error == ''").select_columns(["review_id", "vector"]).write_parquet(str(partial / "vectors"))
    failed = done.filter(expr="error != ''").select_columns(["review_id", "text", "stage", "error"])
    if failed.count():
        failed.write_parquet(str(partial / "failed"))
    os.rename(partial, target)


def count(folders, name):
    return sum(pq.read_metadata(path).num_rows for folder in folders for path in (folder / name).glob("*.parquet"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--most-failed", type=float, default=0.01)
    options = parser.parse_args()
    ray.init()
    total, shards = pq.read_metadata(options.input).num_rows, []
    for start in range(0, total, ROWS_PER_SHARD):
        target = Path(options.output) / f"shard-{start:012}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            run_shard(options.input, start, ROWS_PER_SHARD, target, options.model)
        shards.append(target)
        failed = count(shards, "failed")
        if failed > options.most_failed * total:
            sys.exit(f"{failed} of {total} rows failed, more than {options.most_failed:.0%}")
    written = count(shards, "vectors")
    if written + failed != total:
        sys.exit(f"{total} rows in, but {written} out and {failed} failed")
    print(f"{total} rows in, {written} out, {failed} failed")


if __name__ == "__main__":
    main()
