"""What a door shows beside rows: its health, its contract and documentation, metrics and status."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from headrace.serving.door import heads
from headrace.serving.wire import Failure

if TYPE_CHECKING:
    from headrace.serving.door.fleet import Fleet
    from headrace.serving.door.lobby import Lobby
    from headrace.serving.watch.metrics import DoorMetrics

Page = tuple[int, bytes, bytes]  # status, body, content type

OPEN = frozenset(("/healthz", "/readyz"))
"""Pages that need no key."""

NO_VERSION = Failure(503, "unavailable", "no version of the service is known yet")
_TEXT, _HTML = b"text/plain; charset=utf-8", b"text/html; charset=utf-8"


class Desk(Protocol):
    """The door, as far as its pages need it."""

    fleet: Fleet
    lobby: Lobby[Any]
    metrics: DoorMetrics
    leaving: bool
    closing: bool

    @property
    def keys(self) -> Mapping[str, str] | None:
        """The hashes of valid keys, or None while none are asked for."""

    @property
    def keeps_files(self) -> bool:
        """Whether files and batches are kept here."""

    def has(self, path: str) -> bool:
        """Whether this service has rows under a path, or their schema."""

    def status(self) -> dict[str, Any]:
        """What `/status` answers."""

    def all_peers(self) -> list[str]:
        """The metrics of all doors of all services behind this address, but for this door's own."""


class Views:
    """The pages of a door. Those made from the contract are kept until the routes change."""

    def __init__(self, door: Desk) -> None:
        self._door = door
        self._made: dict[str, Page] = {}
        self._revision: tuple[object, ...] = ()
        self._pages: dict[str, Callable[[], Page | Failure]] = {
            "/healthz": lambda: (200, b"ok\n", _TEXT),
            "/readyz": self._ready,
            "/metrics": self._metrics,
            "/status": lambda: _json(200, self._door.status()),
        }

    def knows(self, path: str) -> bool:
        """Whether there is such a page."""
        return path in self._pages or path in ("/openapi.json", "/docs") or (path.endswith("/schema") and self._door.has(path))

    def page(self, path: str) -> Page | Failure:
        """The page under this path, which is known."""
        if path in self._pages:
            return self._pages[path]()
        routes = self._door.fleet.routes
        version = self._door.fleet.first()
        if routes is None or version is None:
            return NO_VERSION
        guests = tuple(door.fleet.routes and door.fleet.routes.revision for door in self._door.lobby.guests.values())
        revision = (routes.revision, routes.keys is not None, guests)
        if revision != self._revision:
            self._revision = revision
            self._made.clear()
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path]

    def _make(self, path: str) -> Page:
        from headrace.serving.bodies import docs, openapi  # not needed until somebody asks

        fleet = self._door.fleet
        if path.endswith("/schema"):
            mix = fleet.mixes[path[:-7]]
            version = max(mix.versions.values(), key=lambda version: (version.route.weight, version.number))
            return _json(200, openapi.schema(version.route.contract))
        first = fleet.first()
        assert first is not None
        guests = [door.fleet.first() for door in self._door.lobby.guests.values()]
        document = openapi.document(
            first.route.contract,
            fleet.limits,
            keys=self._door.keys is not None,
            files=self._door.keeps_files,
            guests=[guest.route.contract for guest in guests if guest is not None],
        )
        if path == "/docs":
            return 200, docs.page(document).encode(), _HTML
        return _json(200, document)

    def _ready(self) -> Page:
        fleet = self._door.fleet
        if self._door.leaving or self._door.closing:
            return 503, b"this door closes\n", _TEXT
        serving = [version for version in fleet.versions.values() if version.route.weight > 0]
        if not serving:
            return 503, b"no version answers requests\n", _TEXT
        lines = _lacks(fleet)
        guests = [f"{guest}: {line}" for guest, door in self._door.lobby.guests.items() for line in _lacks(door.fleet)]
        # Who deals out requests among addresses looks here: what one guest lacks must not take the others away with it.
        said = "\n".join([*(lines or ["ready"]), *guests, ""])
        return (503 if lines else 200), said.encode(), _TEXT

    def _metrics(self) -> Page:
        from headrace.serving.watch.exposition import CONTENT_TYPE

        return 200, self._door.metrics.text(self._door.all_peers()), CONTENT_TYPE.encode()


def _lacks(fleet: Fleet) -> list[str]:
    """What versions lack that answer requests, a line each."""
    return [f"version {number}: no replica of {', '.join(groups)}" for number, groups in fleet.unready().items()]


def _json(status: int, value: Any) -> Page:
    return status, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), heads.JSON_TYPE
