"""--where: what it means, and what it refuses."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pytest

from headrace.errors import SourceError
from headrace.filters import parse

DATA = pa.table(
    {
        "n": pa.array([1, 2, 3, None], pa.int32()),
        "x": pa.array([0.5, 2.0, None, 4.0]),
        "text": ["a", "b", None, "it's"],
        "ok": [True, False, None, True],
        "day": pa.array([dt.date(2020, 1, n) for n in (1, 2, 3, 4)]),
        "utc": pa.array([dt.datetime(2020, 1, n, tzinfo=dt.UTC) for n in (1, 2, 3, 4)], pa.timestamp("us", tz="UTC")),
        "naive": pa.array([dt.datetime(2020, 1, n) for n in (1, 2, 3, 4)], pa.timestamp("ms")),
        "word": pa.array(["a", "b", "a", None]).dictionary_encode(),
        "tags": [["a"], [], None, ["b"]],
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("n >= 2", [1, 2]),
        ("2 <= n", [1, 2]),
        ("1 < n < 3", [1]),
        ("n != 2", [0, 2]),
        ("n > 1.5", [1, 2]),
        ("n == -1", []),
        ("n in (1, 3, 9)", [0, 2]),
        ("n in (1.5, 2.0)", [1]),
        ("n not in (1, 3)", [1]),
        ("not (n in (1, 3))", [1]),
        ("n in ()", []),
        ("n is None", [3]),
        ("n is not None and n < 2", [0]),
        ("n == None", [3]),
        ("n <= x", [1]),
        ("ok", [0, 3]),
        ("not ok", [1]),
        ("ok == True", [0, 3]),
        ('text == "it\'s"', [3]),
        ("text in ('a', 'b') or x > 3", [0, 1, 3]),
        ("(n == 1 or n == 2) and not ok", [1]),
        ("day > '2020-01-02'", [2, 3]),
        ("utc >= '2020-01-03'", [2, 3]),
        ("utc == '2020-01-03T00:00:00Z'", [2]),
        ("utc == '2020-01-03T02:00:00+02:00'", [2]),
        ("utc in ('2020-01-01', '2020-01-04 00:00:00')", [0, 3]),
        ("naive < '2020-01-02'", [0]),
        ("word == 'a'", [0, 2]),
        ("word in ('b',)", [1]),
        ("word not in ('b',)", [0, 2]),
        ("tags is None", [2]),
        ("  n == 1  ", [0]),
    ],
)
def test_rows_for_which_it_holds(text: str, rows: list[int]) -> None:
    """Nulls compare as in SQL: a row is taken only when the expression is true for it."""
    numbered = DATA.append_column("row", pa.array(range(4)))
    assert numbered.filter(parse(text, DATA.schema).expression)["row"].to_pylist() == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n >=", "is not an expression: invalid syntax; allowed are columns compared"),
        ("n = 3", "is not an expression"),
        ("", "is not an expression"),
        ("m > 3", r"no column 'm' in the input; it has 'n', 'x'"),
        ("texts == 'a'", r"no column 'texts' .*did you mean 'text'\?"),
        ("text > 3", "3 does not fit column 'text' of type string: text and numbers do not compare"),
        ("n == 'a'", "'a' does not fit column 'n' of type int32"),
        ("n in ('a', 1)", "'a' does not fit column 'n' of type int32"),
        ("day > 5", "dates are written as text"),
        ("day > 'tomorrow'", "'tomorrow' does not fit column 'day' of type date32"),
        ("utc > 'tomorrow'", "'tomorrow' does not fit column 'utc' of type timestamp"),
        ("n > text", "does not fit the input's columns"),
        ("n", "'n' is int32, not a truth value; compare it with something"),
        ("len(text) > 3", r"cannot use 'len\(text\)'"),
        ("n + 1 > 3", r"cannot use 'n \+ 1'"),
        ("n > f(3)", r"cannot use 'f\(3\)'"),
        ("n in 'abc'", "cannot use"),
        ("n > {[1]: 2}", "cannot use"),
        ("__import__('os').system('true')", "cannot use"),
        ("n if ok else x", "cannot use"),
        ("tags == 'a'", "does not fit column 'tags'"),
        ("n > 99999999999999999999", "does not fit column 'n'"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    """What it cannot mean is refused with the part that is wrong, and what is allowed."""
    with pytest.raises(SourceError, match="--where.*" + message):
        parse(text, DATA.schema)


def test_the_columns_that_it_reads() -> None:
    """A filter knows its columns, each once, so that the reader fetches them."""
    found: Any = parse("n > 1 and (text == 'a' or n < x)", DATA.schema)
    assert len(found.columns) == 3 and set(found.columns) == {"n", "text", "x"}
