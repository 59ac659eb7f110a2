"""The three ways in which a worker calls its stages; tests want the same of all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from headrace.worker import Worker

OVERLAPS = (False, True, "in a thread")
THREAD = ThreadPoolExecutor(1)


def worker_of(stages, *, overlap, **options):
    """A worker that calls its stages in turn, overlapping, or overlapping in a thread of their own."""
    return Worker(stages, overlap=bool(overlap), thread=THREAD if overlap == OVERLAPS[2] else None, **options)
