"""Workers: slicing, sorting, overlap and running out of memory never show in the result."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from workers import OVERLAPS, worker_of

import headrace as hr
from headrace.events import BudgetHalved
from headrace.stage import Stage
from headrace.worker import Worker

TEXTS = st.lists(st.text("abé", max_size=12), max_size=20)
RULES = st.integers(1, 30).map(hr.rows) | st.integers(1, 40).map(lambda budget: hr.tokens(budget, of="text", bytes_per_token=1))


class OutOfMemoryError(RuntimeError):
    """Named as torch and cupy name theirs."""


def features(text):
    """All kinds of results, each a function of its own row alone."""
    return {
        "upper": [t.upper() for t in text],
        "size": np.array([len(t) for t in text]),
        "fixed": np.array([[len(t), t.count("a")] for t in text], "f4").reshape(len(text), 2),
        "ragged": [np.arange(len(t), dtype="f4") for t in text],
        "maybe": [t or None for t in text],
        "letters": [list(t) for t in text],
    }


OUT = {"upper": str, "size": int, "fixed": hr.Vector(2), "ragged": hr.Vector(), "maybe": str | None, "letters": list[str]}


def stage_of(body, rule, out=OUT):
    """A stage with that body and batch rule that reads `text`."""

    def probe(text: hr.Column[str]):
        return body(text)

    return Stage.of(hr.stage(out=out, batch=rule)(probe))


def block(texts, cut=0):
    """The texts as a table of two chunks, beside a column that no stage touches."""
    data = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    return pa.concat_tables([data.slice(0, cut), data.slice(cut)])


@given(TEXTS, RULES, st.sampled_from(OVERLAPS), st.integers(0, 20))
def test_a_sliced_stage_gives_what_one_call_gives(texts, rule, overlap, cut):
    """Whatever the rule, the chunks and the overlap, the table equals that of a single call over all rows."""
    whole = Worker([stage_of(features, hr.rows(100))], overlap=False)(block(texts))
    sliced = worker_of([stage_of(features, rule)], overlap=overlap)(block(texts, cut))
    sliced.validate(full=True)
    assert sliced.schema == whole.schema
    assert sliced.to_pydict() == whole.to_pydict()


@given(TEXTS, RULES, RULES)
def test_fused_stages_give_what_separate_ones_give(texts, first, second):
    """A group of two stages equals one after the other, also where the second overwrites what it reads."""
    stages = [stage_of(lambda text: {"text": [t[::-1] for t in text]}, first, {"text": str}), stage_of(features, second)]
    fused = Worker(stages)(block(texts))
    assert fused.to_pydict() == Worker(stages[1:])(Worker(stages[:1])(block(texts))).to_pydict()


@given(TEXTS, RULES, st.sampled_from(OVERLAPS), st.integers(1, 30))
def test_out_of_memory_loses_and_repeats_no_row(texts, rule, overlap, most):
    """Where a call over `most` rows runs out of memory, each row is still done once, in order, in calls that fit."""
    done, seen = [], []

    def body(text):
        if len(text) > most:
            raise OutOfMemoryError(f"{len(text)} rows")
        done.extend(text)
        return features(text)

    worker = worker_of([stage_of(body, rule)], overlap=overlap, emit=seen.append)
    assert worker(block(texts)).to_pydict() == Worker([stage_of(features, rule)])(block(texts)).to_pydict()
    assert sorted(done) == sorted(texts)
    divisors = [event.divisor for event in seen if isinstance(event, BudgetHalved)]
    assert divisors == sorted(set(divisors))
    assert worker.shrink["probe"] == (divisors[-1] if divisors else 1)


@given(TEXTS, RULES, st.sampled_from(OVERLAPS))
def test_padding_is_counted_as_called(texts, rule, overlap):
    """Padded tokens are at least the rows' own, and exactly the longest row times the rows of each call."""
    sizes, seen = [], []

    def body(text):
        sizes.append(len(text) * (max(max(len(t.encode()), 1) for t in text) if isinstance(rule, hr.batching.Tokens) else 1))
        return features(text)

    worker_of([stage_of(body, rule)], overlap=overlap, emit=seen.append)(block(texts))
    assert seen[-1].padded_tokens == sum(sizes) >= seen[-1].tokens
