"""The front of the books: what waits is entered together, nobody waits in vain, and nobody's reservation is forgotten."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from headrace.errors import AccountsError
from headrace.gateway.accounts import tables, teller, usage
from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Entry, Release, Reserve, Used
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.quotas import Grant, Refusal
from headrace.gateway.accounts.teller import Teller

GOOD = Used(prompt_tokens=1, completion_tokens=1)


class Watched(Books):
    """Books that note what each transaction entered, and can be held up before one."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.posted: list[list[type]] = []
        self.before: Callable[[Sequence[Entry]], None] = lambda entries: None

    def post(self, entries: Sequence[Entry]) -> list[Any]:
        self.before(entries)
        results = super().post(entries)
        self.posted.append([type(entry) for entry in entries])
        return results


class Desk:
    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.keys = Keys(self.database)
        self.token = self.keys.create("ana")
        self.key = self.keys.get("ana").id
        self.books = Watched(self.database)

    def held(self) -> int:
        with self.database.reading() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(tables.grants)) or 0

    def requests(self) -> int:
        return sum(row.requests for row in usage.sums(self.database))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "llm.db")


def run(task: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(task, 20), debug=False)
    gc.collect()  # an exception that nobody has taken is told here, and is an error


@asynccontextmanager
async def blocked(desk: Desk) -> AsyncIterator[Callable[[], None]]:
    """Holds up the first transaction until the callable is called or the block ends."""
    go = threading.Event()
    desk.books.before = lambda entries: None if go.wait(10) else pytest.fail("held up for too long")
    yield go.set
    go.set()


def test_what_waits_goes_together(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter, blocked(desk) as go:
            asked = [asyncio.ensure_future(counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)) for _ in range(100)]
            await asyncio.sleep(0.02)
            go()
            grants = await asyncio.gather(*asked)
            assert len({grant.id for grant in grants if isinstance(grant, Grant)}) == 100
            assert all(await asyncio.gather(*(counter.settle(grant, GOOD) for grant in grants if isinstance(grant, Grant))))
        assert len(desk.books.posted) <= 6, desk.books.posted
        assert sum(map(len, desk.books.posted)) == 200

    run(main())
    assert desk.requests() == 100 and desk.held() == 0


def test_keys_are_found_in_memory_and_changes_noticed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter:
            found = await asyncio.gather(*(counter.find(desk.token) for _ in range(10)))
            assert {key.name for key in found if key is not None} == {"ana"} and await counter.find("hr_x") is None
            desk.keys.revoke("ana")
            refused = await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)
            assert isinstance(refused, Refusal) and refused.reason == "revoked"  # at once
            monkeypatch.setattr(teller, "KEYS_S", 0.01)
            await asyncio.sleep(0.02)
            assert await counter.find(desk.token) is None
            bob = desk.keys.create("bob")
            await asyncio.sleep(0.02)
            key = await counter.find(bob)
            assert key is not None and key.name == "bob"

    run(main())


def test_whoever_comes_when_the_keys_were_just_read_does_not_go_round_for_ever(desk: Desk):
    """Between the answer and the callback that notes it there may be the first step of another task."""

    async def main() -> None:
        async with Teller(desk.books) as counter:
            looking = counter._looking = asyncio.get_running_loop().create_future()
            looking.add_done_callback(counter._looked)
            looking.set_result(None)
            assert await counter.find("hr_x") is None

    run(main())


def test_a_cancelled_request_holds_nothing(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter, blocked(desk) as go:
            tasks = [asyncio.ensure_future(counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)) for _ in range(10)]
            await asyncio.sleep(0.02)  # the first is being entered, the others wait
            for task in tasks:
                task.cancel()
            go()
            assert all(isinstance(result, asyncio.CancelledError) for result in await asyncio.gather(*tasks, return_exceptions=True))

    run(main())
    assert desk.held() == 0 and desk.requests() == 0


