"""Models by their names in an MLflow registry, `models:/name@alias` and `models:/name/3`: what made them, fetching them, and which one is in use.

The only package that imports mlflow. Which registry that is, mlflow's own variables say: MLFLOW_REGISTRY_URI, or else MLFLOW_TRACKING_URI; without
them it is mlflow's own in this folder: `mlflow.db`, with files in `mlruns`.
"""

from headrace.registry.address import Address, is_address
from headrace.registry.catalog import Figures, Model, Version, figures, model, models, version
from headrace.registry.gates import Latency, Metric, Parity, golden
from headrace.registry.origins import Lineage, Origin, lineage
from headrace.registry.releases import Gate, Move, Outcome, deployed, promote, register, rollback
from headrace.registry.runs import Run, log_run
from headrace.registry.trainings import register_training
from headrace.registry.versions import Located, aliases, fetch, locate, pinned

__all__ = [
    "Address",
    "Figures",
    "Gate",
    "Latency",
    "Lineage",
    "Located",
    "Metric",
    "Model",
    "Move",
    "Origin",
    "Outcome",
    "Parity",
    "Run",
    "Version",
    "aliases",
    "deployed",
    "fetch",
    "figures",
    "golden",
    "is_address",
    "lineage",
    "locate",
    "log_run",
    "model",
    "models",
    "pinned",
    "promote",
    "register",
    "register_training",
    "rollback",
    "version",
]
