"""Plans: fusion, hardware, replicas, and which columns cross which edge."""

import pytest

import headrace as hr
from headrace.columns import type_of
from headrace.errors import HardwareError, WiringError
from headrace.hardware import Cluster, Node
from headrace.plan import explain, resolve

NODES = (Node("plain", cpus=8), Node("fast", cpus=8, gpus=4, kinds=("L4",)))
BOTH, PLAIN = Cluster(NODES), Cluster(NODES[:1])


def function(name, reads, writes, **options):
    """A function stage over text columns."""
    call = eval(f"lambda {reads}: None")
    call.__annotations__ = {reads: hr.Column[str]}
    return hr.stage(out={writes: str}, name=name, **options)(call)


def model(name, reads, writes, **options):
    """A class stage over text columns, made."""
    call = eval(f"lambda self, {reads}: None")
    call.__annotations__ = {reads: hr.Column[str]}
    return hr.stage(out={writes: str}, name=name, **options)(type("Model", (), {"__call__": call}))()


A, B, C = (function(name, reads, writes) for name, reads, writes in (("a", "t", "u"), ("b", "u", "v"), ("c", "v", "w")))
GPU = model("m", "u", "v", on=[hr.gpu(1, "L4"), hr.cpu(2)], replicas=(1, 8))


@pytest.mark.parametrize(
    ("steps", "cluster", "groups"),
    [
        ([A, B, C], BOTH, ["a+b+c"]),
        ([A, GPU, C], BOTH, ["a", "m", "c"]),
        ([A, function("b", "u", "v", on=hr.cpu(2)), C], BOTH, ["a", "b", "c"]),
        ([A, function("b", "u", "v", ray={"num_returns": 1}), C], BOTH, ["a", "b", "c"]),
        ([A, function("b", "u", "v", on=[hr.gpu(1), hr.cpu(1)]), C], PLAIN, ["a+b+c"]),
        ([A, function("b", "u", "v", on=[hr.gpu(1), hr.cpu(1)]), C], BOTH, ["a", "b", "c"]),
        ([model("m", "t", "u"), model("n", "u", "v")], BOTH, ["m", "n"]),
    ],
)
def test_fusion(steps, cluster, groups):
    """Neighbouring functions on the same hardware with the same Ray arguments share a group; a model stands alone."""
    assert [group.name for group in resolve(hr.Pipeline("p", *steps), cluster).groups] == groups


@pytest.mark.parametrize(("replicas", "cluster", "span"), [((1, 8), BOTH, (1, 4)), (None, BOTH, (1, 4)), (2, BOTH, (2, 2)), ((3, None), PLAIN, (3, 4))])
def test_replicas_are_held_to_what_fits(replicas, cluster, span):
    """The bounds are the stage's own, never beyond what the cluster holds of the hardware chosen."""
    stage = model("m", "t", "u", on=[hr.gpu(1, "L4"), hr.cpu(2)], replicas=replicas)
    assert resolve(hr.Pipeline("p", stage), cluster).groups[0].replicas == span


def test_models_share_the_cluster():
    """Models of one plan are given replicas that fit beside each other, in turn."""
    plan = resolve(hr.Pipeline("p", model("m", "t", "u"), model("n", "u", "v", replicas=(2, None))), PLAIN)
    assert [group.replicas for group in plan.groups] == [(1, 4), (2, 4)]


def test_functions_have_no_replicas():
    """A group of functions runs as tasks."""
    assert resolve(hr.Pipeline("p", A, B), BOTH).groups[0].replicas is None


@pytest.mark.parametrize(
    ("outputs", "keep", "carries"),
    [
        (None, [], [["u"], ["u", "v"], ["u", "v", "w"]]),
        (["w"], [], [["u"], ["v"], ["w"]]),
        (["w"], ["id", "t"], [["id", "t", "u"], ["id", "t", "v"], ["id", "t", "w"]]),
        (["u", "w"], ["u"], [["u"], ["u", "v"], ["u", "w"]]),
    ],
)
def test_only_what_is_needed_later_crosses_an_edge(outputs, keep, carries):
    """A group passes on outputs, kept columns, and what a later group reads; nothing else."""
    plan = resolve(hr.Pipeline("p", A, GPU, C, outputs=outputs), BOTH, keep=keep)
    assert [sorted(group.carries) for group in plan.groups] == carries


