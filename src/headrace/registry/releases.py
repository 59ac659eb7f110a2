"""Versions come and go: register one, have an alias name it once it has passed its gates, and go back to the one before.

MLflow has no way to move an alias only if nobody else did, so a move is announced first, as a tag of the model with a name of its own. Whoever
sees another announcement than their own takes theirs back and tries again: of two that are at it at the same time at least one sees the other,
since both announce before they look. What the alias named before is kept in a tag of the model, the last at the end.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.errors import GateError, HeadraceError, RegistryError
from headrace.pipeline import Pipeline
from headrace.registry.address import Address, is_address
from headrace.registry.catalog import GATES, SERVICE, STAGE, Version, registered, version, version_of
from headrace.registry.connection import changing
from headrace.registry.folders import MANIFEST, Manifest
from headrace.registry.runs import Run, log_run
from headrace.registry.versions import DIGEST

FORMER, _MOVING = "headrace.former.", "headrace.moving."
CANDIDATE, PROD = "candidate", "prod"

_KEPT = 50  # former versions of an alias
_ABANDONED_S = 60.0  # after which the announcement of a move counts for nothing: it takes milliseconds
_TRIES, _WAIT_S = 40, 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one gate said of a version."""

    gate: str
    passed: bool
    said: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.gate}: {self.said}"


Gate = Callable[[Version], Outcome]
"""What looks at a version before an alias names it. A HeadraceError that it raises is an outcome, too: it did not pass."""


@dataclass(frozen=True, slots=True)
class Move:
    """An alias that was moved: the version that it names now, the one before (empty if it is new), and what the gates said."""

    alias: str
    version: Version
    former: str
    outcomes: tuple[Outcome, ...] = ()

    def __str__(self) -> str:
        return f"models:/{self.version.name}@{self.alias} is version {self.version.version} now" + (f", and was {self.former}" if self.former else "")


def register(
    folder: str | os.PathLike[str], name: str, *, run: Run | str | None = None, stage: Any = None, alias: str | None = CANDIDATE, trust_pickles: bool = False
) -> Version:
    """Make a folder the next version of a model, with `headrace.json` beside its files; the folder itself is left as it is.

    Args:
        folder: weights in safetensors or in their library's own safe format, and whatever else the stage loads.
        name: the model; it is begun if there is none.
        run: the one that made it, of `log_run` or by its id; without one, a run is logged that says that it is not known.
        stage: the one that uses it, an instance or a class; it is noted with its settings and columns.
        alias: the one that names the newest version; None for none.
        trust_pickles: register pickles all the same. Whoever loads them must say so again.

    Raises:
        RegistryError: the folder has no files, or pickles; the registry is out of reach or refuses.
    """
    source = Path(folder)
    manifest = Manifest.of(source, stage=stage, trust_pickles=trust_pickles)
    if run is None:
        run = log_run(name)
    id, path = (run.id if isinstance(run, Run) else run.removeprefix("run:")), f"models/{manifest.digest[:16]}"
    tags = {DIGEST: manifest.digest} | ({STAGE: manifest.stage["name"]} if manifest.stage else {})
    with changing(f"model {name!r}", make=True) as mlflow:
        client = mlflow.MlflowClient()
        client.log_artifacts(id, str(source), path)
        client.log_text(id, manifest.to_json(), f"{path}/{MANIFEST}")
        with contextlib.suppress(mlflow.MlflowException):  # it is there already; else the next line says why not
            client.create_registered_model(name)
        made = client.create_model_version(name, f"runs:/{id}/{path}", id, tags=tags)
        if alias is not None:
            with _alone(client, name):
                now = client.get_registered_model(name).aliases.get(alias)
                if now is None or int(now) < int(made.version):  # another process may have registered a newer one meanwhile
                    client.set_registered_model_alias(name, alias, str(made.version))
        return version_of(client.get_model_version(name, str(made.version)), client.get_registered_model(name).aliases)


