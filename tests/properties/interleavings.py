"""Every order in which programs can work on one store, each of them the real code.

A program is a function over a `headrace.store.Store`. What it does next depends on the answers that it got, and on nothing else.
So it is run again from its beginning with the answers known so far, and stopped at the first question that has none: a
`Point`. A state of the whole is what lies in the store and the point of each program; `explore` walks over all of them.

A crash is a program that is never resumed. It needs no step of its own: every state is checked for what would be if nobody
went on from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any, NamedTuple

from headrace.errors import StorageError

Disk = Mapping[str, bytes]
Op = tuple[Any, ...]

CLAIMS, SUCCESS = "_headrace/ledger/claims/", "_SUCCESS"
ABSENT, REFUSED = "FileNotFoundError", "StorageError"


class LawError(AssertionError):
    """A state that must not be, and the shortest way there."""


def apply(disk: Disk, op: Op) -> tuple[Disk, Any]:
    """The store after an operation, and its answer. Each is atomic; what a store cannot do at once is several of them."""
    kind, name, *more = op
    if kind == "names":
        below = f"{name}/" if name else ""
        return disk, tuple(sorted({path[len(below) :].partition("/")[0] for path in disk if path.startswith(below)}))
    if kind == "put":
        return {**disk, name: more[0]}, None
    if kind in ("read", "copy", "rename") and name not in disk:
        return disk, ABSENT
    if kind == "read":
        return disk, disk[name]
    if kind == "copy":
        return {**disk, more[0]: disk[name]}, None
    if kind == "rename":
        return {**{path: content for path, content in disk.items() if path != name}, more[0]: disk[name]}, None
    hit = [path for path in sorted(disk, reverse=True) if path == name or path.startswith(f"{name}/")]
    if kind == "shear":  # file by file, the last one first: the order that takes records away before their base
        return {path: content for path, content in disk.items() if path not in hit[:1]}, len(hit) > 1
    return {path: content for path, content in disk.items() if path not in hit}, None


class _Pause(BaseException):
    """A program has come to a question that has no answer yet."""


class Asking:
    """A `Store` whose operations are asked for one by one.

    `renames` tells a disk, where a file is moved and a folder deleted at once, from an object store. The program notes in `kept`
    which rows it has been promised to be committed, as bits, and may `rest`.
    """

    def __init__(self, ask: Callable[[Op], Any], *, renames: bool) -> None:
        self.ask, self.renames = ask, renames
        self.kept = self.asked = self.rested = 0
        self.claim = self.memory = ""

    def rest(self, memory: str) -> None:
        """Say that all that comes depends on `memory` and on answers from now on, so that the way here may be forgotten."""
        self.memory, self.rested = memory, self.asked

    def _do(self, *op: Any) -> Any:
        answer = self.ask(op)
        self.asked += 1
        if answer == ABSENT:
            raise FileNotFoundError(op[1])
        if answer == REFUSED:
            raise StorageError(f"cannot {op[0]} {op[1]}")
        return answer

    def names(self, folder: str) -> list[str]:
        return list(self._do("names", folder))

    def read(self, name: str) -> bytes:
        return bytes(self._do("read", name))

    def put(self, name: str, content: bytes) -> None:
        self._do("put", name, content)
        if name.startswith(CLAIMS):
            self.claim = name

    def move(self, name: str, to: str) -> None:
        if self.renames:
            self._do("rename", name, to)
        else:
            self._do("copy", name, to)
            self._do("shear", name)

    def delete(self, name: str) -> None:
        if self.renames:
            self._do("delete", name)
        else:
            while self._do("shear", name):
                pass


Program = Callable[[Asking], Any]
"""Returns how it ended."""


def alone(program: Program, disk: Disk, *, steps: int | None = None) -> tuple[Disk, Any]:
    """What a program comes to that nobody disturbs; with `steps`, one that is killed after so many."""
    left = count() if steps is None else iter(range(steps))

    def ask(op: Op) -> Any:
        nonlocal disk
        if next(left, None) is None:
            raise _Pause
        disk, answer = apply(disk, op)
        return answer

    end = None
    with suppress(_Pause):
        end = program(Asking(ask, renames=True))
    return disk, end


@dataclass(frozen=True, slots=True)
class Point:
    """Where a program is: the answers that it got, what it asks next or how it ended, and what it was promised."""

    past: tuple[Any, ...]
    op: Op | None
    end: Any
    kept: int
    claim: str


class State(NamedTuple):
    """What lies in the store and where the programs are, as numbers; then whom it is too late for, what is under way, what is left.

    `lost` are the programs, as bits, that had not looked for newer claims for the last time when one was put, `promised` the
    rows that were committed when the reader began, `strays` the single files put so far, and `late` the puts in flight.
    """

    disk: int
    points: tuple[int, ...]
    lost: int = 0
    promised: int = 0
    strays: int = 0
    late: tuple[Op, ...] = ()
    faults: int = 0
    switches: int = -1
    last: int = -1


@dataclass(slots=True, kw_only=True)
class Game:
    """Programs, what lies in the store at first, and what else may happen.

    `strays` are files that somebody may put at any time. Of `faults` puts the answer is lost, and they take effect at some
    time later, or never. From one program to another it is changed `switches` times at most; -1 is no limit. `reader` is the
    program that only reads, `promised` the rows that were committed before, and `alike` means that all programs do the same.
    `on_disk` is called for each content of the store, and `on_end` for each end of a program.
    """

    programs: Sequence[Program]
    renames: bool = True
    disk: Disk = field(default_factory=dict)
    strays: Sequence[tuple[str, bytes]] = ()
    faults: int = 0
    switches: int = -1
    reader: int = -1
    promised: int = 0
    alike: bool = False
    on_disk: Callable[[Disk, int], None] = lambda disk, kept: None
    on_end: Callable[[Any, int, bool], None] = lambda end, promised, lost: None
    disks: list[Disk] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    _ids: dict[frozenset[tuple[str, bytes]], int] = field(default_factory=dict)
    _moves: dict[tuple[int, Any], int] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _applied: dict[tuple[int, Op], tuple[int, Any]] = field(default_factory=dict)
    _checked: set[tuple[int, int]] = field(default_factory=set)

    def start(self) -> State:
        """The state in which nothing has happened."""
        points = tuple(self._replay(number, ()) for number in range(len(self.programs)))
        return State(self._id(self.disk), points, faults=self.faults, switches=self.switches)

    def steps(self, state: State, who: int | None = None) -> Iterator[State]:
        """The states that follow a state; `who` is the only program to go on, or, after the last one, what nobody waits for."""
        for number, at in enumerate(state.points):
            op = self.points[at].op
            if op is None or (who is not None and who != number) or not (self.points[at].past or self._may_begin(state, number)):
                continue
            switches = state.switches
            if switches >= 0 and state.last not in (-1, number) and self.points[state.points[state.last]].op is not None:
                if not switches:
                    continue
                switches -= 1
            yield self._step(state, number, op, switches)
            if state.faults and op[0] == "put":
                late = tuple(sorted((*state.late, op)))
                moved = self._moved(state.points, number, REFUSED)
                yield state._replace(points=moved, late=late, faults=state.faults - 1, switches=switches, last=number)
        if who not in (None, len(self.programs)):
            return
        for stray, file in enumerate(self.strays):
            if not state.strays >> stray & 1:
                yield state._replace(disk=self._apply(state.disk, ("put", *file))[0], strays=state.strays | 1 << stray)
        for at, op in enumerate(state.late):
            yield state._replace(disk=self._apply(state.disk, op)[0], late=state.late[:at] + state.late[at + 1 :])

    def _may_begin(self, state: State, number: int) -> bool:
        """Programs that are alike begin in one order: any other is the same with their names changed."""
        return not self.alike or number == 0 or bool(self.points[state.points[number - 1]].past)

    def check(self, state: State) -> None:
        """Raise AssertionError if the state breaks a law."""
        kept = self.kept(state)
        if (state.disk, kept) not in self._checked:
            self._checked.add((state.disk, kept))
            self.on_disk(self.disks[state.disk], kept)
        if state.last >= 0:
            point = self.points[state.points[state.last]]
            if point.op is None:
                self.on_end(point.end, state.promised, bool(state.lost >> state.last & 1))

    def kept(self, state: State) -> int:
        """The rows that some program was promised."""
        kept = self.promised
        for at in state.points:
            kept |= self.points[at].kept
        return kept

    def told(self, state: State, following: State) -> str:
        """What happened between two states, in words."""
        for number, (before, after) in enumerate(zip(state.points, following.points, strict=True)):
            if before != after:
                point = self.points[after]
                op, answer = self.points[before].op, point.past[-1]
                assert op is not None
                text = f"{number}: {op[0]} {' -> '.join(str(one)[:160] for one in op[1:])}"
                ended = "" if point.op else f"; ended: {point.end}"
                return text + (f" = {str(answer)[:300]}" if answer is not None else "") + ended
        before_, after_ = self.disks[state.disk], self.disks[following.disk]
        return f"put, of nobody that waits for it: {[name for name in after_ if before_.get(name) != after_[name]]}"

    def _step(self, state: State, number: int, op: Op, switches: int) -> State:
        disk, answer = self._apply(state.disk, op)
        lost = state.lost
        if op[0] == "put" and op[1].startswith(CLAIMS):
            claims = [self.points[at].claim for at in state.points]
            claims[number] = op[1]
            for other, claim in enumerate(claims):
                there = self.points[state.points[other]].op
                looked = there is None or (there[0] == "put" and there[1] == SUCCESS)
                if claim and claim < max(op[1], *(path for path in self.disks[disk] if path.startswith(CLAIMS))) and not looked:
                    lost |= 1 << other
        promised = self.kept(state) if number == self.reader and not self.points[state.points[number]].past else state.promised
        points = self._moved(state.points, number, answer)
        return State(disk, points, lost, promised, state.strays, state.late, state.faults, switches, number)

    def _moved(self, points: tuple[int, ...], number: int, answer: Any) -> tuple[int, ...]:
        at = points[number]
        following = self._moves.get((at, answer))
        if following is None:
            following = self._moves[at, answer] = self._replay(number, (*self.points[at].past, answer))
        return (*points[:number], following, *points[number + 1 :])

    def _replay(self, number: int, past: tuple[Any, ...]) -> int:
        answers = iter(past)
        asked: list[Op] = []

        def ask(op: Op) -> Any:
            for answer in answers:
                return answer
            asked.append(op)
            raise _Pause

        store = Asking(ask, renames=self.renames)
        end = None
        with suppress(_Pause):
            end = self.programs[number](store)
        point = Point(past, asked[0] if asked else None, end, store.kept, store.claim)
        same = (number, point.end, store.kept, store.claim, store.memory, past[store.rested :] if asked else ())
        found = self._known.setdefault(same, len(self.points))
        if found == len(self.points):
            self.points.append(point)
        assert self.points[found].op == point.op, "a program forgot more than it may"
        return found

    def _apply(self, disk: int, op: Op) -> tuple[int, Any]:
        known = self._applied.get((disk, op))
        if known is None:
            after, answer = apply(self.disks[disk], op)
            known = self._applied[disk, op] = (disk if after is self.disks[disk] else self._id(after), answer)
        return known

    def _id(self, disk: Disk) -> int:
        found = self._ids.setdefault(frozenset(disk.items()), len(self.disks))
        if found == len(self.disks):
            self.disks.append(disk)
        return found


def explore(game: Game, *, most: int | None = None) -> tuple[int, bool]:
    """Visit every state, those that few steps lead to first; returns how many there were, and whether `most` was enough for all.

    Of a state that was visited only its hash is kept, of 64 bits: among ten million, that two are taken for one is as likely as one in a
    hundred thousand.

    Raises:
        LawError: a law is broken; with the steps that lead there.
    """
    first = game.start()
    before: dict[int, int] = {hash(first): 0}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        try:
            game.check(state)
        except AssertionError as broken:
            raise LawError(f"{broken}\n{story(game, first, before, state)}") from None
        if most is not None and len(before) >= most:
            continue
        here = hash(state)
        for following in game.steps(state):
            there = hash(following)
            if there not in before:
                before[there] = here
                waiting.append(following)
    return len(before), most is None or len(before) < most


def story(game: Game, first: State, before: Mapping[int, int], last: State) -> str:
    """The steps that lead from one state to another, by the hashes of those in between."""
    hashes = [hash(last)]
    while hashes[-1] != hash(first):
        hashes.append(before[hashes[-1]])
    states = [first]
    for wanted in hashes[-2::-1]:
        states.append(next(state for state in game.steps(states[-1]) if hash(state) == wanted))
    return "\n".join(f"  {number:3} {game.told(*two)}" for number, two in enumerate(pairwise(states), 1))


def follow(game: Game, schedule: Sequence[tuple[int, int]]) -> State:
    """Play one order: `(which, steps)` is the `which`th of what can happen, taken so many times.

    Raises:
        LawError: a law is broken; with the steps that lead there.
    """
    first = state = game.start()
    before: dict[int, int] = {hash(first): 0}
    for which, steps in schedule:
        for _ in range(steps):
            following = list(game.steps(state, who=which % (len(game.programs) + 1)))
            if not following:
                break
            chosen = following[which // (len(game.programs) + 1) % len(following)]
            before.setdefault(hash(chosen), hash(state))
            state = chosen
            try:
                game.check(state)
            except AssertionError as broken:
                raise LawError(f"{broken}\n{story(game, first, before, state)}") from None
    return state
