"""Control: the one actor that knows a service. It hears doors and replicas, decides each second, and has Ray Serve do it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray.exceptions

from headrace.errors import KeyFileError
from headrace.on_ray import compat, deployments
from headrace.on_ray.naming import application_name
from headrace.serving.keys import KeyFile
from headrace.serving.release.steering import Release, Steering
from headrace.serving.release.versions import Told
from headrace.serving.routes import DoorReport, Endpoint, Limits, Routes

_TICK_S = 1.0
_LOOK_S = 2.0  # between looks at Serve while there is nothing to do
_KEEP_S = 5.0  # between writes of what changes all the time; what matters is written at once
_LENT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Charge:
    """What control is set over: the service, its bounds, where it answers, the file with its keys, and the certificate to trust there.

    `guarded` is whether doors know keys beside those of the file; then nobody is let in without one, as with a file. A service that is
    `behind` another one has no doors of its own: the other one's are its, and the keys are that one's matter.
    """

    service: str
    limits: Limits
    url: str
    keys: str | None = None
    ca: str | None = None
    guarded: bool = False
    behind: str | None = None

    @property
    def kept(self) -> str:
        """Where in Ray's store the state is kept."""
        return _kept(self.service)[0]

    @property
    def kept_keys(self) -> str:
        """Where the keys that were valid last are kept."""
        return _kept(self.service)[1]

    @staticmethod
    def forget(service: str) -> None:
        """Take away what is kept for a service of that name."""
        for key in _kept(service):
            compat.remember(key, None)


def _kept(service: str) -> tuple[str, str]:
    return f"control/{service}", f"control/{service}/keys"


