"""Batch rules: whatever the lengths, rows are cut into slices that lose nothing and keep within the rule."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace import rows, tokens

LENGTHS = st.lists(st.integers(0, 40), max_size=50).map(lambda lengths: np.array(lengths, np.int64))
RULES = st.integers(1, 60).map(rows) | st.integers(1, 200).map(lambda budget: tokens(budget, of="text"))
SHRINK = st.integers(0, 8).map(lambda power: 2**power)


@given(RULES, LENGTHS, SHRINK)
def test_every_row_is_in_exactly_one_slice(rule, lengths, shrink):
    """Slices are never empty, and together they are all rows, once each."""
    slices = list(rule.slices(lengths, shrink=shrink))
    assert all(len(part) for part in slices)
    assert sorted(int(row) for part in slices for row in part) == list(range(len(lengths)))


@given(RULES, LENGTHS, SHRINK)
def test_the_order_of_rows_can_be_restored(rule, lengths, shrink):
    """Sorting the slices' row numbers puts results back into the rows' own order."""
    order = np.concatenate([*rule.slices(lengths, shrink=shrink), np.empty(0, np.int64)]).astype(np.int64)
    assert (lengths[order][np.argsort(order)] == lengths).all()


@given(st.integers(1, 60), LENGTHS, SHRINK)
def test_rows_keeps_its_count(count, lengths, shrink):
    """No slice has more rows than the divided count, only the last has fewer, and rows stay in order."""
    slices = list(rows(count).slices(lengths, shrink=shrink))
    step = max(1, count // shrink)
    assert all(len(part) == step for part in slices[:-1])
    assert all(len(part) <= step for part in slices)
    assert all((np.diff(part) == 1).all() for part in slices)


@given(st.integers(1, 200), LENGTHS, SHRINK)
def test_tokens_keeps_its_budget(budget, lengths, shrink):
    """A slice's padded size is within the divided budget, unless it is a single row; the longest rows come first."""
    longest = []
    for part in tokens(budget, of="text").slices(lengths, shrink=shrink):
        longest.append(int(lengths[part].max()))
        assert len(part) == 1 or len(part) * longest[-1] <= max(1, budget // shrink)
    assert longest == sorted(longest, reverse=True)


@given(st.integers(1, 200), LENGTHS)
def test_tokens_wastes_no_call(budget, lengths):
    """The next row would not have fitted: two neighbouring slices never fit into one call."""
    slices = list(tokens(budget, of="text").slices(lengths))
    for part in slices[:-1]:
        assert (len(part) + 1) * max(1, int(lengths[part].max())) > budget


@given(RULES, LENGTHS, SHRINK)
def test_shrinking_never_makes_a_slice_larger(rule, lengths, shrink):
    """Twice the divisor gives at least as many slices, the first of them no larger; far enough, each row is alone."""
    before, after = (list(rule.slices(lengths, shrink=divisor)) for divisor in (shrink, 2 * shrink))
    assert len(after) >= len(before)
    assert not len(lengths) or len(after[0]) <= len(before[0])
    assert all(len(part) == 1 for part in rule.slices(np.maximum(lengths, 1), shrink=1024))
