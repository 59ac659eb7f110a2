"""A service from its first version to its end: real Ray, real HTTP, and whatever may happen to it in between."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ray.cluster_utils import Cluster

from conftest import SOURCE  # isort: skip

STAGES = """
import os, time
import headrace as hr


@hr.stage(out={{"length": int, "by": int}})
class Measure:
    factor: int = {factor}

    def setup(self, device):
        {setup}

    def __call__(self, text: hr.Column[str]):
        if "slow" in text[0]:
            time.sleep(2.0)
        return {{"length": [len(t) * self.factor for t in text], "by": [os.getpid()] * len(text)}}


measure = hr.Pipeline("measure", Measure())
"""


class Served:
    """The headrace command in a folder of its own, and a service that it runs there."""

    file = "measure.py"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", "XDG_RUNTIME_DIR": str(folder)}
        self.environment.pop("RAY_ADDRESS", None)
        self.environment["RAY_AUTH_MODE"] = "token"  # not as other tests have it: what is started here asks for one
        self.process: subprocess.Popen[str] | None = None
        self.lines: list[str] = []
        self.logs: list[str] = []
        self.url = ""
        self.trust: ssl.SSLContext | None = None

    def write(self, factor: int = 1, setup: str = "pass") -> None:
        (self.folder / "measure.py").write_text(STAGES.format(factor=factor, setup=setup))

    def start(self, *arguments: str) -> None:
        """`headrace serve`, until it says where it answers."""
        command = [sys.executable, "-m", "headrace", "serve", self.file, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        there = threading.Event()

        def read() -> None:
            assert self.process is not None
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(r"answers at (https?://[\d.:]+)/", line):
                    self.url = found[1]
                    there.set()
            there.set()

        self.readers = [threading.Thread(target=read), threading.Thread(target=lambda: self.logs.extend(self.process.stdout))]  # type: ignore[union-attr, arg-type]
        for reader in self.readers:
            reader.start()
        assert there.wait(120), self.lines
        assert self.url, "".join(self.lines)

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Another command beside it."""
        command = [sys.executable, "-m", "headrace", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def get(self, path: str) -> Any:
        """What a GET is answered, as JSON if it is that."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
            return json.loads(body) if answer.headers.get_content_subtype() == "json" else body.decode().strip()

    def ask(self, text: str = "four", timeout_s: float = 30, **headers: str) -> tuple[int, Any, int]:
        """The status, the answer, and the version that gave it; a lost connection is status 0, as a client's retry would have it."""
        request = urllib.request.Request(f"{self.url}/measure", json.dumps({"text": text}).encode(), {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s, context=self.trust) as answer:
                return answer.status, json.loads(answer.read()), int(answer.headers["X-Headrace-Version"])
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), 0
        except (urllib.error.URLError, ConnectionError) as error:
            return 0, str(error), 0

    @contextlib.contextmanager
    def load(self, text: str = "four", at_once: int = 4) -> Iterator[Counter[tuple[int, int]]]:
        """Requests one after the other for the length of the block, counted by status and version."""
        seen: Counter[tuple[int, int]] = Counter()
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                status, _, version = self.ask(text)
                seen[status, version] += 1
                time.sleep(0.01)

        threads = [threading.Thread(target=ask) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def processes(self, title: str) -> list[int]:
        """Processes of this service's Ray whose title begins so."""
        assert self.process is not None
        return [pid for pid in descendants(self.process.pid) if cmdline(pid).startswith(title)]

    def version(self, number: int) -> dict[str, Any]:
        return next(version for version in self.get("/status")["versions"] if version["version"] == number)

    def end(self) -> None:
        if self.process is not None:
            with self.process:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(60)
            for reader in self.readers:
                reader.join()

    def kill(self) -> None:
        """SIGKILL everything that belongs to it, all at once."""
        assert self.process is not None
        with self.process:
            everything = [self.process.pid, *descendants(self.process.pid)]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in everything:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            self.process.wait(60)
        for reader in self.readers:
            reader.join()


def cmdline(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, rest = [], [pid]
    while rest:
        for child in children.get(rest.pop(), []):
            found.append(child)
            rest.append(child)
    return found


def until(true: Callable[[], Any], within_s: float = 30.0) -> Any:
    deadline_s = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    served.write()
    try:
        served.start("--log", "json", "--replicas", "2")
        yield served
    finally:
        served.end()


def test_it_answers_and_says_how_it_fares(served: Served):
    status, answer, version = served.ask("hello")
    assert (status, answer["length"], version) == (200, 5, 1)
    assert served.get("/readyz") == "ready"
    until(lambda: served.get("/status")["versions"][0]["groups"][0]["ready"] == 2)
    line = until(lambda: [line for line in served.logs if '"status":200' in line])[0]
    assert json.loads(line)["service"] == "measure"
    assert any(line.partition("  ")[2].lstrip().startswith("curl http://127.0.0.1:") for line in served.lines)


def test_its_ray_asks_for_a_token_and_listens_on_loopback(served: Served):
    place = json.loads((served.folder / "headrace" / "measure.json").read_text())
    join = f"from ray._raylet import GcsClient; print(GcsClient(address={place['address']!r}).internal_kv_keys(b'', None))"
    told = []
    for token in ("0" * 64, place["token"]):
        environment = {**served.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        told.append(subprocess.run([sys.executable, "-c", join], env=environment, capture_output=True, text=True, timeout=120))
    assert "InvalidAuthToken" in told[0].stderr
    assert told[1].returncode == 0
    inodes = set()
    for pid in [served.process.pid, *descendants(served.process.pid)]:
        with contextlib.suppress(OSError):
            inodes |= {os.readlink(link)[8:-1] for link in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(link).startswith("socket:")}
    listening = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    addresses = {line[1].partition(":")[0] for line in listening if line[3] == "0A" and line[9] in inodes}
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, as IPv4 and within IPv6


def test_an_update_and_a_rollback_lose_no_request(served: Served):
    served.write(factor=10)
    with served.load() as seen:
        done = served.run("serve", "measure.py", "--replicas", "2")
        assert done.returncode == 0, done.stderr
        assert "version 2 promoted" in done.stderr
        until(lambda: seen[200, 2] > 20)
        assert served.ask("hello")[1]["length"] == 50
        done = served.run("rollback", "measure")
        assert done.returncode == 0, done.stderr
        assert served.ask("hello")[1:] == ({"length": 5, "by": served.ask("hello")[1]["by"]}, 1) or served.ask("hello")[2] == 1
    assert {status for status, _ in seen} == {200}, seen
    until(lambda: [version["version"] for version in served.get("/status")["versions"]] == [1])


def test_a_shadow_answers_nothing_until_it_is_promoted(served: Served):
    served.write(factor=7)
    with served.load() as seen:
        done = served.run("serve", "measure.py", "--replicas", "2", "--shadow", "50%")
        assert done.returncode == 0, done.stderr
        number = max(version["version"] for version in served.get("/status")["versions"])
        count = seen[200, 1]
        until(lambda: seen[200, 1] > count + 50)
        assert {version for _, version in seen} == {1}
        done = served.run("promote", "measure")
        assert done.returncode == 0, done.stderr
        until(lambda: seen[200, number] > 20)
        done = served.run("rollback", "measure")
        assert done.returncode == 0, done.stderr
    assert {status for status, _ in seen} == {200}, seen
    until(lambda: [version["version"] for version in served.get("/status")["versions"]] == [1], 60)


def test_a_version_that_cannot_start_changes_nothing_and_says_why(served: Served):
    served.write(setup="raise FileNotFoundError('no weights.bin')")
    with served.load() as seen:
        done = served.run("serve", "measure.py")
    assert done.returncode == 1
    assert "no weights.bin" in done.stderr
    assert {status for status, _ in seen} == {200}


def test_a_version_that_fails_its_gate_never_answers(served: Served):
    pq.write_table(pa.table({"text": ["a", "bcd"], "length": [1, 3]}), served.folder / "golden.parquet")
    served.write(factor=3)
    with served.load() as seen:
        done = served.run("serve", "measure.py", "--gate", "golden.parquet")
    assert done.returncode == 1, done.stderr
    assert "gate" in done.stderr
    assert {version for _, version in seen} == {1}, seen


def test_kills_lose_nothing(served: Served):
    with served.load(at_once=3) as seen, served.load("slow", at_once=2) as slow:
        until(lambda: seen[200, 1] > 20)
        for title in ("ray::Control", "ray::ServeReplica:measure", "ray::ServeController"):
            victim = until(lambda title=title: served.processes(title))[0]
            os.kill(victim, signal.SIGKILL)
            until(lambda title=title, victim=victim: [pid for pid in served.processes(title) if pid != victim])
            count = seen[200, 1]
            until(lambda count=count: seen[200, 1] > count + 50)
        until(lambda: served.version(1)["groups"][0]["ready"] == 2, 60)
    assert {status for status, _ in seen + slow} == {200}, (seen, slow)


def test_a_killed_door_is_back(served: Served):
    (victim, *_), count = served.processes("ray::FrontDoor"), len(served.processes("ray::FrontDoor"))
    with served.load() as seen:
        until(lambda: seen[200, 1] > 20)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len([pid for pid in served.processes("ray::FrontDoor") if pid != victim]) == count)
    assert seen[0, 0] <= 8  # the connections that it had
    assert {status for status, _ in seen} <= {0, 200}


def test_a_replica_that_hangs_is_replaced(served: Served):
    victim = until(lambda: len(served.processes("ray::ServeReplica:measure")) == 2 and served.processes("ray::ServeReplica:measure"))[0]
    with served.load() as seen:
        os.kill(victim, signal.SIGSTOP)
        until(lambda: not cmdline(victim))  # killed
        until(lambda: served.version(1)["groups"][0]["ready"] == 2)
    assert {status for status, _ in seen} == {200}, seen


def test_a_name_that_no_service_has(served: Served):
    done = served.run("rollback", "mesure")
    assert done.returncode == 2
    assert "did you mean 'measure'?" in done.stderr
    done = served.run("rollback", "measure")
    assert done.returncode == 2
    assert "nothing to roll back to" in done.stderr


def test_it_ends_when_told_to_and_answers_what_it_took(served: Served):
    processes = descendants(served.process.pid)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(served.ask("slow")))
    asking.start()
    time.sleep(0.5)
    done = served.run("stop", "measure")
    assert done.returncode == 0, done.stderr
    asking.join()
    assert answers[0][0] == 200
    assert served.process.wait(30) == 0, served.lines
    until(lambda: not [pid for pid in processes if cmdline(pid)], 10)
    assert not list((served.folder / "headrace").iterdir())


def test_on_a_cluster_that_is_joined_it_outlives_the_command(tmp_path: Path):
    served = Served(tmp_path)
    served.environment["RAY_AUTH_MODE"] = "disabled"
    served.write()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False, "object_store_memory": 200 << 20})
    try:
        done = served.run("serve", "measure.py", "--port", "0", "--address", cluster.address)
        assert done.returncode == 0, done.stderr
        served.url = re.search(r"answers at (http://[\d.:]+)/", done.stderr)[1]
        assert served.ask("hello")[1]["length"] == 5
        served.write(factor=2)
        done = served.run("serve", "measure.py", "--address", cluster.address)
        assert done.returncode == 0, done.stderr
        assert served.ask("hello")[1]["length"] == 10
        done = served.run("rollback", "measre", "--address", cluster.address)
        assert "did you mean 'measure'?" in done.stderr
        done = served.run("rollback", "measure", "--address", cluster.address)
        assert done.returncode == 0, done.stderr
        assert served.ask("hello")[1]["length"] == 5  # the code of then, although the file is another
        done = served.run("stop", "measure", "--address", cluster.address)
        assert done.returncode == 0, done.stderr
        assert served.ask("hello")[0] == 0
        done = served.run("stop", "measure", "--address", cluster.address)
        assert "nor any other" in done.stderr
    finally:
        cluster.shutdown()