@pytest.mark.parametrize(
    ("keep", "source", "columns"),
    [
        ([], {"t": "str"}, {"w": "str"}),
        (["id"], {"t": "str", "id": "any"}, {"id": "any", "w": "str"}),
        (["t", "id"], {"t": "str", "id": "any"}, {"t": "str", "id": "any", "w": "str"}),
        (["w"], {"t": "str"}, {"w": "str"}),
    ],
)
def test_source_and_result_columns(keep, source, columns):
    """The source is asked for what is read or kept; the result has the kept columns first."""
    plan = resolve(hr.Pipeline("p", A, B, C, outputs=["w"]), BOTH, keep=keep)
    assert ({n: str(c) for n, c in plan.source.items()}, list(plan.columns)) == (source, list(columns))
    assert {n: str(c) for n, c in plan.columns.items()} == columns


@pytest.mark.parametrize(
    ("steps", "keep", "error", "parts"),
    [
        ([model("m", "t", "u", on=hr.gpu(1, "H100"))], [], HardwareError, ["'m'", "gpu(1, H100)", "plain: 8 CPUs; fast: 8 CPUs, 4 x L4", "hr.cpu(1)"]),
        ([model("m", "t", "u", replicas=40)], [], HardwareError, ["replica 17", "'m'", "40 of 'm'", "replicas=(least, most)"]),
        ([A, B], ["u"], WiringError, ["keep 'u'", "'a' writes", "another name"]),
    ],
)
def test_a_plan_that_cannot_be_is_refused(steps, keep, error, parts):
    """No hardware, or a column that cannot be kept: refused before anything is rented."""
    with pytest.raises(error) as caught:
        resolve(hr.Pipeline("p", *steps, outputs=["v"] if keep else None), BOTH, keep=keep)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


TWO_CPUS = hr.cpu(2)
M, N = model("m", "u", "v"), model("n", "v", "w")


@pytest.mark.parametrize(
    ("steps", "groups", "whys"),
    [
        ([A, B, C], ["a+b+c"], [""]),
        ([A, GPU, C], ["a+m+c"], [""]),
        ([A, M, N], ["a+m+n"], [""]),
        ([A, M, model("n", "v", "w", on=TWO_CPUS)], ["a+m+n"], [""]),
        ([A, GPU, N], ["a+m", "n"], ["", "cpu(1) after gpu(1, L4)"]),
        ([A, M, model("n", "v", "w", on=hr.gpu(1))], ["a+m", "n"], ["", "gpu(1) after cpu(1)"]),
        ([A, GPU, model("n", "v", "w", on=hr.gpu(1))], ["a+m", "n"], ["", "gpu(1) after gpu(1, L4)"]),
        ([A, M, model("n", "v", "w", replicas=(1, 8))], ["a+m", "n"], ["", "replicas 1..8 after 1.."]),
        ([A, M, model("n", "v", "w", replicas=2)], ["a+m", "n"], ["", "replicas 2..2 after 1.."]),
        ([A, M, model("n", "v", "w", ray={"resources": {"x": 1}})], ["a+m", "n"], ["", "ray={'resources': {'x': 1}} after {}"]),
        ([A, model("m", "u", "v", on=hr.cpu(6)), model("n", "v", "w", on=hr.cpu(6))], ["a+m", "n"], ["", "no room for cpu(12) in one replica"]),
        ([A, M, function("c", "v", "w", apart=True)], ["a+m", "c"], ["", "apart=True"]),
        ([A, model("m", "u", "v", apart=True), C], ["a", "m", "c"], ["", "apart=True", "m is apart"]),
        ([function("a", "t", "u", apart=True), B, C], ["a", "b+c"], ["", "a is apart"]),
        ([A, function("b", "u", "v", on=TWO_CPUS), C], ["a+b+c"], [""]),
        ([A, M, function("c", "v", "w", ray={"resources": {"x": 1}})], ["a+m", "c"], ["", "ray={'resources': {'x': 1}} after {}"]),
    ],
)
def test_neighbours_share_a_replica_online(steps, groups, whys):
    """Functions join whatever they stand beside, models on CPUs that scale alike add up; the rest begins a group and says why."""
    plan = resolve(hr.Pipeline("p", *steps), BOTH, online=True)
    assert [group.name for group in plan.groups] == groups
    assert [group.why for group in plan.groups] == whys


@pytest.mark.parametrize(
    ("steps", "hardware", "replicas"),
    [
        ([A, B], ["cpu(1)"], [(1, 16)]),
        ([A, M], ["cpu(1)"], [(1, 16)]),
        ([M, model("n", "v", "w", on=hr.cpu(2, memory_gb=3))], ["cpu(3) with 3 GB"], [(1, 4)]),
        ([A, GPU, C], ["gpu(1, L4)"], [(1, 4)]),
        ([A, GPU, N], ["gpu(1, L4)", "cpu(1)"], [(1, 4), (1, 12)]),
        ([A, model("m", "u", "v", replicas=(2, 3), on=hr.cpu(0.5)), C], ["cpu(0.5)"], [(2, 3)]),
    ],
)
def test_a_replica_has_what_its_heaviest_stages_ask_for(steps, hardware, replicas):
    """Functions run in the threads that a model leaves idle; models on CPUs each get their own. Every group has bounds of replicas."""
    plan = resolve(hr.Pipeline("p", *steps), BOTH, online=True)
    assert [str(group.choice) for group in plan.groups] == hardware
    assert [group.replicas for group in plan.groups] == replicas


