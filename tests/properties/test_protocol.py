"""The commit protocol: in every order of steps, with a crash between any two, no row is lost and none comes twice.

The real `headrace.ledger` runs here over models of a disk and of an object store (no conditional put; a move is a copy, then a deletion;
folders go file by file), in small drivers that do what `headrace.on_ray` does. In every state that they can get into:

1. A row is in one committed file at most, and that file is there: in its place, or staged.
2. Rows that a run took as committed (`commit` returned, or `begin` with what it took over) are in the view from then on, for ever.
3. If `_SUCCESS` is there, the files of the output hold every row once; a dead row is among the letters.
4. A run that goes on from there undisturbed completes. Then the output holds every row once and nothing else, nothing is
   left in staging, and of the ledger only the last run's part.
5. A run whose `finish` returns was not too late: no newer claim had been put when it looked for the last time, after its last
   commit and after all its files were in their places. So whoever comes later knows all of it.
6. No committed file is deleted. (That is what 1 and 2 come to, state by state.)

Two runs are explored in full, three up to a number of changes from one to the other. `make faults` goes further, and shows that
each rule of the protocol is needed: without it, one of the laws above is broken.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from interleavings import Game, LawError, Program, alone, explore, follow
from runs import ROWS, STAGING, SUCCESS, Laws, Run, read

from headrace import ledger

STRAY = ((f"{STAGING}/000001-a/part-000001-a-zombie.json", b"[[0, 0], [0, 1]]"),)
BAD = frozenset({(0, 1)})
FIRST_UNIT = tuple(row for row in ROWS if row[0] == 0)


def merging(token: str, **options: Any) -> Run:
    """A run that merges what it has not published yet."""
    return Run(token=token, merges=True, **options)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Programs that meet, and how far to look: `quick` and `deep` are changes from one to another, -1 for any number.

    `before` are runs that were there earlier, `without` what is gone of their output, `killed` a run that died half-way, and
    `limits` the ledger's own numbers.
    """

    programs: Sequence[Program]
    quick: int | None
    deep: int = -1
    resumer: Program = field(default_factory=lambda: merging("zz"))
    before: Sequence[Run] = ()
    killed: Run | None = None
    without: Sequence[str] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    laws: Mapping[str, Any] = field(default_factory=dict)
    game: Mapping[str, Any] = field(default_factory=dict)


