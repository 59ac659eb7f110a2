"""A small torch model of the mean embedding of a listing's reviews.

headrace train examples/stays/network.py --input stays-output/train.parquet --output stays-output/network
"""

import dataclasses

from inputs import words  # the files beside this one
from score import WEIGHTS, net

import headrace as hr


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.01
    batch: int = 256


def fit(shard, settings, run):
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = net()
    if folder := run.resume():
        model.load_state_dict(load_file(folder / WEIGHTS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    for batch in shard.batches(settings.batch):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(torch.from_numpy(batch["words"])), torch.from_numpy(batch["booked"]).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(log_loss=loss.item())
        run.checkpoint(lambda folder: save_file(model.state_dict(), folder / WEIGHTS))


network = hr.Training("network", fit, data=hr.Pipeline("words", words), keep=["booked"], settings=Settings(), epochs=8)
