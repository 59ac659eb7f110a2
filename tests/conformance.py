"""One list of pipelines and rows that every target must run alike. `local` is the definition of correct."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import headrace as hr


@dataclass(frozen=True)
class Case:
    """A pipeline, the rows to run it over, and the columns to keep."""

    name: str
    pipeline: hr.Pipeline
    rows: Sequence[Mapping[str, Any]]
    keep: tuple[str, ...] = ()


CANNOT: Mapping[str, Mapping[str, str]] = {
    "batch": {},
    "serve": {"keep": "whoever asks has the columns that it sent, and the answer's rows are in their order"},
}
"""What a target does not do, and why."""

NOON = dt.datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=dt.UTC)
TEXTS = ["", "a", "two words", "ümläut €", "😀 emoji", "line\nbreak", 'tab\tand \\ and "quote"', "x" * 20_000, "NULL", "007"]


@hr.stage(out={"s2": str, "b2": bool, "i2": int, "f2": float, "y2": bytes, "at2": dt.datetime, "day2": dt.date}, batch=3)
def scalars(
    s: hr.Column[str],
    b: hr.Column[bool],
    i: hr.Column[int],
    f: hr.Column[float],
    y: hr.Column[bytes],
    at: hr.Column[dt.datetime],
    day: hr.Column[dt.date],
) -> dict[str, Any]:
    """Every scalar type, in and out."""
    return {
        "s2": [text[::-1] for text in s],
        "b2": ~b,
        "i2": i // 2,
        "f2": f * 0.5,
        "y2": [value + b"\x00" for value in y],
        "at2": [value + dt.timedelta(microseconds=1) for value in at],
        "day2": [value + dt.timedelta(days=1) for value in day],
    }


@hr.stage(
    out={"s2": str | None, "b2": bool | None, "i2": int | None, "f2": float | None, "y2": bytes | None, "at2": dt.datetime | None, "v2": hr.Vector(2) | None}
)
def optionals(
    s: hr.Column[str | None],
    b: hr.Column[bool | None],
    i: hr.Column[int | None],
    f: hr.Column[float | None],
    y: hr.Column[bytes | None],
    at: hr.Column[dt.datetime | None],
    v: hr.Column[hr.Vector(2) | None],  # type: ignore[valid-type]
) -> dict[str, Any]:
    """Nulls of every type, in and out."""
    assert all(value is None or isinstance(value, int) for value in i)
    return {"s2": s, "b2": b, "i2": i, "f2": f, "y2": y, "at2": at, "v2": v}


@hr.stage(out={"fixed2": hr.Vector(3), "ragged2": hr.Vector(), "ids2": hr.Vector(dtype="int32"), "wide": hr.Vector(2, "float64")}, batch=4)
def vectors(
    fixed: hr.Column[hr.Vector(3)],  # type: ignore[valid-type]
    ragged: hr.Column[hr.Vector()],  # type: ignore[valid-type]
    ids: hr.Column[hr.Vector(dtype="int32")],  # type: ignore[valid-type]
) -> dict[str, Any]:
    """Vectors of fixed and of varying length."""
    assert fixed.shape == (len(fixed), 3) and all(one.dtype == np.int32 for one in ids)
    return {"fixed2": fixed + 1, "ragged2": [one[::-1] for one in ragged], "ids2": ids, "wide": np.stack([fixed.sum(1), fixed.max(1)], 1).astype(float)}


@hr.stage(out={"words": list[str], "counts": list[int], "deep": list[list[float]], "maybe": list[str | None] | None})
def lists(text: hr.Column[str]) -> dict[str, Any]:
    """One-to-many is a list in a cell."""
    words = [one.split() for one in text]
    return {
        "words": words,
        "counts": [[len(word) for word in some] for some in words],
        "deep": [[[float(len(word))], []] for some in words for word in [some]],
        "maybe": [None if not some else [some[0], None] for some in words],
    }


@hr.stage(out={"size": int, "copy": hr.Image})
def images(image: hr.Column[hr.Image]) -> dict[str, Any]:
    """Encoded images are bytes."""
    return {"size": [len(one) for one in image], "copy": [bytes(one) for one in image]}


@hr.stage(out={"vector": hr.Vector(4)}, batch=hr.tokens(64, of="text"), replicas=2)
class Hash:
    """A model with settings and a token budget, whose result for a row depends on that row alone."""

    salt: str = "a"
    scale: float = 1.0

    def setup(self, device: str) -> None:
        """What a model loads."""
        self.seed = hashlib.sha256(self.salt.encode())

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """Four numbers of a text."""
        vectors = []
        for one in text:
            digest = self.seed.copy()
            digest.update(one.encode())
            vectors.append(np.frombuffer(digest.digest()[:4], np.uint8).astype(np.float32) * self.scale)
        return {"vector": np.stack(vectors)}


@hr.stage(out={"text": str}, batch=5)
def clean(text: hr.Column[str]) -> dict[str, Any]:
    """A function that replaces the column that it reads."""
    return {"text": [" ".join(one.split()) for one in text]}


@hr.stage(out={"length": int})
def length(text: hr.Column[str]) -> dict[str, Any]:
    """A function that is fused with its neighbour."""
    return {"length": [len(one) for one in text]}


@hr.stage(out={"norm": float}, on=hr.cpu(0.5))
def norm(vector: hr.Column[hr.Vector(4)], length: hr.Column[int]) -> dict[str, Any]:  # type: ignore[valid-type]
    """A function after a model, on hardware of its own, that reads what an earlier group wrote."""
    return {"norm": np.linalg.norm(vector, axis=1).astype(float) + length}


@hr.stage(out={"label": str}, batch=7, replicas=1)
class Label:
    """A second model."""

    limit: float = 200.0

    def __call__(self, norm: hr.Column[float], vector: hr.Column[hr.Vector]) -> dict[str, Any]:  # type: ignore[type-arg]
        """A word for each row."""
        return {"label": ["high" if value > self.limit else "low" for value in norm]}


@hr.stage(out={"kind": str})
def anything(value: hr.Column) -> dict[str, Any]:  # type: ignore[type-arg]
    """A parameter that takes whatever there is."""
    return {"kind": [str(one) for one in value]}


def scalar_rows() -> list[dict[str, Any]]:
    """Rows of every scalar type, extremes included."""
    numbers = [0, 1, -1, 2**53, -(2**62), 7]
    floats = [0.0, -0.0, 1e-300, 1e300, float("inf"), float("nan")]
    return [
        {"s": TEXTS[n], "b": bool(n % 2), "i": numbers[n], "f": floats[n], "y": bytes(range(n * 40)), "at": NOON + dt.timedelta(hours=n), "day": NOON.date()}
        for n in range(6)
    ]


def optional_rows() -> list[dict[str, Any]]:
    """A row of values, a row of nulls, and rows with one null each."""
    full = {"s": "x", "b": True, "i": 3, "f": 0.5, "y": b"\xff", "at": NOON, "v": np.array([1, 2], np.float32)}
    return [full, dict.fromkeys(full), *({**full, name: None} for name in full), full]


def vector_rows() -> list[dict[str, Any]]:
    """Vectors; ragged ones of no, one and many numbers."""
    return [
        {"fixed": np.arange(n, n + 3, dtype=np.float32), "ragged": np.linspace(0, 1, n, dtype=np.float32), "ids": np.arange(n % 4, dtype=np.int32)}
        for n in range(23)
    ]


TEXT_ROWS = [{"text": text} for text in TEXTS]
MANY_ROWS = [{"text": f"row {n} " + "word " * (n * n % 61), "place": f"p{n % 3}", "n": n} for n in range(211)]

CASES = [
    Case("every scalar type", hr.Pipeline("scalars", scalars), scalar_rows(), ("s", "f")),
    Case("nulls of every type", hr.Pipeline("optionals", optionals), optional_rows(), ("s", "v")),
    Case("vectors", hr.Pipeline("vectors", vectors), vector_rows(), ("ragged",)),
    Case("lists", hr.Pipeline("lists", lists), TEXT_ROWS),
    Case("images", hr.Pipeline("images", images), [{"image": bytes([137, n]) * (n * 1000)} for n in range(6)], ("image",)),
    Case("a token budget", hr.Pipeline("tokens", Hash()), [*TEXT_ROWS, *MANY_ROWS], ("text",)),
    Case("settings", hr.Pipeline("settings", Hash(salt="b")).with_settings(hash={"scale": 3.0}), TEXT_ROWS),
    Case("several groups", hr.Pipeline("groups", clean, length, Hash(), norm, Label(limit=300.0)), MANY_ROWS, ("n", "place")),
    Case("some outputs", hr.Pipeline("some", clean, length, Hash(), norm, outputs=["norm"]), MANY_ROWS),
    Case("a pipeline in a pipeline", hr.Pipeline("outer", hr.Pipeline("inner", clean, length), lists), TEXT_ROWS),
    Case("any type", hr.Pipeline("any", anything), [{"value": n, "other": {"x": n, "y": [str(n)]}} for n in range(9)], ("other", "value")),
    Case("one row", hr.Pipeline("one", clean, Hash()), TEXT_ROWS[2:3]),
]
