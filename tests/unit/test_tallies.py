"""What doors count goes on although doors start again."""

from headrace.serving.release.tallies import SILENT_S, Tallies
from headrace.serving.routes import DoorReport, VersionReport


def report(door, answered=0, *, in_flight=0, rejected=0, replicas=None, waiting=None, hung=()):
    latencies = [answered, *[0] * 72]
    counted = VersionReport(answered=answered, in_flight=in_flight, rejected=rejected, latencies=latencies)
    return DoorReport(door, {1: counted}, replicas or {}, tuple(hung), waiting or {})


def test_doors_are_added_up():
    tallies = Tallies()
    tallies.take(report("0", 10, in_flight=2), now_s=0.0)
    tallies.take(report("1", 5, in_flight=1), now_s=0.0)
    assert (tallies.sums(now_s=1.0)[1].answered, tallies.sums(now_s=1.0)[1].in_flight) == (15, 3)
    assert tallies.sums(now_s=1.0)[1].latencies[0] == 15


def test_a_door_that_starts_again_loses_nothing():
    tallies = Tallies()
    tallies.take(report("0", 10, in_flight=2), now_s=0.0)
    tallies.take(report("0", 3, in_flight=1), now_s=1.0)
    assert (tallies.sums(now_s=1.0)[1].answered, tallies.sums(now_s=1.0)[1].in_flight) == (13, 1)
    tallies.take(report("0", 4), now_s=2.0)
    assert tallies.sums(now_s=2.0)[1].answered == 14


def test_a_silent_door_holds_nothing_any_more():
    tallies = Tallies()
    tallies.take(report("0", 10, in_flight=2, waiting={(1, "embed"): 3}, hung=["a"]), now_s=0.0)
    later_s = SILENT_S + 1
    assert (tallies.sums(now_s=later_s)[1].answered, tallies.sums(now_s=later_s)[1].in_flight) == (10, 0)
    assert tallies.hung(now_s=later_s) == set()
    assert tallies.loads({(1, "embed"): []}, now_s=later_s)[1, "embed"].waiting == 0
    assert tallies.doors(now_s=later_s) == {"0": later_s}


def test_loads_are_of_the_latest_word_on_each_replica():
    tallies = Tallies()
    tallies.take(report("0", replicas={"a": {"in_flight": 9}, "b": {"in_flight": 1}}), now_s=0.0)
    tallies.take(report("1", replicas={"a": {"in_flight": 4}}, waiting={(1, "embed"): 2}), now_s=0.5)
    loads = tallies.loads({(1, "tidy"): ["b"], (1, "embed"): ["a", "new"]}, now_s=1.0)
    assert (loads[1, "tidy"].in_flight, loads[1, "embed"].in_flight, loads[1, "embed"].waiting) == (1, 4, 2)


def test_background_work_is_told_apart():
    tallies = Tallies()
    tallies.take(report("0", replicas={"a": {"in_flight": 5, "engine": {"background": 3.0}}, "b": {"in_flight": 1, "engine": None}}), now_s=0.0)
    load = tallies.loads({(1, "embed"): ["a", "b"]}, now_s=0.5)[1, "embed"]
    assert (load.in_flight, load.background) == (3.0, 3.0)


def test_what_was_shed_is_put_down_to_the_fullest_group():
    tallies = Tallies()
    members = {(1, "tidy"): ["b"], (1, "embed"): ["a"]}
    tallies.take(report("0", rejected=5, replicas={"a": {"in_flight": 9}, "b": {"in_flight": 1}}), now_s=0.0)
    assert tallies.loads(members, now_s=0.0)[1, "embed"].shed == 5
    tallies.take(report("0", rejected=7, replicas={"a": {"in_flight": 0}, "b": {"in_flight": 8}}), now_s=1.0)
    loads = tallies.loads(members, now_s=1.0)
    assert (loads[1, "embed"].shed, loads[1, "tidy"].shed) == (5, 2)


def test_after_a_restart_of_control_what_a_door_had_counted_before_is_not_counted_again():
    tallies = Tallies(resumed=True)
    tallies.take(report("0", 100), now_s=0.0)
    tallies.take(report("0", 110), now_s=1.0)
    assert tallies.sums(now_s=1.0)[1].answered == 10
    tallies.take(report("1", 5_000), now_s=2.0)  # late
    tallies.take(report("1", 5_001), now_s=3.0)
    assert tallies.sums(now_s=3.0)[1].answered == 11
    assert tallies.sums(now_s=3.0)[1].latencies[0] == 11