class Control:
    """The actor. Its methods are short and run on one event loop; deciding and talking to Serve have a thread each, since both may block.

    After a kill it starts again, goes on from what it kept, and hears of the replicas within two seconds; meanwhile the doors go on
    with the routes they have.
    """

    def __init__(self, charge: Charge) -> None:
        self.charge = charge
        self._keys = None if charge.keys is None else KeyFile(charge.keys)
        self._steering = Steering(charge.service, charge.limits, now_s=time.monotonic(), at_s=time.time(), kept=compat.recall(charge.kept))
        self._lock = threading.Lock()  # of all that is in _steering
        self._hurry, self._work, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._serve: Mapping[str, Mapping[str, deployments.Deployed]] = {}
        self._doomed: set[str] = set()
        self._hashes, self._lent = self._recall_keys()
        self._troubles = {"keys": "", "serve": ""}
        self._kept: tuple[float, object] = (0.0, None)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        for work in (self._decide, self._act):
            threading.Thread(target=self._run, args=(work,), name=f"headrace-{work.__name__.strip('_')}", daemon=True).start()

    # What replicas and doors call

    async def joined(self, version: int, group: str, endpoint: Endpoint) -> None:
        """A replica is there and ready; it says so every other second."""
        with self._lock:
            news = self._steering.join(version, group, endpoint, now_s=time.monotonic())
        if news:
            self._hurry.set()

    async def report(self, report: DoorReport) -> tuple[list[str], dict[str, Any]]:
        """A door tells what it has counted; it is told the metrics of the others, and what `/status` shows."""
        now_s = time.monotonic()
        with self._lock:
            urgent = self._steering.report(report, now_s=now_s)
            answer = self._steering.peers(report.door, now_s=now_s), self._steering.status(now_s=now_s, at_s=time.time())
        if urgent:
            self._hurry.set()
        return answer

    async def routes(self, after: int, wait_s: float = 10.0) -> Routes | None:
        """The routes, as soon as there are others than those of revision `after`; None when there were none for so long."""

        def newer() -> Routes | None:
            with self._lock:
                waking = self._steering.waking(now_s=time.monotonic())
                return None if waking or self._steering.routes.revision == after else self._steering.routes

        found: Routes | None = await self._until(newer, wait_s)
        return found

    # What commands call

    async def status(self) -> dict[str, Any]:
        """What `/status` tells beside a door's own figures."""
        with self._lock:
            return self._steering.status(now_s=time.monotonic(), at_s=time.time())

    async def events(self, after: int, wait_s: float = 10.0) -> list[tuple[int, Told]]:
        """What happened after event number `after`, as soon as there is something; nothing when nothing happened for so long."""

        def later() -> list[tuple[int, Told]]:
            with self._lock:
                return self._steering.since(after)

        return await self._until(later, wait_s) or []

    async def charged(self) -> Charge:
        """What this control is set over."""
        return self.charge

    async def latest(self) -> tuple[int, int]:
        """The highest number that a version was given, and that of the last event."""
        with self._lock:
            return self._steering.state.latest, self._steering.told

    async def names(self) -> tuple[str, ...]:
        """By which names its versions are asked."""
        with self._lock:
            return self._steering.names

    async def guests(self) -> tuple[str, ...]:
        """The services behind this one's doors."""
        with self._lock:
            return tuple(self._steering.guests.names)

    async def seat(self, guest: str, names: tuple[str, ...]) -> None:
        """Take a service in behind this one's doors, to be asked by these names, or give it others."""
        self._change(lambda: self._steering.seat(guest, names))

    async def unseat(self, guest: str) -> None:
        """A service behind this one's doors has ended, or ends."""
        self._change(lambda: self._steering.guests.unseat(guest))

    async def deploy(self, release: Release) -> None:
        """A version is about to appear in Serve."""
        self._change(lambda: self._steering.deploy(release, at_s=time.time()))

    async def command(self, name: str, **arguments: Any) -> None:
        """`promote`, `abort`, `rollback`, `stop`, `gate_passed` or `gate_failed` of `serving.release.rollout`, done now."""
        self._change(lambda: self._steering.command(name, at_s=time.time(), **arguments))

    async def lend(self, digest: str) -> None:
        """Let a key in for `_LENT_S`, by its SHA-256: the gate's own."""
        self._lent = {**{name: until_s for name, until_s in self._lent.items() if until_s > time.time()}, digest: time.time() + _LENT_S}
        self._keep_keys()
        self._hurry.set()

    async def ended(self) -> bool:
        """Whether no replica of any version is left, nor will be."""
        with self._lock:
            return self._steering.state.stopped and not self._steering.state.versions

    # What runs by itself

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            self._keep(at_once=True)
        self._hurry.set()

    async def _until(self, found: Callable[[], Any], wait_s: float) -> Any:
        if self._news is None:
            self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        deadline_s = time.monotonic() + wait_s
        while True:
            news = self._news
            if answer := found():
                return answer
            try:
                await asyncio.wait_for(news.wait(), deadline_s - time.monotonic())
            except TimeoutError:
                return None

    def _tell(self) -> None:
        """Wake all who wait for news."""

        def wake() -> None:
            assert self._news is not None
            self._news.set()
            self._news = asyncio.Event()

        if self._loop is not None:
            self._loop.call_soon_threadsafe(wake)

    def _run(self, work: Callable[[], None]) -> None:
        """Control with a thread less would be blind: it ends as a whole, and Ray starts it again."""
        try:
            while not self._stopped.is_set():
                work()
        finally:
            traceback.print_exc()
            os._exit(1)

    def _decide(self) -> None:
        began_s = time.monotonic()
        keys = self._read_keys()
        with self._lock:
            told = self._steering.told
            self._steering.keys = keys
            changed = self._steering.tick(now_s=began_s, at_s=time.time(), failures=self._failures())
            self._keep(at_once=self._steering.told != told)
            news = changed or self._steering.told != told
            idle = self._idle(began_s)
        if news:
            self._tell()
        if not idle:
            self._work.set()
        if self._hurry.wait(max(0.05, _TICK_S - (time.monotonic() - began_s))):
            self._hurry.clear()

    def _idle(self, now_s: float) -> bool:
        """Whether Serve has all that is wanted, as far as is known."""
        steering = self._steering
        self._doomed |= {replica for replica in steering.tallies.hung(now_s=now_s) if steering.roster.where(replica)}
        have = {(number, group): self._serve.get(self._name(number), {}).get(group) for number, group in steering.wanted}
        return not self._doomed and not steering.retired() and all(have[key] is not None and have[key].target == n for key, n in steering.wanted.items())  # type: ignore[union-attr]

    def _act(self) -> None:
        """Have Serve do what was decided. It answers late or not at all while its controller is down: then again in a second."""
        if self._work.wait(_LOOK_S):
            self._work.clear()
        try:
            self._serve = deployments.deployed()
            with self._lock:
                wanted, retired, doomed = dict(self._steering.wanted), self._steering.retired(), set(self._doomed)
                # Only numbers that this service has given out can be strays: others' applications may have such a name, too.
                strays = set(range(1, self._steering.state.latest + 1)) - {version.number for version in self._steering.state.versions}
            for (number, group), replicas in wanted.items():
                has = self._serve.get(self._name(number), {}).get(group)
                if has is not None and has.target != replicas:
                    with contextlib.suppress(LookupError):  # it is not quite there yet, or just ending
                        deployments.scale(self._name(number), group, replicas)
            self._delete(retired, strays)
            self._kill(doomed)
        except (deployments.OutOfReach, ray.exceptions.RayError) as error:
            self._trouble("serve", str(error).partition("\n")[0])
            self._stopped.wait(_TICK_S)
        else:
            self._trouble("serve", "")

    def _delete(self, retired: tuple[int, ...], strays: set[int]) -> None:
        """End what is retired, and forget it once it is gone."""
        for number in retired:
            if self._name(number) in self._serve:
                deployments.delete(self._name(number))
            else:
                with self._lock:
                    self._steering.forget(number)
                    self._keep(at_once=True)
        for number in strays:
            if self._name(number) in self._serve:
                deployments.delete(self._name(number))

    def _kill(self, doomed: set[str]) -> None:
        """End replicas that hang. They are out of the routes at once, whatever becomes of the process."""
        replicas = {replica.id: replica for groups in self._serve.values() for group in groups.values() for replica in group.replicas}
        for name in doomed:
            if name in replicas:
                deployments.kill(replicas[name])
            with self._lock:
                self._doomed.discard(name)
                self._steering.roster.bar(name, now_s=time.monotonic())
        if doomed:
            self._hurry.set()

    def _failures(self) -> dict[int, tuple[int, str]]:
        """Starts of replicas that failed, by version, as Serve tells them: many where it has given up."""
        found = {}
        for version in self._steering.state.versions:
            for group, has in self._serve.get(self._name(version.number), {}).items():
                if has.failed or has.trouble:
                    found[version.number] = (3 if has.failed else 1, f"{group}: {has.failed or has.trouble}")
        return found

    def _trouble(self, source: str, text: str) -> None:
        with self._lock:
            self._troubles[source] = text
            self._steering.trouble = "; ".join(filter(None, self._troubles.values()))

    def _keep(self, *, at_once: bool) -> None:
        now_s = time.monotonic()
        if at_once or now_s - self._kept[0] > _KEEP_S:
            kept = self._steering.keep()
            if kept != self._kept[1]:
                compat.remember(self.charge.kept, kept)
            self._kept = (now_s, kept)

    def _read_keys(self) -> Mapping[str, str] | None:
        """The hashes of valid keys, None where none are asked for; those of before while the file is damaged."""
        if self._keys is None and not self.charge.guarded:
            return None
        if self._keys is not None and self._keys.changed():
            try:
                self._hashes = self._keys.hashes()
            except KeyFileError as error:
                self._trouble("keys", str(error))
            else:
                self._trouble("keys", "")
                self._keep_keys()
        lent = {digest: "gate" for digest, until_s in self._lent.items() if until_s > time.time()}
        return {**self._hashes, **lent}

    def _keep_keys(self) -> None:
        """Hashes only; so that a control that starts again while the file is damaged lets the same ones in."""
        compat.remember(self.charge.kept_keys, json.dumps({"hashes": self._hashes, "lent": self._lent}).encode())

    def _recall_keys(self) -> tuple[dict[str, str], dict[str, float]]:
        """The keys that were valid last, by their hashes, and until when (seconds since 1970) the lent ones are."""
        kept = json.loads(compat.recall(self.charge.kept_keys) or b"{}")
        return kept.get("hashes", {}), kept.get("lent", {})

    def _name(self, version: int) -> str:
        return application_name(self.charge.service, version)
