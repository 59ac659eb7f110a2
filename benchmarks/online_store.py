"""What it takes to read the features of 100 keys, beside the database's own client reading the same blobs and leaving them as they are.

    python benchmarks/online_store.py --save
    python benchmarks/online_store.py --redis redis://127.0.0.1:6379/9      # a Redis that is there; otherwise one is started, if it is installed

Each request asks for 100 keys out of all, at random, once of the raw client and once of the store, in turns, so that whatever else the machine does
meets both. The raw side is one statement or one command: `SELECT ... WHERE key IN (...)` on a table of key and value, with the same settings of the
connection, or MGET. It gives bytes; the store gives an Arrow table with a column per feature. A figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import shutil
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from headrace.online_store import open_store

ASKED = 100
NUMBERS = 8
Read = Callable[[list[str]], object]


def events(keys: int, *, vectors: bool) -> pa.Table:
    """A row per key: eight numbers, and with `vectors` a text and a vector of 384 numbers."""
    random = np.random.default_rng(1)
    columns = {"key": pa.array([f"listing-{number}" for number in range(keys)]), "time": pa.array([dt.datetime(2026, 1, 1, tzinfo=dt.UTC)] * keys)}
    columns |= {f"n{at}": pa.array(random.random(keys) if at % 2 else random.integers(0, 1000, keys)) for at in range(NUMBERS)}
    if vectors:
        columns["text"] = pa.array([f"a quiet room, number {number}" for number in range(keys)])
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(random.random(keys * 384, np.float32)), 384)
    return pa.table(columns)


def blobs(place: str, keys: list[str]) -> dict[str, bytes]:
    """What the store keeps of each key, asked for over connections of its own: a reply of 170 MB leaves buffers behind that slow the next ones down."""
    with open_store(place) as store:
        generation = store.engine.current("bench")
        assert generation is not None
        return dict(zip(keys, store.engine.fetch(generation, [key.encode() for key in keys]) or [], strict=True))  # type: ignore[arg-type]


@contextlib.contextmanager
def raw_sqlite(path: str, kept: dict[str, bytes]) -> Iterator[Read]:
    connection = sqlite3.connect(path, isolation_level=None)
    for setting in ("journal_mode = WAL", "synchronous = NORMAL", "mmap_size = 1073741824"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute("CREATE TABLE raw (key TEXT PRIMARY KEY, value BLOB)")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO raw VALUES (?, ?)", kept.items())
    connection.execute("COMMIT")
    statement = f"SELECT key, value FROM raw WHERE key IN ({','.join('?' * ASKED)})"

    def read(keys: list[str]) -> list[bytes | None]:
        found = dict(connection.execute(statement, keys).fetchall())
        return [found.get(key) for key in keys]

    yield read
    connection.close()


@contextlib.contextmanager
def raw_redis(url: str, kept: dict[str, bytes]) -> Iterator[Read]:
    import redis

    with redis.Redis.from_url(url) as client:
        names = list(kept)
        for at in range(0, len(names), 1000):
            client.mset({f"raw:{key}": kept[key] for key in names[at : at + 1000]})
        yield lambda keys: client.mget([f"raw:{key}" for key in keys])


@contextlib.contextmanager
def redis_server(url: str | None) -> Iterator[str | None]:
    program = shutil.which("redis-server")
    if url or program is None:
        yield url
        return
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    server = subprocess.Popen([program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < until:
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def measure(sides: dict[str, Read], keys: int, *, requests: int, rounds: int) -> dict[str, float]:
    """Percentiles of each side in microseconds, and their ratios, as medians over the rounds."""
    random = np.random.default_rng(2)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        took: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(requests):
            asked = [f"listing-{key}" for key in random.integers(0, keys, ASKED)]
            for name, read in list(sides.items())[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                read(asked)
                took[name].append((time.perf_counter() - start) * 1e6)
        cuts = {name: statistics.quantiles(each, n=100) for name, each in took.items()}
        for what, at in (("p50", 49), ("p99", 98)):
            for name, cut in cuts.items():
                found.setdefault(f"{name} {what} us", []).append(cut[at])
            found.setdefault(f"ratio {what}", []).append(cuts["store"][at] / cuts["raw"][at])
    return {name: round(statistics.median(each), 2 if "ratio" in name else 0) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=2000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--redis", help="the URL of a Redis whose database may be emptied")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/online_store.json")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder, redis_server(arguments.redis) as url:
        for where, place, raw in (("sqlite", f"{folder}/{{}}.db", raw_sqlite), ("redis", url, raw_redis)):
            for what in ("numbers", "vectors") if place else ():
                rows = events(arguments.keys, vectors=what == "vectors")
                keys = rows["key"].to_pylist()
                with open_store(place.format(what)) as store:
                    store.replace("bench", [rows], key="key", time="time")
                    with raw(place.format(f"raw-{what}"), blobs(place.format(what), keys)) as read:
                        sides: dict[str, Read] = {"raw": read, "store": lambda asked, store=store: store.read("bench", asked)}
                        found = results[f"{where} {what}"] = measure(sides, arguments.keys, requests=arguments.requests, rounds=arguments.rounds)
                print(f"{where} {what}: " + ", ".join(f"{name} {value:,g}" for name, value in found.items()), flush=True)
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {"sqlite": sqlite3.sqlite_version, "pyarrow": version("pyarrow")} | ({"redis": version("redis")} if url else {})
        shape = {"keys": arguments.keys, "asked": ASKED, "requests": arguments.requests, "rounds": arguments.rounds}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "shape": shape, "results": results}
        (Path(__file__).parent / "results/online_store.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
