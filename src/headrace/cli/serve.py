"""`headrace serve`: a pipeline as a service."""

from __future__ import annotations

import ipaddress
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from headrace.cli.loading import load
from headrace.cli.options import (
    Accounts,
    Address,
    AllowNoKeys,
    Background,
    Behind,
    CanaryShare,
    Deadline,
    Doors,
    File,
    Files,
    Follow,
    Gate,
    Host,
    Idle,
    Keys,
    Latency,
    Log,
    MaxBody,
    MaxRows,
    Name,
    Port,
    Prices,
    Replicas,
    Set,
    ShadowShare,
    TargetInFlight,
    Tls,
    Verbose,
    check_behind,
)
from headrace.errors import ServingError, SettingError, listing
from headrace.settings import override

if TYPE_CHECKING:
    from headrace.gateway.openai.opening import Opening
    from headrace.on_ray.service import Face
    from headrace.pipeline import Pipeline
    from headrace.serving.release.versions import How

SPOKEN_S = 600.0
"""The deadline of requests to a language model where none is given."""

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h)?")
_TIMES_S = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)[bB]?")
_SIZES = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3}
_SERVICE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")


def serve(
    context: typer.Context,
    file: File,
    name: Name = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    behind: Behind = None,
    replicas: Replicas = None,
    target_in_flight: TargetInFlight = 8.0,
    idle: Idle = "5min",
    latency: Latency = "1s",
    deadline: Deadline = None,
    max_body: MaxBody = "16MiB",
    max_rows: MaxRows = 4096,
    keys: Keys = None,
    accounts: Accounts = None,
    prices: Prices = None,
    files: Files = None,
    background: Background = "25%",
    tls: Tls = None,
    allow_no_keys: AllowNoKeys = False,
    doors: Doors = 2,
    canary: CanaryShare = None,
    shadow: ShadowShare = None,
    gate: Gate = None,
    follow: Follow = None,
    set_: Set = None,
    address: Address = None,
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Serve a pipeline over HTTP, until told to stop. On a running service this is its next version, which takes over without a request lost."""
    check_behind(context, behind)
    how = takeover(canary, shadow)
    replicas_of, idle_s = dict(replica_bounds(word) for word in replicas or []), seconds(idle, "--idle")
    latency_s, most_bytes = seconds(latency, "--latency"), size(max_body, "--max-body")
    deadline_s = None if deadline is None else seconds(deadline, "--deadline")
    shown = Shown(host, port, doors, tls, keys, allow_no_keys, log)
    shown.check(accounts)
    pipeline = override(load(file), set_ or [])
    service = name or pipeline.name
    check_name(service, "--name")
    if follow and shadow:
        raise SettingError("--shadow is about a version that answers nothing, and --follow about those that are to answer; give one of them")
    follow_s = followed(follow, [pipeline])
    from headrace.serving.bodies.openapi import contract
    from headrace.serving.routes import Limits

    if deadline_s is None:
        deadline_s = SPOKEN_S if "speech" in contract(pipeline) else Limits().deadline_s
    limits = Limits(most_bytes, max_rows, deadline_s=deadline_s, latency_s=latency_s, background=share(background, "--background"))
    opening = opened(accounts, prices, files)
    from headrace.on_ray.deploying import Bounds, Change  # loads ray: a mistake above is told half a second earlier
    from headrace.on_ray.service import Service, Where
    from headrace.on_ray.service import serve as begin

    where = Where(address, Path(file.partition("::")[0]).resolve().parent, verbose)
    bounds = Bounds(replicas_of, target_in_flight, idle_s)
    begin(Service(pipeline, service, where, shown.face(opening), limits, bounds, Change(how, gate, follow_s), behind), tell=tell)


@dataclass(frozen=True, slots=True)
class Shown:
    """What options say of the doors of a service."""

    host: str
    port: int
    doors: int
    tls: str | None
    keys: Path | None
    allow_no_keys: bool
    log: str | None

    def check(self, accounts: str | None) -> None:
        """Tell mistakes now, and not by actors.

        Raises:
            HeadraceError: something is wrong, or does not go together.
        """
        exposed(self.host, keys=self.keys is not None or accounts is not None, allow_no_keys=self.allow_no_keys)
        if self.tls is not None:
            pair(self.tls)
        if self.log not in (None, "json", "off"):
            raise SettingError(f"--log {self.log!r} must be json or off")
        if self.keys is not None:
            from headrace.serving.keys import KeyFile

            KeyFile(self.keys).hashes()

    def face(self, opening: Opening) -> Face:
        """The same as the service has it."""
        from headrace.on_ray.service import Face

        logs = self.log == "json" or (self.log is None and not sys.stdout.isatty())
        certificate = None if self.tls is None else pair(self.tls)
        return Face(self.host, self.port, self.doors, certificate, self.keys, logs, opening, opening.accounts is not None)


def check_name(service: str, option: str) -> None:
    """Refuse what no service can be called."""
    if not _SERVICE.fullmatch(service) or "-door-" in service:
        raise SettingError(f"{option} {service!r} must be a letter, then letters, digits, '_' and '-', 63 at most, such as reviews or reviews-eu")


def tell(text: str) -> None:
    """A line for people, on standard error, with the time of day."""
    Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(f"{time.strftime('%H:%M:%S')}  {text}", markup=False)


def takeover(canary: str | None, shadow: str | None) -> How:
    """How the new version takes over."""
    from headrace.serving.release.versions import Canary, Rolling, Shadow

    if canary and shadow:
        raise SettingError("--canary answers requests and --shadow answers none; give one of them (a canary's requests are mirrored anyway)")
    if canary:
        return Canary(share=share(canary, "--canary"))
    return Shadow(share=share(shadow, "--shadow")) if shadow else Rolling()


def followed(follow: str | None, pipelines: Sequence[Pipeline]) -> float | None:
    """Seconds between two looks at the aliases that settings name.

    Raises:
        SettingError: it is no time, or a pipeline names no alias.
    """
    if follow is None:
        return None
    every_s = seconds(follow, "--follow")
    from headrace.registry import aliases  # not before it is needed

    for pipeline in pipelines:
        if not any(aliases(stage.settings, f"stage {stage.name!r}") for stage in pipeline.stages):
            named = [f"{stage.name}.{name}={value!r}" for stage in pipeline.stages for name, value in stage.settings.items() if isinstance(value, str)]
            raise SettingError(f"--follow: no setting of {pipeline.name!r} names a model by an alias, such as models:/name@prod; it has {listing(named)}")
    return every_s


def exposed(host: str, *, keys: bool, allow_no_keys: bool) -> None:
    """Refuse to answer everybody beyond this machine, unless told to in words."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not (local or keys or allow_no_keys):
        raise ServingError(
            f"--host {host} lets other machines in, and no key is asked for. Make one: headrace keys create NAME --file keys.json, "
            "then give --keys keys.json; or, where something in front checks who asks, say --allow-no-keys"
        )


def opened(accounts: str | None, prices: Path | None, files: Path | None) -> Opening:
    """What doors are to open for OpenAI's interface; mistakes in it are told now, and not by actors."""
    from headrace.gateway.openai.opening import Opening

    if prices is not None and accounts is None:
        raise SettingError("--prices says what requests cost, and only --accounts keep what a key has spent: give both")
    if accounts is not None and "://" not in accounts:
        accounts = str(Path(accounts).expanduser().resolve())
    opening = Opening(accounts, None if prices is None else str(prices.resolve()), None if files is None else str(files.resolve()))
    if (books := opening.books()) is not None:
        books.database.close()
    if (depot := opening.depot()) is not None:
        depot.close()
    return opening


def replica_bounds(word: str) -> tuple[str, tuple[int, int]]:
    """`1:8`, `4` or `embed=0:2` as the group's name, empty for all, and its bounds."""
    group, equals, span = word.rpartition("=")
    least, colon, most = span.partition(":")
    try:
        found = int(least), int(most if colon else least)
    except ValueError:
        found = (-1, -1)
    if not 0 <= found[0] <= found[1] or found[1] < 1 or (equals and not group):
        raise SettingError(f"--replicas {word!r} must be LEAST:MOST with 0 <= LEAST <= MOST and MOST at least 1, such as 1:8 or embed=0:4")
    return group, found


def pair(text: str) -> tuple[str, str]:
    """The certificate and its key, both of which must be there."""
    certificate, comma, key = text.partition(",")
    for file in (certificate, key):
        if not comma or not Path(file).is_file():
            raise SettingError(f"--tls {text!r} must name two files, CERT,KEY" + (f"; there is no file {file!r}" if comma else ""))
    return str(Path(certificate).resolve()), str(Path(key).resolve())


def share(text: str, option: str) -> float:
    """`5%` or `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise SettingError(f"{option} {text!r} must be a share above 0 and at most 1, such as 5% or 0.05")
    return value


def seconds(text: str, option: str) -> float:
    """`200ms`, `1.5s`, `2min` in seconds; a number alone is seconds."""
    found = _TIME.fullmatch(text.strip())
    value = float(found[1]) * _TIMES_S[found[2]] if found else 0.0
    if not value > 0:
        raise SettingError(f"{option} {text!r} must be a time above 0, such as 200ms, 1.5s or 2min")
    return value


def size(text: str, option: str) -> int:
    """`16MB` (10^6) and `16MiB` (2^20) in bytes; a number alone is bytes."""
    found = _SIZE.fullmatch(text.strip())
    value = int(float(found[1]) * (1024 if found[3] else 1000) ** _SIZES[found[2]]) if found else 0
    if not value > 0:
        raise SettingError(f"{option} {text!r} must be a size above 0, such as 512kB, 16MB or 16MiB")
    return value
