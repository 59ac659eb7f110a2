"""What `headrace top` shows, of whatever a service says of itself, and how it asks."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrace import cli
from headrace.cli.top import open_client, watch
from headrace.errors import ServiceError, ServingError, UnauthorizedError, UnavailableError
from headrace.scaling.policy import Scale
from headrace.serving import place
from headrace.serving.figures import bucket
from headrace.serving.release.steering import Release, Steering
from headrace.serving.release.versions import Version
from headrace.serving.routes import DoorReport, Endpoint, Limits, VersionReport
from headrace.serving.watch import top as view
from headrace.serving.wire import Stats

LATELY = {"answered_per_s": 47.53, "errors_per_s": 0.0, "rejected_per_s": 0.0, "expired_per_s": 0.0, "retries_per_s": 0.2, "p50_s": 0.0214, "p99_s": 0.118}
CLEAN = {"ready": 2, "wanted": 2, "in_flight": 3.0, "queued": 1, "waiting": 0, "shed": 0, "rows_per_s": 812.4, "calls_per_s": 40.0, "fill": 0.83}
STATUS: dict[str, Any] = {
    "service": "reviews",
    "at_s": 1_800_000_000.0,
    "trouble": "",
    "doors": [{"name": "0", "silent_s": 0.4}, {"name": "1", "silent_s": 7.2}],
    "versions": [
        {"version": 2, "role": "previous", "since_s": 1.0, "why": "", "weight": 0.0, "shadow": 0.0, "counts": None, **dict.fromkeys(LATELY), "groups": []},
        {
            "version": 3, "role": "current", "since_s": 1.0, "why": "", "weight": 0.95, "shadow": 0.0, "counts": {"in_flight": 4, "queued": 1}, **LATELY,
            "groups": [
                {"name": "clean", **CLEAN, "p50_s": 0.0008, "p99_s": 0.0042, "memory_bytes": 310_000_000},
                {
                    "name": "embed", **CLEAN, "ready": 3, "wanted": 4, "p50_s": 0.02, "p99_s": 1.114, "fill": None, "shed": 12, "waiting": 5,
                    "memory_bytes": 2_100_000_000,
                },
            ],
        },
        {
            "version": 4, "role": "joining", "since_s": 1.0, "why": "", "weight": 0.05, "shadow": 0.125, "counts": {"in_flight": 1}, **LATELY,
            "errors_per_s": 0.4, "answered_per_s": 2.5, "rejected_per_s": 12.0, "groups": [{"name": "embed", "ready": 1, "wanted": 1, "rows_per_s": None}],
        },
    ],
    "rollout": {
        "version": 4, "kind": "canary", "step": 0, "mirror": 0.125, "waits": "57 requests more", "seen": "latency 1.04 times the other version's on 43 pairs",
        "numbers": {"latency": 1.04},
    },
    "events": [
        {"number": at, "at_s": 1_800_000_000.0 + at, "what": "step", "version": 4, "why": "", "numbers": {}, "text": f"version 4 step: number {at}"}
        for at in range(10)
    ],
}  # fmt: skip

ENGINE = {
    "running": 41.0, "waiting": 0.0, "sequences": 256.0, "kv_cache": 0.312, "input_tokens_per_s": 14_210.0, "output_tokens_per_s": 2204.4,
    "preempted_per_s": 0.0, "prefix_hits": 0.67,
}  # fmt: skip
SPEECH = {"ttft_p50_s": 0.081, "ttft_p99_s": 0.412, "itl_p50_s": 0.0118, "itl_p99_s": 0.0305}
TALK: dict[str, Any] = {
    **STATUS,
    "service": "talk",
    "doors": STATUS["doors"][:1],
    "versions": [
        {**STATUS["versions"][1], "speech": SPEECH, "groups": [{**STATUS["versions"][1]["groups"][0], "name": "say", "fill": None, "engine": ENGINE}]},
        {
            **STATUS["versions"][2], "speech": dict.fromkeys(SPEECH),
            "groups": [
                {"name": "fetch", "ready": 1, "wanted": 1, "engine": None},
                {
                    "name": "say", "ready": 1, "wanted": 1,
                    "engine": {
                        **ENGINE, **dict.fromkeys(("input_tokens_per_s", "output_tokens_per_s", "prefix_hits")), "running": 256.0, "waiting": 12.0,
                        "kv_cache": 0.991, "preempted_per_s": 1.3,
                    },
                },
            ],
        },
    ],
    "rollout": None,
    "events": [],
}  # fmt: skip


def test_the_view_of_language_models(golden: Callable[[str, str], None]) -> None:
    """One that has room, and one that is full and has no figures of the last seconds yet."""
    shown = io.StringIO()
    console = Console(file=shown, width=150, force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(view.frame(TALK, url="http://127.0.0.1:8000"))
    golden("top-speech.ansi", shown.getvalue())
    golden("top-speech.txt", view.text(TALK, url="http://127.0.0.1:8000"))


def test_the_view(golden: Callable[[str, str], None]) -> None:
    """A service with a canary, a group that lacks a replica, and a door that is silent: colours and all, and as text."""
    shown = io.StringIO()
    console = Console(file=shown, width=150, force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(view.frame(STATUS, url="http://127.0.0.1:8000"))
    console.print(view.frame({**STATUS, "versions": [], "rollout": None, "events": [], "trouble": "Ray Serve does not answer"}, note="nothing answers"))
    golden("top.ansi", shown.getvalue())
    golden("top.txt", view.text(STATUS, url="http://127.0.0.1:8000"))


def test_what_is_missing_or_hostile_is_shown_as_well_as_can_be() -> None:
    assert view.text({}) == "  0 doors\n"
    hostile = {"service": "a\x1b[2Jb\n", "versions": [{"version": 1, "role": "[red]\x07", "groups": [{"name": "g\r"}]}, "no map"], "events": None, "rollout": 3}
    hostile["versions"] += [{"version": 2, "speech": "none", "groups": [{"name": "a", "engine": []}, {"name": "e\x1b", "engine": {}}]}]
    shown = view.text(hostile)
    assert "a\ufffd[2Jb\ufffd" in shown and "[red]\ufffd" in shown and "g\ufffd" in shown and shown.count("e\ufffd") == 2
    assert all(one.isprintable() or one == "\n" for one in shown)


def test_what_control_says_is_what_is_shown() -> None:
    """Ten seconds of a service: two doors count, a replica computes, and every figure of it arrives in the view."""
    steering = Steering("reviews", Limits(), now_s=0.0, at_s=1_800_000_000.0)
    steering.deploy(Release(Version(1, {"embed": Scale()}), {}), at_s=1_800_000_000.0)
    for at in range(1, 12):
        steering.join(1, "embed", Endpoint("r1", "127.0.0.1", 1), now_s=float(at))
        for door in ("0", "1"):
            counted = VersionReport(answered=50 * at, errors=at, in_flight=2)
            hops = [0] * len(counted.latencies)
            counted.latencies[bucket(0.02)] = hops[bucket(0.01)] = 50 * at
            engine = {"running": 2.0, "waiting": 1.0, "sequences": 8.0, "kv_cache": 0.5, "generated_tokens": 70.0 * at}
            stats = Stats(3, 1, 0.0, 200 * at, 10 * at, 7.5 * at, 512_000_000, draining=False, engine=engine)
            replicas, paces = {"r1": dataclasses.asdict(stats)}, {1: (hops, counted.latencies)}
            steering.report(DoorReport(door, {1: counted}, replicas, hops={(1, "embed"): hops}, paces=paces), now_s=float(at))
        steering.tick(now_s=float(at), at_s=1_800_000_000.0 + at, failures={})
    status = steering.status(now_s=11.0, at_s=1_800_000_011.0)
    assert json.loads(json.dumps(status)) == status
    assert status.keys() | {"door", "guests"} == set(re.findall(r"^    (\w+)(?=:|,|  )", view.__doc__ or "", re.MULTILINE)) | {"at_s"}
    lines = [" ".join(line.split()) for line in view.text(status).splitlines()]
    assert lines[0] == "reviews 2 doors, 100 requests/s"
    assert "1 current 100% 100 4 20 ms 20 ms 2.0 0 0 0" in [re.sub(r"\b(19|2\d) ms", "20 ms", line) for line in lines]
    assert "1 embed 1 3 1 200 75% 10 ms 10 ms 0 512.0 MB" in [re.sub(r"\b(9\.\d|1\d) ms", "10 ms", line) for line in lines]
    engines = [re.sub(r"\b(19|2\d) ms", "20 ms", re.sub(r"\b(9\.\d|1[0-3]) ms", "10 ms", line)) for line in lines]
    assert "1 embed 0 70 10 ms 10 ms 20 ms 20 ms 2 of 8 1 50% - 0" in engines
    assert lines[-1].endswith("version 1 promoted: the first version")


class Service(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A service that says what it is told to, and asks for a key if it has one."""

    daemon_threads = True
    answer: bytes = json.dumps(STATUS).encode()
    code = 200
    key: str | None = None


