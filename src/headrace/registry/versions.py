"""Versions of registered models: where they lie, and fetching them. All that asks mlflow."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from headrace import copies
from headrace.errors import SettingError, listing, nearest
from headrace.registry.address import Address, is_address

_SHELF = "registry"
_OURS = re.compile(r"(file|s3|gs|gcs|hdfs|abfss?)://|file:/|(?![a-z][a-z0-9+.-]*:)", re.IGNORECASE)  # read by our own file systems
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter is what it says of an alias
_SET = "MLFLOW_TRACKING_URI, or MLFLOW_REGISTRY_URI, says where the registry is"
_QUIETLY = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""For what is asked here, where the environment says nothing: three retries take 12 s, mlflow's own seven take four minutes."""


@dataclass(frozen=True, slots=True)
class Located:
    """A version of a registered model, and the URI of its artifacts, as mlflow has it."""

    uri: str
    name: str
    version: str

    def __str__(self) -> str:
        return str(Address(self.name, version=self.version))


def locate(uri: str, what: str = "model") -> Located:
    """The version that `models:/name@alias` or `models:/name/3` names now; `what` opens messages.

    Raises:
        SettingError: mlflow is missing, the registry is out of reach, or holds no such model, alias or version.
    """
    address = Address.of(uri, what)
    with _asking(f"{what}={uri!r}") as mlflow:
        client = mlflow.MlflowClient()
        try:
            found = client.get_model_version_by_alias(address.name, address.alias) if address.alias else client.get_model_version(address.name, address.version)
        except mlflow.MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            raise SettingError(f"{what}={uri!r}: {_absent(client, mlflow, address)}") from error
        return Located(client.get_model_version_download_uri(found.name, str(found.version)), found.name, str(found.version))


def fetch(uri: str, what: str) -> Path:
    """The folder in the user's cache with the artifacts of the version that a URI names now; `what` opens messages.

    Raises:
        SettingError: as `locate`; or the artifacts cannot be fetched.
    """
    located = locate(uri, what)
    return copies.kept(_SHELF, (located.name, located.version, located.uri), partial(_fill, located, what))


def pinned(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Those of the settings that name registered models, with the versions that they name now: `{"model": "models:/name/3"}`.

    Raises:
        SettingError: as `locate`.
    """
    return {name: str(locate(value, f"{where}: {name}")) for name, value in settings.items() if is_address(value)}


def _fill(located: Located, what: str, folder: Path) -> None:
    """Put the artifacts into a folder: by our own file systems, else as mlflow does it."""
    source, what = located.uri, f"{what}={str(located)!r}: artifacts"
    elsewhere = source.startswith("s3:") and "MLFLOW_S3_ENDPOINT_URL" in os.environ  # which only mlflow reads
    if _OURS.match(source) and not elsewhere:
        copies.copy(re.sub("^file:/(?!/)", "file:///", source), what, folder)
    else:
        with _asking(f"{what}={source!r}") as mlflow:
            mlflow.artifacts.download_artifacts(artifact_uri=str(located), dst_path=str(folder))
    if not any(path.is_file() for path in folder.rglob("*")):
        raise SettingError(f"{what}={source!r} are no files; log some, and register the next version")


def _absent(client: Any, mlflow: Any, address: Address) -> str:
    """What a registry holds in place of what was asked for."""
    name = address.name
    try:
        model = client.get_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        names = [model.name for model in client.search_registered_models()]
        return f"the registry has no model {name!r}; it has {listing(names)}" + nearest(name, names)
    if address.alias:
        return f"model {name!r} has no alias {address.alias!r}; it has {listing(model.aliases)}" + nearest(address.alias, model.aliases)
    versions = sorted((int(one.version) for one in client.search_model_versions(f"name={name!r}")), reverse=True)
    return f"model {name!r} has no version {address.version}; it has {listing(map(str, versions))}"


@contextlib.contextmanager
def _asking(asked: str) -> Iterator[Any]:
    """mlflow, whose errors are told as ours; `asked` opens the message."""
    given = {name: value for name, value in _QUIETLY.items() if name not in os.environ}
    os.environ.update(given)
    try:
        import mlflow

        uri = mlflow.get_registry_uri()
        if uri.startswith("sqlite:///") and not os.path.exists(unquote(uri.removeprefix("sqlite:///").partition("?")[0])):  # mlflow would make an empty one
            raise SettingError(f"{asked}: there is no MLflow registry at {uri}; {_SET}, such as http://127.0.0.1:5000")
        yield mlflow
    except ImportError as error:
        package = "'headrace[registry]'" if error.name == "mlflow" else "mlflow"  # a registry in a database needs more than the client
        raise SettingError(f"{asked} needs {error.name}, which is not installed: pip install {package}") from error
    except _failures() as error:
        raise SettingError(f"{asked} cannot be had from the MLflow registry at {_bare(uri)}: {_bare(str(error))}; {_SET}") from error
    finally:
        for name in given:
            os.environ.pop(name, None)


def _failures() -> tuple[type[Exception], ...]:
    """What mlflow raises where it cannot read: its own errors, those of sockets and files, and of a database, if it reads one itself."""
    from mlflow import MlflowException

    database = sys.modules.get("sqlalchemy.exc")
    return (MlflowException, OSError) if database is None else (MlflowException, OSError, database.SQLAlchemyError)


def _bare(text: str) -> str:
    """Without passwords in URIs."""
    return re.sub(r"//[^/@\s]*@", "//", text)
