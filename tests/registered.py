"""MLflow registries for tests: real ones, in a file or behind a server's own process."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # which needs more of mlflow than is installed here
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


@contextlib.contextmanager
def asked(uri: str) -> Iterator[Any]:
    """A client of a registry, which is the one that the environment names for the length of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, "MLFLOW_TRACKING_URI": uri}.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        import mlflow

        yield mlflow.MlflowClient()


def in_file(folder: Path) -> str:
    """The URI of a registry in a new file of the folder."""
    return f"sqlite:///{folder}/registry.db"


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URI of a registry behind a server, which keeps artifacts, too; all of it in the folder."""
    stores = ["--backend-store-uri", in_file(folder), "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *stores, "--host", "127.0.0.1", "--port", "0", "--workers", "1"]
    with subprocess.Popen(command, env={**os.environ, **QUIET}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield found[1]
                    return
            raise AssertionError("".join(said))
        finally:
            process.terminate()
            process.wait(30)


def register(client: Any, name: str, source: Path | str, alias: str | None = None, **of: Any) -> str:
    """Make the next version of a model, and have an alias name it."""
    from mlflow import MlflowException

    with contextlib.suppress(MlflowException):  # it is there already
        client.create_registered_model(name)
    version = str(client.create_model_version(name, source=str(source), **of).version)
    if alias is not None:
        client.set_registered_model_alias(name, alias, version)
    return version
