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
    rounds: int = 100
    lr: float = 0.05
    leaves: int = 8


def fit(shard, settings, run):
    import lightgbm

    rows = shard.table()
    data = lightgbm.Dataset(np.stack(rows["numbers"].to_pylist()), rows["booked"].to_numpy())
    before = lightgbm.Booster(model_file=folder / TREES) if (folder := run.resume()) else None

    def grown(now):
        run.report(log_loss=now.evaluation_result_list[0][2])
        run.checkpoint(lambda folder: now.model.save_model(folder / TREES))

    options = {"objective": "binary", "learning_rate": settings.lr, "num_leaves": settings.leaves, "min_data_in_leaf": 60, "verbosity": -1}
    rounds = settings.rounds - (before.num_trees() if before else 0)
    lightgbm.train(options, data, rounds, valid_sets=[data], init_model=before, callbacks=[grown])


boosted = hr.Training("boosted", fit, data=inputs, keep=["booked"], settings=Settings())
