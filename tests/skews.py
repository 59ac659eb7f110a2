"""Pipelines whose two versions differ in one setting that is easily forgotten, and rows on which that shows."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from doors import service

import headrace as hr
from headrace.parity import Golden, gate, over_http

SEEDS = range(25)
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Skew:
    """Rows for a seed, the stage as it should be, and as it is on the other side; `needs` is the package that both use."""

    rows: Callable[[int], Rows]
    honest: Callable[[], Any]
    skewed: Callable[[], Any]
    needs: str = "numpy"

    def caught(self, seeds: Sequence[int]) -> dict[int, set[str]]:
        """For each seed, the ways of asking a skewed service that show it; an honest one must show nothing."""
        right, wrong = hr.Pipeline("p", self.honest()), hr.Pipeline("p", self.skewed())
        found = {}
        for pipeline in (right, wrong):
            with service(pipeline) as url, hr.Client(url) as client:
                for seed in seeds:
                    verdict = gate(right, Golden(self.rows(seed)), over_http(client, "p"))
                    found[seed] = {one.target for one in verdict.differences}
                    assert pipeline is wrong or not verdict.differences, str(verdict)
        return found


def words(seed: int) -> Rows:
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choice(["Quiet", "room", "LOUD", "at", "night", "the", "Host"]) for _ in range(draw.randint(4, 12)))} for _ in range(4)]


def pictures(seed: int) -> Rows:
    from PIL import Image

    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(3):
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (int(draw.integers(20, 60)), int(draw.integers(20, 60)), 3), dtype=np.uint8)).save(stream, "PNG")
        rows.append({"image": stream.getvalue()})
    return rows


def prices(seed: int) -> Rows:
    draw = random.Random(seed)
    return [{"price": draw.randint(100, 99_999) / 100 + 0.005 * draw.randint(0, 1)} for _ in range(4)] + [{"price": 0.125}, {"price": 2.675}]


def tokenizer(*, lower: bool = True, longest: int = 8) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace

    known = ["[UNK]", "quiet", "room", "loud", "at", "night", "the", "host"]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    if lower:
        made.normalizer = Lowercase()
    made.enable_truncation(longest)

    @hr.stage(out={"tokens": hr.Vector(dtype="int32")})
    def tokenise(text: hr.Column[str]):
        return {"tokens": [one.ids for one in made.encode_batch(list(text))]}

    return tokenise


def resized(method: str = "BILINEAR", *, gap: float | None = None, mode: str = "RGB") -> Any:
    from PIL import Image

    @hr.stage(out={"pixels": hr.Vector(192)})
    def resize(image: hr.Column[hr.Image]):
        small = [Image.open(io.BytesIO(one)).convert(mode).convert("RGB").resize((8, 8), Image.Resampling[method], reducing_gap=gap) for one in image]
        return {"pixels": [np.asarray(one, np.float32).ravel() / 255 for one in small]}

    return resize


def rounded(convert: Callable[[float], Any], out: Any = str) -> Any:
    @hr.stage(out={"shown": out})
    def show(price: hr.Column[float]):
        return {"shown": [convert(one) for one in price]}

    return show


def centred(*, peek: bool) -> Any:
    @hr.stage(out={"centred": float})
    def centre(price: hr.Column[float]):
        return {"centred": price - (price.mean() if peek else 500.0)}

    return centre


SKEWS = {
    "tokenizer: case kept": Skew(words, tokenizer, lambda: tokenizer(lower=False), "tokenizers"),
    "tokenizer: cut shorter": Skew(words, lambda: tokenizer(longest=4), lambda: tokenizer(longest=3), "tokenizers"),
    "resize: bicubic": Skew(pictures, resized, lambda: resized("BICUBIC"), "PIL"),
    "resize: nearest": Skew(pictures, resized, lambda: resized("NEAREST"), "PIL"),
    "resize: box": Skew(pictures, resized, lambda: resized("BOX"), "PIL"),
    "resize: reduced first": Skew(pictures, resized, lambda: resized(gap=1.0), "PIL"),
    "resize: grey": Skew(pictures, resized, lambda: resized(mode="L"), "PIL"),
    "rounding: one digit less, as text": Skew(prices, lambda: rounded("{:.2f}".format), lambda: rounded("{:.1f}".format)),
    "rounding: trailing zeros": Skew(prices, lambda: rounded("{:.2f}".format), lambda: rounded(lambda one: str(round(one, 2)))),
    "rounding: half up": Skew(prices, lambda: rounded(lambda one: f"{one:.2f}"), lambda: rounded(lambda one: f"{int(one * 100 + 0.5) / 100:.2f}")),
    "rounding: two digits, as a number": Skew(prices, lambda: rounded(float, float), lambda: rounded(lambda one: round(one, 2), float)),
    "rounding: cut, as a number": Skew(prices, lambda: rounded(lambda one: round(one, 1), float), lambda: rounded(lambda one: int(one * 10) / 10, float)),
    "neighbours: a mean over the batch": Skew(prices, lambda: centred(peek=False), lambda: centred(peek=True)),
}
