"""Wiring and plans: for any chain of stages, columns are where they are needed, and nowhere else."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace as hr
from headrace.columns import type_of
from headrace.errors import WiringError
from headrace.hardware import Cluster, Node
from headrace.plan import resolve

NAMES = "abcdef"
ONE = Cluster((Node("one", cpus=64),))
ANNOTATIONS = [str, str | None, int, int | None, hr.Vector(3), hr.Vector(3) | None, hr.Vector(), hr.Vector() | None, list[int], list[int | None]]
COLUMN_SETS = st.sets(st.sampled_from(NAMES), min_size=1, max_size=3).map(sorted)
CHAINS = st.lists(st.tuples(COLUMN_SETS, COLUMN_SETS, st.booleans()), min_size=1, max_size=6)


def step(number, reads, writes, model=False, annotation=int):
    """A stage that adds its columns up and writes the sum, plus its number, to each."""
    sums = "[{} + sum(row) for row in zip({})]".format(number, ", ".join(reads))
    call = eval(f"lambda {'self, ' * model}{', '.join(reads)}: {{name: {sums} for name in {writes!r}}}")
    call.__annotations__ = dict.fromkeys(reads, hr.Column[annotation])
    target = type("Model", (), {"__call__": call}) if model else call
    made = hr.stage(out=dict.fromkeys(writes, annotation), name=f"s{number}")(target)
    return made() if model else made


def pipeline_of(chain, **options):
    return hr.Pipeline("p", *(step(number, *spec) for number, spec in enumerate(chain)), **options)


def by_hand(chain, row):
    """The columns after all stages, in plain Python."""
    row = dict(row)
    for number, (reads, writes, _) in enumerate(chain):
        row |= dict.fromkeys(writes, number + sum(row[name] for name in reads))
    return row


@given(CHAINS)
def test_inputs_are_what_is_read_before_it_is_written(chain):
    """A column is an input if and only if its first reader comes before, or is, its first writer."""
    expected, written = set(), set()
    for reads, writes, _ in chain:
        expected |= set(reads) - written
        written |= set(writes)
    pipeline = pipeline_of(chain)
    assert (set(pipeline.inputs), set(pipeline.outputs)) == (expected, written)


@given(CHAINS)
def test_a_missing_input_is_named(chain):
    """Inputs declared without one that is read are refused, by name; inputs declared in full are taken."""
    inputs = pipeline_of(chain).inputs
    assert pipeline_of(chain, inputs=dict(inputs)).inputs == inputs
    for missing in inputs:
        with pytest.raises(WiringError, match=f"reads '{missing}'"):
            pipeline_of(chain, inputs={name: column for name, column in inputs.items() if name != missing})


@given(CHAINS, st.data())
def test_local_means_one_stage_after_the_other(chain, data):
    """A pipeline's result is that of its stages in turn, cut down to outputs and kept columns."""
    whole = pipeline_of(chain)
    outputs = data.draw(st.lists(st.sampled_from(sorted(whole.outputs)), min_size=1, unique=True))
    keep = [name for name in sorted(whole.inputs) if name not in whole.outputs]
    row = dict(zip(NAMES, itertools.count(100), strict=False))
    (found,) = pipeline_of(chain, outputs=outputs).local([row], keep=keep)
    assert list(found) == [*keep, *outputs]
    assert found == {name: by_hand(chain, row)[name] for name in found}


@given(CHAINS, st.data())
def test_every_group_gets_what_it_reads_and_nothing_is_carried_in_vain(chain, data):
    """Between groups flow exactly the columns that a later group, the sink or `keep` needs, and all stages run in order."""
    whole = pipeline_of(chain)
    outputs = data.draw(st.lists(st.sampled_from(sorted(whole.outputs)), min_size=1, unique=True))
    keep = [name for name in NAMES if name not in whole.outputs]
    plan = resolve(pipeline_of(chain, outputs=outputs), ONE, keep=keep)
    assert [stage.name for group in plan.groups for stage in group.stages] == [stage.name for stage in whole.stages]
    there = set(plan.source)
    for at, group in enumerate(plan.groups):
        for stage in group.stages:
            assert set(stage.reads) <= there
            there |= set(stage.writes)
        assert set(group.carries) <= there
        there = set(group.carries)
        later, rewritten = set(), set()
        for stage in (stage for after in plan.groups[at + 1 :] for stage in after.stages):
            later |= set(stage.reads) - rewritten
            rewritten |= set(stage.writes)
        assert there == later | (({*keep, *outputs}) - rewritten)
    assert set(plan.columns) == {*keep, *outputs}


@given(st.permutations(ANNOTATIONS).flatmap(lambda order: st.tuples(st.just(order[0]), st.just(order[1]))))
def test_two_readers_of_an_input_may_come_in_any_order(readers):
    """Two declarations of an input either agree on the same type in both orders, that feeds both, or are refused in both."""

    def wired(order):
        try:
            return hr.Pipeline("p", *(step(at, ["x"], [f"y{at}"], annotation=annotation) for at, annotation in enumerate(order))).inputs["x"]
        except WiringError:
            return None

    found = wired(readers)
    assert found == wired(readers[::-1])
    assert found is None or all(found.feeds(type_of(annotation)) for annotation in readers)


@given(st.sampled_from(ANNOTATIONS), st.sampled_from(ANNOTATIONS))
def test_an_edge_is_wired_if_and_only_if_the_writer_feeds_the_reader(written, read):
    """A type that does not fit is refused where the pipeline is written, with both types."""
    steps = [step(0, ["x"], ["y"], annotation=written), step(1, ["y"], ["z"], annotation=read)]
    if type_of(written).feeds(type_of(read)):
        assert set(hr.Pipeline("p", *steps).inputs) == {"x"}
    else:
        with pytest.raises(WiringError) as caught:
            hr.Pipeline("p", *steps)
        assert f"reads 'y' as {type_of(read)}" in str(caught.value)
        assert f"writes it as {type_of(written)}" in str(caught.value)
