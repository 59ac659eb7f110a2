"""What a door counts of answers of language models, and what their engines tell, as Prometheus reads it.

Names follow OpenTelemetry's conventions for generative AI (`gen_ai`) where there is one for the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from headrace.serving.routes import LATENCY_BOUNDS_S
from headrace.serving.watch.exposition import Histogram, escaped, line
from headrace.serving.wire import Said

EACH = 3  # bounds of LATENCY_BOUNDS_S to one of Prometheus: 24 buckets, each 1.7 times the one before
MODELS = 100  # of a version, with labels of their own
OTHER = "other"

_OVERHEAD_S = tuple(0.0001 * 2**step for step in range(16))
_TOKENS_PER_S = (1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)

HELP = {
    "headrace_gen_ai_tokens_total": ("counter", "Tokens of requests: of their prompts (input), and of answers (output)."),
    "headrace_gen_ai_cached_tokens_total": ("counter", "Tokens of prompts that the engine had computed before."),
    "headrace_gen_ai_cancelled_total": ("counter", "Requests whose client went away before the answer's first piece (waiting) or its last (streaming)."),
    "headrace_gen_ai_queue_seconds": ("histogram", "Time that requests waited for a replica with room and for its engine's first step with them."),
    "headrace_gen_ai_time_to_first_token_seconds": ("histogram", "Time from a request's first byte to the first piece of its streamed answer."),
    "headrace_gen_ai_inter_token_latency_seconds": ("histogram", "Time between pieces of a streamed answer that bring tokens."),
    "headrace_gen_ai_output_tokens_per_second": ("histogram", "Tokens of an answer by the time from its request to its end."),
    "headrace_gen_ai_overhead_seconds": ("histogram", "What the way to the engine and back adds to its own time, until the first token and until the end."),
    "headrace_engine_running": ("gauge", "Sequences that an engine computes."),
    "headrace_engine_waiting": ("gauge", "Sequences that wait for room in an engine."),
    "headrace_engine_sequences": ("gauge", "Sequences that an engine computes at a time, at most."),
    "headrace_engine_capacity_tokens": ("gauge", "Tokens that an engine has room for."),
    "headrace_engine_kv_cache_usage_ratio": ("gauge", "How full an engine's memory for tokens is, of 1."),
    "headrace_engine_tokens_total": ("counter", "Tokens of prompts that an engine has read (input), and that it has generated (output)."),
    "headrace_engine_prefix_cache_lookup_tokens_total": ("counter", "Tokens that an engine has looked up in its cache of prefixes."),
    "headrace_engine_prefix_cache_hit_tokens_total": ("counter", "Tokens that it found there."),
    "headrace_engine_preemptions_total": ("counter", "Sequences that an engine has put off, to compute them again, for want of room."),
}

_FIGURES = {
    "running": ("headrace_engine_running", ""),
    "waiting": ("headrace_engine_waiting", ""),
    "sequences": ("headrace_engine_sequences", ""),
    "capacity": ("headrace_engine_capacity_tokens", ""),
    "kv_cache": ("headrace_engine_kv_cache_usage_ratio", ""),
    "prompt_tokens": ("headrace_engine_tokens_total", ',type="input"'),
    "generated_tokens": ("headrace_engine_tokens_total", ',type="output"'),
    "prefix_tokens": ("headrace_engine_prefix_cache_lookup_tokens_total", ""),
    "prefix_hits": ("headrace_engine_prefix_cache_hit_tokens_total", ""),
    "preempted": ("headrace_engine_preemptions_total", ""),
}


_BY_MODEL = (
    ("headrace_gen_ai_tokens_total", ',type="input"'),
    ("headrace_gen_ai_tokens_total", ',type="output"'),
    ("headrace_gen_ai_cached_tokens_total", ""),
    ("headrace_gen_ai_cancelled_total", ',phase="waiting"'),
    ("headrace_gen_ai_cancelled_total", ',phase="streaming"'),
)
_NOTHING = Said(0)


class Spoken:
    """What is counted of a version's answers of OpenAI's interface. All times are in seconds, as a door saw them."""

    __slots__ = ("_models", "_to_end", "_to_first", "first", "gaps", "queue", "speed")

    def __init__(self) -> None:
        self.first, self.gaps, self.queue = (Histogram(LATENCY_BOUNDS_S, each=EACH) for _ in range(3))
        self.speed = Histogram(_TOKENS_PER_S)
        self._to_first, self._to_end = Histogram(_OVERHEAD_S), Histogram(_OVERHEAD_S)
        self._models: dict[str, list[int]] = {}  # by name, the counts of _BY_MODEL

    def answered(self, said: Said, *, took_s: float, waited_s: float, first_s: float | None) -> None:
        """A request was answered `took_s` after its body was there, of which it waited for a replica with room at first.

        Its first piece came after `first_s`, where it was streamed.
        """
        self.queue.add(waited_s + said.queue_s)
        self._to_end.add(max(0.0, took_s - waited_s - said.took_s))
        if first_s is not None and said.first_s:
            self._to_first.add(max(0.0, first_s - waited_s - said.first_s))
        if said.completion_tokens:
            self.speed.add(said.completion_tokens / max(took_s, 1e-9))

    def used(self, model: str, said: Said, before: Said = _NOTHING) -> None:
        """A request for a model has come to these tokens, of which those `before` were counted."""
        if said.gaps:
            self.gaps.add_all(np.frombuffer(said.gaps, np.float32))
        self._count(
            model,
            max(0, said.prompt_tokens - before.prompt_tokens),
            max(0, said.completion_tokens - before.completion_tokens),
            max(0, said.cached_tokens - before.cached_tokens),
        )

    def cancelled(self, model: str, *, begun: bool) -> None:
        """The client of a request went away, before its answer had begun or after."""
        self._count(model, 0, 0, 0, not begun, begun)

    def pace(self) -> tuple[list[int], list[int]]:
        """Times to first tokens, and between tokens, by `LATENCY_BOUNDS_S`."""
        return list(self.first.counts), list(self.gaps.counts)

    def absorb(self, other: Spoken) -> None:
        """Count all that another one has counted."""
        for mine, its in zip(self._histograms(), other._histograms(), strict=True):
            mine[2].absorb(its[2])
        for name, counts in other._models.items():
            self._count(name, *counts)

    def lines(self, labels: str) -> Iterator[tuple[str, list[str]]]:
        """Its series by the names of families, with these labels and more."""
        for model, counts in sorted(self._models.items()):
            for (name, more), number in zip(_BY_MODEL, counts, strict=True):
                yield name, [line(name, f'{labels},model="{escaped(model)}"{more}', number)]
        for family, more, histogram in self._histograms():
            yield family, histogram.lines(family, f"{labels}{more}")

    def _histograms(self) -> list[tuple[str, str, Histogram]]:
        return [
            ("headrace_gen_ai_queue_seconds", "", self.queue),
            ("headrace_gen_ai_time_to_first_token_seconds", "", self.first),
            ("headrace_gen_ai_inter_token_latency_seconds", "", self.gaps),
            ("headrace_gen_ai_output_tokens_per_second", "", self.speed),
            ("headrace_gen_ai_overhead_seconds", ',until="first_token"', self._to_first),
            ("headrace_gen_ai_overhead_seconds", ',until="end"', self._to_end),
        ]

    def _count(self, model: str, *more: int) -> None:
        if model not in self._models and len(self._models) >= MODELS:
            model = OTHER
        counts = self._models.setdefault(model, [0] * len(_BY_MODEL))
        for at, number in enumerate(more):
            counts[at] += number


class Engines:
    """What the engines of a service tell, by version and replica.

    All doors hear the same of them. These series are of no door, so that each is there once when the texts of doors are joined.
    """

    def __init__(self, service: str) -> None:
        self.told: Mapping[tuple[int, str], Mapping[str, float]] = {}
        self._labels = f'service="{escaped(service)}"'

    def lines(self) -> Iterator[tuple[str, list[str]]]:
        """Their series by the names of families."""
        for (version, replica), figures in sorted(self.told.items()):
            labels = f'{self._labels},version="{version}",replica="{escaped(replica)}"'
            for figure, (name, more) in _FIGURES.items():
                if figure in figures:
                    yield name, [line(name, f"{labels}{more}", figures[figure])]
