"""Quotas hold whatever comes in whatever order, from threads and processes at once, and through the death of one: limits, budgets and books that balance."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from postgres import fresh, postgresql  # noqa: F401 - fixtures

import headrace
from headrace.gateway.accounts import tables, usage
from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Used, is_own
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import NANO, Limits
from headrace.gateway.accounts.prices import Prices
from headrace.gateway.accounts.quotas import Ask, Grant, Meter, refusal
from headrace.gateway.accounts.window import Window

START = 1_769_900_400.0  # 2026-01-31 23:00 UTC: months end in what follows
PRICES = Prices.of({"small": {"prompt": 1, "cached": 0.25, "completion": 4}, "large": {"prompt": 10, "completion": 30}})
SOURCES = str(Path(headrace.__file__).parents[1])

STEPS = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 2), st.floats(0, 70), st.sampled_from([0.0, 0.5, 1.0, 59.0, 60.0, 61.0])),  # seconds since the step before
        st.sampled_from(["ask", "ask", "ask", "settle", "release"]),
        st.integers(1, 60),  # tokens
        st.integers(0, 100),  # which of the open grants, and how much of it was used
    ),
    max_size=60,
)


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


# --- windows: a model that remembers every admission


@given(STEPS, st.integers(1, 8), st.integers(60, 200), st.booleans())
def test_no_minute_ever_admits_more_and_none_is_refused_without_need(steps, requests, tokens, is_stored):
    limits = Limits(requests_per_minute=requests, tokens_per_minute=tokens)
    meter, now = Meter(Window(), "2026-01", 0, 0), START
    admitted: list[list] = []  # [when, tokens as they are known now, its second, whether it is open]
    for after_s, what, count, which in steps:
        now += after_s
        if is_stored:  # between two decisions there is only what the database has
            meter.window = Window(str(meter.window))
        at = meter.window.advance(now)
        assert at == now
        if what == "ask":
            against = refusal(limits, meter, Ask("m", count, 0, 0), now=at)
            near = [one for one in admitted if one[0] > now - 61]
            if against is None:
                admitted.append([now, count, meter.window.admit(at, count), True])
            else:
                assert len(near) + 1 > requests or sum(one[1] for one in near) + count > tokens
                assert against.retry_after_s is not None and 0 < against.retry_after_s <= 61
                later = Window(str(meter.window))
                later.advance(now + against.retry_after_s + 1e-6)
                assert refusal(limits, Meter(later, "2026-01", 0, 0), Ask("m", count, 0, 0), now=now + against.retry_after_s) is None
        elif is_open := [one for one in admitted if one[3]]:
            one = is_open[which % len(is_open)]
            one[3] = False
            if what == "settle":
                used = one[1] * which // 100
                meter.window.correct(one[2], tokens=used - one[1])
                one[1] = used
            else:
                meter.window.correct(one[2], requests=-1, tokens=-one[1])
                admitted.remove(one)
        for first in admitted:  # every window that begins with an admission; no other can hold more
            minute = [one for one in admitted if first[0] <= one[0] < first[0] + 60]
            assert len(minute) <= requests and sum(one[1] for one in minute) <= tokens


# --- money: the books themselves, with everything that can happen to a grant


@given(steps=STEPS, budget=st.integers(0, 3_000))
def test_a_budget_is_never_passed_and_the_books_balance(fresh, steps, budget):  # noqa: F811
    clock = Clock()
    with _opened(fresh) as database:
        keys, books = Keys(database, clock=clock), Books(database, prices=PRICES, grant_s=50, clock=clock)
        keys.create("ana", limits=Limits(requests_per_minute=20, tokens_per_minute=500, budget_usd=budget / 10**6))
        held: list[Grant] = []
        settled: list[tuple[str, int]] = []  # month and nano-USD of what was settled, as it happens
        for after_s, what, count, which in steps:
            clock.now += after_s * (40_000 if which == 7 else 1)  # now and then, weeks
            model = ("small", "large")[which % 2]
            if what == "ask":
                result = books.reserve(1, model, prompt_tokens=count, max_tokens=which % 10, id=f"a:{which}" if which > 90 else None)
                if isinstance(result, Grant):
                    held = [grant for grant in held if grant.id != result.id] + [result]
            elif held:
                grant = held.pop(which % len(held))
                if what == "settle":
                    used = Used(prompt_tokens=grant.ask.prompt_tokens * which // 100, completion_tokens=grant.ask.completion_tokens, cached_tokens=0)
                    if books.settle(grant, used):
                        settled.append((grant.day[:7], PRICES.nusd(grant.ask.model, used.prompt_tokens, used.completion_tokens)))
                else:
                    books.release(grant)
            elif which > 50:
                swept = {grant.id: grant for grant in held if grant.expires <= clock.now}
                books.sweep()
                settled += [(grant.day[:7], grant.ask.nusd) for grant in swept.values() if not is_own(grant.id)]
            _check_money(database, budget * 1000)
        clock.now += 100
        open_now = {(row.day[:7], row.nusd, row.id) for row in _rows(database, tables.grants)}
        books.sweep()
        settled += [(month, nusd) for month, nusd, name in open_now if not is_own(name)]  # others' callers book for themselves
        assert not _rows(database, tables.grants)
        by_month: dict[str, int] = {}
        for month, nusd in settled:
            by_month[month] = by_month.get(month, 0) + nusd
        found = {month: round(sum(row.usd for row in rows) * NANO) for month, rows in _months(usage.sums(database, by=["day"]))}
        assert {month: nusd for month, nusd in found.items() if nusd} == {month: nusd for month, nusd in by_month.items() if nusd}
        logged = usage.log(database, most=1000)
        sums = usage.sums(database, by=[])
        assert sum(row.requests for row in sums) == len(logged) == len(settled)
        assert sum(row.prompt_tokens for row in sums) == sum(row.prompt_tokens for row in logged)


def _check_money(database: Database, budget_nusd: int) -> None:
    (key,) = _rows(database, tables.keys)
    in_month = [row for row in _rows(database, tables.usage) if row.day.startswith(key.month)]
    held = [row for row in _rows(database, tables.grants) if row.day.startswith(key.month)]
    assert (key.spent_nusd, key.held_nusd) == (sum(row.nusd for row in in_month), sum(row.nusd for row in held))
    assert key.spent_nusd + key.held_nusd <= budget_nusd


# --- at once


def test_threads_at_once(fresh):  # noqa: F811
    with _opened(fresh) as database:
        Keys(database).create("ana", limits=Limits(requests_per_minute=100, tokens_per_minute=10**6, budget_usd=1))
        books = Books(database, prices=PRICES)
        granted: list[Grant] = []
        billed = itertools.count()

        def work() -> None:
            for at in range(40):
                result = books.reserve(1, "small", prompt_tokens=10, max_tokens=10)
                if isinstance(result, Grant):
                    granted.append(result)
                    assert books.settle(result, Used(prompt_tokens=10, completion_tokens=at % 10))
                if books.book(f"batch:b:{at}", key=1, model="small", used=Used(prompt_tokens=1)):
                    next(billed)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 100 and next(billed) == 40  # no more, and no less
        (row,) = usage.sums(database)
        assert (row.requests, row.refused, row.prompt_tokens) == (140, 60, 1040)
        _check_money(database, NANO)


WORKER = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Used
from headrace.gateway.accounts.prices import Prices
from headrace.gateway.accounts.quotas import Grant
from headrace.gateway.accounts.teller import Teller

async def main():
    books = Books(Database(sys.argv[2]), prices=Prices.of({"small": {"prompt": 1, "completion": 4}}))
    async with Teller(books) as teller:
        async def work(number):
            at = 0
            while True:
                grant = await teller.reserve(1, "small", prompt_tokens=10, max_tokens=10)
                if not isinstance(grant, Grant):
                    os.write(1, f"refused {grant.reason}\\n".encode())
                    return
                os.write(1, f"granted {grant.id}\\n".encode())
                assert await teller.settle(grant, Used(prompt_tokens=10, completion_tokens=at % 10))
                os.write(1, f"settled {grant.id} {at % 10}\\n".encode())
                if at < 30 and await teller.book(f"batch:b{number}:{at}", key=1, model="small", used=Used(prompt_tokens=1)):
                    os.write(1, f"booked b{number}:{at}\\n".encode())
                at += 1
        await teller.find("hr_none")  # all is loaded
        os.write(1, b"ready\\n")
        await asyncio.to_thread(sys.stdin.readline)
        await asyncio.gather(*map(work, range(8)))

asyncio.run(main())
"""


