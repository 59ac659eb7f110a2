"""How often is an equal version rolled back, and how soon a bad one? Thousands of simulated canaries.

    python benchmarks/canary.py --save

The real decisions of `headrace.serving.release.rollout` are stepped once a second against simulated doors. What makes latencies hard to compare is simulated,
too: lognormal noise (sigma 0.3 to 0.6, one for each run) on top of requests of different sizes, 1 in 100 requests up to fifty times as slow, spells in
which both versions are slow, hiccups of a few seconds of one version alone (one in two minutes, twice as slow), a slow drift of each version by
3 %, and a newcomer with cold caches. A share of requests fails in both versions, and a share in either by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from headrace.scaling.policy import Scale
from headrace.serving.release import rollout
from headrace.serving.release.versions import Canary, Seen, ServiceState, Version
from headrace.serving.routes import LATENCY_BOUNDS_S, VersionReport

HERE = Path(__file__).resolve().parent
MIDDLE_S, COLD_REQUESTS, COLD_S = 0.04, 15, 8.0
BOUNDS = np.array(LATENCY_BOUNDS_S)


@dataclass(frozen=True)
class Bad:
    """What is wrong with the new version: times as slow, failing more, differing in this share of outputs."""

    slower: float = 1.0
    errors: float = 0.0
    different: float = 0.0
    chance: float | None = None  # the share that fails in either version by chance


CASES = {
    "equal, 50/s": (50.0, Bad()),
    "equal, 5/s": (5.0, Bad()),
    "equal, 0.2/s": (0.2, Bad()),
    "latency +50 %, 50/s": (50.0, Bad(slower=1.5)),
    "2 % errors, 50/s": (50.0, Bad(errors=0.02, chance=0.0)),
    "2 % errors beside 0.5 % by chance, 50/s": (50.0, Bad(errors=0.02, chance=0.005)),
    "outputs shifted, 50/s": (50.0, Bad(different=1.0)),
    "1 % of outputs differ, 50/s": (50.0, Bad(different=0.01)),
    "latency +20 %, 50/s": (50.0, Bad(slower=1.2)),
    "latency +50 %, 0.2/s": (0.2, Bad(slower=1.5)),
    "2 % errors, 0.2/s": (0.2, Bad(errors=0.02)),
    "outputs shifted, 0.2/s": (0.2, Bad(different=1.0)),
}
RUNS = {"equal, 50/s": 3000, "equal, 5/s": 2000, "equal, 0.2/s": 2000}
RUNS |= {name: 200 for name in CASES if name.endswith(" 0.2/s") and name not in RUNS}


class Doors:
    """Doors and replicas of two versions, second by second."""

    def __init__(self, rate: float, bad: Bad, random: np.random.Generator) -> None:
        self.rate, self.bad, self.random = rate, bad, random
        self.sigma = random.uniform(0.3, 0.6)
        self.sizes = random.uniform(0.3, 1.0)
        self.poison = random.choice([0.0, 0.002, 0.01])
        self.chance = random.choice([0.0, 0.0, 0.001, 0.005]) if bad.chance is None else bad.chance
        self.reports = {1: VersionReport(), 2: VersionReport()}
        self.common, self.drift = 0.0, np.zeros(2)
        self.spell_s, self.hiccup_s = 0.0, np.zeros(2)
        self.served, self.began_s = 0, math.nan

    def second(self, at_s: float, weights: dict[int, tuple[float, float]]) -> None:
        random = self.random
        self.common = 0.95 * self.common + math.sqrt(1 - 0.95**2) * random.normal(0, 0.1)
        self.drift = 0.97 * self.drift + math.sqrt(1 - 0.97**2) * random.normal(0, 0.03, 2)
        self.spell_s = random.uniform(3, 20) if self.spell_s <= 0 and random.random() < 1 / 60 else self.spell_s - 1
        for which in (0, 1):
            starts = self.hiccup_s[which] <= 0 and random.random() < 1 / 120
            self.hiccup_s[which] = random.uniform(1, 5) if starts else self.hiccup_s[which] - 1
        count = random.poisson(self.rate)
        answers, shadow = weights.get(2, (0.0, 0.0))
        if not count:
            return
        new = random.random(count) < answers
        mirrored = random.random(count) < shadow  # what either version answers is mirrored to the other
        ran_new = new | mirrored
        if math.isnan(self.began_s) and ran_new.any():
            self.began_s = at_s
        size = random.normal(math.log(MIDDLE_S), self.sizes, count) + self.common + (math.log(3) if self.spell_s > 0 else 0)
        seconds = [np.exp(size + self._own(which, count)) for which in (0, 1)]
        seconds[1] = seconds[1] * self.bad.slower
        order = self.served + np.cumsum(ran_new)
        cold = (order <= COLD_REQUESTS) | (at_s - self.began_s < COLD_S) if not math.isnan(self.began_s) else np.zeros(count, bool)
        seconds[1] = np.where(cold, seconds[1] * (1 + 4 * np.exp(-order / COLD_REQUESTS)), seconds[1])
        self.served += int(ran_new.sum())
        poisoned = random.random(count) < self.poison
        fails = [poisoned | (random.random(count) < self.chance) for _ in (0, 1)]
        fails[1] |= random.random(count) < self.bad.errors
        self._count(self.reports[1], seconds[0][~new], fails[0][~new])
        self._count(self.reports[2], seconds[1][new], fails[1][new])
        self._pair(self.reports[2], [s[mirrored] for s in seconds], [f[mirrored] for f in fails])

    def _own(self, which: int, count: int) -> np.ndarray:
        random = self.random
        tail = np.where(random.random(count) < 0.01, np.minimum(random.pareto(1.2, count), 50), 0)
        noise = random.normal(0, self.sigma, count) + np.log1p(tail) + self.drift[which]
        return noise + (math.log(2) if self.hiccup_s[which] > 0 else 0)

    def _count(self, report: VersionReport, seconds: np.ndarray, fails: np.ndarray) -> None:
        report.answered += len(seconds)
        report.errors += int(fails.sum())
        for bucket in np.searchsorted(BOUNDS, seconds):
            report.latencies[bucket] += 1

    def _pair(self, report: VersionReport, seconds: list[np.ndarray], fails: list[np.ndarray]) -> None:
        both = ~fails[0] & ~fails[1]
        ratios = np.log(seconds[1] / seconds[0])[both]
        report.pairs += len(both)
        report.pair_errors += int((fails[1] & ~fails[0]).sum())
        report.pair_base_errors += int((fails[0] & ~fails[1]).sum())
        report.pair_slower += int((ratios > 0).sum())
        report.pair_log_ratio += float(ratios.sum())
        report.pair_log_ratio_squares += float((ratios**2).sum())
        report.pair_different += int(self.random.binomial(len(ratios), self.bad.different))


def simulate(rate: float, bad: Bad, seed: int) -> tuple[str, float, str, int]:
    """How a canary of 5 % ended, after how many seconds, why, and how many requests the new version answered."""
    random = np.random.default_rng(seed)
    doors = Doors(rate, bad, random)
    scales = {"embed": Scale(1, 4)}
    state, _ = rollout.deploy(ServiceState(), Version(1, scales), at_s=0.0)
    at_s, ready = 0.0, {(1, "embed"): 1}
    state, _ = rollout.step(state, Seen(at_s, ready, {}, doors.reports))
    state, _ = rollout.deploy(state, Version(2, scales), how=Canary(share=0.05), at_s=at_s)
    joined_s = math.nan
    while True:
        at_s += 1
        if at_s > 8:
            ready[2, "embed"] = 1
        seen = Seen(at_s, ready, {}, doors.reports)
        state, told = rollout.step(state, seen)
        for event in told:
            if event.what in ("promoted", "failed"):
                return event.what, at_s - joined_s, event.why, doors.reports[2].answered
        shares = rollout.weights(state, seen)
        if math.isnan(joined_s) and sum(shares[2]):
            joined_s = at_s
        if at_s > 40_000:
            return "holding", at_s - joined_s, state.rollout.waits if state.rollout else "", doors.reports[2].answered
        doors.second(at_s, shares)


def _one(case: tuple[str, int]) -> tuple[str, float, str, int]:
    rate, bad = CASES[case[0]]
    return simulate(rate, bad, hash_seed(*case))


def hash_seed(name: str, run: int) -> int:
    return list(CASES).index(name) * 1_000_000 + run


def summary(ends: list[tuple[str, float, str, int]]) -> dict[str, object]:
    failed_s = sorted(took_s for what, took_s, _, _ in ends if what == "failed")
    promoted_s = sorted(took_s for what, took_s, _, _ in ends if what == "promoted")
    found: dict[str, object] = {"runs": len(ends), "rolled_back": len(failed_s), "promoted": len(promoted_s)}
    found["answered_by_new_median"] = int(np.median([answered for *_, answered in ends]))
    for name, took in (("rolled_back", failed_s), ("promoted", promoted_s)):
        if took:
            found[f"{name}_s"] = {f"p{p}": round(float(np.percentile(took, p)), 1) for p in (50, 90, 99, 100)}
    found["rolled_back_within_60_s"] = sum(took_s <= 60 for took_s in failed_s)
    found["reasons"] = {test: sum(why.startswith(test) for what, _, why, _ in ends if what == "failed") for test in ("errors", "latency", "outputs")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="of each case; by default 1,000, and more of equal versions, fewer of those with little traffic")
    parser.add_argument("--case", action="append", help="only these")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/canary.json")
    options = parser.parse_args()
    found = {}
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        for name in options.case or CASES:
            runs = options.runs or RUNS.get(name, 1000)
            began_s = time.perf_counter()
            ends = pool.map(_one, [(name, run) for run in range(runs)], chunksize=10)
            found[name] = summary(ends)
            print(f"{name:28} {json.dumps(found[name])} ({time.perf_counter() - began_s:.0f} s)", flush=True)
            for what, took_s, why, _ in ends:
                if name.startswith("equal") and what != "promoted":
                    print(f"    {what} after {took_s:.0f} s: {why}")
    if options.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": {"numpy": version("numpy")}, "canary": found}
        (HERE / "results/canary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
