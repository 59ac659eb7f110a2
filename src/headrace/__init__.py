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
    from headrace import features, models, online_store, registry
    from headrace.client import Client
    from headrace.features import FeatureView, training_set
    from headrace.llms import LLM, Sampling
    from headrace.on_ray.job import run
    from headrace.on_ray.serve import serve
    from headrace.on_ray.sweep import sweep
    from headrace.on_ray.train import train
    from headrace.online_store import Lookup
    from headrace.training import Training

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Client",
    "Column",
    "FeatureView",
    "HeadraceError",
    "Image",
    "Input",
    "Lookup",
    "Output",
    "Pipeline",
    "Sampling",
    "Training",
    "Vector",
    "cpu",
    "explain",
    "features",
    "gpu",
    "models",
    "online_store",
    "registry",
    "resolve",
    "rows",
    "run",
    "serve",
    "stage",
    "sweep",
    "tokens",
    "train",
    "training_set",
]

# Where the names are that load more than numpy and pyarrow, such as ray, which takes half a second: they are loaded when they are asked for.
_LATER = {
    "Client": "client",
    "FeatureView": "features",
    "LLM": "llms",
    "Lookup": "online_store",
    "Sampling": "llms",
    "Training": "training",
    "run": "on_ray.job",
    "serve": "on_ray.serve",
    "sweep": "on_ray.sweep",
    "train": "on_ray.train",
    "training_set": "features",
}


def __getattr__(name: str) -> Any:
    if name in ("features", "models", "online_store", "registry"):
        return importlib.import_module(f"headrace.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(f"headrace.{_LATER[name]}"), name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
