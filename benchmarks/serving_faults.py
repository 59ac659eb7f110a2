"""What a service loses when it is struck: headrace beside plain Ray Serve, case by case.

    python benchmarks/serving_faults.py --save

The cases are those of tests/faults/test_online.py: replicas killed and frozen, a controller and a front door killed, updates, a version that
cannot start, a row that kills its process, five times the load. Each contender is started anew for each case, one after the other.
"lost" counts requests that got neither an answer nor a 429.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests/faults"))

import online  # noqa: E402 - lies with the tests
from online import Headrace, Plain, PlainHaproxy, Service  # noqa: E402

CASES: dict[str, Callable[[Service], dict[str, Any]]] = {
    "replicas killed": online.killed_replicas,
    "replicas killed, six-second requests": online.killed_in_long_requests,
    "a replica frozen": online.frozen_replica,
    "Serve's controller killed": partial(online.killed, role="controller"),
    "the front door killed": partial(online.killed, role="door"),
    "an update": online.rolling_update,
    "an update, six-second requests": partial(online.rolling_update, pause_s=6.0, seconds=50),
    "a version that cannot start": online.bad_version,
    "a row that kills its process": online.poison,
    "five times the load": online.overload,
}
CONTENDERS: dict[str, type[Service]] = {"headrace": Headrace, "ray serve": Plain, "ray serve, haproxy": PlainHaproxy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="all by default")
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="all by default")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving_faults.json")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for case in arguments.case or CASES:
        for name in arguments.only or CONTENDERS:
            more = ("--latency", "150ms") if name == "headrace" and case == "five times the load" else ()
            with CONTENDERS[name](name=name.replace(" ", "_").replace(",", ""), more=more) as service:
                result = CASES[case](service)
            for word in ("said", "samples", "answer"):
                result.pop(word, None)
            found.setdefault(case, {})[name] = result
            print(f"{case:40} {name:20} {result}", flush=True)
    if arguments.save:
        file = HERE / "results/serving_faults.json"
        before = json.loads(file.read_text())["cases"] if file.is_file() else {}
        merged = {case: before.get(case, {}) | found.get(case, {}) for case in [*before, *(case for case in found if case not in before)]}
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("headrace", "ray")}
        file.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "cases": merged}, indent=1) + "\n")


if __name__ == "__main__":
    main()
