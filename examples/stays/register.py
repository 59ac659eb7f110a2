"""Judge the two models on the rows that came later, beside what needs no model, and register them as the candidate.

python examples/stays/register.py
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from score import TREES, WEIGHTS, Score, score  # the files beside this one
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
    answers = score.with_settings(hear={"model": str(folder)}, score={"model": str(folder)}).local(rows.to_pylist())
    heard, chance = (np.array([row[name] for row in answers]) for name in ("heard", "chance"))
    guesses = {"base_rate": naive, "last_30d": known, "network": 1 / (1 + np.exp(-heard)), "trees": chance}
    for name, one in guesses.items():
        print(f"  {name:<10} log loss {log_loss(one, booked):.3f}   AUC {auc(one, booked):.3f}")
    loss = {name: log_loss(one, booked) for name, one in guesses.items()}
    gain = 1 - loss["trees"] / min(loss["base_rate"], loss["last_30d"])
    return {"log_loss": loss["trees"], "auc": auc(chance, booked), "gain": gain} | {f"log_loss.{name}": one for name, one in loss.items() if name != "trees"}


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
        run = registry.log_run("stays", metrics=metrics, inputs=made_from)
        version = registry.register(folder, "stays", run=run, stage=Score())
    print(f"{100 * metrics['gain']:.1f}% less log loss than the better guess; registered as {version}, @candidate")
