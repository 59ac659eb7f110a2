"""The stage that answers: trees and network together, from a version of the registry. Batch jobs and services load the same files.

headrace explain examples/stays/score.py
"""

from pathlib import Path

import numpy as np
from boosted import TREES  # the files beside this one
from inputs import numbers, words
from network import WEIGHTS, net

import headrace as hr


@hr.stage(out={"chance": float}, batch=1024)
class Score:
    model: str = "models:/stays@prod"  # or a folder
    share: float = 0.9  # of the trees; the rest is the network's

    def setup(self, device: str):
        import lightgbm
        from safetensors.torch import load_file

        from headrace import registry

        folder = registry.fetch(self.model) if registry.is_address(self.model) else Path(self.model)
        self.trees = lightgbm.Booster(model_file=folder / TREES)
        self.network = net()
        self.network.load_state_dict(load_file(folder / WEIGHTS))

    def __call__(self, numbers: hr.Column[hr.Vector(12)], words: hr.Column[hr.Vector(8)]):
        import torch

        with torch.inference_mode():
            read = torch.sigmoid(self.network(torch.from_numpy(np.array(words)))).numpy()
        return {"chance": self.share * self.trees.predict(np.array(numbers), num_threads=1) + (1 - self.share) * read}


score = hr.Pipeline("score", numbers, words, Score(), outputs=["chance"])
