"""Who is there: replicas are in the routes while they say so, and no longer."""

from headrace.serving.release.roster import EXPIRY_S, Roster
from headrace.serving.routes import Endpoint

A, B = Endpoint("a", "127.0.0.1", 1), Endpoint("b", "127.0.0.1", 2)


def tick(roster, first_s, last_s):
    """As control does: once a second."""
    return [roster.expire(now_s=float(second)) for second in range(first_s, last_s + 1)].count(True) > 0


def test_a_replica_that_announces_itself_is_news_once():
    roster = Roster()
    assert roster.join(1, "embed", A, now_s=0.0)
    assert not roster.join(1, "embed", A, now_s=2.0)
    assert roster.join(1, "embed", Endpoint("a", "127.0.0.1", 9), now_s=4.0)  # elsewhere than before
    assert roster.ready(1, "embed") == (Endpoint("a", "127.0.0.1", 9),)
    assert roster.ready(2, "embed") == ()
    assert roster.where("a") == (1, "embed")


def test_silence_takes_a_replica_out():
    roster = Roster()
    roster.join(1, "embed", A, now_s=0.0)
    roster.join(1, "embed", B, now_s=0.0)
    assert not tick(roster, 0, int(EXPIRY_S))
    roster.join(1, "embed", B, now_s=EXPIRY_S)
    assert tick(roster, int(EXPIRY_S) + 1, int(EXPIRY_S) + 1)
    assert roster.ready(1, "embed") == (B,)


def test_who_was_held_up_itself_does_not_blame_others():
    roster = Roster()
    roster.join(1, "embed", A, now_s=0.0)
    roster.expire(now_s=1.0)
    assert not roster.expire(now_s=30.0)  # stopped for 29 s: nothing could be heard
    assert roster.ready(1, "embed") == (A,)
    assert tick(roster, 31, 37)  # but then it was silent by itself


def test_a_replica_that_is_being_killed_stays_out_whatever_it_says():
    roster = Roster()
    roster.join(1, "embed", A, now_s=0.0)
    assert roster.bar("a", now_s=1.0)
    assert not roster.join(1, "embed", A, now_s=2.0)
    assert roster.ready(1, "embed") == ()


def test_routes_have_every_version_with_a_contract():
    roster = Roster()
    roster.join(2, "embed", B, now_s=0.0)
    routes = roster.routes({1: (0.95, 0.0), 2: (0.05, 0.2), 3: (0.0, 0.0)}, {1: ["tidy", "embed"], 2: ["embed"], 3: ["embed"]}, {1: {"pipeline": "p"}, 2: {}})
    assert [(route.version, route.weight, route.shadow) for route in routes] == [(1, 0.95, 0.0), (2, 0.05, 0.2)]
    assert [group.name for group in routes[0].groups] == ["tidy", "embed"]
    assert routes[1].groups[0].endpoints == (B,)


def test_a_version_is_forgotten_as_a_whole():
    roster = Roster()
    roster.join(1, "embed", A, now_s=0.0)
    roster.join(2, "embed", B, now_s=0.0)
    assert roster.forget(1)
    assert not roster.forget(1)
    assert roster.where("b") == (2, "embed")
