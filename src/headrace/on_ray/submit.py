"""Ship a pipeline file to a cluster as a Ray job, without building an image, and follow it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray.exceptions
from ray.job_submission import JobStatus, JobSubmissionClient

from headrace.errors import RunError
from headrace.on_ray.cluster import code

_POLL_S = 1.0


def submit(url: str, arguments: Sequence[str], *, folder: Path, echo: Callable[[str], None]) -> int:
    """Run `headrace ARGUMENTS` on the cluster behind the dashboard at `url`, with the files of `folder`; its exit code.

    The cluster needs Ray of this version and what the stages import; headrace itself travels along. `echo` is called with
    each piece of the job's output as it comes.

    Raises:
        RunError: the dashboard does not answer, or refuses the job.
    """
    try:
        client = JobSubmissionClient(url)
        job = client.submit_job(entrypoint="python -m headrace " + shlex.join(arguments), runtime_env=code(folder))
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise RunError(f"cannot submit to {url!r}: {error}. It must be the address of a Ray dashboard, such as http://head:8265") from error
    echo(f"job {job} on {url}\n")
    shown = 0
    while True:
        status = client.get_job_status(job)
        logs = client.get_job_logs(job)
        echo(logs[shown:])
        shown = len(logs)
        if status.is_terminal():
            if status is JobStatus.SUCCEEDED:
                return 0
            info = client.get_job_info(job)
            echo(f"job {job} {status.value.lower()}: {info.message}\n")
            return info.driver_exit_code or 1
        time.sleep(_POLL_S)
