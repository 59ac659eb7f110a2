"""Boosted trees of what is known of a listing and a night, grown on top of what the network says of its reviews.

headrace train examples/stays/boosted.py --input stays-output/train.parquet --output stays-output/boosted
"""

import dataclasses

import numpy as np
from inputs import numbers, words  # the files beside this one
from score import TREES, Hear
from views import CITY

import headrace as hr

prepare = hr.Pipeline("prepare", numbers, words, Hear(model=str(CITY / "network" / "checkpoint")), outputs=["numbers", "heard"])


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int = 100
    lr: float = 0.05
    leaves: int = 8


def fit(shard, settings, run):
    import lightgbm

    rows = shard.table()
    data = lightgbm.Dataset(np.stack(rows["numbers"].to_pylist()), rows["booked"].to_numpy(), init_score=rows["heard"].to_numpy())

    def grown(now):
        run.report(log_loss=now.evaluation_result_list[0][2])
        run.checkpoint(lambda folder: now.model.save_model(folder / TREES))  # of a few seconds: killed, it grows them again

    options = {"objective": "binary", "learning_rate": settings.lr, "num_leaves": settings.leaves, "min_data_in_leaf": 60, "num_threads": 1, "verbosity": -1}
    lightgbm.train(options, data, settings.rounds, valid_sets=[data], callbacks=[grown])


boosted = hr.Training("boosted", fit, data=prepare, keep=["booked"], settings=Settings())
