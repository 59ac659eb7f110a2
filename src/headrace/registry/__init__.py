"""Models by their names in an MLflow registry: `models:/name@alias` and `models:/name/3`. The only package that imports mlflow.

Which registry that is, mlflow's own variables say: MLFLOW_REGISTRY_URI, or else MLFLOW_TRACKING_URI.
"""

from headrace.registry.address import Address, is_address
from headrace.registry.versions import Located, fetch, locate, pinned

__all__ = ["Address", "Located", "fetch", "is_address", "locate", "pinned"]
