"""The stages that answer: what the network says of the reviews, and the trees on top of it. They load a version of the registry, or a folder.

headrace explain examples/stays/score.py
"""

from pathlib import Path

import numpy as np
from inputs import numbers, words  # the file beside this one

import headrace as hr

TREES, WEIGHTS = "trees.txt", "network.safetensors"  # formats without code: LightGBM's own, and safetensors


def net():
    import torch

    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))


def located(model: str) -> Path:
    from headrace import registry

    return registry.fetch(model) if registry.is_address(model) else Path(model)


@hr.stage(out={"heard": float}, on=hr.cpu(0.5), batch=1024)
class Hear:
    """The log odds by the reviews alone."""

    model: str = "models:/stays@prod"

    def setup(self, device: str):
        from safetensors.torch import load_file

        self.network = net()
        self.network.load_state_dict(load_file(located(self.model) / WEIGHTS))

    def __call__(self, words: hr.Column[hr.Vector(8)]):
        import torch

        with torch.inference_mode():
            return {"heard": self.network(torch.from_numpy(np.array(words))).numpy()}


@hr.stage(out={"chance": float}, on=hr.cpu(0.5), batch=1024)
class Score:
    """The chance by everything: the trees were grown to correct the network."""

    model: str = "models:/stays@prod"

    def setup(self, device: str):
        import lightgbm

        self.trees = lightgbm.Booster(model_file=located(self.model) / TREES)

    def __call__(self, numbers: hr.Column[hr.Vector(12)], heard: hr.Column[float]):
        odds = np.asarray(heard) + self.trees.predict(np.array(numbers), raw_score=True, num_threads=1)
        return {"chance": 1 / (1 + np.exp(-odds))}


score = hr.Pipeline("score", numbers, words, Hear(), Score(), outputs=["heard", "chance"])
