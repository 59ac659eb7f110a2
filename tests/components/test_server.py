"""A door on a port, and clients of all kinds."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime as dt
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from replicas import Call, FakeReplica, routes, version

from headrace.errors import ServingError
from headrace.serving.door import guard
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.routes import Limits

LIMITS = Limits()


class Running:
    """A door on a port before one fake replica that lives on the door's loop."""

    def __init__(self, server: DoorServer, replica: FakeReplica) -> None:
        self.server, self.replica, self.door = server, replica, server.door
        self.port = server._port
        self.url = f"http://127.0.0.1:{self.port}"

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall(data)
        return connection

    def until(self, holds) -> None:
        end = time.monotonic() + 5
        while not self.server.call(holds):
            assert time.monotonic() < end
            threading.Event().wait(0.002)


@contextlib.contextmanager
def running(behave=Call.done, *, limits: Limits = LIMITS, tls: tuple[str, str] | None = None) -> Iterator[Running]:
    replica = FakeReplica("r", behave)
    server = DoorServer(Door("s"), tls=tls)
    server.start()
    try:
        asyncio.run_coroutine_threadsafe(replica.open(), server._loop).result(5)
        server.call(server.door.update, routes(version(1, [replica]), limits=limits))
        it = Running(server, replica)
        it.until(lambda: server.door.fleet.versions[1].open)
        yield it
    finally:
        with contextlib.suppress(ServingError):
            server.call(replica.die)
        server.stop(1)


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """One answer off a connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        got = connection.recv(65536)
        if not got:
            raise ConnectionError(data)
        data += got
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += connection.recv(65536)
    return int(head.split()[1]), body


def closed(connection: socket.socket) -> bool:
    """Whether the other side closes it, without a further answer."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def post(body: bytes = b"{}", *more: str, length: int | None = None) -> bytes:
    head = ["POST /p HTTP/1.1", "host: x", f"content-length: {len(body) if length is None else length}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


def test_real_clients_get_answers_over_kept_connections():
    with running() as it, httpx2.Client(base_url=it.url) as client:
        for _ in range(3):
            reply = client.post("/p", json={"x": 1})
            assert (reply.status_code, reply.json()) == (200, {"y": 1})
        assert client.get("/healthz").text == "ok\n"
        assert client.head("/healthz").status_code == 200
        assert client.options("/p").headers["allow"] == "POST, OPTIONS"
        assert client.get("/nothing").json()["error"]["code"] == "not_found"
        assert it.door.connections == 1


def test_requests_that_share_a_packet_are_answered_in_order():
    with running(lambda call: call.done(call.body)) as it:
        connection = it.connect(post(b"1") + post(b"2") + post(b"3"))
        data = b""
        while data.count(b"\r\n\r\n") < 3 or not data.endswith(b"3"):
            data += connection.recv(65536)
        assert [part[0:1] for part in data.split(b"\r\n\r\n")[1:]] == [b"1", b"2", b"3"]
        connection.close()


def test_a_slow_body_right_behind_a_request_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "LINGER_S", 0.02)
    with running(lambda call: call.done(call.body)) as it:
        connection = it.connect(post(b"1") + post(b"2", length=2))
        assert answer(connection) == (200, b"1")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)
        connection.sendall(b"3")
        assert answer(connection) == (200, b"23")
        connection.close()


def test_doors_share_a_port_and_two_strangers_do_not():
    with running() as it:
        beside = DoorServer(Door("s", name="1"), port=it.port)
        assert beside.start() == it.port
        beside.stop(1)
        alone = socket.create_server(("127.0.0.1", 0))
        with pytest.raises(ServingError, match="cannot listen"):
            DoorServer(Door("s"), port=alone.getsockname()[1]).start()
        alone.close()
        with pytest.raises(ServingError, match="no address"):
            DoorServer(Door("s"), host="no.such.host.invalid").start()


def test_a_head_that_does_not_come_is_not_waited_for():
    with running(limits=Limits(header_s=0.05)) as it:
        silent, half, later = it.connect(), it.connect(b"POST /p HTTP/1.1\r\nhost: x\r\n"), it.connect(post())
        assert answer(later)[0] == 200
        later.sendall(b"POST /p HT")
        assert closed(silent) and closed(half) and closed(later)
        idle = it.connect(post())
        assert answer(idle)[0] == 200
        assert httpx2.post(f"{it.url}/p", json={}).status_code == 200
        idle.settimeout(0.2)
        with pytest.raises(TimeoutError):
            idle.recv(1)  # between requests there is more time
        for connection in (silent, half, later, idle):
            connection.close()


def test_a_head_without_end_is_refused():
    with running() as it:
        connection = it.connect(b"POST /p HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(b"x: " + b"y" * 4000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 431")
        connection.close()


def test_a_body_of_which_half_is_sent_is_answered_and_cut_off():
    with running(limits=Limits(body_s=0.05)) as it:
        connection = it.connect(post(b"{", length=10))
        status, body = answer(connection)
        assert (status, json.loads(body)["error"]["code"]) == (408, "timeout_reading")
        assert closed(connection)
        assert not it.replica.calls
        connection.close()


def test_a_body_that_is_too_large_is_refused_before_it_is_there():
    with running(limits=Limits(body_bytes=1000)) as it:
        connection = it.connect(post(b"x", length=100_000_000))
        assert answer(connection)[0] == 413
        connection.sendall(b"x" * 1_000_000)  # what still comes is thrown away, so that the client sees the answer
        connection.close()
        reply = httpx2.post(f"{it.url}/p", content=b"x" * 3_000_000)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        reply = httpx2.post(f"{it.url}/p", content=iter([b"x" * 900] * 50))
        assert reply.status_code == 413
        expecting = it.connect(b"POST /p HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\nexpect: 100-continue\r\n\r\n")
        assert answer(expecting)[0] == 413
        assert closed(expecting)
        expecting.close()
        assert it.door.memory.held_bytes == 0


