"""The models behind an address: which versions of which service answer under which name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from headrace.gateway.openai.refusals import Refused
from headrace.serving.door.fleet import Mix, Version

if TYPE_CHECKING:
    from headrace.serving.door.fleet import Fleet


class Models:
    """The models that the versions of some services speak for; `fleets` gives those that there are now, one for each service.

    A model answers to its own name, and its pipeline's name is an alias for whatever model the service's versions have: during a canary, of
    the old one and the new one by their shares.
    """

    def __init__(self, fleets: Callable[[], Iterable[Fleet]]) -> None:
        self._fleets = fleets
        self._revisions: tuple[tuple[str, int], ...] = ()
        self._mixes: dict[str, Mix] = {}

    def mixes(self) -> dict[str, Mix]:
        """The versions by name, aliases last."""
        revisions = tuple((fleet.routes.service, fleet.routes.revision) for fleet in self._fleets() if fleet.routes is not None)
        if revisions != self._revisions:
            self._revisions = revisions
            self._mixes = self._found()
        return self._mixes

    def choose(self, name: str, path: str, number: int | None) -> Version:
        """The version that answers, which may be asked for by its number.

        Raises:
            Refused: there is no such model or version, or it does not answer this path.
        """
        mix = self.mixes().get(name)
        if mix is None:
            raise self._unknown(name)
        version = mix.versions.get(number) if number is not None else mix.choose()
        if version is None:
            what = "no version of it answers requests at the moment" if number is None else f"version {number} is not served"
            raise Refused(f"the model {name!r}: {what}", "model", status=503 if number is None else 404, code="unavailable")
        paths = speech(version)["paths"]
        if path not in paths:
            raise Refused(f"the model {name!r} does not answer {path}, but {' and '.join(paths)}", "model", status=404, code="unsupported_path")
        return version

    def listed(self, allowed: Iterable[str] | None = None) -> dict[str, Any]:
        """All that answer, or those of them that are allowed, as OpenAI lists models.

        Raises:
            Refused: none answers, as while the first version starts.
        """
        if not self.mixes() and all(fleet.versions for fleet in self._fleets()):
            raise Refused("no pipeline of this service is a language model", status=404, code="not_found")
        if not any(mix.weighted for mix in self.mixes().values()):
            raise Refused("no model answers requests at the moment", status=503, code="unavailable")
        only = None if allowed is None else set(allowed)
        names = [name for name, mix in self.mixes().items() if mix.weighted and (only is None or name in only)]
        return {"object": "list", "data": [self.shown(name) for name in names]}

    def shown(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            Refused: there is none of that name.
        """
        if (mix := self.mixes().get(name)) is None:
            raise self._unknown(name)
        roots = sorted({speech(version)["model"] for version in mix.versions.values()})
        length = max((length_of(version) for version in mix.versions.values()), default=0)
        more = {"max_model_len": length} if length else {}
        owner = next(iter(mix.versions.values())).service
        return {"id": name, "object": "model", "created": 0, "owned_by": owner, "root": roots[-1], **more}

    def _found(self) -> dict[str, Mix]:
        """Services have no name in common, see `serving.release.guests`; else the first one's counts."""
        models: dict[str, Mix] = {}
        aliases: dict[str, Mix] = {}
        for fleet in self._fleets():
            speaking = [version for version in fleet.versions.values() if speech(version)]
            mine = [version.pipeline for version in speaking], [speech(version)["model"] for version in speaking]
            for known, names in zip((aliases, models), mine, strict=True):
                for name in names:
                    known.setdefault(name, Mix([version for version in speaking if name in (speech(version)["model"], version.pipeline)]))
        return {**models, **{name: mix for name, mix in aliases.items() if name not in models}}

    def _unknown(self, name: str) -> Refused:
        if any(fleet.routes is None for fleet in self._fleets()):
            return Refused("the service starts, and not all of its models are known yet", "model", status=503, code="unavailable")
        names = ", ".join(map(repr, self.mixes())) or "none yet"
        return Refused(f"the model {name[:100]!r} does not exist; there are {names}", "model", status=404, code="model_not_found")


def speech(version: Version) -> dict[str, Any]:
    """What a version's contract says of the model that it speaks for; nothing if it does not."""
    found: dict[str, Any] = version.route.contract.get("speech") or {}
    return found


def billed_as(name: str, version: Version, allowed: Iterable[str] | None) -> str:
    """The model that a request is booked under which asked for `name`: the version's own, unless that name is one that the key was `allowed`."""
    own: str = speech(version)["model"]
    return name if allowed is not None and name in allowed else own


def length_of(version: Version) -> int:
    """How many tokens its model takes; 0 while no replica has told."""
    return int(engine_figure(version, "length"))


def engine_figure(version: Version, name: str) -> float:
    """The highest value that a replica of its last group has told of its engine."""
    told = [link.stats.engine for link in version.pools[-1].links.values() if link.stats is not None] if version.pools else []
    return max((figures.get(name, 0.0) for figures in told if figures), default=0.0)
