"""The online store on a real Redis: every test that it has to pass in an SQLite file, and how a Redis refuses."""

from __future__ import annotations

import pytest
from components.test_online_store import *  # noqa: F403 - the tests, and what they need
from components.test_online_store import table, values, write
from redis_server import redis_url, running  # noqa: F401 - a fixture

from headrace.errors import OnlineStoreError
from headrace.online_store import OnlineStore, open_store


@pytest.fixture
def place(redis_url: str) -> str:  # noqa: F811
    import redis

    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return f"{redis_url}/3"


def test_this_is_a_redis(store: OnlineStore, place: str) -> None:
    assert store.name == place and store.engine.client.ping()


def test_a_lost_connection_is_made_again(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    store.engine.client.client_kill_filter(_type="normal", skipme=False)
    assert values(store, "a") == [1]


def test_what_a_redis_removed_by_itself_is_told(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    store.engine.client.delete("headrace:{stats}:1")
    for ask in (lambda: values(store, "a"), lambda: write(store, ("a", 1, 1))):
        with pytest.raises(OnlineStoreError, match="are gone though the view is there.*`replace`"):
            ask()
    store.replace("stats", [table(("a", 0, 2))], key="key", time="time")
    assert values(store, "a") == [2]


def test_a_damaged_value_is_told(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    store.engine.client.hset("headrace:{stats}:1", "a", b"short")
    with pytest.raises(OnlineStoreError, match="view 'stats' in .* is damaged: a value has another length"):
        values(store, "a")
    store.engine.client.hset("headrace:{stats}:1:about", "schema", b"none")
    with pytest.raises(OnlineStoreError, match="the schema of view 'stats' in .* is damaged"):
        open_store(store.name).read("stats", ["a"])


def test_a_generation_given_up_leaves_nothing(store: OnlineStore) -> None:
    write(store, ("a", 0, 1))
    before = set(store.engine.client.keys())
    with pytest.raises(OnlineStoreError, match="different columns"):
        store.replace("stats", [table(("a", 0, 2)), table(("a", 0, 2)).rename_columns(["key", "time", "other"])], key="key", time="time")
    assert set(store.engine.client.keys()) == before


def test_a_full_redis_keeps_nothing_of_a_batch(redis_url: str) -> None:  # noqa: F811
    with running("--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as url, open_store(url) as store:
        write(store, ("k0", 0, 0))
        done = 1
        with pytest.raises(OnlineStoreError, match="its memory is full, and nothing of the batch was kept"):
            while True:
                write(store, *((f"k{number}", 0, number) for number in range(done, done + 1000)))
                done += 1000
        assert values(store, "k0", f"k{done - 1}", f"k{done}") == [0, done - 1, None]
        assert store.freshness("stats").keys == done


def test_passwords_are_asked_for_and_not_shown() -> None:
    with running("--requirepass", "secret word") as url:
        right = url.replace("redis://", "redis://:secret%20word@")
        with open_store(right) as store:
            write(store, ("a", 0, 1))
            assert store.name == f"{url}" and values(store, "a") == [1]
        for wrong in (url, right.replace("secret", "wrongly")):
            with pytest.raises(OnlineStoreError) as raised:
                open_store(wrong)
            assert "refuse" in str(raised.value) and "word" not in str(raised.value).replace("password", "")


def test_a_server_that_is_not_there_is_told() -> None:
    with running() as url:
        pass
    with pytest.raises(OnlineStoreError, match=r"the Redis at 'redis://127.0.0.1:\d+/0' cannot be reached"):
        open_store(f"{url}/0")
    for wrong in ("redis://127.0.0.1:port/0", "redis://127.0.0.1:99999999/0"):
        with pytest.raises(OnlineStoreError, match="is no URL of a Redis|cannot be reached"):
            open_store(wrong)
