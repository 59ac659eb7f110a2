"""Versions of registered models: where they lie, and fetching them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from headrace import copies
from headrace.errors import SettingError, listing, nearest
from headrace.registry import folders, pickles
from headrace.registry.address import Address, is_address
from headrace.registry.connection import ABSENT, asking

_SHELF = "registry"
DIGEST = "headrace.digest"
"""The tag of a version that names its files; see `folders.Manifest.digest`."""

_OURS = re.compile(r"(file|s3|gs|gcs|hdfs|abfss?)://|file:/|(?![a-z][a-z0-9+.-]*:)", re.IGNORECASE)  # read by our own file systems


@dataclass(frozen=True, slots=True)
class Located:
    """A version of a registered model, and the URI of its artifacts, as mlflow has it. `digest` is that of its files, if headrace registered them."""

    uri: str
    name: str
    version: str
    digest: str = ""

    def __str__(self) -> str:
        return str(Address(self.name, version=self.version))


def locate(uri: str, what: str = "model") -> Located:
    """The version that `models:/name@alias` or `models:/name/3` names now; `what` opens messages.

    Raises:
        SettingError: mlflow is missing, the registry is out of reach, or holds no such model, alias or version.
    """
    address = Address.of(uri, what)
    with asking(f"{what}={uri!r}") as mlflow:
        client = mlflow.MlflowClient()
        try:
            found = client.get_model_version_by_alias(address.name, address.alias) if address.alias else client.get_model_version(address.name, address.version)
        except mlflow.MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            raise SettingError(f"{what}={uri!r}: {absent(client, mlflow, address)}") from error
        uri = client.get_model_version_download_uri(found.name, str(found.version))
        return Located(uri, found.name, str(found.version), found.tags.get(DIGEST, ""))


def fetch(uri: str, what: str = "model", *, trust_pickles: bool = False) -> Path:
    """The folder in the user's cache with the artifacts of the version that a URI names now; `what` opens messages.

    Files that headrace registered are held to what they were then. A folder with pickles is refused, for reading them would run whatever code
    their maker put there, unless `trust_pickles` says that this maker is trusted.

    Raises:
        SettingError: as `locate`; or the artifacts cannot be fetched, are not those that were registered, or have pickles.
    """
    located = locate(uri, what)
    folder = copies.kept(_SHELF, (located.name, located.version, located.uri), partial(_fill, located, what))
    if not trust_pickles:
        advice = "register the next version with weights in safetensors or the library's own format, or say trust_pickles=True where the model is named"
        pickles.refuse(folder, f"{what}={str(located)!r}", advice=advice)
    return folder


def pinned(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Those of the settings that name registered models, with the versions that they name now: `{"model": "models:/name/3"}`.

    Raises:
        SettingError: as `locate`.
    """
    return {name: str(locate(value, f"{where}: {name}")) for name, value in settings.items() if is_address(value)}


def aliases(settings: Mapping[str, Any], where: str) -> list[str]:
    """Those of the settings that name registered models by an alias: `["models:/name@prod"]`. No registry is asked.

    Raises:
        SettingError: a setting begins like such a name, and is none.
    """
    return [value for name, value in settings.items() if is_address(value) and Address.of(value, f"{where}: {name}").alias]


def _fill(located: Located, what: str, folder: Path) -> None:
    """Put the artifacts into a folder: by our own file systems, else as mlflow does it."""
    source, what = located.uri, f"{what}={str(located)!r}: artifacts"
    elsewhere = source.startswith("s3:") and "MLFLOW_S3_ENDPOINT_URL" in os.environ  # which only mlflow reads
    if _OURS.match(source) and not elsewhere:
        copies.copy(re.sub("^file:/(?!/)", "file:///", source), what, folder)
    else:
        with asking(f"{what}={source!r}") as mlflow:
            mlflow.artifacts.download_artifacts(artifact_uri=str(located), dst_path=str(folder))
    if not any(path.is_file() for path in folder.rglob("*")):
        raise SettingError(f"{what}={source!r} are no files; log some, and register the next version")
    if located.digest:
        folders.check(folder, located.digest, what)


def absent(client: Any, mlflow: Any, address: Address) -> str:
    """What a registry holds in place of what was asked for."""
    name = address.name
    try:
        model = client.get_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        names = [model.name for model in client.search_registered_models()]
        return f"the registry has no model {name!r}; it has {listing(names)}" + nearest(name, names)
    if address.alias:
        return f"model {name!r} has no alias {address.alias!r}; it has {listing(model.aliases)}" + nearest(address.alias, model.aliases)
    versions = sorted((int(one.version) for one in client.search_model_versions(f"name={name!r}")), reverse=True)
    return f"model {name!r} has no version {address.version}; it has {listing(map(str, versions))}"
