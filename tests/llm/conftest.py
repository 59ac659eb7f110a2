"""Tests with a real engine, on models of a few megabytes that are made up here. `make test-llm` runs them; each engine takes a quarter of a minute to start."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As in tests/integration/conftest.py: before ray is imported.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import endpoints
import pytest

import headrace

SOURCE = Path(headrace.__file__).parent.parent
ENGINE = {"max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The models: `lm`, `embedder` and `lora`."""
    import tiny_llm  # loads torch

    return tiny_llm.make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="package")
def talk(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[endpoints.Endpoint]:
    """A service of a language model, with two replicas and accounts, which all tests share that do not end it."""
    source = endpoints.TALK.format(model=tiny.lm, words=endpoints.WORDS, engine=endpoints.ENGINE)
    with endpoints.serving(tmp_path_factory.mktemp("talk"), source, accounts=True) as running:
        yield running


@pytest.fixture(scope="package")
def vectors(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[endpoints.Endpoint]:
    """A service of an embedding model, which asks for no key."""
    with endpoints.serving(tmp_path_factory.mktemp("vectors"), endpoints.EMBED.format(model=tiny.embedder, engine=ENGINE), "--doors", "1") as running:
        yield running


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """A Ray of four CPUs in this process, whose workers can import headrace."""
    import ray

    from headrace.on_ray import compat

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")])))
        patch.delenv("RAY_ADDRESS", raising=False)
        with compat.lean():
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Sockets that vLLM leaves to the garbage collector are found when no test runs, and no mark of one holds: between two, or at the end."""
    if "llm" in config.option.markexpr.split():
        config.addinivalue_line("filterwarnings", "ignore:Unclosed (context|socket) <zmq:ResourceWarning")
        warnings.simplefilter("ignore", ResourceWarning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these start an engine; what Ray, vLLM and their dependencies warn about themselves is no failure."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.llm)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
