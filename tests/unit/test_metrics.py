"""What a door counts: right, in valid text, with a bounded number of series; quantiles and recent figures out of counts."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.serving.figures import Lately, Recent, bucket, quantile
from headrace.serving.routes import LATENCY_BOUNDS_S, DoorReport, VersionReport
from headrace.serving.watch.metrics import DoorMetrics
from headrace.serving.wire import Done

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
        "queued": 2, "rows_per_s": 50.0, "calls_per_s": 5.0, "fill": 0.8, "memory_bytes": 7,
        "p50_s": pytest.approx(0.01, rel=0.2), "p99_s": pytest.approx(0.01, rel=0.2),
    }  # fmt: skip
    assert lately.group(3, "embed", [], now_s=20.0)["rows_per_s"] is None
    lately.note({4: VersionReport()}, [], now_s=21.0)
    assert lately.version(3, now_s=21.0)["answered_per_s"] is None and lately.group(3, "embed", [], now_s=21.0)["p50_s"] is None
