"""vLLM's worker on a CPU, which holds out where a prompt with a seed is read in parts: loaded in the engine's own process.

Of a part that is not the last one vLLM samples a token, too, drops it, and sets the request's random numbers back, in a way that those of a CPU do not
have: the worker dies, and everybody's sequences with it. Any client that sends a seed and a long prompt could do that. Here such a token is drawn from
nobody's numbers, so that an answer depends on its seed alone, however its prompt was read.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

_SWITCH_S = 1e-4
"""How long Python lets a thread go on while another wants to. Mostly the engine's scheduler and its sockets are threads of this process: with Python's own
5 ms, first tokens came about a tenth later (8 and 32 sequences, two cores)."""


class Runner(CPUModelRunner):  # type: ignore[misc]
    """vLLM's, which keeps the random numbers of requests whose token is dropped."""

    _kept: dict[int, Any]

    def _sample(self, *given: Any, **named: Any) -> Any:
        generators = self.input_batch.generators
        dropped = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        self._kept = {int(at): generators.pop(int(at)) for at in dropped if int(at) in generators}
        return super()._sample(*given, **named)

    def _bookkeeping_sync(self, *given: Any, **named: Any) -> Any:
        try:
            return super()._bookkeeping_sync(*given, **named)
        finally:
            self.input_batch.generators.update(self._kept)


class Worker(CPUWorker):  # type: ignore[misc]
    """vLLM's, with such a runner."""

    def init_device(self) -> None:
        """See vLLM."""
        super().init_device()
        sys.setswitchinterval(_SWITCH_S)
        if type(self.model_runner) is CPUModelRunner:  # vLLM makes it here, and has no setting for it
            self.model_runner.__class__ = Runner
