"""One local Ray per module. Whatever a test starts, it ends through its own handle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before ray is imported: a local Ray would otherwise turn authentication on by itself, and leave a token behind.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread of Serve's that outlives a module's Ray would start another
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest

import headrace

TESTS = Path(__file__).parent.parent
SOURCE = Path(headrace.__file__).parent.parent
sys.path.insert(0, str(TESTS))  # for conformance.py, which lies above


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """A Ray of eight CPUs in this process, whose workers can import headrace."""
    import ray

    from headrace.on_ray import compat

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")])))
        patch.delenv("RAY_ADDRESS", raising=False)
        with compat.lean():
            ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20)
        try:
            yield
        finally:
            ray.shutdown()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Run:
    """The headrace command, run in `tmp_path`."""

    def run(*arguments: str, timeout_s: float = 180, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", **variables}
        environment.pop("RAY_ADDRESS", None) if "RAY_ADDRESS" not in variables else None
        return subprocess.run([sys.executable, "-m", "headrace", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout_s)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray and its dependencies warn about themselves, from frames that a filter cannot tell from ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
