"""Ready stages for models that many pipelines need. `Embedder` turns text into vectors."""

from headrace.models.embedder import Embedder

__all__ = ["Embedder"]
