"""A process that runs a batch dies at any operation on the disk, at any booking, and the power may go with it: each line counts once.

Every operation that changes the disk goes through `Disk`, which counts them and dies at the one that it is told. After a power cut, what
was not flushed is what it may be: there, in part, or garbage. SQLite's commits are taken as whole, which is what it promises.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from batches import Clock, FakeEngine, ask, depot_in, order, request_line, shown, text_of
from hypothesis import event, given
from hypothesis import strategies as st

from headrace.gateway.batches import results, shelf
from headrace.gateway.batches.catalog import Catalog
from headrace.gateway.batches.lines import Answered, Line, Lost, Outcome, Result, Retry
from headrace.gateway.batches.records import Charge
from headrace.gateway.batches.worker import Worker

PATIENCE_S = 20
OVER = ("completed", "failed", "expired", "cancelled")


class Death(BaseException):
    """The process is gone."""


class Disk:
    """`os` for `shelf`, which dies before the operation number `dies_at`, and does nothing after that but close."""

    def __init__(self, dies_at: int | None, rng: random.Random, *, power: bool) -> None:
        self.operations, self.dead = 0, False
        self._dies_at, self._rng, self._power = dies_at, rng, power
        self._names: dict[int, str] = {}
        self._flushed: dict[str, int] = {}  # how much of the beginning of a file the device is sure to hold
        self._changed: set[str] = set()  # files that have changed since they were flushed

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def step(self) -> None:
        if self.dead or self.operations == self._dies_at:
            self.dead = True
            raise Death
        self.operations += 1

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self.step()
        made = os.open(path, flags, mode)
        self._names[made] = path
        self._flushed.setdefault(path, os.fstat(made).st_size)
        return made

    def ftruncate(self, descriptor: int, size: int) -> None:
        self.step()
        path = self._names[descriptor]
        if size != os.fstat(descriptor).st_size:
            self._flushed[path] = min(self._flushed[path], size)
            self._changed.add(path)
        os.ftruncate(descriptor, size)

    def pwrite(self, descriptor: int, data: memoryview, at: int) -> int:
        self.step()
        self._changed.add(self._names[descriptor])
        assert at >= self._flushed[self._names[descriptor]], "what is flushed is not written over"
        if self.operations == self._dies_at:  # it dies in the middle of the write
            return os.pwrite(descriptor, data[: self._rng.randint(0, len(data))], at)
        return os.pwrite(descriptor, data, at)

    def fsync(self, descriptor: int) -> None:
        self.step()
        path = self._names[descriptor]
        if os.path.isfile(path):
            self._flushed[path] = os.fstat(descriptor).st_size
            self._changed.discard(path)

    def unlink(self, path: str) -> None:
        self.step()
        os.unlink(path)

    def close(self, descriptor: int) -> None:
        self._names.pop(descriptor, None)
        os.close(descriptor)

    def lose(self) -> None:
        """The process is gone, and so are its locks; after a power cut, so is what was not flushed."""
        for descriptor in list(self._names):
            self.close(descriptor)
        for path in sorted(self._changed):
            if self._power and os.path.isfile(path):
                held = Path(path).read_bytes()
                kept = held[: max(self._flushed[path], self._rng.randint(0, len(held)))]
                Path(path).write_bytes(kept + self._rng.randbytes(self._rng.choice((0, 0, 1, 300))))


class Ledger(FakeEngine):
    """An engine whose usage differs each time, and a bill that outlives the process."""

    disk: Disk

    async def book(self, charges: Iterable[Charge]) -> None:
        self.disk.step()
        await super().book(charges)
        self.disk.step()


def live(folder: Path, ledger: Ledger, batch: str, clock: Clock, disk: Disk) -> int:
    """One life of a process, to the end of the batch or its own; how many operations it came to."""
    ledger.disk = disk

    async def life() -> None:
        depot = depot_in(folder, clock, retry_s=0.0001, gather_s=0.0001, grace_s=0.01)
        stopping = asyncio.Event()
        worker = asyncio.create_task(Worker(depot, send=ledger.send, book=ledger.book, slots=lambda: 3).run(stopping))
        async with asyncio.timeout(PATIENCE_S):
            while not disk.dead and not worker.done() and depot.catalog.batch(batch).live:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        if disk.dead:
            worker.cancel()
        stopping.set()
        await asyncio.gather(worker, return_exceptions=True)
        disk.dead = True  # threads that are left do nothing more
        depot.close()

    commit = Catalog._commit

    def committed(self: Catalog) -> None:
        disk.step()
        commit(self)
        disk.step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf, "os", disk)
        patch.setattr(Catalog, "_commit", committed)
        asyncio.run(life())
    disk.lose()
    return disk.operations


def scene(folder: Path, count: int, clock: Clock) -> str:
    async def begin() -> str:
        with depot_in(folder, clock) as depot:
            return await order(depot, b"".join(request_line(f"r{number}", pad="x" * number) for number in range(1, count + 1)))

    return asyncio.run(begin())


def check(folder: Path, ledger: Ledger, batch: str, clock: Clock) -> dict[str, Any]:
    """Every line is in one of the two files, once; booked is what the output says, line by line, and in all."""

    async def look() -> dict[str, Any]:
        with depot_in(folder, clock) as depot:
            found = await shown(depot, batch)
            output, errors = await text_of(depot, found["output_file_id"]), await text_of(depot, found["error_file_id"])
            count = found["request_counts"]["total"]  # 0 where it was cancelled before its lines were looked at
            assert sorted(line["custom_id"] for line in output + errors) == sorted(f"r{number}" for number in range(1, count + 1))
            assert found["request_counts"] == {"total": count, "completed": len(output), "failed": len(errors)}
            told = {f"batch:{batch}:{line['custom_id'][1:]}": line["response"]["body"]["usage"]["times"] for line in output}
            assert {name: charge.usage.output_tokens for name, charge in ledger.booked.items()} == told
            assert found["usage"]["output_tokens"] == sum(told.values())
            depot.sweep(orphan_s=-1)
            assert len(list((folder / "contents").iterdir())) == 1 + bool(output) + bool(errors)
            return found

    return asyncio.run(look())


def behave(kinds: list[str]) -> Any:
    def outcome(line: Line, times: int) -> Outcome:
        kind = kinds[line.number - 1]
        if kind == "bad":
            return Answered(400, b"{}")
        if kind == "lost" and times % 3:
            return Lost("gone")
        if kind == "busy" and times % 3:
            return Retry(0.0001)
        return FakeEngine.good(line, times)

    return outcome


@pytest.mark.parametrize("halt", ["", "cancelled", "expired"])
@pytest.mark.parametrize("power", [False, True])
def test_a_death_at_any_operation_loses_and_doubles_nothing(tmp_path: Path, power: bool, halt: str):
    kinds = ["good", "bad", "lost", "good", "busy"]
    statuses = set()
    for dies_at in itertools.count():
        folder, clock, ledger, rng = tmp_path / str(dies_at), Clock(), Ledger(behave(kinds)), random.Random(dies_at)
        folder.mkdir()
        batch = scene(folder, len(kinds), clock)
        came_to = live(folder, ledger, batch, clock, Disk(dies_at, rng, power=power))
        if halt:
            _halt(folder, clock, batch, halt)
        live(folder, ledger, batch, clock, Disk(None, rng, power=power))
        statuses.add(check(folder, ledger, batch, clock)["status"])
        if came_to < dies_at:
            break
    assert dies_at > 25 and statuses == {"completed", halt or "completed"}


@given(
    kinds=st.lists(st.sampled_from(["good", "good", "bad", "lost", "busy"]), min_size=1, max_size=12),
    deaths=st.lists(st.integers(0, 60), max_size=4),
    halt=st.sampled_from(["", "cancelled", "expired"]),
    halt_after=st.integers(0, 3),
    power=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_number_of_deaths_loses_and_doubles_nothing(kinds: list[str], deaths: list[int], halt: str, halt_after: int, power: bool, seed: int):
    with tempfile.TemporaryDirectory() as name:
        folder, clock, ledger, rng = Path(name), Clock(), Ledger(behave(kinds)), random.Random(seed)
        batch = scene(folder, len(kinds), clock)
        for number, dies_at in enumerate([*deaths, None]):
            if halt and number == min(halt_after, len(deaths)):
                _halt(folder, clock, batch, halt)
            live(folder, ledger, batch, clock, Disk(dies_at, rng, power=power))
        with depot_in(folder, clock) as depot:
            found = depot.catalog.batch(batch)
        event(found.status)
        assert found.status in OVER and (halt or found.status == "completed")
        check(folder, ledger, batch, clock)


def _halt(folder: Path, clock: Clock, batch: str, halt: str) -> None:
    async def cancel() -> None:
        with depot_in(folder, clock) as depot:
            await ask(depot, "POST", f"/v1/batches/{batch}/cancel")

    if halt == "cancelled":
        asyncio.run(cancel())
    else:
        clock.now += 90_000


def _settle_first(self: results.Results, group: list[Result]) -> list[Charge]:
    """A protocol that is wrong: lines are done before their texts are on the disk."""
    output, self._output = self._output, _Later()
    errors, self._errors = self._errors, _Later()
    try:
        return RIGHT(self, group)
    finally:
        later = (self._output, self._errors)
        self._output, self._errors = output, errors
        for sheet, written in zip((output, errors), later, strict=True):
            for at, data in written.calls:
                sheet.end_with(at, data)


class _Later:
    """Remembers what it is to write."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []

    def end_with(self, at: int, data: bytes) -> None:
        self.calls.append((at, data))


def _never_cut(self: shelf.Sheet, size: int) -> None:
    """A restart that goes on behind what it finds."""


def _append(self: shelf.Sheet, at: int, data: bytes) -> None:
    """A write that does not say where."""
    self.write(os.fstat(self._descriptor).st_size, data)
    shelf.os.fsync(self._descriptor)


def _unnoted(self: Catalog, batch: Any) -> list[Charge]:
    """A restart that does not book what its forerunner had noted."""
    return []


RIGHT = results.Results.add


@pytest.mark.parametrize(
    "wrong",
    [
        [(results.Results, "add", _settle_first)],
        [(shelf.Sheet, "cut", _never_cut), (shelf.Sheet, "end_with", _append)],
        [(Catalog, "unbooked", _unnoted)],
    ],
    ids=["settled before written", "torn tails kept", "notes not booked"],
)
def test_a_wrong_protocol_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[tuple[Any, str, Any]]):
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE_S", 1)  # some end in a run that is tried for ever
    for owner, name, instead in wrong:
        monkeypatch.setattr(owner, name, instead)
    with pytest.raises((AssertionError, json.JSONDecodeError, TimeoutError)):
        test_a_death_at_any_operation_loses_and_doubles_nothing(tmp_path, power=True, halt="")
