"""Asking mlflow: with what it needs for as long as it is asked, and its errors told as ours. The only module that imports it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from headrace.errors import HeadraceError, RegistryError, SettingError

ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What mlflow says of what is not there; the latter of an alias."""

_SET = "MLFLOW_TRACKING_URI, or MLFLOW_REGISTRY_URI, says where the registry is"
_QUIETLY = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""For what is asked here, where the environment says nothing: three retries take 12 s, mlflow's own seven take four minutes."""


@contextlib.contextmanager
def asking(asked: str, *, make: bool = False, error: type[HeadraceError] = SettingError, verb: str = "be had from") -> Iterator[Any]:
    """mlflow, whose errors are told as ours; `asked` and `verb` open the message. Only with `make` a registry in a file is begun where there is none.

    Raises:
        `error`: mlflow is missing, the registry is not there or out of reach, or it refuses.
    """
    given = {name: value for name, value in _QUIETLY.items() if name not in os.environ}
    os.environ.update(given)
    try:
        import mlflow

        uri = mlflow.get_registry_uri()
        if not make and uri.startswith("sqlite:///") and not os.path.exists(unquote(uri.removeprefix("sqlite:///").partition("?")[0])):
            raise error(f"{asked}: there is no MLflow registry at {uri}; {_SET}, such as http://127.0.0.1:5000")  # mlflow would make an empty one
        yield mlflow
    except ImportError as missing:
        package = "'headrace[registry]'" if missing.name == "mlflow" else "mlflow"  # a registry in a database needs more than the client
        raise error(f"{asked} needs {missing.name}, which is not installed: pip install {package}") from missing
    except _failures() as failed:
        raise error(f"{asked} cannot {verb} the MLflow registry at {_bare(uri)}: {_bare(str(failed))}; {_SET}") from failed
    finally:
        for name in given:
            os.environ.pop(name, None)


def changing(what: str, *, make: bool = False) -> contextlib.AbstractContextManager[Any]:
    """mlflow, to write with; `what` opens messages, which are RegistryErrors. See `asking`."""
    return asking(what, make=make, error=RegistryError, verb="be kept in")


def reading(what: str) -> contextlib.AbstractContextManager[Any]:
    """mlflow, to look something up with for its own sake; `what` opens messages, which are RegistryErrors."""
    return asking(what, error=RegistryError)


def _failures() -> tuple[type[Exception], ...]:
    """What mlflow raises where it cannot read: its own errors, those of sockets and files, and of a database, if it reads one itself."""
    from mlflow import MlflowException

    database = sys.modules.get("sqlalchemy.exc")
    return (MlflowException, OSError) if database is None else (MlflowException, OSError, database.SQLAlchemyError)


def _bare(text: str) -> str:
    """Without passwords in URIs."""
    return re.sub(r"//[^/@\s]*@", "//", text)