def test_a_client_that_goes_on_sending_after_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "LINGER_S", 0.05)
    with running(limits=Limits(body_bytes=1000)) as it:
        connection = it.connect(post(b"x", length=100_000_000))
        assert answer(connection)[0] == 413
        assert closed(connection)
        connection.close()


def test_a_refused_request_whose_body_was_there_leaves_the_connection_usable():
    with running(limits=Limits(body_bytes=1000)) as it:
        connection = it.connect(post(b"x" * 2000))
        assert answer(connection)[0] == 413
        connection.sendall(post())
        assert answer(connection)[0] == 200
        connection.close()


def test_connections_beyond_the_most_are_refused():
    with running(limits=Limits(connections=3)) as it:
        held = [it.connect(post()) for _ in range(3)]
        assert [answer(connection)[0] for connection in held] == [200] * 3
        refused = it.connect()
        assert answer(refused)[0] == 503
        assert closed(refused)
        held.pop().close()
        it.until(lambda: it.door.connections < 3)
        again = it.connect(post())
        assert answer(again)[0] == 200
        for connection in (*held, refused, again):
            connection.close()


def test_a_client_that_goes_away_is_noticed():
    with running(lambda call: None) as it:
        connection = it.connect(post())
        it.until(lambda: it.replica.calls)
        connection.close()
        it.until(lambda: it.replica.cancelled == [1])
        it.until(lambda: it.door.connections == 0 and it.door.turnstile.inside == 0)


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "STALLED_S", 0.05)
    with running(lambda call: call.done(b"x" * 200_000)) as it:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", it.port))
        connection.sendall(post(b"{}", "connection: close") * 1)
        it.until(lambda: it.replica.calls)
        it.until(lambda: it.door.connections == 0)
        connection.close()


def test_nonsense_is_answered_with_400():
    with running() as it:
        connection = it.connect(b"\x16\x03\x01nonsense\r\n\r\n")
        assert answer(connection)[0] == 400
        connection.close()


def test_a_stream_of_lines_comes_back_as_it_is_computed():
    def behave(call: Call) -> None:
        call.done(json.dumps({"rows": call.value["rows"]}).encode(), rows=len(call.value["rows"]))

    with running(behave) as it:
        sent = [json.dumps({"x": x}).encode() + b"\n" for x in range(3)]
        reply = httpx2.post(f"{it.url}/p", content=iter(sent), headers={"content-type": "application/x-ndjson"})
        assert (reply.status_code, reply.content.splitlines(True)) == (200, sent)
        # httpx sends all of a body before it reads an answer; this client does both at once.
        connection = it.connect(b"POST /p HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")
        data = b""
        for x in range(3):
            line = json.dumps({"x": x}).encode() + b"\n"
            connection.sendall(b"%x\r\n%s\r\n" % (len(line), line))
            while line not in data:
                data += connection.recv(65536)
        connection.sendall(b"0\r\n\r\n")
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(65536)
        connection.close()


def test_a_door_that_stops_finishes_what_it_has_and_takes_nothing_new(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "LEAVING_S", 0.2)
    with running(lambda call: None) as it, concurrent.futures.ThreadPoolExecutor() as pool:
        idle, late = it.connect(), it.connect(post())
        it.until(lambda: it.replica.calls)
        it.server.call(it.replica.calls[0].done)
        assert answer(late)[0] == 200
        busy = it.connect(post())
        it.until(lambda: len(it.replica.calls) == 2)
        stopping = pool.submit(it.server.stop, 10)
        it.until(lambda: it.door.leaving)
        late.sendall(post())  # it was on its way
        it.until(lambda: len(it.replica.calls) == 3)
        it.server.call(lambda: (it.replica.calls[1].done(), it.replica.calls[2].done(), it.replica.server.close()))
        assert answer(busy)[0] == 200 and answer(late)[0] == 200
        assert closed(busy) and closed(idle) and closed(late)
        stopping.result(10)
        with pytest.raises(ConnectionRefusedError):
            it.connect()
        with pytest.raises(ServingError, match="closed"):
            it.server.call(it.door.report)
        for connection in (idle, busy, late):
            connection.close()


def test_tls(tmp_path: Path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    built = built.not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
    certificate = built.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False).sign(key, hashes.SHA256())
    (tmp_path / "cert").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key").write_bytes(private)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "cert"))
    body = b'"' + b"x" * 1_000_000 + b'"'
    with running(lambda call: call.done(call.body), tls=(str(tmp_path / "cert"), str(tmp_path / "key"))) as it:
        reply = httpx2.post(f"https://localhost:{it.port}/p", content=body, verify=trusted)
        assert (reply.status_code, reply.content) == (200, body)
    with pytest.raises(ServingError, match="certificate"):
        DoorServer(Door("s"), tls=(str(tmp_path / "key"), str(tmp_path / "cert"))).start()


def test_nobody_is_let_in_before_a_door_is_prepared():
    server = DoorServer(Door("s"))
    seen: list[str] = []

    async def prepare() -> None:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server._port)
        seen.append("refused")

    try:
        socket.create_connection(("127.0.0.1", server.start(prepare)), timeout=5).close()
        assert seen == ["refused"]
    finally:
        server.stop(1)

    async def fail() -> None:
        raise ServingError("no accounts")

    with pytest.raises(ServingError, match="no accounts"):
        DoorServer(Door("s")).start(fail)
