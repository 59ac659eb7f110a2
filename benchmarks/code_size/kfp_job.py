"""Guest reviews to sentence vectors, as a pipeline of containers: Kubeflow Pipelines.

python kfp_job.py    # writes reviews.yaml, which is submitted with the arguments of the pipeline
"""

from kfp import compiler, dsl
from kfp.dsl import Dataset, Input, Output

IMAGE = "python:3.11"
DATA = ["pyarrow==26.0.1"]
MODEL = [*DATA, "sentence-transformers==5.6.0", "torch==2.13.0"]


@dsl.component(base_image=IMAGE, packages_to_install=DATA)
def split(source: str, rows_per_shard: int) -> list[int]:
    import pyarrow.parquet as pq

    return list(range(0, pq.read_metadata(source).num_rows, rows_per_shard))


@dsl.component(base_image=IMAGE, packages_to_install=DATA)
def clean(source: str, start: int, rows: int, cleaned: Output[Dataset], failed: Output[Dataset]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, bad = [], []
    for row in pq.read_table(source, columns=["review_id", "text"]).slice(start, rows).to_pylist():
        try:
            if not row["text"].strip():
                raise ValueError("empty review")
            good.append({**row, "text": " ".join(row["text"].split())})
        except Exception as error:
            bad.append({**row, "stage": "clean", "error": f"{type(error).__name__}: {error}"})
    fields = [("review_id", pa.int64()), ("text", pa.string())]
    pq.write_table(pa.Table.from_pylist(good, pa.schema(fields)), cleaned.path)
    fields += [("stage", pa.string()), ("error", pa.string())]
    pq.write_table(pa.Table.from_pylist(bad, pa.schema(fields)), failed.path)


@dsl.component(base_image=IMAGE, packages_to_install=MODEL)
def embed(cleaned: Input[Dataset], model: str, vectors: Output[Dataset], failed: Output[Dataset]):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cuda" if torch.cuda.is_available() else "cpu")
    good, bad = [], []
    for batch in pq.ParquetFile(cleaned.path).iter_batches(64):
        rows = batch.to_pylist()
        try:
            encoded = encoder.encode([row["text"] for row in rows])
            good += [{"review_id": row["review_id"], "vector": vector} for row, vector in zip(rows, encoded, strict=True)]
        except Exception:
            for row in rows:  # one by one, to find out which rows are at fault
                try:
                    good.append({"review_id": row["review_id"], "vector": encoder.encode(row["text"])})
                except Exception as error:
                    bad.append({**row, "stage": "embed", "error": f"{type(error).__name__}: {error}"})
    schema = pa.schema([("review_id", pa.int64()), ("vector", pa.list_(pa.float32(), 384))])
    pq.write_table(pa.Table.from_pylist(good, schema), vectors.path)
    names = ("review_id", "text", "stage", "error")
    schema = pa.schema([(name, pa.int64() if name == "review_id" else pa.string()) for name in names])
    pq.write_table(pa.Table.from_pylist(bad, schema), failed.path)


@dsl.component(base_image=IMAGE, packages_to_install=DATA)
def publish(
    source: str,
    target: str,
    most_failed: float,
    vectors: Input[list[Dataset]],
    failed_clean: Input[list[Dataset]],
    failed_embed: Input[list[Dataset]],
):
    import os
    import shutil

    import pyarrow.parquet as pq

    total = pq.read_metadata(source).num_rows
    failures = [shard.path for shard in [*failed_clean, *failed_embed]]
    failed = sum(pq.read_metadata(path).num_rows for path in failures)
    written = sum(pq.read_metadata(shard.path).num_rows for shard in vectors)
    if failed > most_failed * total:
        raise RuntimeError(f"{failed} of {total} rows failed, more than {most_failed:.0%}")
    if written + failed != total:
        raise RuntimeError(f"{total} rows in, but {written} out and {failed} failed")
    partial = f"{target}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name, paths in (("vectors", [shard.path for shard in vectors]), ("failed", failures)):
        os.makedirs(f"{partial}/{name}")
        for at, path in enumerate(paths):
            shutil.copy(path, f"{partial}/{name}/{at:06}.parquet")
    os.rename(partial, target)
    print(f"{total} rows in, {written} out, {failed} failed")


@dsl.pipeline(name="reviews")
def reviews(source: str, target: str, model: str = "all-MiniLM-L6-v2", rows_per_shard: int = 8192, most_failed: float = 0.01):
    shards = split(source=source, rows_per_shard=rows_per_shard)
    shards.set_cpu_request("1").set_memory_request("2G").set_caching_options(False)
    with dsl.ParallelFor(shards.output, parallelism=8) as start:
        cleaned = clean(source=source, start=start, rows=rows_per_shard)
        cleaned.set_cpu_request("1").set_memory_request("4G").set_retry(3)
        embedded = embed(cleaned=cleaned.outputs["cleaned"], model=model)
        embedded.set_cpu_request("4").set_memory_request("16G").set_retry(3)
        embedded.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)
    publish(
        source=source,
        target=target,
        most_failed=most_failed,
        vectors=dsl.Collected(embedded.outputs["vectors"]),
        failed_clean=dsl.Collected(cleaned.outputs["failed"]),
        failed_embed=dsl.Collected(embedded.outputs["failed"]),
    ).set_cpu_request("1").set_memory_request("4G")


if __name__ == "__main__":
    compiler.Compiler().compile(reviews, "reviews.yaml")
