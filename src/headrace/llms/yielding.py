"""A scheduler of vLLM's that lets background sequences wait between two steps while better ones are there: loaded in the engine's own process.

vLLM orders what waits by priority, but what it has let in it steps on with, all of it in every step; and on a device that computes, a step takes
longer with each sequence. Here sequences of `RIDER` stay out of steps that read the prompt of a better one, whose first token comes as soon as
without them; those of `FILLER` stay out of all steps while there are better ones. They keep what they have computed, and go on as if nothing had
been: a step without some of the sequences is what vLLM itself makes when a step's budget of tokens is used up.
"""

from __future__ import annotations

import math
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from headrace.speech import FILLER, RIDER

_ABLE = (RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)  # others wait for something else, such as a grammar
_FULL = 0.8  # of the memory for tokens: from there on vLLM must see all sequences, to take the memory of the least
_CHUNK = 256  # tokens of prompts in a step of the background


class Yielding(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, which sees of the background only what may take part in a step."""

    running: list[Any]
    max_num_running_reqs: int
    max_num_scheduled_tokens: int

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._stuck = False  # the last step had nothing: what waits needs memory that those who were held have

    def schedule(self, *given: Any, **named: Any) -> Any:
        """The next step."""
        if self._stuck or all(request.priority < RIDER for request in self.requests.values()) or self.kv_cache_manager.usage > _FULL:
            self._stuck = False
            return super().schedule(*given, **named)
        better = [request for request in self.requests.values() if request.priority < RIDER and request.status in _ABLE]
        reading = any(request.num_computed_tokens < request.num_prompt_tokens for request in better)
        least = RIDER if reading else FILLER if better else math.inf
        running, places, budget = self.running, self.max_num_running_reqs, self.max_num_scheduled_tokens
        held = [request for request in running if request.priority >= least]
        self.running = [request for request in running if request.priority < least]
        # What waits is let in by its priority: with places for so many alone, none that is to be held gets in.
        self.max_num_running_reqs = min(places, sum(request.priority < least for request in self.requests.values()))
        if not reading:  # whoever comes next waits for this step to end
            self.max_num_scheduled_tokens = min(budget, len(self.running) + _CHUNK)
        try:
            step = super().schedule(*given, **named)
        finally:
            self.running += held
            self.max_num_running_reqs, self.max_num_scheduled_tokens = places, budget
        self._stuck = not step.total_num_scheduled_tokens
        return step