A_B, ALIKE = (merging("a"), merging("b")), {"alike": True}
SCENARIOS = {
    "two runs": Scenario(programs=A_B, quick=2, game=ALIKE),
    "two runs of falling names": Scenario(programs=A_B[::-1], quick=None, game=ALIKE),
    "files are published at once": Scenario(programs=[Run(token="a"), Run(token="b")], quick=None, game=ALIKE),
    "one publishes what the other merges": Scenario(programs=[Run(token="a"), merging("b")], quick=1),
    "three runs": Scenario(programs=[*A_B, merging("c")], quick=1, deep=4, game=ALIKE),
    "a zombie worker": Scenario(programs=A_B, quick=0, game={"strays": STRAY, **ALIKE}),
    "a put whose answer is lost": Scenario(programs=A_B, quick=0, game={"faults": 1, **ALIKE}),
    "a put that is given up": Scenario(programs=A_B, quick=0, limits={"_PUTS": 1}, game={"faults": 1, **ALIKE}),
    "a run that goes on after a put was given up": Scenario(
        programs=[Run(token="a", stubborn=True), Run(token="b", stubborn=True)], quick=0, limits={"_PUTS": 1}, game={"faults": 1, **ALIKE}
    ),
    "compaction at each commit": Scenario(programs=A_B, quick=1, limits={"_COMPACT_AFTER": 1}, game=ALIKE),
    "compaction and a lost answer": Scenario(
        programs=[Run(token="a", segment=1), Run(token="b", segment=1)], quick=None, deep=2, limits={"_COMPACT_AFTER": 2}, game={"faults": 1, **ALIKE}
    ),
    "dead letters": Scenario(programs=[merging("a", deadly=BAD), merging("b", deadly=BAD)], quick=0, resumer=merging("zz", deadly=BAD), game=ALIKE),
    "dead rows become done": Scenario(programs=[merging("a", deadly=BAD), merging("b", retry=True)], quick=0),
    "a retry of a finished output": Scenario(
        programs=[merging("a", retry=True), merging("b", retry=True)],
        quick=1,
        before=[Run(token="o", deadly=BAD)],
        resumer=merging("zz", looks=True),
        game=ALIKE,
    ),
    "a retry that fails again": Scenario(
        programs=[merging("a", retry=True, deadly=BAD), merging("b", retry=True)],
        quick=0,
        before=[Run(token="o", deadly=BAD)],
        resumer=merging("zz", looks=True),
    ),
    "an output without its _SUCCESS": Scenario(
        programs=A_B, quick=1, before=[Run(token="o")], without=[SUCCESS], resumer=merging("zz", looks=True), game=ALIKE
    ),
    "a finished output": Scenario(
        programs=[merging("a", looks=True), merging("b", looks=True)], quick=-1, before=[Run(token="o")], resumer=merging("zz", looks=True), game=ALIKE
    ),
    # Here _SUCCESS may come from a run that was frozen at its last step: it promises the input of that time.
    "an input that grew": Scenario(programs=A_B, quick=1, before=[Run(token="o", rows=FIRST_UNIT)], laws={"promised": runs.mask(FIRST_UNIT)}, game=ALIKE),
    "an input that grew, and nobody else": Scenario(
        programs=[Run(token="a", segment=1)], quick=0, before=[Run(token="o", rows=ROWS[:2])], laws={"promised": runs.mask(ROWS[:2]), "whole": True}
    ),
    "a restart": Scenario(programs=[merging("a"), merging("b", restart=True)], quick=1, laws={"promised": 0, "for_ever": False}),
    "a reader": Scenario(programs=[merging("a"), read], quick=2, killed=Run(token="o"), laws={"resumes": False}, game={"reader": 1}),
    "a reader and two runs": Scenario(programs=[merging("a"), merging("b"), read], quick=0, deep=3, laws={"resumes": False}, game={"reader": 2}),
}
STORES = {"disk": True, "object store": False}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files come from a count, so that a run does the same again."""
    monkeypatch.setattr(ledger, "uuid", runs.deterministic_names())


def played(scenario: Scenario, *, renames: bool, switches: int, most: int | None = None) -> tuple[int, int]:
    """Explore a scenario; returns how many states it has, and how many contents of the store."""
    laws = Laws(resumer=scenario.resumer, **scenario.laws)
    disk = runs.settled_before(*scenario.before, without=scenario.without)
    if scenario.killed:
        disk, _ = alone(scenario.killed, disk, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in scenario.limits.items():
            patch.setattr(runs.ledger, name, value)
        done, dead, _ = runs.view(disk)
        game = Game(
            programs=scenario.programs,
            renames=renames,
            disk=disk,
            promised=done | dead,
            switches=switches,
            on_disk=laws.on_disk,
            on_end=laws.on_end,
            **scenario.game,
        )
        states, all_of_them = explore(game, most=most)
    assert all_of_them
    return states, len(game.disks)


# An object store does in several steps what a disk does at once: it gets into all states that a disk gets into.
@pytest.mark.parametrize(("name", "store"), [("two runs", "disk"), *((name, "object store") for name, one in SCENARIOS.items() if one.quick is not None)])
def test_no_order_of_steps_breaks_a_law(name: str, store: str) -> None:
    """Few changes from one run to another: most mistakes show with one or two."""
    quick = SCENARIOS[name].quick
    assert quick is not None
    states, disks = played(SCENARIOS[name], renames=STORES[store], switches=quick)
    assert states > 20 and disks >= 1


@pytest.mark.faults
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_steps_breaks_a_law_however_long(name: str, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All orders of two runs, and three runs further."""
    scenario = SCENARIOS[name]
    states, disks = played(scenario, renames=STORES[store], switches=scenario.deep)
    bound = "all orders" if scenario.deep < 0 else f"{scenario.deep} changes"
    with capsys.disabled():
        print(f"\n  {name}, {store}, {bound}: {states:,} states, {disks:,} contents of the store", end="")


OPTIONS = st.fixed_dictionaries(
    {
        "merges": st.booleans(),
        "segment": st.integers(1, 3),
        "deadly": st.frozensets(st.sampled_from(ROWS), max_size=2),
        "looks": st.booleans(),
        "retry": st.booleans(),
        "stubborn": st.booleans(),
    }
)
BURSTS = st.lists(st.tuples(st.integers(0, 24), st.integers(1, 30)), min_size=5, max_size=60)


