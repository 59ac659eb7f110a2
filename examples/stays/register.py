"""Judge the two models on the rows that came later, beside what needs no model, and register them as the candidate.

python examples/stays/register.py
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from boosted import TREES  # the files beside this one
from network import WEIGHTS
from score import Score, score
from views import CITY, listings, nights, reviews

from headrace import registry

VIEWS = [listings, nights, reviews]


def log_loss(chance, booked) -> float:
    return float(-np.mean(np.where(booked, np.log(chance), np.log1p(-chance))))


def auc(chance, booked) -> float:
    """How often a night that was booked has the higher chance of two, ties counting half."""
    _, at, count = np.unique(chance, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[at]
    hits = booked.sum()
    return float((rank[booked].sum() - hits * (hits + 1) / 2) / (hits * (len(booked) - hits)))


def judged(folder: Path) -> dict[str, float]:
    """The metrics of the models in a folder, and those of two guesses: the share of nights of the past, and that of the listing's last 30."""
    rows, before = pq.read_table(CITY / "test.parquet"), pq.read_table(CITY / "train.parquet", columns=["booked"])
    booked = rows["booked"].to_numpy().astype(bool)
    naive = np.full(len(booked), before["booked"].to_numpy().mean())
    known = np.clip(rows["occupancy_30d"].fill_null(naive[0]).to_numpy(), 0.02, 0.98)
    guesses = {"base_rate": naive, "last_30d": known}
    for name, share in (("trees", 1.0), ("network", 0.0), ("both", Score.share)):
        pipeline = score.with_settings(score={"model": str(folder), "share": share})
        guesses[name] = np.array([row["chance"] for row in pipeline.local(rows.to_pylist())])
    for name, chance in guesses.items():
        print(f"  {name:<10} log loss {log_loss(chance, booked):.3f}   AUC {auc(chance, booked):.3f}")
    loss = {name: log_loss(chance, booked) for name, chance in guesses.items()}
    gain = 1 - loss["both"] / min(loss["base_rate"], loss["last_30d"])
    return {"log_loss": loss["both"], "auc": auc(guesses["both"], booked), "gain": gain} | {f"log_loss_{name}": one for name, one in loss.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(CITY / "boosted" / "checkpoint" / TREES, folder)
        shutil.copy(CITY / "network" / "checkpoint" / WEIGHTS, folder)
        print(f"on {CITY.name}/test.parquet:")
        metrics = judged(folder)
        for view in VIEWS:
            registry.log_run(f"features {view.name}", inputs=[view.source], output=f"view:{view.name}")
        for made in ("boosted", "network"):
            registry.log_run(made, output=str(CITY / made))
        made_from = [*(f"view:{view.name}" for view in VIEWS), *(str(CITY / one) for one in ("boosted", "network", "test.parquet"))]
        run = registry.log_run("stays", metrics=metrics, settings={"share": Score.share}, inputs=made_from)
        version = registry.register(folder, "stays", run=run, stage=Score())
    print(f"{100 * metrics['gain']:.1f}% less log loss than the better guess; registered as {version}, @candidate")
