"""What control makes of reports and announcements, without Ray: routes, targets, events, and all of it again after a restart."""

import dataclasses
import json

import pytest

from headrace.errors import ServingError
from headrace.scaling.policy import Scale
from headrace.serving.release.guests import Guests, names_of
from headrace.serving.release.steering import EVENTS, GRACE_S, Release, Steering
from headrace.serving.release.versions import Role, Told, Version
from headrace.serving.routes import DoorReport, Endpoint, Limits
from headrace.serving.wire import Stats

START_S = 1_000_000.0


class Life:
    """A control whose clock is a number: replicas announce themselves each second, and then it decides."""

    def __init__(self, kept=None, at_s=0.0):
        self.at_s = at_s
        self.steering = Steering("reviews", Limits(), now_s=self.at_s, at_s=START_S + self.at_s, kept=kept)
        self.replicas = {}

    def tick(self, seconds=1, failures=None):
        for _ in range(seconds):
            self.at_s += 1.0
            for name, (version, group) in self.replicas.items():
                self.steering.join(version, group, Endpoint(name, "127.0.0.1", 1), now_s=self.at_s)
            changed = self.steering.tick(now_s=self.at_s, at_s=START_S + self.at_s, failures=failures or {})
        return changed

    def deploy(self, version, scale=None, **options):
        release = Release(Version(version, {"embed": scale or Scale(1, 2)}), {"pipeline": "reviews"}, **options)
        self.steering.deploy(release, at_s=START_S + self.at_s)

    def role(self, version):
        found = self.steering.state.version(version)
        return found and found.role

    def status(self):
        return self.steering.status(now_s=self.at_s, at_s=START_S + self.at_s)

    def routed(self):
        return {route.version: (route.weight, [endpoint.replica for endpoint in route.groups[0].endpoints]) for route in self.steering.routes.versions}


def running():
    life = Life()
    life.deploy(1)
    life.replicas["a"] = (1, "embed")
    life.tick(2)
    return life


def test_a_first_version_answers_once_a_replica_is_there():
    life = Life()
    life.deploy(1)
    life.tick()
    assert life.routed() == {1: (0.0, [])}
    assert life.steering.wanted == {(1, "embed"): 1}
    life.replicas["a"] = (1, "embed")
    before = life.steering.routes.revision
    assert life.tick()
    assert life.routed() == {1: (1.0, ["a"])}
    assert life.steering.routes.revision > before
    assert not life.tick()
    assert [told.what for _, told in life.steering.events] == ["deployed", "ready", "promoted"]


def test_a_second_version_takes_over_and_the_first_is_kept():
    life = running()
    life.deploy(2)
    life.tick()
    assert life.routed()[1] == (1.0, ["a"])  # nothing changes before it is ready
    life.replicas["b"] = (2, "embed")
    life.tick(3)
    assert life.routed() == {1: (0.0, ["a"]), 2: (1.0, ["b"])}
    life.steering.command("rollback", at_s=START_S + life.at_s)
    life.tick()
    assert life.routed()[1] == (1.0, ["a"])
    assert life.steering.retired() == (2,)
    life.steering.forget(2)
    life.tick()
    assert list(life.routed()) == [1]


def test_the_gate_has_the_word():
    life = running()
    life.deploy(2, gate=True)
    life.replicas["b"] = (2, "embed")
    life.tick(3)
    assert life.role(2) is Role.GATING
    assert life.routed()[2] == (0.0, ["b"])  # there, for requests that ask for this version
    life.steering.command("gate_failed", at_s=START_S, version=2, why="row 3 differs")
    life.tick()
    assert life.role(2) is Role.FAILED
    assert "row 3 differs" in str(life.steering.events[-1][1])


def test_starts_that_fail_end_a_version_and_say_why():
    life = running()
    life.deploy(2)
    life.tick(2, failures={2: (3, "embed: no file weights.bin")})
    assert life.role(2) is Role.FAILED
    assert "no file weights.bin" in life.steering.events[-1][1].why
    assert life.routed() == {1: (1.0, ["a"])}


def test_a_restart_decides_nothing_until_replicas_had_time_to_speak():
    life = running()
    life.deploy(2)
    life.tick()
    after = Life(kept=life.steering.keep(), at_s=50.0)
    assert after.steering.waking(now_s=50.0)
    after.tick()
    assert after.steering.routes.versions == ()  # not given out: see `Control.routes`
    after.replicas = {"a": (1, "embed"), "b": (2, "embed")}
    after.tick(int(GRACE_S) + 3)
    assert not after.steering.waking(now_s=after.at_s)
    assert after.routed() == {1: (0.0, ["a"]), 2: (1.0, ["b"])}
    assert after.steering.routes.revision > life.steering.routes.revision
    assert [told.what for _, told in after.steering.events][:4] == ["deployed", "ready", "promoted", "deployed"]
    assert [number for number, _ in after.steering.events] == list(range(1, after.steering.told + 1))


