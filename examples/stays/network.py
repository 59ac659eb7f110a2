"""A small torch model of the mean embedding of a listing's reviews.

headrace train examples/stays/network.py --input stays-output/train.parquet --output stays-output/network
"""

import dataclasses

from inputs import inputs  # the file beside this one

import headrace as hr

WEIGHTS = "network.safetensors"


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.01
    batch: int = 256


def net():
    import torch

    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1), torch.nn.Flatten(0))


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


network = hr.Training("network", fit, data=inputs, keep=["booked"], settings=Settings(), epochs=8)