def test_a_request_that_is_cancelled_as_it_is_granted_holds_nothing(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter:
            task = asyncio.ensure_future(counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1))
            tell = counter._tell

            def tell_and_cancel(*args: Any) -> None:
                tell(*args)
                task.cancel()  # it has its grant, and has not run since

            counter._tell = tell_and_cancel  # type: ignore[method-assign]
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())
    assert desk.books.posted == [[Reserve], [Release]] and desk.held() == 0


def test_leaving_enters_what_was_asked_for(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter:
            grant = await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)
            assert isinstance(grant, Grant)
            settling = asyncio.ensure_future(counter.settle(grant, GOOD))
            abandoned = asyncio.ensure_future(counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1))
            await asyncio.sleep(0)
            abandoned.cancel()
        assert await settling
        for act in (counter.settle(grant, GOOD), counter.find("hr_x")):
            with pytest.raises(AccountsError, match="this teller is not open"):
                await act

    run(main())
    assert desk.held() == 0 and desk.requests() == 1


def test_a_settlement_is_entered_though_its_task_is_cancelled(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter:
            grant = await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)
            assert isinstance(grant, Grant)
            settling = asyncio.ensure_future(counter.settle(grant, GOOD))
            await asyncio.sleep(0)
            settling.cancel()

    run(main())
    assert desk.requests() == 1


def test_books_and_releases(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter:
            assert [await counter.book("batch:b:1", key=desk.key, model="m", used=GOOD) for _ in range(2)] == [True, False]
            grant = await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1, id="batch:b:2")
            assert isinstance(grant, Grant) and grant.id == "batch:b:2"
            assert [await counter.release(grant), await counter.release(grant)] == [True, False]

    run(main())


def test_all_who_wait_are_told_that_the_database_refuses(desk: Desk) -> None:
    def refuse(entries: Sequence[Entry]) -> None:
        raise AccountsError("the disk is full")

    async def main() -> None:
        async with Teller(desk.books) as counter:
            desk.books.before = refuse
            asked = (counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1) for _ in range(5))
            results = await asyncio.gather(*asked, return_exceptions=True)
            assert [str(result) for result in results] == ["the disk is full"] * 5 and len(set(map(id, results))) == 5
            desk.books.before = lambda entries: None
            assert isinstance(await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1), Grant)

    run(main())


def test_a_wrong_value_reaches_only_who_gave_it(desk: Desk) -> None:
    async def main() -> None:
        async with Teller(desk.books) as counter:
            fine, wrong, strange = await asyncio.gather(
                counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1),
                counter.reserve(desk.key, "m", prompt_tokens=-1, max_tokens=1),
                counter.reserve(desk.key + 9, "m", prompt_tokens=1, max_tokens=1),
                return_exceptions=True,
            )
            assert isinstance(fine, Grant) and isinstance(wrong, AccountsError) and isinstance(strange, AccountsError)

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_ours_leaves_nobody_waiting(desk: Desk) -> None:
    def fault(entries: Sequence[Entry]) -> None:
        raise RuntimeError("a fault")

    async def main() -> None:
        async with Teller(desk.books) as counter:
            desk.books.before = fault
            with pytest.raises(AccountsError, match="a fault of headrace"):
                await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)
            counter._thread.join()
            with pytest.raises(AccountsError, match="is not open"):
                await counter.reserve(desk.key, "m", prompt_tokens=1, max_tokens=1)

    run(main())


def test_what_has_expired_is_settled_by_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teller, "UPKEEP_S", 0.01)
    database = Database(tmp_path / "llm.db")
    Keys(database).create("ana")
    books = Books(database, grant_s=0.05)

    async def main() -> None:
        async with Teller(books) as counter:
            grant = await counter.reserve(1, "m", prompt_tokens=1, max_tokens=1)
            assert isinstance(grant, Grant)
            while not usage.log(database):  # noqa: ASYNC110 - the database tells nobody
                await asyncio.sleep(0.01)
            assert not await counter.settle(grant, GOOD)

    run(main())