def test_keys_tls_and_a_gate_at_the_first_version(tmp_path: Path):
    served = Served(tmp_path)
    served.write()
    certify(tmp_path)
    served.trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    pq.write_table(pa.table({"text": ["a", "bcd"], "length": [1, 3]}), tmp_path / "golden.parquet")
    key = served.run("keys", "create", "me", "--file", "keys.json").stdout.strip()
    (tmp_path / "measure.py").write_text((tmp_path / "measure.py").read_text().replace("os.getpid()", "0"))  # the gate would see it differ
    try:
        served.start("--host", "0.0.0.0", "--keys", "keys.json", "--tls", "cert.pem,key.pem", "--gate", "golden.parquet")
        assert any("version 1 gate passed" in line for line in served.lines)
        assert [served.ask()[0], served.ask(Authorization=f"Bearer {key}")[0], served.ask(Authorization="Bearer hr_other")[0]] == [401, 200, 401]
        good = (tmp_path / "keys.json").read_bytes()
        (tmp_path / "keys.json").write_bytes(good[:-20])
        (victim,) = served.processes("ray::Control")
        os.kill(victim, signal.SIGKILL)  # the next one cannot read the keys, and goes on with those that were valid
        until(lambda: set(served.processes("ray::Control")) - {victim})
        until(lambda: "damaged" in served.run("top", served.url, "--once", "--json", "--key", key, "--ca", "cert.pem").stdout)
        assert [served.ask()[0], served.ask(Authorization=f"Bearer {key}")[0]] == [401, 200]
        (tmp_path / "keys.json").write_bytes(good)
        assert served.run("keys", "revoke", "me", "--file", "keys.json").returncode == 0
        until(lambda: served.ask(Authorization=f"Bearer {key}")[0] == 401)
    finally:
        served.end()


def certify(folder: Path) -> None:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")]), dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def test_scale_to_zero_holds_the_first_request(tmp_path: Path):
    served = Served(tmp_path)
    served.write()
    try:
        served.start("--replicas", "0:1", "--idle", "1s")
        until(lambda: not served.processes("ray::ServeReplica:measure"), 60)
        assert served.get("/healthz") == "ok"
        status, answer, _ = served.ask("hello", timeout_s=60)
        assert (status, answer["length"]) == (200, 5)
    finally:
        served.end()
