"""Features as a job on Ray: the row pipelines of views as batch jobs, then the cuts and joins of `headrace.features.job` as tasks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

from headrace.errors import StoppedError
from headrace.features.job import HOME, Each, FeatureJob, FeatureReport, Task
from headrace.features.reading import Paths, Reading, without_pipeline
from headrace.features.view import FeatureView
from headrace.formats import Input
from headrace.hardware import Cluster
from headrace.letters import Allowance
from headrace.on_ray.commits import told_to_stop
from headrace.on_ray.job import Connect, Job
from headrace.on_ray.operators import limit_threads
from headrace.on_ray.translation import translated
from headrace.resume import Mode
from headrace.sources import open_source

_MOST_MEMORY = 0.8  # of the largest node's, that one task asks for: more it would never be given
_RETRIES = 3  # of a task whose process dies
_LOOK_S = 0.5  # how often to see whether somebody has asked the job to stop


def run(job: FeatureJob, *, input: Paths | None = None, connect: Connect, restart: bool = False) -> FeatureReport:
    """Run a job of features on the Ray that `connect` connects to. Run again, it goes on where it stopped.

    `input` is what the job was told to read instead of its view's source.

    Raises:
        As `FeatureJob.run`, and `headrace.run` for the pipelines of views, of which no row may fail: an event that is missing would be a wrong
        feature.
        StoppedError: Ctrl-C or SIGTERM. What was done is kept.
    """
    if not restart and (done := job.finished()) is not None:
        return done
    with connect() as cluster:

        def rows(view: FeatureView, reading: Reading) -> Reading:
            assert view.pipeline is not None
            paths = view.source if input is None else input
            assert paths is not None
            output = job.output.place.child(f"{HOME}/rows/{view.name}").uri
            kept = [name for name in view.columns if name not in view.pipeline.outputs]
            batch = Job.of(view.pipeline, input=paths if isinstance(paths, Input) else Input(paths), output=output, keep=kept)
            batch.run(mode=Mode.RESUME, allowance=Allowance.parse(0), connect=lambda: contextlib.nullcontext(cluster), watch=lambda events, total: None)
            return without_pipeline(reading, open_source(Input(output)))

        return job.run(each=tasks_on(cluster), rows=rows, restart=restart)


def tasks_on(cluster: Cluster) -> Each:
    """Tasks on the nodes of a cluster, so many at a time as there are cores, each with room for what it says it takes."""
    largest = max((node.memory_gb for node in cluster.nodes), default=0) * 1e9 * _MOST_MEMORY
    at_once = 2 * max(1, int(cluster.cpus))

    def each(tasks: Sequence[Task]) -> Iterator[tuple[str, dict[str, Any]]]:
        stop = threading.Event()
        waiting = list(reversed(tasks))
        running: dict[Any, str] = {}
        with told_to_stop(stop):
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        task = waiting.pop()
                        memory = int(min(task.memory_bytes, largest))
                        running[_do.options(memory=memory).remote(task)] = task.name
                    ended, _ = ray.wait(list(running), timeout=_LOOK_S)
                    for reference in ended:
                        yield running.pop(reference), ray.get(reference)
                    if stop.is_set():
                        raise StoppedError("stopped; the same command goes on from here")
            except ray.exceptions.RayError as error:
                raise translated(error) from error
            finally:
                for reference in running:
                    ray.cancel(reference)

    return each


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _do(task: Task) -> dict[str, Any]:
    limit_threads(1)
    return task()
