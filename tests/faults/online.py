"""A service under load, struck: the same cases for headrace and for plain Ray Serve. Every request is accounted for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
from harness import SOURCE, session, title

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import load  # noqa: E402 - lies with the benchmarks

READY_S = 120  # within which a service must be up; Ray and its processes take ten seconds on an idle machine
CPUS = 16

PIPELINE = """
import ctypes
import os
import threading
import time

import headrace as hr


@hr.stage(out={"y": float}, batch=8)
class Work:
    factor: float = 2.0

    def setup(self, device: str):
        if self.factor < 0:
            raise RuntimeError("a version that cannot start")

    def __call__(self, x: hr.Column[float], pause_s: hr.Column[float], deed: hr.Column[str]):
        if "exit" in deed:
            os._exit(3)
        if "segv" in deed:
            ctypes.string_at(0)
        if "lock" in deed:
            threading.Event().wait()
        time.sleep(max(pause_s))
        return {"y": x * self.factor}


work = hr.Pipeline("work", Work())
"""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def body(x: float, *, pause_s: float = 0.05, deed: str = "") -> bytes:
    """One row."""
    return json.dumps({"x": x, "pause_s": pause_s, "deed": deed}).encode()


def doubled(bodies: Sequence[bytes]) -> load.Check:
    """Holds that an answer is twice the row's number."""
    wanted = [json.loads(one)["x"] * 2 for one in bodies]
    return lambda number, answer: bool(json.loads(answer)["y"] == wanted[number])


