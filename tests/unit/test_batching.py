"""Batch rules: what they refuse, and slices worked out by hand."""

import numpy as np
import pytest

from headrace import rows, tokens
from headrace.errors import DefinitionError


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (lambda: rows(0), ["hr.rows(n)", "whole number of at least 1", "got 0"]),
        (lambda: rows(True), ["hr.rows(n)", "got True"]),
        (lambda: rows("8"), ["hr.rows(n)", "got '8'"]),
        (lambda: tokens(1.5, of="text"), ["hr.tokens(budget)", "whole number", "got 1.5"]),
        (lambda: tokens(8, of=""), ["of=...", "name the column", "got ''"]),
        (lambda: tokens(8, of=3), ["of=...", "name the column", "got 3"]),
        (lambda: tokens(8, of="text", bytes_per_token=0), ["bytes_per_token", "above 0", "got 0"]),
        (lambda: tokens(8, of="text", bytes_per_token="4"), ["bytes_per_token", "got '4'"]),
        (lambda: tokens(8, of="text", longest=0), ["longest", "at least 1", "got 0"]),
    ],
)
def test_an_impossible_rule_is_refused(mistake, parts):
    """A rule that cuts no slice is refused where it is written, with the value and what is allowed."""
    with pytest.raises(DefinitionError) as caught:
        mistake()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("rule", "lengths", "shrink", "slices"),
    [
        (rows(2), [1, 1, 1, 1, 1], 1, [[0, 1], [2, 3], [4]]),
        (rows(4), [1, 1, 1, 1, 1], 2, [[0, 1], [2, 3], [4]]),
        (rows(2), [1, 1], 8, [[0], [1]]),
        (rows(2), [], 1, []),
        (tokens(6, of="text"), [1, 3, 2, 1], 1, [[1, 2], [0, 3]]),
        (tokens(6, of="text"), [1, 3, 2, 1], 2, [[1], [2], [0, 3]]),
        (tokens(4, of="text"), [9, 1, 1], 1, [[0], [1, 2]]),
        (tokens(4, of="text"), [0, 0], 1, [[0, 1]]),
        (tokens(4, of="text"), [], 1, []),
    ],
)
def test_slices(rule, lengths, shrink, slices):
    """Rows are cut in order; under a budget the longest come first, and equals keep their order."""
    assert [part.tolist() for part in rule.slices(np.array(lengths, np.int64), shrink=shrink)] == slices


@pytest.mark.parametrize(("rule", "text"), [(rows(8), "8 rows"), (tokens(16_384, of="text"), "16,384 tokens of text")])
def test_text(rule, text):
    """A rule is printed with its unit."""
    assert str(rule) == text