def test_three_processes_at_once_of_which_one_is_killed(fresh, tmp_path):  # noqa: F811
    """What each process was told it may do and has done adds up to what the books say; the dead one's reservations are billed in full."""
    limit, where = 3_000, fresh()
    with contextlib.closing(Database(where)) as database:
        Keys(database).create("ana", limits=Limits(requests_per_minute=limit, tokens_per_minute=10**6, budget_usd=1))
        began = time.monotonic()
        outputs = [tmp_path / f"{at}.txt" for at in range(3)]
        workers = []
        for output in outputs:
            with output.open("wb") as file:
                workers.append(subprocess.Popen([sys.executable, "-c", WORKER, SOURCES, where], stdin=subprocess.PIPE, stdout=file))
        try:
            _wait(lambda: all("ready" in output.read_text() for output in outputs))
            for worker in workers:
                worker.stdin.close()
            at = _wait(lambda: [at for at, output in enumerate(outputs) if output.read_text().count("settled") > 50])[0]  # whoever is first
            os.kill(workers[at].pid, signal.SIGKILL)
            assert [worker.wait(40) for worker in workers] == [-signal.SIGKILL if worker is workers[at] else 0 for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        assert time.monotonic() - began < 60, "the machine is too slow for this test: a new minute has begun"

        lines = [[line.split() for line in output.read_text().splitlines()] for output in outputs]
        granted, settled, booked = ([line for each in lines for line in each if line[0] == what] for what in ("granted", "settled", "booked"))
        refused = [line for each in lines[:at] + lines[at + 1 :] for line in each if line[0] == "refused"]
        assert refused == [["refused", "requests"]] * 16  # each task of the two that lived
        dead = {row.id for row in _rows(database, tables.grants)}
        logged = {row.id: row for row in _rows(database, tables.requests)}
        once = {name for name in logged if not name.startswith("batch:")}
        assert len(once) + len(dead) == limit  # exactly what the limit allows, and nothing in flight but the dead one's
        assert len(dead) <= 8 and len(granted) <= limit
        assert {line[1] for line in settled} <= once and {line[1] for line in granted} <= once | dead
        assert all(logged[line[1]].completion_tokens == int(line[2]) for line in settled)
        assert len(booked) == len({line[1] for line in booked}) and len(logged) - len(once) == 8 * 30  # each line once, whoever came first

        later = Books(database, prices=PRICES, clock=lambda: time.time() + 4000)
        assert later.sweep() == len(dead) and later.sweep() == 0
        (row,) = usage.sums(database)
        whole = _rows(database, tables.requests)
        assert row.requests == len(whole) == limit + 8 * 30
        assert round(row.usd * NANO) == sum(each.nusd for each in whole)
        assert {each.id: (each.status, each.nusd) for each in whole if each.id in dead} == dict.fromkeys(dead, (0, 50_000))
        _check_money(database, NANO)


@contextlib.contextmanager
def _opened(fresh: Callable[[], str]) -> Iterator[Database]:  # noqa: F811
    with contextlib.closing(Database(fresh())) as database:
        yield database


def _rows(database: Database, table: sa.Table) -> list[sa.Row]:
    with database.reading() as connection:
        return list(connection.execute(sa.select(table)))


def _months(rows: list[usage.Sum]) -> Iterator[tuple[str, list[usage.Sum]]]:
    for month, days in itertools.groupby(rows, key=lambda row: (row.day or "")[:7]):
        yield month, list(days)


def _wait(done: Callable[[], Any]) -> Any:
    until = time.monotonic() + 30
    while not (result := done()):
        assert time.monotonic() < until, "the processes do not get on"
        time.sleep(0.002)
    return result