def test_events_are_bounded_and_numbered():
    life = running()
    told = life.steering.told
    for number in range(EVENTS + 5):
        life.steering._decided((life.steering.state, (Told("scaled", 1, str(number)),)))
    assert len(life.steering.events) == EVENTS
    assert life.steering.since(life.steering.told - 1)[0][1].why == str(EVENTS + 4)
    assert life.steering.told == told + EVENTS + 5


def test_someone_who_waits_at_an_empty_group_is_urgent():
    life = Life()
    life.deploy(1, Scale(0, 2, idle_s=3.0, down_delay_s=0.0))
    life.replicas["a"] = (1, "embed")
    life.tick(8)
    assert life.steering.wanted == {(1, "embed"): 0}
    del life.replicas["a"]
    life.tick(8)
    assert life.routed() == {1: (1.0, [])}
    assert life.steering.report(DoorReport("0", waiting={(1, "embed"): 1}), now_s=life.at_s)
    life.tick()
    assert life.steering.wanted == {(1, "embed"): 1}


def test_a_replica_that_hangs_is_urgent_and_a_stranger_is_not():
    life = running()
    assert life.steering.report(DoorReport("0", hung=("a",)), now_s=life.at_s)
    assert not life.steering.report(DoorReport("0", hung=("gone",)), now_s=life.at_s)


def test_doors_are_told_each_others_metrics():
    life = running()
    for door in "01":
        life.steering.report(DoorReport(door, metrics=f"text of {door}"), now_s=life.at_s)
    assert life.steering.peers("0", now_s=life.at_s) == ["text of 1"]


def test_status_is_json_and_tells_each_group():
    life = running()
    life.steering.report(DoorReport("0", replicas={"a": dataclasses.asdict(Stats(3, 1, 0.5, 90, 10, 9.0, 1 << 28, False))}), now_s=life.at_s)
    life.tick()
    status = json.loads(json.dumps(life.status()))
    (version,) = status["versions"]
    assert (version["version"], version["role"], version["weight"]) == (1, "current", 1.0)
    (group,) = version["groups"]
    assert group.items() >= {"name": "embed", "ready": 1, "wanted": 1, "in_flight": 3.0, "queued": 1, "waiting": 0, "shed": 0}.items()
    assert status["events"][-1]["text"].startswith("version 1 promoted")
    life.deploy(2)
    life.tick()
    assert life.status()["rollout"]["kind"] == "rolling"


def test_guests_are_routed_to_and_survive_a_restart():
    life = running()
    life.steering.seat("chat", ["chat", "acme/chat"])
    assert life.tick()
    assert life.steering.routes.guests == ("chat",)
    after = Life(kept=life.steering.keep(), at_s=50.0)
    after.replicas = {"a": (1, "embed")}
    after.tick(int(GRACE_S) + 3)
    assert after.steering.routes.guests == ("chat",)
    with pytest.raises(ServingError, match="'other' would answer as 'acme/chat' at an address where service 'chat' does already"):
        after.steering.seat("other", ["acme/chat"])
    after.steering.guests.unseat("chat")
    assert after.tick()
    assert after.steering.routes.guests == ()
    after.steering.seat("other", ["acme/chat"])


def test_a_service_and_its_guests_have_no_name_in_common():
    life = running()
    with pytest.raises(ServingError, match="'chat' would answer as 'reviews' .* service 'reviews' does already"):
        life.steering.seat("chat", ["reviews"])
    life.steering.seat("chat", ["chat", "acme/chat"])
    life.steering.seat("chat", ["chat", "acme/chat", "acme/chat-2"])  # its next version
    release = Release(Version(2, {"embed": Scale(1, 2)}), {"pipeline": "reviews", "speech": {"model": "acme/chat-2", "paths": []}})
    with pytest.raises(ServingError, match="'reviews' would answer as 'acme/chat-2' .* service 'chat' does already, .* --name chat"):
        life.steering.deploy(release, at_s=START_S)
    assert life.steering.state.version(2) is None
    assert life.steering.names == ("reviews",)


def test_names_by_which_a_pipeline_is_asked():
    assert names_of({"pipeline": "chat", "speech": {"model": "acme/chat", "paths": []}}) == ("chat", "acme/chat")
    assert names_of({"pipeline": "chat", "speech": {"model": "chat", "paths": []}}) == ("chat",)
    assert names_of({}) == ()
    assert Guests("host", {"chat": ["chat"]}).names == {"chat": ("chat",)}
