"""The features of one key as one blob.

    event time | as of | expiry | numbers, by their width, and truth values | a bit per feature that is there | lengths of what varies | vectors | what varies

All features of a key are one value for a store, which changes whole or not at all. The three instants are microseconds since 1970, moved up by 2**63
and big-endian: they compare as bytes as they do as instants, in whatever language. The first two say which of two values is the later one. The rest is
as in `cells`, in the order of the schema. Lengths have 4 bytes each. Behind the numbers of 8 bytes is the event time once more, as one of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.online_store import cells

TIME, RANK, EXPIRY = slice(0, 8), slice(0, 16), slice(16, 24)
"""Where in a blob the event time is, what makes it later than others, and its expiry."""

NEVER = 2**63 - 1
"""The expiry of what does not expire."""

MIDDLE = 2**63
"""What is added to an instant in a blob."""

KINDS = {"w8": "<u8", "w4": "<u4", "w2": "<u2", "w1": "u1"}
"""What numpy makes of numbers of each width."""


def coded(instant_us: int) -> bytes:
    """An instant as it stands in a blob."""
    return (instant_us + MIDDLE).to_bytes(8, "big")


def instant_us(code: bytes) -> int:
    """The instant that `coded` wrote."""
    return int.from_bytes(code, "big") - MIDDLE


class Layout:
    """How rows of a schema lie in blobs.

    Numbers of one width lie together, so that they are turned into columns at once.

    Attributes:
        features: the schema.
        head: what is the same in all blobs, as numpy has it, up to the vectors. Numbers are `w8`, `w4`, `w2` and `w1`, truth values `truths`.
        numbers: by name in `head`, the places of those features in the schema.
        wide: by place, where a vector lies in a blob.
        varying: the places of features that vary in length.
        fixed_bytes: how much of a blob does not vary.
        full: the bits of a row that has all features.

    Raises:
        ValueError: a column has a type that cannot be kept; names it.
    """

    def __init__(self, features: pa.Schema) -> None:
        self.features = features
        self.numbers: dict[str, list[int]] = {"w8": [], "w4": [], "w2": [], "w1": [], "truths": []}
        self.wide: dict[int, slice] = {}
        self.varying: list[int] = []
        widths = {}
        for at, field in enumerate(features):
            try:
                size = cells.width(field.type)
            except ValueError as error:
                raise ValueError(f"column {field.name!r}: {error}") from None
            if size is None:
                self.varying.append(at)
            elif field.type.num_fields:
                widths[at] = size
            else:
                self.numbers["truths" if pa.types.is_boolean(field.type) else f"w{size}"].append(at)
        fields: list[Any] = [("time", ">u8"), ("known", ">u8"), ("expires", ">u8")]
        fields += [(name, KINDS.get(name, "u1"), (len(places) + (name == "w8"),)) for name, places in self.numbers.items() if places or name == "w8"]
        fields.append(("present", "u1", ((len(features) + 7) // 8,)))
        if self.varying:
            fields.append(("lengths", "<u4", (len(self.varying),)))
        self.head = np.dtype(fields)
        end = self.head.itemsize
        for at, size in widths.items():
            self.wide[at] = slice(end, end + size)
            end += size
        self.fixed_bytes = end
        self.full = np.packbits(np.ones(len(features), np.bool_), bitorder="little").tobytes()

    def encode(self, table: pa.Table, times_us: npt.NDArray[np.int64], expiry_us: npt.NDArray[np.int64], at_us: int) -> list[bytes]:
        """The rows of a table of exactly this schema as blobs, as of `at_us`.

        Raises:
            ValueError: a value that cannot be kept; names its column.
        """
        heads = np.zeros(len(table), self.head)
        heads["time"], heads["expires"] = times_us.view(np.uint64) ^ np.uint64(MIDDLE), expiry_us.view(np.uint64) ^ np.uint64(MIDDLE)
        heads["known"], heads["w8"][:, -1] = at_us + MIDDLE, times_us
        present = np.empty((len(table), len(self.features)), np.bool_)
        place = {at: (name, column) for name, places in self.numbers.items() for column, at in enumerate(places)}
        wide: list[list[bytes]] = []
        varying: list[list[bytes]] = []
        for at, column in enumerate(table.columns):
            array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            present[:, at] = cells.is_there(array)
            try:
                if at in place:
                    heads[place[at][0]][:, place[at][1]] = cells.raw(array)
                elif at in self.wide:
                    wide.append([row.tobytes() for row in cells.raw(array)])
                else:
                    heads["lengths"][:, len(varying)] = np.fromiter(map(len, packed := cells.pack(array)), np.int64, len(array))
                    varying.append(packed)
            except ValueError as error:
                raise ValueError(f"column {self.features.names[at]!r}: {error}") from None
        heads["present"] = np.packbits(present, axis=1, bitorder="little")
        whole, size = heads.tobytes(), self.head.itemsize
        return [b"".join((whole[start : start + size], *rest)) for start, *rest in zip(range(0, len(whole), size), *wide, *varying, strict=True)]