def test_models_that_fit_only_apart_stay_apart():
    """As many replicas of both as are asked for at least must fit."""
    steps = [model("m", "u", "v", on=hr.cpu(3), replicas=2), model("n", "v", "w", on=hr.cpu(2), replicas=2)]
    nodes = (Node("one", cpus=6), Node("two", cpus=4))
    assert [group.name for group in resolve(hr.Pipeline("p", *steps), Cluster(nodes), online=True).groups] == ["m", "n"]
    assert [group.name for group in resolve(hr.Pipeline("p", *steps), BOTH, online=True).groups] == ["m+n"]


def test_what_reaches_a_group_is_what_the_one_before_carries():
    """Group by group, the first from the request; an input that a later group reads is carried to it."""
    late = function("c", "t", "w", apart=True)
    plan = resolve(hr.Pipeline("p", A, late, outputs=["w", "u"]), BOTH, online=True)
    assert [list(columns) for columns in plan.arrivals] == [["t"], ["u", "t"]]
    assert list(plan.groups[-1].carries) == ["w", "u"]


def test_nothing_is_kept_online():
    """A request's other columns are with whoever sent it."""
    with pytest.raises(WiringError, match="keep=\\['id'\\] is for batch jobs"):
        resolve(hr.Pipeline("p", A), BOTH, keep=["id"], online=True)


def test_explain_online():
    """The groups of a service, and why each begins where it does."""
    text = explain(resolve(hr.Pipeline("p", A, GPU, C, model("n", "w", "x", batch=4)), BOTH, online=True))
    assert text == (
        "pipeline p\n"
        "cluster  plain: 8 CPUs; fast: 8 CPUs, 4 x L4\n"
        "\n"
        "request\n"
        "   │  t: str\n"
        "   ▼\n"
        "group 1: a+m+c    gpu(1, L4), 1 to 4 replicas kept in memory\n"
        "   a(t: str) -> u: str    batch 1024 rows\n"
        "   m(u: str) -> v: str    batch 32 rows\n"
        "   c(v: str) -> w: str    batch 1024 rows\n"
        "   │  u: str, v: str, w: str\n"
        "   ▼\n"
        "group 2: n    cpu(1), 1 to 12 replicas kept in memory    begins here: cpu(1) after gpu(1, L4)\n"
        "   n(w: str) -> x: str    batch 4 rows\n"
        "   │  u: str, v: str, w: str, x: str\n"
        "   ▼\n"
        "answer"
    )


def test_explain():
    """The text shows columns on every edge, and each group's hardware, replicas, batch rules and settings."""
    text = explain(resolve(hr.Pipeline("p", A, GPU, C, outputs=["w"]), BOTH, keep=["id"]))
    assert text == (
        "pipeline p\n"
        "cluster  plain: 8 CPUs; fast: 8 CPUs, 4 x L4\n"
        "\n"
        "source\n"
        "   │  t: str, id: any\n"
        "   ▼\n"
        "group 1: a    cpu(1), tasks, as many as there is room for\n"
        "   a(t: str) -> u: str    batch 1024 rows\n"
        "   │  id: any, u: str\n"
        "   ▼\n"
        "group 2: m    gpu(1, L4), 1 to 4 replicas kept in memory\n"
        "   m(u: str) -> v: str    batch 32 rows\n"
        "   │  id: any, v: str\n"
        "   ▼\n"
        "group 3: c    cpu(1), tasks, as many as there is room for\n"
        "   c(v: str) -> w: str    batch 1024 rows\n"
        "   │  id: any, w: str\n"
        "   ▼\n"
        "sink"
    )
    kept = explain(resolve(hr.Pipeline("p", A), BOTH, keep=["id"]), types={"id": type_of(int)})
    assert "id: int" in kept and "id: any" not in kept


@pytest.mark.parametrize(("replicas", "text"), [(1, "1 replica kept"), (3, "3 replicas kept"), ((1, 3), "1 to 3 replicas kept")])
def test_replicas_in_words(replicas, text):
    """One replica is singular, a range is a range."""
    assert text in explain(resolve(hr.Pipeline("p", model("m", "t", "u", replicas=replicas)), BOTH))
