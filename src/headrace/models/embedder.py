"""The stage that turns text into vectors with a model of sentence-transformers, in the fastest runtime that is equal to the reference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from headrace import registry
from headrace.columns import Column, Vector, types_of
from headrace.errors import SettingError, check_number
from headrace.hardware import Hardware, cpu, gpu
from headrace.models import choice, folder
from headrace.models.choice import Vectors
from headrace.models.prepare import Wish, prepare
from headrace.models.slicing import padded
from headrace.stage import MARK, Stage, stage

Runtime = Literal["auto", "torch", "torch-bf16", "torch-fp16", "openvino", "openvino-bf16", "onnx"]

_BATCH_ROWS = 4096  # rows of a call: what is sorted by length together


@dataclass(kw_only=True)
class Embedder:
    """A ready stage: text in, float32 vectors out, by any model in the format of sentence-transformers.

        reviews = hr.Pipeline("reviews", clean, hr.models.Embedder(model="sentence-transformers/all-MiniLM-L6-v2"))

    The first replica on a kind of machine tries the runtimes that are installed against torch in float32, uses the fastest of
    those that are equal to it, and keeps the verdict and the converted model in the user's cache directory
    (`$XDG_CACHE_HOME/headrace/models`); later replicas load only what was chosen. Texts are tokenised here, cut at the model's
    limit, and run in slices of like length, so that little is padded. `pip install 'headrace[embeddings]'` brings the libraries.

    Attributes:
        model: a local folder, the name of a hub's model, or a name in an MLflow registry, `models:/name@alias` or `models:/name/3`; where it
            is not on this machine, and for one of a registry, give `size` as well.
        runtime: "auto", or the one to use: "torch", "torch-bf16", "torch-fp16", "openvino", "openvino-bf16", "onnx".
        prompt: put before every text; the model's own default prompt when left out.
        longest: tokens after which a text is cut, at most (and when left out) as many as the model says.
        slice_tokens: padded tokens per forward pass; measured when left out.
        least_cosine: the cosine similarity to the reference that a runtime must reach on every sample text.
        size: numbers per vector; read from the model when left out.
        forward: after `setup`, one forward pass: token ids and mask, each of shape (rows, tokens), to vectors of shape (rows, size).
        verdict: after `setup`, the runtime in use, its slices, and what became of the other candidates.

    Besides, once and not as settings: `text` and `out`, the names of the columns read and written; `on`, acceptable hardware,
    a GPU or else one CPU core when left out; `replicas`; `name`, the stage's own, "embedder"; `trust_pickles=True` where the model is
    one of a registry, and has pickles whose maker is trusted.

    Raises:
        DefinitionError: the model cannot be run as its makers meant it; says why.
        SettingError: a setting has a wrong value, a forced runtime is missing or not equal, or no model is found.
    """

    model: str
    runtime: Runtime = "auto"
    prompt: str | None = None
    longest: int | None = None
    slice_tokens: int | None = None
    least_cosine: float = 0.9999
    size: int | None = None
    text: InitVar[str] = "text"
    out: InitVar[str] = "vector"
    on: InitVar[Sequence[Hardware] | Hardware] = (gpu(1), cpu(1))
    replicas: InitVar[int | tuple[int, int | None] | None] = None
    name: InitVar[str] = "embedder"
    trust_pickles: InitVar[bool] = False

    def __post_init__(self, text: str, out: str, on: Any, replicas: Any, name: str, trust_pickles: bool) -> None:
        # In the instance, where `dataclasses.replace` finds them again, but no fields: a setting that is changed later on
        # the command line must not be one on which the wiring depends.
        vars(self).update(text=text, out=out, on=on, replicas=replicas, name=name, trust_pickles=trust_pickles)
        choice.check_runtime(self.runtime)
        for setting in ("longest", "slice_tokens", "size"):
            if (value := getattr(self, setting)) is not None:
                check_number(value, f"{name}: {setting}", whole=True)
        check_number(self.least_cosine, f"{name}: least_cosine")
        if registry.is_address(self.model):
            registry.Address.of(self.model, f"{name}: model")
        found = folder.find(str(self.model))
        self._check_size(None if found is None else folder.read(found).size)

    def setup(self, device: str) -> str:
        """Load the model on `device`, in the runtime chosen; the first time on a kind of machine this includes the choice, which is returned as text.

        Raises:
            SettingError: the model cannot be had, or is not of the declared `size`; a forced runtime is missing or not equal.
        """
        import tokenizers

        found = folder.find(str(self.model)) or _download(str(self.model), vars(self)["name"], trust_pickles=vars(self)["trust_pickles"])
        card = folder.read(found)
        self._check_size(card.size)
        prompt = card.prompt if self.prompt is None else self.prompt
        longest = min(self.longest or card.longest, card.longest)
        tokenizer = tokenizers.Tokenizer.from_file(str(card.tokenizer))
        tokenizer.no_padding()
        tokenizer.enable_truncation(longest)

        def tokenise(texts: Sequence[str]) -> list[list[int]]:
            given = [prompt + text for text in texts] if prompt else list(texts)
            return [encoding.ids for encoding in tokenizer.encode_batch_fast([text.lower() for text in given] if card.lower else given)]

        self._tokenise = tokenise
        wish = Wish(self.runtime, device, _threads(), longest, prompt, float(self.least_cosine))
        self.verdict, self.forward = prepare(found, wish, tokenise)
        if self.slice_tokens is not None:
            self.verdict = dataclasses.replace(self.verdict, slice_tokens=self.slice_tokens)
        return str(self.verdict)

    def __call__(self, **columns: Column[str]) -> dict[str, Vectors]:
        """The vectors of a column of texts, shape (rows, size), under the name of the column to write."""
        (texts,) = columns.values()
        return {vars(self)["out"]: self._embed(self._tokenise(texts))}

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        lengths = np.array([len(row) for row in tokens], np.int64)
        vectors = np.empty((len(tokens), self.size or 0), np.float32)
        waiting = choice.slices(lengths, self.verdict.slice_tokens)[::-1]
        while waiting:
            part = waiting.pop()
            try:
                vectors[part] = self.forward(*padded(tokens, lengths, part))
            except RuntimeError as error:
                if "out of memory" not in str(error).lower() or len(part) == 1:
                    raise
            else:
                continue
            # Out of the handler, and with it of the traceback that holds the failed pass's tensors. From now on in smaller slices.
            half = max(1, self.verdict.slice_tokens // 2)
            self.verdict = dataclasses.replace(self.verdict, slice_tokens=half)
            rows = np.concatenate([part, *waiting[::-1]])
            waiting = [rows[again] for again in choice.slices(lengths[rows], half)][::-1]
        return vectors

    def _check_size(self, size: int | None) -> None:
        if size is None and self.size is None:
            raise SettingError(
                f"model {self.model!r} is no folder, and not in Hugging Face's cache on this machine, so the size of its vectors is not known; "
                "correct the path, fetch the model, or say size=384 (numbers per vector)"
            )
        if size is not None and self.size not in (None, size):
            raise SettingError(
                f"model {self.model!r} gives vectors of {size} numbers, but the pipeline was defined with size={self.size}; "
                "name the model in the pipeline's file, where the column's type follows from it"
            )
        self.size = self.size or size


class _Spec:
    """The stage behind an `Embedder`: what `@hr.stage` leaves on other classes, here after the instance's own columns and hardware."""

    def __get__(self, embedder: Embedder | None, kind: type[Embedder]) -> Stage:
        given: Mapping[str, Any] = vars(kind) if embedder is None else vars(embedder)
        size = None if embedder is None else embedder.size

        @stage(out={given["out"]: Vector(size)}, on=given["on"], batch=_BATCH_ROWS, replicas=given["replicas"], name=given["name"])
        class Shape:
            def __call__(self, text: Column[str]) -> None: ...

        reads = types_of({given["text"]: str}, f"stage {given['name']!r}")
        return dataclasses.replace(Stage.of(Shape()), reads=MappingProxyType(reads), call=kind if embedder is None else embedder)


setattr(Embedder, MARK, _Spec())


def _download(model: str, where: str, *, trust_pickles: bool) -> Path:
    if registry.is_address(model):
        return registry.fetch(model, f"{where}: model", trust_pickles=trust_pickles)
    from headrace.models import runtimes

    try:
        return runtimes.download(model)
    except (ImportError, OSError, ValueError) as error:
        raise SettingError(f"model {model!r} is no folder on this machine, and cannot be fetched: {type(error).__name__}: {error}; correct the name") from error


def _threads() -> int:
    """How many threads this process may use: as a replica is told, else as many as it has cores."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
