"""A model that is registered, promoted once it has passed its gates, and used by its name: how many words has a text of so many characters?

python examples/registry.py
headrace models promote words --metric "r2>=0.5" --pipeline examples/registry.py --input examples/hello.csv --latency 1s --no-batch
headrace run examples/registry.py --input examples/hello.csv --output registry-output
headrace lineage words@prod

Without MLFLOW_TRACKING_URI the registry lies in this folder: mlflow.db, and mlruns beside it.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import headrace as hr
from headrace import registry

TEXTS = Path(__file__).with_name("hello.csv")


@hr.stage(out={"words": float})
class Words:
    model: str = "models:/words@prod"  # a job, and each version of a service, keeps to the version that this means when it begins

    def setup(self, device: str):
        self.weights = load_file(registry.fetch(self.model) / "model.safetensors")

    def __call__(self, text: hr.Column[str]):
        lengths = np.array([len(one) for one in text])
        return {"words": lengths * self.weights["slope"] + self.weights["offset"]}


counted = hr.Pipeline("counted", Words())


def main():
    with TEXTS.open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    lengths, words = np.array([len(text) for text in texts]), np.array([len(text.split()) for text in texts])
    slope, offset = np.polyfit(lengths, words, 1)
    off = words - (slope * lengths + offset)
    r2 = 1 - off.var() / words.var()
    run = registry.log_run("words", settings={"degree": 1}, metrics={"r2": r2}, inputs=[TEXTS])
    with tempfile.TemporaryDirectory() as folder:
        save_file({"slope": np.array([slope]), "offset": np.array([offset])}, Path(folder) / "model.safetensors")
        version = registry.register(folder, "words", run=run, stage=Words())
    print(f"{version} is @candidate now, r2 {r2:.3f}")


if __name__ == "__main__":
    main()
