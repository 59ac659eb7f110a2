"""A training: the rows prepared by a pipeline, the loop plain numpy. Killed at any moment, the same command goes on.

python examples/train.py
headrace train examples/train.py --input flats.parquet --output flats-output --set lr=0.3 --epochs 4
"""

import dataclasses

import numpy as np

import headrace as hr


@hr.stage(out={"x": hr.Vector(3, "float64")})
def features(size_m2: hr.Column[float], floor: hr.Column[int], centre_km: hr.Column[float]):
    return {"x": np.stack([(size_m2 - 70) / 30, (floor - 3) / 2, (centre_km - 5) / 3], axis=1)}


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    batch: int = 256


def fit(shard, settings, run):
    weights, bias = np.zeros(3), 0.0
    if folder := run.resume():
        weights, bias = np.load(folder / "weights.npy"), float(np.load(folder / "bias.npy"))

    def save(folder):
        np.save(folder / "weights.npy", weights)
        np.save(folder / "bias.npy", bias)

    for batch in shard.batches(settings.batch):
        error = batch["x"] @ weights + bias - batch["price"]
        weights -= settings.lr * batch["x"].T @ error / len(error)
        bias -= settings.lr * error.mean()
        run.report(loss=(error**2).mean())
        run.checkpoint(save)


flats = hr.Training("flats", fit, data=hr.Pipeline("prepare", features), keep=["price"], settings=Settings(), epochs=2, checkpoint_every="10s")


if __name__ == "__main__":
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    size, floor, centre = random.normal(70, 20, 20_000), random.integers(0, 7, 20_000), random.exponential(5, 20_000)
    price = 3.1 * size / 30 + 0.4 * floor - 0.9 * centre / 3 + random.normal(0, 0.3, 20_000)
    pq.write_table(pa.table({"size_m2": size, "floor": floor, "centre_km": centre, "price": price}), "flats.parquet", row_group_size=5_000)
    rows = pq.read_table("flats.parquet").slice(0, 2_000)
    print(f"in this process, on 2,000 flats: loss {flats.local(rows, settings={'lr': 0.3}).metrics['loss']:.3f}")
