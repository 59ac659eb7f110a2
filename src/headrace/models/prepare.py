"""From a model's folder to a forward pass in the runtime that suits the machine: found out once, then kept on disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import SettingError
from headrace.models import choice, runtimes, shelf
from headrace.models.choice import REFERENCE, Forward, Vectors, Verdict
from headrace.models.folder import digest
from headrace.models.slicing import padded

_RULES = 1  # raised when the choice is made in another way, so that older verdicts no longer count
_TRIAL_SLICE_TOKENS = 1024
_SAMPLE = (
    "The room was quiet, clean and close to the station; we would gladly stay again! "
    "Das Zimmer war ruhig, die Dusche leider kalt. Très bon accueil, merci à toute l'équipe. "
    "Отличная квартира, рядом метро. とても静かで快適でした。 房间 很 干净 。 🙂 10/10, $95 per night (incl. VAT), WiFi ~300Mbit/s "
    "although the neighbours upstairs were unexpectedly walking around in wooden shoes until half past two in the morning."
)
_WORD_COUNTS = (0, 1, 2, 3, 5, 8, 11, 14, 18, 22, 26, 30, 35, 40, 45, 50, 57, 64, 72, 85, 100, 130, 180)

Tokenise = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for: a runtime or "auto", on a device with so many threads, and what the vectors depend on."""

    runtime: str
    device: str
    threads: int
    longest: int
    prompt: str
    least_cosine: float


def prepare(folder: Path, wish: Wish, tokenise: Tokenise) -> tuple[Verdict, Forward]:
    """The verdict and the forward pass, from the shelf or found out now.

    Raises:
        SettingError: the forced runtime, or in "auto" the reference, is missing or not equal to the reference.
    """
    place = shelf.place()
    facts = dataclasses.asdict(wish) | {"model": digest(folder), "on": runtimes.hardware(wish.device), "versions": runtimes.versions(), "rules": _RULES}
    name = shelf.key(facts)
    if found := _kept(place, name, folder, wish):
        return found
    with shelf.alone(place, name):
        if found := _kept(place, name, folder, wish):  # by the one that held the lock before
            return found
        with shelf.desk(place, name) as made:
            verdict, forward = _find_out(folder, made, wish, tokenise)
            runtimes.leave_only(verdict.runtime, made)
            shelf.put(place, name, verdict.to_json(), made)
            return verdict, forward


def samples(longest: int) -> list[str]:
    """Texts of all lengths, from none to more than `longest` tokens, in several scripts."""
    words = _SAMPLE.split()
    counts = [*_WORD_COUNTS, min(2000, longest + longest // 4)]
    return [" ".join(words[(3 * at + word) % len(words)] for word in range(count)) for at, count in enumerate(counts)]


def _kept(place: Path, name: str, folder: Path, wish: Wish) -> tuple[Verdict, Forward] | None:
    entry = shelf.get(place, name)
    if entry is None:
        return None
    content, files = entry
    try:
        verdict = Verdict.of_json(content)
        return verdict, runtimes.again(verdict.runtime, folder, files, device=wish.device, threads=wish.threads, longest=wish.longest)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, ImportError):  # written by other code, or no longer to be loaded: find out anew
        shelf.drop(place, name)
        return None


def _find_out(folder: Path, made: Path, wish: Wish, tokenise: Tokenise) -> tuple[Verdict, Forward]:
    try:
        reference = runtimes.encoder(folder, wish.device, wish.longest)
    except ModuleNotFoundError as error:
        raise SettingError(f"hr.models.Embedder needs {error.name}, which is not installed: pip install 'headrace[embeddings]'") from error
    texts = samples(wish.longest)
    expected: Vectors = reference.encode(texts, prompt=wish.prompt, batch_size=8, show_progress_bar=False, convert_to_numpy=True)
    tokens = tokenise(texts)
    lengths = np.array([len(row) for row in tokens], np.int64)
    batches = [(part, padded(tokens, lengths, part)) for part in choice.slices(lengths, _TRIAL_SLICE_TOKENS)]

    def embed(forward: Forward) -> tuple[Vectors, int]:
        vectors = np.empty_like(expected)
        for part, batch in batches:
            vectors[part] = forward(*batch)
        return vectors, sum(ids.size for _, (ids, _) in batches)

    load = runtimes.loader(folder, made, device=wish.device, threads=wish.threads, longest=wish.longest, reference=reference)
    trials, loaded = choice.audition(
        choice.candidates(wish.runtime, wish.device), load, embed=embed, reference=expected, least_cosine=wish.least_cosine, timer=time.perf_counter
    )
    best = choice.fastest(trials)
    if best is None:
        raise _refuse(wish, folder, trials)
    return Verdict(best.runtime, choice.budget(loaded[best.runtime], wish.device, timer=time.perf_counter), trials), loaded[best.runtime]


def _refuse(wish: Wish, folder: Path, trials: Sequence[Any]) -> SettingError:
    why = "; ".join(map(str, trials))
    if wish.runtime == "auto":
        return SettingError(
            f"model {str(folder)!r}: no runtime gives the vectors of sentence-transformers, {REFERENCE} included, so its texts are tokenised or pooled "
            f"in a way that hr.models.Embedder does not know ({why}); write a stage of your own for it"
        )
    return SettingError(f"runtime={wish.runtime!r} cannot be used with model {str(folder)!r}: {why}; choose another, runtime='auto', or a lower least_cosine")
