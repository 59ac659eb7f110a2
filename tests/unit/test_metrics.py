"""What a door counts: right, in valid text, with a bounded number of series; quantiles and recent figures out of counts."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.serving.figures import Lately, Recent, bucket, quantile
from headrace.serving.routes import LATENCY_BOUNDS_S, DoorReport, VersionReport
from headrace.serving.watch.metrics import _HELP, DoorMetrics
from headrace.serving.wire import Done, Said

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: bytes) -> Series:
    """Every series of a text, which must be valid: each family explained once and in one piece, no series twice, buckets that never fall."""
    seen: list[str] = []
    series: Series = {}
    for family in text_string_to_metric_families(text.decode()):
        seen.append(family.name)
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        buckets: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
        for sample in family.samples:
            place = sample.name, frozenset(sample.labels.items())
            assert place not in series
            series[place] = sample.value
            if "le" in sample.labels:
                rest = frozenset((name, value) for name, value in sample.labels.items() if name != "le")
                buckets.setdefault(rest, []).append((float(sample.labels["le"]), sample.value))
        for labels, found in buckets.items():
            assert found == sorted(found) and [value for _, value in found] == sorted(value for _, value in found)
            assert found[-1] == (float("inf"), series[f"{family.name}_count", labels])
    assert len(seen) == len(set(seen))
    return series


def value(series: Series, name: str, **labels: str) -> float:
    found = [number for (known, place), number in series.items() if known == name and labels.items() <= dict(place).items()]
    assert len(found) == 1, (name, labels, len(found))
    return found[0]


def total(series: Series, name: str) -> float:
    return sum(number for (known, _), number in series.items() if known == name)


def busy(door: str) -> DoorMetrics:
    metrics = DoorMetrics("reviews", door)
    for at in range(100):
        metrics.answered(3, 200, 0.01 * at, 2, key="ana")
        metrics.group(3, "embed", Done(rows=2, queue_s=0.001, wait_s=0.002, compute_s=0.02, batch_rows=1 + at))
    metrics.answered(0, 401, 0.0001)
    metrics.shed("queue")
    metrics.retried("connection_lost")
    metrics.expired()
    metrics.paired("same")
    metrics.occupancy(3, 7, 2)
    metrics.replicas(3, "embed", 4)
    metrics.connections(12)
    return metrics


def test_what_was_counted_is_in_the_text() -> None:
    series = read(busy("0").text())
    assert value(series, "headrace_requests_total", service="reviews", door="0", version="3", code="200") == 100
    assert value(series, "headrace_requests_total", version="none", code="401") == 1
    assert value(series, "headrace_request_duration_seconds_sum", version="3") == pytest.approx(49.5)
    below = value(series, "headrace_request_duration_seconds_bucket", version="3", le=f"{LATENCY_BOUNDS_S[38]:.6g}")
    assert below == sum(0.01 * at <= LATENCY_BOUNDS_S[38] for at in range(100))
    assert value(series, "headrace_rows_total", version="3") == 200
    for name, seconds in (("queue", 0.1), ("batch_wait", 0.2), ("compute", 2.0)):
        assert value(series, f"headrace_group_{name}_seconds_sum", version="3", group="embed") == pytest.approx(seconds)
    assert value(series, "headrace_batch_rows_bucket", group="embed", le="16") == 16
    assert value(series, "headrace_group_rows_total", group="embed") == 200
    assert [value(series, f"headrace_{name}", version="3") for name in ("in_flight", "queued", "replicas")] == [7, 2, 4]
    assert value(series, "headrace_shed_total", reason="queue") == value(series, "headrace_retries_total", reason="connection_lost") == 1
    assert value(series, "headrace_shadow_pairs_total", outcome="same") == value(series, "headrace_expired_total") == 1
    assert value(series, "headrace_connections") == 12
    assert value(series, "headrace_key_requests_total", key="ana") == 100
    assert value(series, "process_resident_memory_bytes", door="0") > 1e6


def test_doors_are_joined_into_one_text() -> None:
    """Each with its own label; the same door twice, and rubbish, change nothing."""
    texts = [busy(door).text() for door in ("0", "1", "2")]
    rubbish = ["", "\0", '# TYPE headrace_requests_total gauge\nheadrace_requests_total{door="9"} 1\n', 'nonsense 1\n# TYPE x\nheadrace_connections{a="b"} x\n']
    series = read(busy("0").text([*texts, *rubbish, b"\xff"]))
    assert total(series, "headrace_requests_total") == 3 * 101
    assert {dict(place)["door"] for _, place in series} == {"0", "1", "2"}
    assert {place for place in series if place[0].startswith("headrace")} == {
        place for text in texts for place in read(text) if place[0].startswith("headrace")
    }


def test_a_family_of_a_newer_door_is_kept() -> None:
    peer = '# HELP headrace_new_total What a later release counts.\n# TYPE headrace_new_total counter\nheadrace_new_total{door="1",note="a } b"} 4\n'
    assert value(read(DoorMetrics("reviews", "0").text([peer])), "headrace_new_total", door="1") == 4


SAID = Said(200, prompt_tokens=40, cached_tokens=32, completion_tokens=20, queue_s=0.01, first_s=0.03, took_s=0.5)
ENGINE = {
    "running": 3.0, "waiting": 1.0, "sequences": 256.0, "capacity": 9000.0, "length": 4096.0, "kv_cache": 0.25, "kv_cache_peak": 0.5, "prompt_tokens": 400.0,
    "generated_tokens": 200.0, "prefix_tokens": 380.0, "prefix_hits": 95.0, "preempted": 2.0, "background_room": 9.0,
}  # fmt: skip


def speaking(door: str) -> DoorMetrics:
    metrics = DoorMetrics("talk", door)
    spoken = metrics.spoken(2)
    spoken.first.add(0.05)
    for _ in range(19):
        spoken.gaps.add(0.025)
    spoken.used("talk", SAID)
    spoken.answered(SAID, took_s=0.8, waited_s=0.2, first_s=0.2313)
    spoken.used("acme/small", Said(0, 10, 0, 2))
    spoken.cancelled("acme/small", begun=True)
    spoken.used("acme/small", Said(499, 10, 0, 5), before=Said(0, 10, 0, 2))
    metrics.answered(2, 200, 0.8)
    metrics.engines({(2, "r1"): ENGINE, (2, "r2"): {**ENGINE, "running": 5.0}, (1, "r0"): {"running": 0.0}})
    return metrics


def test_what_language_models_answer_is_in_the_text() -> None:
    series = read(speaking("0").text())
    here = {"service": "talk", "door": "0", "version": "2"}

    def tokens(name: str, **labels: str) -> float:
        return value(series, f"headrace_gen_ai_{name}_total", **here, **labels)

    assert [tokens("tokens", model="talk", type=kind) for kind in ("input", "output")] == [40, 20]
    assert [tokens("tokens", model="acme/small", type=kind) for kind in ("input", "output")] == [10, 5]
    assert [tokens("cached_tokens", model=model) for model in ("talk", "acme/small")] == [32, 0]
    assert [tokens("cancelled", model="acme/small", phase=phase) for phase in ("waiting", "streaming")] == [0, 1]
    for name, number, seconds in (("queue", 1, 0.21), ("time_to_first_token", 1, 0.05), ("inter_token_latency", 19, 19 * 0.025)):
        assert value(series, f"headrace_gen_ai_{name}_seconds_count", **here) == number
        assert value(series, f"headrace_gen_ai_{name}_seconds_sum", **here) == pytest.approx(seconds)
    assert value(series, "headrace_gen_ai_output_tokens_per_second_sum", **here) == pytest.approx(25)
    assert value(series, "headrace_gen_ai_overhead_seconds_sum", **here, until="end") == pytest.approx(0.1)
    assert value(series, "headrace_gen_ai_overhead_seconds_sum", **here, until="first_token") == pytest.approx(0.0013)
    below = [value(series, "headrace_gen_ai_overhead_seconds_bucket", until="first_token", le=le) for le in ("0.0008", "0.0016")]
    assert below == [0, 1]


def test_an_engine_is_there_once_however_many_doors_hear_it() -> None:
    """And one that only another door hears is there, too."""
    own, peer = speaking("0"), speaking("1")
    peer.engines({(2, "r1"): {**ENGINE, "generated_tokens": 199.0}, (2, "r9"): ENGINE})
    series = read(own.text([peer.text()]))
    assert total(series, "headrace_engine_running") == 3 + 5 + 0 + 3
    assert value(series, "headrace_engine_tokens_total", replica="r1", type="output") == 200
    assert value(series, "headrace_engine_tokens_total", service="talk", version="2", replica="r2", type="input") == 400
    found = {name: value(series, f"headrace_engine_{name}", replica="r9") for name in (
        "waiting", "sequences", "capacity_tokens", "kv_cache_usage_ratio", "prefix_cache_lookup_tokens_total", "prefix_cache_hit_tokens_total",
        "preemptions_total",
    )}  # fmt: skip
    assert list(found.values()) == [1, 256, 9000, 0.25, 380, 95, 2]
    assert not [place for name, place in series if name.startswith("headrace_engine") and "door" in dict(place)]
    assert total(series, "headrace_gen_ai_tokens_total") == 2 * 75
    own.engines({})
    assert total(read(own.text()), "headrace_engine_running") == 0


def test_the_documentation_names_what_is_there() -> None:
    """Every metric is explained, and none that is not there is asked for."""
    text = (Path(__file__).parents[2] / "docs/how-to/observe.md").read_text(encoding="utf-8")
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bheadrace_[a-z_]+", text)} == set(_HELP)


def test_models_and_old_versions_share_a_label() -> None:
    metrics = DoorMetrics("talk", "0")
    for at in range(300):
        metrics.spoken(1).used(f"model-{at}", SAID)
    for version in range(1, 13):
        metrics.spoken(version).used("talk", SAID)
        metrics.spoken(version).answered(SAID, took_s=1.0, waited_s=0.0, first_s=None)
        metrics.answered(version, 200, 1.0)
    series = read(metrics.text())
    assert total(series, "headrace_gen_ai_tokens_total") == 312 * 60 and total(series, "headrace_gen_ai_queue_seconds_count") == 12
    assert {dict(place).get("version") for _, place in series} - {None} == {*map(str, range(5, 13)), "other"}
    assert len({dict(place).get("model") for _, place in series} - {None}) == 102  # a hundred, `talk` of versions that have no others, and `other`
    assert set(metrics.paces()) == set(range(5, 13))


def test_versions_beyond_the_last_eight_share_a_label() -> None:
    """Nothing that was counted is lost, and an old version that answers again does not come back."""
    metrics = DoorMetrics("reviews", "0")
    for version in (*range(1, 21), 2, 20):
        metrics.answered(version, 200, 0.1, 1)
        metrics.group(version, f"embed-{version}", Done(1, 0.0, 0.0, 0.1, 1))
        metrics.occupancy(version, 1, 1)
        metrics.replicas(version, "embed", 1)
    series = read(metrics.text())
    assert {dict(place).get("version") for _, place in series} - {None} == {*map(str, range(13, 21)), "other"}
    assert total(series, "headrace_requests_total") == total(series, "headrace_group_rows_total") == 22
    assert total(series, "headrace_in_flight") == total(series, "headrace_replicas") == 20
    metrics.keep([20])
    assert total(read(metrics.text()), "headrace_in_flight") == 1
    assert total(read(metrics.text()), "headrace_requests_total") == 22


def test_names_are_bounded() -> None:
    metrics = DoorMetrics("reviews", "0")
    for at in range(200):
        metrics.answered(1, 200, 0.1, key=f"key{at}")
        metrics.shed(f"reason_{at}")
        metrics.retried('free text, "quoted"\n')
    series = read(metrics.text())
    tally = Counter(name for name, _ in series)
    assert tally["headrace_key_requests_total"] == 101 and value(series, "headrace_key_requests_total", key="other") == 100
    assert tally["headrace_shed_total"] == 25 and total(series, "headrace_shed_total") == 200
    assert value(series, "headrace_retries_total", reason="other") == 200


def test_labels_are_escaped() -> None:
    metrics = DoorMetrics('re"views\\', "0\n")
    metrics.group(1, 'a"b\\c\nd', Done(1, 0.0, 0.0, 0.1, 1))
    assert value(read(metrics.text()), "headrace_group_rows_total", group='a"b\\c\nd', service='re"views\\', door="0\n") == 1


def test_the_latencies_of_a_group() -> None:
    hops = busy("0").hops()
    assert list(hops) == [(3, "embed")] and hops[3, "embed"][bucket(0.023)] == 100


def test_the_latencies_of_a_version_are_shared() -> None:
    metrics = DoorMetrics("reviews", "0")
    latencies = metrics.latencies(1)
    metrics.answered(1, 200, 0.02)
    metrics.answered(1, 500, 1e9)
    assert latencies[bucket(0.02)] == 1 and latencies[-1] == 1 and sum(latencies) == 2


def test_quantiles() -> None:
    chance = random.Random(7)
    took_s = sorted(chance.lognormvariate(-3, 1) for _ in range(5000))
    held = [0] * (len(LATENCY_BOUNDS_S) + 1)
    for one in took_s:
        held[bucket(one)] += 1
    for q in (0.01, 0.5, 0.9, 0.99):
        assert quantile(held, q) == pytest.approx(took_s[int(q * 5000)], rel=0.1)
    assert quantile([0] * len(held), 0.5) is None and quantile([], 0.5) is None
    assert quantile([*[0] * len(LATENCY_BOUNDS_S), 3], 0.5) == LATENCY_BOUNDS_S[-1]
    assert quantile([1.0, *[0] * len(LATENCY_BOUNDS_S)], 1.0) == LATENCY_BOUNDS_S[0]
    assert quantile([10, 10, 0], 0.75, bounds=(1.0, 2.0)) == 1.5


def test_what_was_counted_lately() -> None:
    recent = Recent(span_s=10.0)
    assert recent.since(0.0) == ([], 0.0)
    for at in range(31):
        recent.add("a", float(at), (at * 5.0, at * 2.0))
        if at >= 25:
            recent.add("b", float(at), ((at - 25) * 100.0, 0.0))
    assert recent.since(30.0) == ([550.0, 20.0], 10.0)
    recent.add("a", 31.0, (3.0, 1.0))  # it has started anew
    recent.add("a", 32.0, (8.0, 3.0))
    assert recent.since(32.0) == ([505.0, 2.0], 5.0)
    assert recent.since(32.0, sources=["b"]) == ([500.0, 0.0], 5.0)
    assert recent.since(100.0) == ([], 0.0)


def test_figures_of_the_last_seconds() -> None:
    """Sums go on, a door starts anew, and doors hear of a replica at different times."""
    lately = Lately()
    assert lately.version(3, now_s=0.0)["p99_s"] is None and lately.group(3, "embed", ["r1"], now_s=0.0)["fill"] is None
    for at in range(21):
        counted = VersionReport(answered=100 * at, errors=at, rejected=2 * at)
        counted.latencies[bucket(0.02)] = 100 * at
        hops = [0] * (len(LATENCY_BOUNDS_S) + 1)
        hops[bucket(0.01)] = 100 * at if at < 15 else 100 * (at - 15)
        heard = at - (at % 2)
        stats = {"rows": 50 * heard, "calls": 5 * heard, "filled": 4.0 * heard, "queued": 2, "memory_bytes": 7}
        doors = [
            DoorReport("0", replicas={"r1": stats}, hops={(3, "embed"): hops}),
            DoorReport("1", replicas={"r1": {**stats, "rows": max(0, stats["rows"] - 10)}}),
        ]
        lately.note({3: counted}, doors, now_s=float(at))
    assert lately.version(3, now_s=20.0) == {
        "answered_per_s": 100.0, "errors_per_s": 1.0, "rejected_per_s": 2.0, "expired_per_s": 0.0, "retries_per_s": 0.0,
        "p50_s": pytest.approx(0.02, rel=0.2), "p99_s": pytest.approx(0.02, rel=0.2),
    }  # fmt: skip
    assert lately.group(3, "embed", ["r1", "r2"], now_s=20.0) == {
        "queued": 2, "rows_per_s": 50.0, "calls_per_s": 5.0, "fill": 0.8, "memory_bytes": 7, "engine": None,
        "p50_s": pytest.approx(0.01, rel=0.2), "p99_s": pytest.approx(0.01, rel=0.2),
    }  # fmt: skip
    assert lately.group(3, "embed", [], now_s=20.0)["rows_per_s"] is None
    lately.note({4: VersionReport()}, [], now_s=21.0)
    assert lately.version(3, now_s=21.0)["answered_per_s"] is None and lately.group(3, "embed", [], now_s=21.0)["p50_s"] is None


def test_figures_of_language_models() -> None:
    """Engines are added up, whoever heard them; the times to tokens are those of all doors."""
    lately = Lately()
    for at in range(21):
        doors = []
        for door in ("0", "1"):
            first, gaps = ([0] * (len(LATENCY_BOUNDS_S) + 1) for _ in range(2))
            first[bucket(0.2)], gaps[bucket(0.02)] = 5 * at, 95 * at
            grown = {"prompt_tokens": 400.0 * at, "generated_tokens": 50.0 * at, "prefix_tokens": 400.0 * at, "prefix_hits": 100.0 * at, "preempted": 0.5 * at}
            stats = {"rows": 0, "calls": 0, "filled": 0.0, "queued": 0, "memory_bytes": 7, "engine": {**ENGINE, **grown}}
            replicas = {"r1": stats, "r2": {**stats, "engine": {**stats["engine"], "kv_cache": 0.75, "running": 7.0}}, "r3": {**stats, "engine": None}}
            doors.append(DoorReport(door, replicas=replicas, paces={3: (first, gaps)}))
        lately.note({3: VersionReport()}, doors, now_s=float(at))
    assert lately.speech(3, now_s=20.0) == {
        "ttft_p50_s": pytest.approx(0.2, rel=0.2), "ttft_p99_s": pytest.approx(0.2, rel=0.2),
        "itl_p50_s": pytest.approx(0.02, rel=0.2), "itl_p99_s": pytest.approx(0.02, rel=0.2),
    }  # fmt: skip
    assert lately.group(3, "say", ["r1", "r2", "r3"], now_s=20.0)["engine"] == {
        "running": 10.0, "waiting": 2.0, "sequences": 512.0, "kv_cache": 0.75,
        "input_tokens_per_s": 800.0, "output_tokens_per_s": 100.0, "preempted_per_s": 1.0, "prefix_hits": 0.25,
    }  # fmt: skip
    assert lately.group(3, "say", ["r3"], now_s=20.0)["engine"] is None and lately.speech(4, now_s=20.0) is None
    lately.note({4: VersionReport()}, [], now_s=21.0)
    assert lately.speech(3, now_s=21.0) is None
