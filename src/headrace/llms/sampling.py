"""How the next token is chosen: the parameters of OpenAI's and vLLM's interfaces that matter in a pipeline."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from headrace.errors import SettingError

_LEAST_TEMPERATURE = 0.3  # of further attempts: at 0 the same answer would come again
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "temperature": (0, math.inf, "a number of at least 0"),
    "top_p": (0, 1, "a number above 0, and at most 1"),
    "min_p": (0, 1, "a number from 0 to 1"),
    "presence_penalty": (-2, 2, "a number from -2 to 2"),
    "frequency_penalty": (-2, 2, "a number from -2 to 2"),
    "repetition_penalty": (0, math.inf, "a number above 0"),
}
_ABOVE = ("top_p", "repetition_penalty")  # 0 itself is not allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an LLM chooses its words; what is left out is left to the model's own defaults.

    Attributes:
        max_tokens: after so many tokens the answer is cut off.
        temperature: 0 takes the likeliest token each time, so that the same prompt gives the same answer.
        top_p: choose among the likeliest tokens that have this probability together.
        top_k: choose among so many of the likeliest tokens.
        min_p: leave out tokens whose probability is below this share of the likeliest one's.
        stop: texts that end the answer, and are not part of it.
        seed: makes the choice at a temperature above 0 repeatable.
        presence_penalty: above 0, against tokens that are in the answer already.
        frequency_penalty: the same, the more the more often they are.
        repetition_penalty: above 1, against tokens of the prompt, too.

    Raises:
        SettingError: a value is out of its bounds; says which are allowed.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not (_is(value, Integral) and value >= least):
                raise SettingError(f"hr.Sampling: {name} must be a whole number of at least {least}, got {value!r}")
        for name, (low, high, allowed) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not (_is(value, Real) and low <= value <= high and math.isfinite(value) and not (name in _ABOVE and value == 0)):
                raise SettingError(f"hr.Sampling: {name} must be {allowed}, got {value!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise SettingError(f"hr.Sampling: stop must be a text or several, none of them empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))

    def fields(self, attempt: int = 0) -> dict[str, Any]:
        """The parameters as fields of a request's body. Further attempts, from 1 on, have other seeds, and do not sample at a temperature near 0."""
        given = {name: value for name, value in _given(self).items() if name != "stop"}
        if self.stop:
            given["stop"] = list(self.stop)
        if attempt:
            given |= {"temperature": max(_LEAST_TEMPERATURE, self.temperature), "seed": (self.seed or 0) + attempt}
        return given

    def __repr__(self) -> str:
        shown = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if getattr(self, one.name) != one.default}
        return f"Sampling({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _given(sampling: Sampling) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(sampling).items() if value is not None}


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
