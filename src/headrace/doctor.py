"""Is this machine fit to run headrace? Checks that say what they found and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from headrace import __version__

RAY_VERSION = "2.60.0"
_EXTRAS = {"torch": "models", "sentence-transformers": "text embeddings", "pillow": "images", "deltalake": "Delta tables", "s3fs": "fsspec's S3"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `state`, what was found, and what to do unless all is well."""

    state: Literal["ok", "warning", "problem"]
    what: str
    advice: str = ""


def findings(*, ray_temp: str = "/tmp") -> Iterator[Finding]:
    """All checks that need no Ray."""
    yield from (python(), ray_version())
    yield from versions()
    yield from (memory(), shared_memory(), disk(ray_temp, need_gb=10), open_files())


def python() -> Finding:
    """Python's version; headrace needs 3.11, and every node of a cluster the same minor version as the driver."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):
        return Finding("problem", found, "use Python 3.11 or newer")
    return Finding("ok", found)


def ray_version() -> Finding:
    """Ray's version against the one that headrace is tested with."""
    found = importlib.metadata.version("ray")
    if found != RAY_VERSION:
        return Finding("warning", f"ray {found}", f"headrace is tested with ray {RAY_VERSION}: pip install 'ray[data,default]=={RAY_VERSION}'")
    return Finding("ok", f"ray {found}")


def versions() -> Iterator[Finding]:
    """Versions of what headrace stands on, and which optional packages are there."""
    yield Finding("ok", f"headrace {__version__}")
    for name in ("pyarrow", "numpy"):
        yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
    for name, use in _EXTRAS.items():
        try:
            yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("ok", f"no {name} (optional, for {use})")


def memory() -> Finding:
    """Memory of the machine, and the part that Ray's object store will take by default (30 %)."""
    total_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found = f"{total_gb:.0f} GB memory; Ray's object store takes {0.3 * total_gb:.1f} GB of it"
    if total_gb < 4:
        return Finding("warning", found, "models and Ray share less than 4 GB: lower replicas, or use a larger machine")
    return Finding("ok", found)


def shared_memory(path: str = "/dev/shm") -> Finding:
    """Room in shared memory, where the object store lies; in containers it is often 64 MB."""
    if not os.path.isdir(path):
        return Finding("ok", f"no {path}; Ray keeps its object store in its temporary folder")
    free_gb = shutil.disk_usage(path).free / 1e9
    found = f"{free_gb:.1f} GB free in {path}, for the object store"
    if free_gb < 1:
        return Finding("problem", found, "Ray falls back to the disk, which is slow: start the container with --shm-size=8g or more")
    return Finding("ok", found)


def disk(path: str, *, need_gb: float) -> Finding:
    """Room where Ray keeps logs and spills objects that do not fit in memory."""
    if not os.path.isdir(path):
        return Finding("problem", f"no folder {path}, where Ray would log and spill", "make it, or set RAY_TMPDIR to another one")
    usage = shutil.disk_usage(path)
    found = f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f} on the disk of {path}, where Ray logs and spills"
    if usage.free / usage.total < 0.05:
        return Finding("problem", found, "Ray stops spilling when a disk is 95 % full: make room, or set RAY_TMPDIR to another disk")
    if usage.free / 1e9 < need_gb:
        return Finding("warning", found, f"make at least {need_gb:.0f} GB of room, or set RAY_TMPDIR to another disk")
    return Finding("ok", found)


def open_files() -> Finding:
    """The limit on open files; Ray opens several per worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Finding("warning", f"at most {soft} open files", f"raise it before a large run: ulimit -n {min(65536, hard)}")
    return Finding("ok", f"at most {soft:,} open files")