@given(st.lists(OPTIONS, min_size=3, max_size=4), BURSTS, st.booleans(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_no_random_order_breaks_a_law(options, bursts, renames, faults, compact, puts):
    """Three or four runs of any kind, in bursts, until all die; then one goes on."""
    laws = Laws(resumer=merging("zz"), resumes=False)
    programs = [Run(token="dbca"[number], **one) for number, one in enumerate(options)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "uuid", runs.deterministic_names())
        patch.setattr(ledger, "_COMPACT_AFTER", compact)
        patch.setattr(ledger, "_PUTS", puts)
        game = Game(programs=programs, renames=renames, strays=STRAY, faults=faults, on_disk=laws.on_disk, on_end=laws.on_end)
        laws.resume(game.disks[follow(game, bursts).disk])


CLAIM = '        store.put(f"{_CLAIMS}/{ledger.run}", b"")\n        ledger.check()\n        try:\n            return ledger, '
LOAD = "load(store, below=ledger.run)"
RECORD = '            self._put(f"record-{self._records:06d}", values)\n            self._records += 1\n'
LOOK = "            self.check()\n"
COMPACT = '        self.store.delete(f"{_LEDGER}/{self.run}/base-{old:06d}")\n'
IS_OURS = "if made and made[1] <= self.run and name not in known"

# Each takes one thing out of the ledger's source; with so few changes from one run to another, a law is broken then.
MUTANTS = {
    "no look after a record": ("two runs", 1, RECORD + LOOK, RECORD),
    "the look before the record": ("two runs", 3, RECORD + LOOK, LOOK + RECORD),
    "no look after a base": ("three runs", 3, "self.state.to_json())\n        self.check()\n", "self.state.to_json())\n"),
    "no last look": ("two runs", 1, "before_success()\n        self.check()\n", "before_success()\n"),
    "reads, then claims": (
        "two runs",
        3,
        f"{CLAIM}None if restart else {LOAD}",
        f"        before = {LOAD}\n{CLAIM}before",
    ),
    "sweeps newer runs' staged files": ("dead rows become done", 2, "if run < self.run or (own and run == self.run)]", "if run < self.run or own]"),
    "sweeps newer runs' ledgers": ("two runs", 2, "if run < self.run:  #", "if run != self.run and run[:1].isdigit():  #"),
    "sweeps newer runs' published files": ("two runs", 2, IS_OURS, "if made and name not in known"),
    "sweeps nothing that is published": ("one publishes what the other merges", 2, IS_OURS, "if False"),
    "sweeps nothing that is staged": ("two runs", 1, "for run in [run for run in self.store.names(_STAGING)", "for run in [run for run in ()"),
    "compaction deletes first": ("compaction at each commit", 1, f"        self._put_base()\n{COMPACT}", f"{COMPACT}        self._put_base()\n"),
    "commits go on after a put was given up": ("a run that goes on after a put was given up", 0, "if self._refused:", "if False:"),
    "a reader looks once": ("a reader", 2, "    if _newest(store, below)[0] != run:\n        raise", "    if False:\n        raise"),
    "finished is enough": ("a retry of a finished output", 1, "and held == state.files.keys() | state.letters.keys()", ""),
    "letters go before new ones come": (
        "a retry that fails again",
        1,
        "        for file in change.letters:\n            self.publish(file.name)",
        "        pass",
    ),
    "_SUCCESS stays while the input grows": (
        "an input that grew, and nobody else",
        0,
        "if not state.finished:\n            self.store.delete",
        "if False:\n            self.store.delete",
    ),
}
QUICK_MUTANTS = ("no look after a record", "no last look", "compaction deletes first", "a reader looks once")


@pytest.fixture
def mutated(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Runs the drivers over a ledger whose source is changed."""

    def change(old: str, new: str) -> None:
        source = Path(ledger.__file__).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"the ledger has changed; change this mutant with it: {old}"
        mutant = types.ModuleType("mutant")
        exec(compile(source.replace(old, new), "mutant", "exec"), vars(mutant))
        vars(mutant)["uuid"] = ledger.uuid
        monkeypatch.setattr(runs, "ledger", mutant)

    return change


def caught(name: str, mutated: Callable[[str, str], None]) -> str:
    """The law that a mutant breaks."""
    scenario, switches, old, new = MUTANTS[name]
    mutated(old, new)
    with pytest.raises(LawError) as broken:
        played(SCENARIOS[scenario], renames=False, switches=switches)
    return str(broken.value).partition("\n")[0]


@pytest.mark.parametrize("name", QUICK_MUTANTS)
def test_a_protocol_without_one_of_its_rules_is_caught(name: str, mutated: Callable[[str, str], None]) -> None:
    assert caught(name, mutated)


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICK_MUTANTS])
def test_each_rule_of_the_protocol_is_needed(name: str, mutated: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    law = caught(name, mutated)
    with capsys.disabled():
        print(f"\n  {name}: {law}", end="")


@pytest.mark.faults
def test_a_driver_that_publishes_before_it_commits_is_caught() -> None:
    with pytest.raises(LawError):
        played(Scenario(programs=[Run(token="a", wrongly=True), merging("b")], quick=2), renames=False, switches=2)


@pytest.mark.faults
def test_forgetting_loses_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """What programs say that they may forget changes how many states there are, but not what can lie in the store."""
    few = played(SCENARIOS["two runs"], renames=False, switches=-1)
    monkeypatch.setattr(runs, "_rest", lambda *memory: None)
    many = played(SCENARIOS["two runs"], renames=False, switches=-1)
    assert few[1] == many[1] and few[0] < many[0]
