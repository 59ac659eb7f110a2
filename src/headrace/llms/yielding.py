"""A scheduler of vLLM's for devices that compute, where each sequence and each prompt makes a step longer: loaded in the engine's own process.

vLLM begins on all that waits at once, as far as a step's budget of tokens allows. Everybody's next token waits for these prompts, and so does whoever
comes meanwhile, to be begun together in the step after: prompts gather. Here a step begins on a share of what waits, which keeps the gaps between tokens
even. On the whole first tokens come no later for that, since a step that reads fewer prompts gives theirs the sooner.

vLLM orders what waits by priority, but what it has let in it steps on with, all of it in every step. Here sequences of `RIDER` stay out of steps that
read the prompt of a better one, whose first token comes as soon as without them; those of `FILLER` stay out of all steps while there are better ones.
They keep what they have computed, and go on as if nothing had been: a step without some of the sequences is what vLLM itself makes when a step's budget
of tokens is used up.
"""

from __future__ import annotations

import math
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from headrace.speech import FILLER, RIDER

_ABLE = (RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)  # others wait for something else, such as a grammar
_FULL = 0.8  # of the memory for tokens: from there on vLLM must see all sequences, to take the memory of the least
_CHUNK, _SIP = 256, 64  # tokens of the background's prompts in a step: where nobody else is, and beside better ones
_TURNS = 3  # a step begins on one of so many that wait, at least


class Yielding(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, which sees of the background only what may take part in a step, and begins on a part of what waits."""

    running: list[Any]
    max_num_running_reqs: int
    max_num_scheduled_tokens: int

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._stuck = False  # the last step had nothing: what waits needs memory that those who were held have

    def schedule(self, *given: Any, **named: Any) -> Any:
        """The next step."""
        running, places, budget = self.running, self.max_num_running_reqs, self.max_num_scheduled_tokens
        least, prompts = self._limits()
        held = [request for request in running if request.priority >= least]
        self.running = [request for request in running if request.priority < least]
        # What waits is let in by its priority: with places for so many alone, none that is to be held gets in.
        self.max_num_running_reqs = min(places, len(self.running) + self._turn(least))
        self.max_num_scheduled_tokens = min(budget, len(self.running) + prompts)
        try:
            step = super().schedule(*given, **named)
        finally:
            self.running += held
            self.max_num_running_reqs, self.max_num_scheduled_tokens = places, budget
        self._stuck = not step.total_num_scheduled_tokens
        return step

    def _turn(self, least: float) -> int:
        """How many of those that wait, and whose priority is better than `least`, the next step may begin on."""
        waiting = [request.num_tokens for request in self.requests.values() if request.priority < least and request.status != RequestStatus.RUNNING]
        # So many tokens of prompts as sequences run make no step much longer.
        return math.ceil(len(waiting) * min(1.0, max(1 / _TURNS, len(self.running) / sum(waiting)))) if waiting else 0

    def _limits(self) -> tuple[float, int]:
        """From which priority on sequences are held in the next step, and how many tokens of prompts it may read."""
        stuck, self._stuck = self._stuck, False
        if stuck or all(request.priority < RIDER for request in self.requests.values()) or self.kv_cache_manager.usage > _FULL:
            return math.inf, self.max_num_scheduled_tokens
        better = [request for request in self.requests.values() if request.priority < RIDER and request.status in _ABLE]
        if any(request.num_computed_tokens < request.num_prompt_tokens for request in better):
            return RIDER, self.max_num_scheduled_tokens
        return (FILLER, _SIP) if better else (math.inf, _CHUNK)  # whoever comes next waits for this step to end
