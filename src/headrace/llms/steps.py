"""What an engine does, step by step, as figures: the one reader of vLLM's statistics, whose form is not stable."""

from __future__ import annotations

import threading
from typing import Any

from headrace.readings import GROWING


class Steps:
    """Sums over the steps of an engine. `count` is their number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = self._waiting = 0
        self._kv_cache = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin to count."""
        with self._lock:
            self.count = 0
            self._sums = dict.fromkeys(GROWING, 0.0)
            self._kv_cache_peak = 0.0

    def figures(self) -> dict[str, float]:
        """The sums, and the state of the moment; see `headrace.readings`."""
        with self._lock:
            moment = {"running": self._running, "waiting": self._waiting, "kv_cache": self._kv_cache, "kv_cache_peak": self._kv_cache_peak}
            return {**self._sums, **moment}

    def add(self, scheduled: Any, done: Any) -> None:
        """A step: vLLM's `SchedulerStats` and `IterationStats`, either of which may be None."""
        with self._lock:
            self.count += 1
            if scheduled is not None:
                self._running, self._waiting = scheduled.num_running_reqs, scheduled.num_waiting_reqs
                self._kv_cache = scheduled.kv_cache_usage
                self._kv_cache_peak = max(self._kv_cache_peak, self._kv_cache)
                if (prefix := scheduled.prefix_cache_stats) is not None:
                    self._sums["prefix_tokens"] += prefix.queries
                    self._sums["prefix_hits"] += prefix.hits
            if done is not None:
                self._sums["prompt_tokens"] += done.num_prompt_tokens
                self._sums["generated_tokens"] += done.num_generation_tokens
                self._sums["preempted"] += done.num_preempted_reqs

    def logger(self) -> Any:
        """What vLLM makes its logger of: called with its configuration, once."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        add = self.add

        class Logger(StatLoggerBase):  # type: ignore[misc]
            """vLLM's logger, which hands all on."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                """There is nothing to set up."""

            def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
                add(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                """There is nothing to say."""

        return Logger
