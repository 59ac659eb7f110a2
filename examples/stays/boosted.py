"""Boosted trees of what is known of a listing and a night.

headrace train examples/stays/boosted.py --input stays-output/train.parquet --output stays-output/boosted
"""

import dataclasses

import numpy as np
from inputs import inputs  # the file beside this one

import headrace as hr

TREES = "trees.txt"  # LightGBM's own format: text, and no code


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int = 120
    lr: float = 0.05
    leaves: int = 15


def fit(shard, settings, run):
    import lightgbm

    rows = shard.table()
    x = np.stack(rows["numbers"].to_pylist())
    options = {"objective": "binary", "learning_rate": settings.lr, "num_leaves": settings.leaves, "min_data_in_leaf": 40, "num_threads": 2, "seed": 0}
    data = lightgbm.Dataset(x, rows["booked"].to_numpy(), free_raw_data=False)
    before = run.resume()
    trees = lightgbm.Booster(options | {"verbosity": -1}, data)
    if before:
        raise SystemExit
    for _ in range(settings.rounds):
        trees.update()
        run.report(log_loss=trees.eval_train()[0][2])
        run.checkpoint(lambda folder: trees.save_model(folder / TREES))


boosted = hr.Training("boosted", fit, data=inputs, keep=["booked"], settings=Settings())
