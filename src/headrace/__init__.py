"""One pipeline, every shape of work: stages written once, run as a streaming batch job or served online, on Ray.

import headrace as hr

@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}

tidy = hr.Pipeline("tidy", clean)
tidy.local([{"text": "  A   quiet room "}])                        # here, in this process
hr.run(tidy, input="reviews/*.parquet", output="out")              # on Ray
ray.serve.run(hr.serve(tidy))                                      # online
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headrace.batching import rows, tokens
from headrace.columns import Column, Image, Vector
from headrace.errors import HeadraceError
from headrace.formats import Input, Output
from headrace.hardware import cpu, gpu
from headrace.pipeline import Pipeline
from headrace.plan import explain, resolve
from headrace.stage import stage

if TYPE_CHECKING:
    from headrace import features as features
    from headrace import models
    from headrace.client import Client
    from headrace.features import FeatureView as FeatureView
    from headrace.features import training_set as training_set
    from headrace.llms import LLM, Sampling
    from headrace.on_ray.job import run
    from headrace.on_ray.serve import serve
    from headrace.on_ray.sweep import sweep
    from headrace.on_ray.train import train
    from headrace.online_store import Lookup as Lookup
    from headrace.training import Training

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Client",
    "Column",
    "HeadraceError",
    "Image",
    "Input",
    "Output",
    "Pipeline",
    "Sampling",
    "Training",
    "Vector",
    "cpu",
    "explain",
    "gpu",
    "models",
    "resolve",
    "rows",
    "run",
    "serve",
    "stage",
    "sweep",
    "tokens",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "run":  # loads ray, which takes half a second: only when it is asked for
        from headrace.on_ray.job import run

        return run
    if name == "serve":
        from headrace.on_ray.serve import serve

        return serve
    if name == "sweep":
        from headrace.on_ray.sweep import sweep

        return sweep
    if name == "train":
        from headrace.on_ray.train import train

        return train
    if name == "Training":
        return importlib.import_module("headrace.training").Training
    if name == "Client":
        return importlib.import_module("headrace.client").Client
    if name in ("LLM", "Sampling"):
        return getattr(importlib.import_module("headrace.llms"), name)
    if name in ("features", "models"):
        return importlib.import_module(f"headrace.{name}")
    if name in ("FeatureView", "training_set"):
        return getattr(importlib.import_module("headrace.features"), name)
    if name == "Lookup":
        return importlib.import_module("headrace.online_store").Lookup
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
