"""Registered models as values: their versions, what each is made by, and which aliases name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import RegistryError, SettingError
from headrace.registry.address import Address, is_address
from headrace.registry.connection import ABSENT, reading
from headrace.registry.versions import DIGEST, absent

STAGE, GATES, SERVICE = "headrace.stage", "headrace.gates", "headrace.service."
"""Tags of a version: the stage that uses it, what its gates said last, and, with a service's name behind, which version of that was deployed with it."""

_MOST = 1000  # things a page


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a registered model. `run` is the id of the run that made it, `tags` are all that MLflow has."""

    name: str
    version: str
    aliases: tuple[str, ...] = ()
    run: str = ""
    created_s: float = 0.0
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A name for its files; empty if it was not registered by headrace."""
        return self.tags.get(DIGEST, "")

    @property
    def services(self) -> dict[str, str]:
        """Services that a version was deployed of with this one, and what is noted of that."""
        return {tag.removeprefix(SERVICE): said for tag, said in self.tags.items() if tag.startswith(SERVICE)}

    def __str__(self) -> str:
        return str(Address(self.name, version=self.version))


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model: the version that each alias names, and its versions, the newest first."""

    name: str
    aliases: Mapping[str, str]
    versions: tuple[Version, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run that made a version says: the last value of each metric, its settings, and its status."""

    metrics: Mapping[str, float]
    settings: Mapping[str, str]
    status: str


def models() -> list[Model]:
    """All registered models, by name.

    Raises:
        RegistryError: mlflow is missing, or the registry is not there or out of reach.
    """
    with reading("the list of models") as mlflow:
        client = mlflow.MlflowClient()
        return [model_of(client, found) for found in sorted(pages(client.search_registered_models), key=lambda one: str(one.name))]


def model(name: str) -> Model:
    """One registered model.

    Raises:
        RegistryError: as `models`; or there is none of this name.
    """
    with reading(f"model {name!r}") as mlflow:
        client = mlflow.MlflowClient()
        return model_of(client, registered(mlflow, client, name))


def version(reference: str) -> Version:
    """The version that `models:/name@alias`, `name@alias`, `models:/name/3` or `name/3` names, or of a bare name the newest.

    Raises:
        RegistryError: there is no such model, alias or version; or as `models`.
    """
    if "@" not in reference and "/" not in reference.removeprefix("models:/"):
        found = model(reference.removeprefix("models:/"))
        if not found.versions:
            raise RegistryError(f"model {found.name!r} has no version yet; register one")
        return found.versions[0]
    try:
        address = Address.of(reference if is_address(reference) else f"models:/{reference}", "version")
    except SettingError as error:
        raise RegistryError(str(error)) from None
    with reading(str(address)) as mlflow:
        client = mlflow.MlflowClient()
        try:
            number = client.get_model_version_by_alias(address.name, address.alias).version if address.alias else address.version
            found_version = client.get_model_version(address.name, str(number))
        except mlflow.MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            raise RegistryError(f"{address}: {absent(client, mlflow, address)}") from error
        return version_of(found_version, client.get_registered_model(address.name).aliases)


def figures(of: Version) -> Figures | None:
    """What the run that made a version says; None where there is no run, or it was deleted."""
    if not of.run:
        return None
    with reading(f"run {of.run} of {of}") as mlflow:
        try:
            run = mlflow.MlflowClient().get_run(of.run)
        except mlflow.MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return None
        return Figures(dict(run.data.metrics), dict(run.data.params), str(run.info.status))


def registered(mlflow: Any, client: Any, name: str) -> Any:
    """What mlflow has of a model.

    Raises:
        RegistryError: there is none.
    """
    try:
        return client.get_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise RegistryError(absent(client, mlflow, Address(name))) from error


def model_of(client: Any, found: Any) -> Model:
    """A model of mlflow's as ours, with all of its versions."""
    ones = [version_of(one, found.aliases) for one in pages(client.search_model_versions, filter_string=f"name={quoted(found.name)}")]
    return Model(
        str(found.name), {alias: str(number) for alias, number in found.aliases.items()}, tuple(sorted(ones, key=lambda one: int(one.version), reverse=True))
    )


def version_of(found: Any, aliases: Mapping[str, str]) -> Version:
    """A version of mlflow's as ours; `aliases` are those of its model."""
    number = str(found.version)
    named = tuple(sorted(alias for alias, one in aliases.items() if str(one) == number))
    return Version(str(found.name), number, named, str(found.run_id or ""), found.creation_timestamp / 1000, dict(found.tags))


def pages(search: Callable[..., Any], **query: Any) -> Iterator[Any]:
    """All that a search of mlflow finds, page by page."""
    token = None
    while True:
        found = search(max_results=_MOST, page_token=token, **query)
        yield from found
        if not (token := found.token):
            return


def quoted(text: str) -> str:
    """Text as mlflow's filters take it.

    Raises:
        RegistryError: it has both kinds of quotes, which no filter can hold.
    """
    if "'" in text and '"' in text:
        raise RegistryError(f"{text!r} has both kinds of quotes, and MLflow cannot look for it; rename it")
    return f'"{text}"' if "'" in text else f"'{text}'"
