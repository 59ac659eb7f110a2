"""The choice of a runtime: trials of candidates against the reference, and the verdict over them. Pure; `runtimes` loads and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.batching import Tokens
from headrace.errors import SettingError, listing, nearest

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Forward = Callable[[Ids, Ids], Vectors]
"""One forward pass: token ids and mask, each of shape (rows, tokens), to vectors of shape (rows, size)."""

REFERENCE = "torch"
RUNTIMES = (REFERENCE, "torch-bf16", "torch-fp16", "openvino", "openvino-bf16", "onnx")
_HOPELESS = 2  # times slower than the best on a first short pass: not worth a real one
_WORTH = 1.03  # larger slices, which pad more, must be faster by this much
_SLICE_TOKENS = {"cpu": (512, 1024, 2048), "cuda": (8_192, 32_768, 131_072)}
_SLICE_ROW_TOKENS = 64  # tokens of a row in the slices with which budgets are compared


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a candidate: its least cosine similarity to the reference and its speed, or the problem with it."""

    runtime: str
    cosine: float = 0.0
    tokens_per_s: float = 0.0
    problem: str = ""

    def __str__(self) -> str:
        speed = f"{self.tokens_per_s:,.0f} tokens/s" if self.tokens_per_s else "the only one tried"
        return f"{self.runtime} {self.problem or speed}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The runtime to use, the padded tokens per slice that suit it, and the trials that led to it."""

    runtime: str
    slice_tokens: int
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        return f"{self.runtime}, slices of {self.slice_tokens:,} tokens ({'; '.join(map(str, self.trials))})"

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @staticmethod
    def of_json(found: Any) -> Verdict:
        """From JSON's types; KeyError, TypeError or ValueError if it is not one."""
        trials = tuple(Trial(**trial) for trial in found["trials"])
        verdict = Verdict(str(found["runtime"]), int(found["slice_tokens"]), trials)
        if verdict.runtime not in RUNTIMES or verdict.slice_tokens < 1:
            raise ValueError(f"no such verdict: {found!r}")
        return verdict


def check_runtime(runtime: str) -> None:
    """Raise SettingError unless `runtime` is one that a stage can be given."""
    if runtime != "auto" and runtime not in RUNTIMES:
        known = ("auto", *RUNTIMES)
        raise SettingError(f"runtime must be one of {listing(known)}, got {runtime!r}" + nearest(str(runtime), known))


def candidates(runtime: str, device: str) -> tuple[str, ...]:
    """The runtimes to try: the forced one, or all that the device knows, the reference first."""
    if runtime != "auto":
        return (runtime,)
    return tuple(name for name in RUNTIMES if (name.startswith("torch") if device == "cuda" else name != "torch-fp16"))


def cosine(vectors: Vectors, reference: Vectors) -> float:
    """The least cosine similarity of rows, each of shape (rows, size); -1 where a number is not finite. Equal rows of zeros count as 1."""
    if not np.isfinite(vectors).all():
        return -1.0
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    same = np.where(lengths > 0, (vectors * reference).sum(axis=1) / np.maximum(lengths, 1e-30), np.abs(vectors - reference).max(axis=1) == 0)
    return float(same.min(initial=1.0))


def slices(lengths: npt.NDArray[np.int64], budget: int) -> list[npt.NDArray[np.int64]]:
    """Index arrays in order of falling length, each of at most `budget` padded tokens."""
    return list(Tokens(budget, of="text").slices(lengths))


def audition(
    names: Sequence[str],
    load: Callable[[str], Forward],
    *,
    embed: Callable[[Forward], tuple[Vectors, int]],
    reference: Vectors,
    least_cosine: float,
    timer: Callable[[], float],
) -> tuple[tuple[Trial, ...], dict[str, Forward]]:
    """Try each candidate; a trial for each in the same order, and the forward passes of those that are usable.

    `load` raises ModuleNotFoundError where a library is missing, and RuntimeError or ValueError where a candidate does not work
    here; `embed` runs the sample texts through a forward pass and returns their vectors and how many padded tokens it ran.
    """
    trials: dict[str, Trial] = {}
    loaded: dict[str, Forward] = {}
    best_s = float("inf")
    for name in names:
        try:
            forward = load(name)
            short_s = min(_probe(forward, timer) for _ in range(2))
            if short_s > _HOPELESS * best_s:
                trials[name] = Trial(name, problem=f"is {short_s / best_s:.0f} times slower than the best")
                continue
            vectors, _ = embed(forward)
        except ModuleNotFoundError as error:
            trials[name] = Trial(name, problem=f"needs {error.name}, which is not installed: pip install 'headrace[embeddings]'")
        except (RuntimeError, ValueError, OSError) as error:
            first = next(iter(str(error).strip().splitlines()), "")
            trials[name] = Trial(name, problem=f"does not work here: {type(error).__name__}: {first}")
        else:
            trials[name] = Trial(name, cosine=cosine(vectors, reference))
            if trials[name].cosine < least_cosine:
                trials[name] = replace(trials[name], problem=f"is not equal: cosine similarity {trials[name].cosine:.6f}, wanted {least_cosine:g}")
            else:
                loaded[name] = forward
                best_s = min(best_s, short_s)
    times_s: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(3 if len(loaded) > 1 else 0):  # in turn, so that a busy moment of the machine meets all of them
        for name, forward in loaded.items():
            started = timer()
            _, tokens = embed(forward)
            times_s[name].append((timer() - started) / tokens)
    for name, taken in times_s.items():
        trials[name] = replace(trials[name], tokens_per_s=1 / min(taken) if taken else 0.0)
    return tuple(trials.values()), loaded


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The fastest candidate without a problem, the first of them when several are alike; None when there is none."""
    return max((trial for trial in trials if not trial.problem), key=lambda trial: trial.tokens_per_s, default=None)


def budget(forward: Forward, device: str, *, timer: Callable[[], float]) -> int:
    """Padded tokens per slice at which a forward pass is fastest, tried on full slices: few suit the caches of a CPU, many a GPU."""
    best, best_rate = 0, 0.0
    for tokens in _SLICE_TOKENS["cuda" if device.startswith("cuda") else "cpu"]:
        ids = _ids(tokens // _SLICE_ROW_TOKENS, _SLICE_ROW_TOKENS)
        taken_s = []
        for _ in range(2):
            started = timer()
            forward(ids, np.ones_like(ids))
            taken_s.append(timer() - started)
        rate = ids.size / max(min(taken_s), 1e-9)
        if rate > best_rate * _WORTH:
            best, best_rate = tokens, rate
    return best


def _probe(forward: Forward, timer: Callable[[], float]) -> float:
    ids = _ids(1, 16)
    started = timer()
    forward(ids, np.ones_like(ids))
    return timer() - started


def _ids(rows: int, tokens: int) -> Ids:
    return np.arange(rows * tokens, dtype=np.int64).reshape(rows, tokens) % 97 + 3  # every vocabulary has a hundred tokens
