"""The same service on plain Ray Serve, for comparison: python plain.py PORT REPLICAS [ADDRESS]. A line on standard input deploys the version it names."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=64)
class Work:
    """Waits as long as the row says, and multiplies."""

    def __init__(self, factor: float) -> None:
        if factor < 0:
            raise RuntimeError("a version that cannot start")
        self.factor = factor

    async def __call__(self, request: Request) -> dict[str, float]:
        """One row."""
        row = await request.json()
        if row["deed"] == "exit":
            os._exit(3)
        await asyncio.sleep(row["pause_s"])
        return {"y": row["x"] * self.factor}


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.stdin.close())
    where = {"address": sys.argv[3]} if len(sys.argv) > 3 else {"address": "local", "num_cpus": 16, "include_dashboard": False}
    ray.init(**where, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])), logging_config=LoggingConfig(enable_access_log=False))

    def deploy(factor: float) -> None:
        serve.run(Work.options(num_replicas=int(sys.argv[2])).bind(factor), name="work", route_prefix="/work")

    deploy(2.0)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            deploy(float(line))
        except RuntimeError as error:
            print(f"not deployed: {error}", flush=True)
        else:
            print("deployed", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