class Answering(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Service)
        allowed = self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"
        self.send_response(self.server.code if allowed and self.path == "/status" else 404 if allowed else 401)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No services of this machine, and no key."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("HEADRACE_KEY", raising=False)


def call(*words: str) -> str:
    done = CliRunner().invoke(cli.app, ["top", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_once(service: Service) -> None:
    """Text where there is no terminal, JSON if asked for, by any way to name the service."""
    where = f"127.0.0.1:{service.server_port}"
    for url in (where, f"http://{where}", f"http://{where}/", f"http://{where}/status"):
        assert call(url) == view.text(STATUS, url=f"http://{where}")
    assert json.loads(call(where, "--json")) == STATUS
    place.write(place.here("reviews", address="", token="", url=f"http://{where}", drain_s=1.0))
    assert call() == call("reviews", "--once") == call(where)
    with pytest.raises(ServingError, match="no service 'reviewz'.*did you mean 'reviews'"):
        call("reviewz")


def test_services_behind_one_address(service: Service) -> None:
    """All of them, one below the other, or the one that is named."""
    service.answer = json.dumps({**STATUS, "guests": [{"service": "chat", "versions": []}, "no map"]}).encode()
    where = f"127.0.0.1:{service.server_port}"
    host = place.here("reviews", address="", token="", url=f"http://{where}", drain_s=1.0)
    for name in ("chat", "draw"):
        place.write(dataclasses.replace(host, service=name, behind="reviews"))
    place.write(host)
    assert call() == view.text(STATUS, url=f"http://{where}") + "\nchat  0 doors\n"
    assert call("chat") == f"chat  http://{where}, 0 doors\n"
    assert json.loads(call("chat", "--json")) == {"service": "chat", "versions": []}
    with pytest.raises(ServiceError, match="has not heard of 'draw' yet"):
        call("draw")


def test_keys(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.key = "hr_good"
    where = f"127.0.0.1:{service.server_port}"
    for key in ((), ("--key", "hr_bad")):
        with pytest.raises(UnauthorizedError, match="asks for a key"):
            call(where, *key)
    assert "reviews" in call(where, "--key", "hr_good")
    monkeypatch.setenv("HEADRACE_KEY", "hr_good")
    assert "reviews" in call(where)
    with pytest.raises(ServingError, match="without line breaks"):
        call(where, "--key", "hr_\n")


def test_what_cannot_be_asked(service: Service, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="0 services run here; give the URL"):
        call()
    with pytest.raises(UnavailableError, match="nothing answers at http://127.0.0.1:9"):
        call("127.0.0.1:9")
    with pytest.raises(ServingError, match="is no URL"):
        call("http://127.0.0.1:port")
    with pytest.raises(ServingError, match="cannot be read"):
        call("https://127.0.0.1:9", "--ca", str(tmp_path / "none.pem"))
    for service.code, service.answer in ((200, b"<html>"), (200, b"[]"), (200, b"{}"), (503, b"{}")):
        with pytest.raises(ServiceError, match="no service of headrace"):
            call(f"127.0.0.1:{service.server_port}")


def test_it_is_watched_until_ctrl_c(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The view follows the service, says when it no longer answers, and goes on when it does."""
    url = f"http://127.0.0.1:{service.server_port}"
    moments: list[dict[str, Any]] = [{"service": "renamed"}, {"code": 503}, {"service": "back again"}]

    def sleep(_: float) -> None:
        if not moments:
            raise KeyboardInterrupt
        now = moments.pop(0)
        service.code = now.get("code", 200)
        service.answer = json.dumps({**STATUS, **now}).encode()

    monkeypatch.setattr(time, "sleep", sleep)
    shown = io.StringIO()
    console = Console(file=shown, width=150, force_terminal=True, color_system=None)
    with open_client(url, None, None) as client:
        watch(client, url, STATUS, console)
    said = shown.getvalue()
    assert said.index("renamed") < said.index("no service of headrace") < said.index("back again")