def promote(name: str, *, gates: Sequence[Gate], to: str = PROD, of: str = CANDIDATE) -> Move:
    """Have alias `to` name the version that `of` names, an alias or a number, if it passes all gates. Every gate is asked, whatever the others say.

    What they said is kept with the version. The version that the alias named before is kept, too: `rollback` goes back to it.

    Raises:
        GateError: a gate was not passed; the alias is where it was.
        RegistryError: there is no such model, alias or version; or the alias was moved by somebody else while the gates were asked.
    """
    chosen = version(f"models:/{name}/{of}" if of.isdigit() else f"models:/{name}@{of}")
    before = _named(name, to)
    outcomes = tuple(_asked(gate, chosen) for gate in gates)
    failed = [one for one in outcomes if not one.passed]
    with changing(f"model {name!r}") as mlflow:
        client = mlflow.MlflowClient()
        said = {"alias": to, "at": _now(), "by": _who(), "outcomes": [asdict(one) for one in outcomes]}
        client.set_model_version_tag(name, chosen.version, GATES, json.dumps(said))
        if failed:
            rest = "\n".join(f"  {one}" for one in outcomes)
            where = f"@{to} stays at version {before}" if before else f"@{to} names nothing yet"
            raise GateError(f"{chosen} does not pass {len(failed)} of {len(outcomes)} gates; {where}\n{rest}")
        with _alone(client, name):
            model = registered(mlflow, client, name)
            now = str(model.aliases.get(to, ""))
            if now != before:
                was, become = (f"version {one}" if one else "nothing" for one in (before, now))
                raise RegistryError(f"@{to} of model {name!r} named {was} when the gates were asked, and names {become} now: somebody moved it; promote again")
            former = _former(model, to)
            if now and now != chosen.version:
                client.set_registered_model_tag(name, FORMER + to, ",".join([*former, now][-_KEPT:]))
            client.set_registered_model_alias(name, to, chosen.version)
    return Move(to, version(str(chosen)), before, outcomes)


def rollback(name: str, *, alias: str = PROD) -> Move:
    """Have an alias name the version that it named before; once more, the one before that.

    Raises:
        RegistryError: there is none, or it was deleted; or the registry is out of reach.
    """
    with changing(f"model {name!r}") as mlflow:
        client = mlflow.MlflowClient()
        registered(mlflow, client, name)
        with _alone(client, name):
            model = registered(mlflow, client, name)
            now, former = str(model.aliases.get(alias, "")), _former(model, alias)
            while former and former[-1] == now:  # somebody ended between the two steps of a move
                former.pop()
            if not former:
                raise RegistryError(f"@{alias} of model {name!r} named no version before" + (f" {now}" if now else "") + "; there is nothing to go back to")
            back = version(f"models:/{name}/{former[-1]}")  # which says so if it is gone
            client.set_registered_model_alias(name, alias, back.version)
            client.set_registered_model_tag(name, FORMER + alias, ",".join(former[:-1]))
    return Move(alias, version(str(back)), now)


def deployed(pipeline: Pipeline, service: str, number: int) -> None:
    """Note with each version that a pinned pipeline names that version `number` of a service has been deployed with it, for `lineage`.

    Raises:
        RegistryError: the registry is out of reach or refuses.
    """
    named = {value for stage in pipeline.stages for value in stage.settings.values() if is_address(value)}
    for address in [Address.of(uri, "model") for uri in sorted(named)]:
        with changing(str(address)) as mlflow:
            mlflow.MlflowClient().set_model_version_tag(address.name, address.version, SERVICE + service, f"version {number}, deployed {_now()}")


def _asked(gate: Gate, chosen: Version) -> Outcome:
    try:
        return gate(chosen)
    except HeadraceError as error:
        return Outcome(str(getattr(gate, "title", None) or getattr(gate, "__name__", gate)), False, str(error))


def _named(name: str, alias: str) -> str:
    """The version that an alias names now; empty for none."""
    with changing(f"model {name!r}") as mlflow:
        client = mlflow.MlflowClient()
        return str(registered(mlflow, client, name).aliases.get(alias, ""))


def _former(model: Any, alias: str) -> list[str]:
    """The versions that an alias named before, the last at the end."""
    return [one for one in model.tags.get(FORMER + alias, "").split(",") if one]


@contextlib.contextmanager
def _alone(client: Any, name: str) -> Iterator[None]:
    """Move an alias of a model while nobody else does; see above.

    Raises:
        RegistryError: somebody else is at it, all the time.
    """
    mine = f"{_MOVING}{uuid.uuid4().hex}"
    for tried in range(_TRIES):
        client.set_registered_model_tag(name, mine, json.dumps({"at_s": time.time(), "by": _who()}))
        try:
            others = _others(client, name, mine)
            if not others:
                yield
                return
        finally:
            client.delete_registered_model_tag(name, mine)
        time.sleep(random.uniform(0, _WAIT_S * min(tried + 1, 10)))  # noqa: S311 - so that two do not meet again and again
    raise RegistryError(f"aliases of model {name!r} are being moved by {others[0]} at the same time, or that ended in the middle of it; try again in a minute")


def _others(client: Any, name: str, mine: str) -> list[str]:
    """Who else has announced a move, and has not been at it for so long that they must have ended in the middle of it."""
    found = []
    for tag, said in client.get_registered_model(name).tags.items():
        if tag.startswith(_MOVING) and tag != mine:
            told = json.loads(said)
            if time.time() - told["at_s"] < _ABANDONED_S:
                found.append(str(told["by"]))
            else:
                client.delete_registered_model_tag(name, tag)
    return found


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
