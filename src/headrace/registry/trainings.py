"""What a training saved last as the next version of a model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from headrace import copies
from headrace.registry.catalog import Version
from headrace.registry.releases import register
from headrace.registry.runs import log_run

if TYPE_CHECKING:
    from headrace.training import Training


def register_training(training: Training, name: str, *, output: str, checkpoint: str) -> Version:
    """Log a finished training as a run, and register its checkpoint as the next version of model `name`, which `@candidate` names then.

    `output` and `checkpoint` are the folder or URI of the training, and of what it saved (`Result.checkpoint`); the files in which it keeps its
    own place are left out.

    Raises:
        RegistryError: as `log_run` and `register`: a checkpoint of pickles is refused.
        SettingError: the checkpoint cannot be read.
    """
    run = log_run(training.name, output=output, code=training.loop)
    with tempfile.TemporaryDirectory(prefix="headrace-model-") as folder:
        copies.copy(checkpoint, "checkpoint", Path(folder))
        for own in Path(folder).glob("_*"):
            own.unlink()
        return register(folder, name, run=run)