@dataclass(kw_only=True)
class Service:
    """A running service: the process that was started, and the address."""

    name: str
    replicas: int = 3
    address: str | None = None
    more: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="headrace-online-")))
    process: Any = None
    path: ClassVar[str] = "/work"
    TITLES: ClassVar[dict[str, Any]] = {}
    VARIABLES: ClassVar[dict[str, str]] = {}

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def said(self) -> str:
        """What it has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def command(self) -> list[str]:
        """What is run."""
        raise AssertionError

    def __enter__(self) -> Service:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(SOURCE), "RAY_USAGE_STATS_ENABLED": "0", "NO_COLOR": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=environment | (self.VARIABLES or {}),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
                if json.loads(self.ask(body(1.0, pause_s=0), timeout_s=5)[1]).get("y") == 2.0 and len(self.members("replica")) >= self.replicas:
                    return self
            if self.process.poll() is not None or time.monotonic() > until:
                said = self.said
                self.__exit__()
                raise AssertionError(f"{self.name} does not answer:\n{said[-3000:]}")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        found = session(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for process in [*found, *session(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.process.stdin.close()

    def ask(self, row: bytes, *, timeout_s: float = 60) -> tuple[int, bytes]:
        """One request's status and answer."""
        request = urllib.request.Request(self.url, row, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def members(self, role: str) -> list[psutil.Process]:
        """Its processes of a role: `replica`, `controller` (Serve's), `control` (ours), or `door`."""
        pool = psutil.process_iter() if self.address else session(self.process.pid)
        return [process for process in pool if title(process).startswith(self.TITLES[role]) and process.status() != psutil.STATUS_ZOMBIE]

    def settle(self) -> None:
        """Wait until all replicas are there and it answers."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            with contextlib.suppress(urllib.error.URLError, OSError, KeyError, ValueError):
                if len(self.members("replica")) >= self.replicas and json.loads(self.ask(body(1.0, pause_s=0), timeout_s=5)[1])["y"] == 2.0:
                    return
            time.sleep(0.2)
        raise AssertionError(f"{self.name} has not recovered:\n{self.said[-3000:]}")

    def update(self, factor: float, *more: str) -> tuple[bool, str]:
        """Deploy a version in place of the one that runs: whether it took over, and what was said."""
        raise AssertionError


class Headrace(Service):
    """`headrace serve` of the pipeline."""

    TITLES: ClassVar[dict[str, Any]] = {
        "replica": "ray::ServeReplica:",
        "controller": "ray::ServeController",
        "control": "ray::Control",
        "door": "ray::FrontDoor",
    }

    def command(self) -> list[str]:
        """The command, in a folder with the pipeline."""
        (self.folder / "work.py").write_text(PIPELINE)
        where = ["--address", self.address] if self.address else []
        return [
            sys.executable,
            "-m",
            "headrace",
            "serve",
            "work.py",
            "--name",
            self.name,
            "--port",
            str(self.port),
            "--replicas",
            str(self.replicas),
            *where,
            *self.more,
        ]

    def update(self, factor: float, *more: str, timeout_s: float = 240) -> tuple[bool, str]:
        """The same command again, with another setting."""
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_ADDRESS", None)
        command = [*self.command(), "--set", f"work.factor={factor}", *more]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout_s)
        return done.returncode == 0, done.stdout + done.stderr


class Plain(Service):
    """Plain Ray Serve, with the default proxy."""

    TITLES: ClassVar[dict[str, Any]] = {
        "replica": "ray::ServeReplica:",
        "controller": "ray::ServeController",
        "control": "ray::ServeController",
        "door": "ray::ProxyActor",
    }

    def command(self) -> list[str]:
        """The script beside this one."""
        return [sys.executable, str(Path(__file__).with_name("plain.py")), str(self.port), str(self.replicas), *filter(None, [self.address])]

    def update(self, factor: float, *more: str) -> tuple[bool, str]:
        """By its standard input; waits for the word."""
        before = len(self.said)
        self.process.stdin.write(f"{factor}\n".encode())
        self.process.stdin.flush()
        until = time.monotonic() + 180
        while "deployed" not in self.said[before:] and time.monotonic() < until:
            time.sleep(0.1)
        return "not deployed" not in self.said[before:], self.said[before:]


class PlainHaproxy(Plain):
    """Plain Ray Serve behind its HAProxy."""

    VARIABLES: ClassVar[dict[str, str]] = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    TITLES: ClassVar[dict[str, Any]] = Plain.TITLES | {"door": ("haproxy", "/usr/sbin/haproxy")}


@contextlib.contextmanager
def traffic(make: Callable[[], Any]) -> Iterator[Callable[[], load.Result]]:
    """A load in a thread of its own for the length of the block and until it has ended; gives its result when asked after that."""
    found: list[load.Result] = []
    thread = threading.Thread(target=lambda: found.append(load.run(make())), name="load")
    thread.start()

    def result() -> load.Result:
        thread.join()
        return found[0]

    try:
        yield result
    finally:
        thread.join()


def rows(pause_s: float = 0.05) -> list[bytes]:
    """Bodies with different numbers."""
    return [body(float(x), pause_s=pause_s) for x in range(100)]


def light(service: Service, *, seconds: float, per_s: float = 30, pause_s: float = 0.05, timeout_s: float = 60) -> Any:
    """An open loop well below capacity."""
    some = rows(pause_s)
    return lambda: load.steady(service.url, some, per_s=per_s, seconds=seconds, timeout_s=timeout_s, check=doubled(some))


def strike(processes: Sequence[psutil.Process], what: int, chance: random.Random) -> bool:
    """A signal to one of the processes; whether there was one."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        chance.choice(processes).send_signal(what)
        return True
    return False


def account(result: load.Result) -> dict[str, Any]:
    """What a case comes to."""
    return {
        "answered": len(result.latencies_s),
        "lost": result.lost,
        "turned away": result.statuses[429],
        "p50_ms": round(result.ms(0.5), 1),
        "p99_ms": round(result.ms(0.99), 1),
        "slowest_s": round(max(result.latencies_s, default=0), 2),
        "how": {**{str(status): count for status, count in result.statuses.items() if status != 200}, **result.failures},
        "samples": [f"{status} {text.decode(errors='replace')[:160]}" for _, status, text in result.samples[:3]],
    }


def killed_replicas(service: Service, *, seconds: float = 24, every_s: float = 3.0) -> dict[str, Any]:
    """SIGKILL to a replica every few seconds."""
    chance, kills, until = random.Random(0), 0, time.monotonic() + seconds
    with traffic(light(service, seconds=seconds)) as result:
        while time.monotonic() < until - every_s:
            time.sleep(every_s)
            kills += strike(service.members("replica"), signal.SIGKILL, chance)
    return {"kills": kills, **account(result())}


def killed_in_long_requests(service: Service, *, seconds: float = 40, every_s: float = 5.0) -> dict[str, Any]:
    """The same under requests of six seconds."""
    chance, kills, some, until = random.Random(1), 0, rows(6.0), time.monotonic() + seconds
    with traffic(lambda: load.closed(service.url, some, connections=12, seconds=seconds, check=doubled(some))) as result:
        while time.monotonic() < until - every_s:
            time.sleep(every_s)
            kills += strike(service.members("replica"), signal.SIGKILL, chance)
    return {"kills": kills, **account(result())}


def frozen_replica(service: Service, *, seconds: float = 20) -> dict[str, Any]:
    """SIGSTOP to a replica. How long until no answer is late any more is told by the slowest answer."""
    with traffic(light(service, seconds=seconds, timeout_s=30)) as result:
        time.sleep(3)
        before = {process.pid for process in service.members("replica")}
        frozen = service.members("replica")[0]
        frozen.suspend()
        time.sleep(seconds - 4)
        replaced = bool({process.pid for process in service.members("replica")} - before)
    with contextlib.suppress(psutil.NoSuchProcess):
        frozen.resume()
    return {"replaced": replaced, **account(result())}


def locked_replica(service: Service, *, seconds: float = 20) -> dict[str, Any]:
    """A replica whose thread waits for ever. The row that made it do so is not counted."""
    with traffic(light(service, seconds=seconds, timeout_s=30)) as result:
        time.sleep(3)
        deed = threading.Thread(target=lambda: service.ask(body(0, deed="lock"), timeout_s=25), daemon=True)
        deed.start()
        time.sleep(seconds - 3)
    return account(result())


def killed(service: Service, role: str, *, seconds: float = 20, times: int = 2) -> dict[str, Any]:
    """SIGKILL to the processes of a role. `down_s` is the longest time without an answer."""
    chance, kills = random.Random(2), 0
    with traffic(light(service, seconds=seconds)) as result:
        for _ in range(times):
            time.sleep(seconds / (times + 1))
            kills += strike(service.members(role), signal.SIGKILL, chance)
    answered = sorted(result().answered_s)
    down_s = max((later - earlier for earlier, later in itertools.pairwise(answered)), default=seconds)
    return {"kills": kills, "down_s": round(down_s, 2), **account(result())}


def rolling_update(service: Service, *, seconds: float = 40, pause_s: float = 0.05) -> dict[str, Any]:
    """A new version that answers alike takes over, under load."""
    some = rows(pause_s)
    connections = 12 if pause_s > 1 else 4
    with traffic(lambda: load.closed(service.url, some, connections=connections, seconds=seconds, check=doubled(some))) as result:
        time.sleep(3)
        taken, said = service.update(2.0)
    return {"taken over": taken, "said": said[-600:], **account(result())}


def bad_version(service: Service, *, seconds: float = 30) -> dict[str, Any]:
    """A version that cannot start, under load near capacity."""
    some = rows(0.05)
    with traffic(lambda: load.closed(service.url, some, connections=4, seconds=seconds, timeout_s=20, check=doubled(some))) as result:
        time.sleep(3)
        taken, said = service.update(-1.0)
    after = service.ask(body(3.0))[1]
    return {"taken over": taken, "said": said[-600:], "still right": b"6.0" in after, **account(result())}


def poison(service: Service, *, seconds: float = 20) -> dict[str, Any]:
    """A row that kills its process, under load."""
    with traffic(light(service, seconds=seconds)) as result:
        time.sleep(3)
        before = {process.pid for process in service.members("replica")}
        status, answer = service.ask(body(0, deed="exit"))
        deaths = len(before - {process.pid for process in service.members("replica")})
    return {"status": status, "answer": answer.decode()[:300], "deaths": deaths, **account(result())}


def overload(service: Service, *, seconds: float = 10, pause_s: float = 0.1) -> dict[str, Any]:
    """Capacity in a closed loop, then five times as much in an open one."""
    some = rows(pause_s)
    capacity = load.run(load.closed(service.url, some, connections=16 * service.replicas, seconds=seconds, check=doubled(some)))
    flood = load.run(load.steady(service.url, some, per_s=5 * capacity.per_s, seconds=seconds, check=doubled(some)))
    return {
        "capacity_per_s": round(capacity.per_s, 1),
        "capacity_p99_ms": round(capacity.ms(0.99), 1),
        "goodput": round(sum(latency_s <= 2 for latency_s in flood.latencies_s) / flood.wall_s / capacity.per_s, 3),  # late answers are of no use
        "p99 over p99 at capacity": round(flood.ms(0.99) / capacity.ms(0.99), 2),
        **account(flood),
    }


def drained(service: Service) -> dict[str, Any]:
    """SIGTERM to the service while requests of two seconds are under way."""
    some = rows(2.0)
    threads = [threading.Thread(target=lambda at=at: answers.append(service.ask(some[at])[0])) for at in range(6)]
    answers: list[int] = []
    for thread in threads:
        thread.start()
    time.sleep(0.7)
    service.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    code = service.process.wait(60)
    return {"answered": answers.count(200), "of": len(threads), "exit code": code}


def bad_clients(service: Service, *, idle: int = 5000, seconds: float = 25) -> dict[str, Any]:
    """Idle connections, heads and bodies that never end, a body of 100 MB, and readers that do not read, beside a light load."""
    doors, held = service.members("door"), []
    before = sum(process.memory_info().rss for process in doors)
    half = f"POST {service.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{".encode()
    with traffic(light(service, seconds=seconds)) as result:
        for number in range(idle):
            one = socket.create_connection(("127.0.0.1", service.port))
            held.append(one)
            if number % 10 == 0:
                one.sendall(half)
            elif number % 10 == 1:
                one.sendall(b"POST / HTTP/1.1\r\nx-slow: ")
        with socket.create_connection(("127.0.0.1", service.port)) as huge:
            huge.sendall(half.replace(b"1000", b"104857600"))
            answer = huge.recv(12)
        time.sleep(seconds / 2)
        grown = sum(process.memory_info().rss for process in doors if process.is_running()) - before
    closed = 0
    for one in held:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            closed += one.recv(1 << 16) != b"never"
        one.close()
    return {"grown_mb": round(grown / 1e6), "huge body": int(answer.split()[1] or 0), "closed or answered": closed, "idle": idle, **account(result())}


@contextlib.contextmanager
def nodes() -> Iterator[tuple[str, Callable[[Service], None]]]:
    """A cluster of a head and two nodes on this machine: its address, and what takes a node away on which no front door of a service is.

    A front door that goes takes its connections with it, which is a case of its own (`killed`).
    """
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_AUTH_MODE")}
    os.environ |= {"PYTHONPATH": str(SOURCE), "RAY_AUTH_MODE": "disabled"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 128 << 20})
    try:
        added = [cluster.add_node(num_cpus=3, object_store_memory=128 << 20) for _ in range(2)]
        cluster.wait_for_nodes()

        def remove(service: Service) -> None:
            of_doors = {door.ppid() for door in service.members("door")}
            away = next(node for node in added if node.all_processes["raylet"][0].process.pid not in of_doors)
            cluster.remove_node(away, allow_graceful=False)

        yield cluster.address, remove
    finally:
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def node_removed(service: Service, remove: Callable[[Service], None], *, seconds: float = 30) -> dict[str, Any]:
    """A node and everything on it is gone from one moment to the next."""
    with traffic(light(service, seconds=seconds)) as result:
        time.sleep(4)
        remove(service)
    return account(result())
