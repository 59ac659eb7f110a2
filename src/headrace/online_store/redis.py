"""An online store in a Redis: for services on several machines. The only module that imports redis.

A generation is one hash, of keys to blobs: reading it is one HMGET, giving it up one UNLINK, and on a cluster it lies on one node. Changes are Lua
scripts, which a Redis runs whole. What it has, it has in memory: whether that outlives the server is up to the server's own settings, and a Redis
that evicts keys when it is full would take whole views (`maxmemory-policy noeviction` does not).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from headrace.errors import OnlineStoreError
from headrace.online_store.engine import FORMAT, Generation, Standing, new_token
from headrace.online_store.records import EXPIRY, instant_us
from headrace.online_store.views import MARKER

_CONNECT_S, _ANSWER_S = 5.0, 30.0
_READ_BYTES = 1 << 18  # of a reply at once: in small parts, 100 vectors take a tenth longer
_VIEWS = "headrace:views"
_SWEPT = 1000  # fields looked at in one step

# KEYS: the view. ARGV: its schema, the marker, a token, the format, "current" or "begun". Gives number, schema and token of the generation.
_MAKE = """
local state = ARGV[5]
if state == 'current' then
  local number = redis.call('HGET', KEYS[1], 'current')
  if number then
    local about = KEYS[1] .. ':' .. number .. ':about'
    return {number, redis.call('HGET', about, 'schema') or '', redis.call('HGET', about, 'token') or ''}
  end
else
  local before = redis.call('HGET', KEYS[1], 'begun')
  if before then redis.call('UNLINK', KEYS[1] .. ':' .. before, KEYS[1] .. ':' .. before .. ':about') end
end
local number = redis.call('HINCRBY', KEYS[1], 'numbers', 1)
local place = KEYS[1] .. ':' .. number
local base = redis.call('HGET', KEYS[1], 'current') or ''
local writes = base ~= '' and redis.call('HGET', KEYS[1] .. ':' .. base .. ':about', 'writes') or ''
redis.call('HSET', place .. ':about', 'schema', ARGV[1], 'token', ARGV[3], 'writes', 0, 'base', base, 'base_writes', writes)
redis.call('HSET', place, ARGV[2], ARGV[3])
redis.call('HSET', KEYS[1], state, number, 'format', ARGV[4])
return {tostring(number), ARGV[1], ARGV[3]}
"""

# KEYS: the view. ARGV: a number. Gives 1 if that generation, which was begun, is the current one now.
_SWAP = """
if redis.call('HGET', KEYS[1], 'begun') ~= ARGV[1] then return 0 end
local place = KEYS[1] .. ':' .. ARGV[1]
local base = redis.call('HGET', KEYS[1], 'current') or ''
local writes = base ~= '' and redis.call('HGET', KEYS[1] .. ':' .. base .. ':about', 'writes') or ''
if redis.call('HGET', place .. ':about', 'base') ~= base or redis.call('HGET', place .. ':about', 'base_writes') ~= writes then return 0 end
redis.call('HSET', KEYS[1], 'current', ARGV[1])
redis.call('HDEL', KEYS[1], 'begun')
if base ~= '' then redis.call('UNLINK', KEYS[1] .. ':' .. base, KEYS[1] .. ':' .. base .. ':about') end
return 1
"""

# KEYS: the view. ARGV: a number.
_DROP = """
if redis.call('HGET', KEYS[1], 'begun') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'begun')
return redis.call('UNLINK', KEYS[1] .. ':' .. ARGV[1], KEYS[1] .. ':' .. ARGV[1] .. ':about')
"""

# KEYS: the generation, what is said about it. ARGV: the marker, its token, when this is, then keys and values. Gives how many values were kept, or -1 if the
# generation is gone. Instants are compared in halves: a number of Lua's has 53 bits, and its comparison of texts follows the server's language.
_PUT = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return -1 end
local function later(one, other, halves)
  for at = 1, halves do
    local a, b = struct.unpack('>I4', one, at * 4 - 3), struct.unpack('>I4', other, at * 4 - 3)
    if a ~= b then return a > b end
  end
  return false
end
local newest = redis.call('HGET', KEYS[2], 'newest')
local kept = 0
for at = 4, #ARGV, 2 do
  local there = redis.call('HGET', KEYS[1], ARGV[at])
  if not there or not later(there, ARGV[at + 1], 4) then
    redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
    kept = kept + 1
    if not newest or later(ARGV[at + 1], newest, 2) then newest = string.sub(ARGV[at + 1], 1, 8) end
  end
end
if newest then redis.call('HSET', KEYS[2], 'newest', newest) end
redis.call('HSET', KEYS[2], 'published', ARGV[3])
redis.call('HINCRBY', KEYS[2], 'writes', 1)
return kept
"""

# KEYS: the generation. ARGV: pairs of a key, and the first bytes of its value when it was found to have expired. Gives how many were removed.
_REMOVE = """
local removed = 0
for at = 1, #ARGV, 2 do
  local there = redis.call('HGET', KEYS[1], ARGV[at])
  if there and string.sub(there, 1, #ARGV[at + 1]) == ARGV[at + 1] then removed = removed + redis.call('HDEL', KEYS[1], ARGV[at]) end
end
return removed
"""


class RedisEngine:
    """An `Engine` on a Redis.

    Args:
        url: `redis://user:password@host:port/db`, or `rediss://` for TLS; what follows a `?` goes to redis-py.

    Raises:
        OnlineStoreError: redis is not installed, the URL is wrong, or the server does not answer or refuses.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
            import redis.exceptions
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise OnlineStoreError(f"an online store in a Redis needs {error.name}: pip install 'headrace[redis]'") from error
        self.name = shown(url)
        self._failures = redis.exceptions
        try:
            self.client: Any = redis.Redis.from_url(
                url,
                socket_connect_timeout=_CONNECT_S,
                socket_timeout=_ANSWER_S,
                retry=Retry(NoBackoff(), 1),  # at once: a connection of the pool may have been closed by the server since it was used last
                socket_read_size=_READ_BYTES,
                protocol=2,  # whose replies redis-py reads faster
            )
        except ValueError as error:
            raise OnlineStoreError(f"{self.name!r} is no URL of a Redis ({error}); write redis://user:password@host:6379/0") from None
        self.client.connection_pool.connection_kwargs["decode_responses"] = False  # whatever the URL says: values are no text
        self._make, self._swap, self._drop, self._put, self._remove = map(self.client.register_script, (_MAKE, _SWAP, _DROP, _PUT, _REMOVE))
        try:
            with self._told():
                self.client.ping()
        except OnlineStoreError:
            self.close()
            raise

    def close(self) -> None:
        """See `Engine`."""
        self.client.close()

    def views(self) -> list[str]:
        """See `Engine`."""
        with self._told():
            names = sorted(name.decode() for name in self.client.smembers(_VIEWS))
            return [name for name in names if self.client.hexists(_view(name), "current")]

    def current(self, view: str) -> Generation | None:
        """See `Engine`."""
        with self._told():
            number, format = self.client.hmget(_view(view), ["current", "format"])
            if number is None:
                return None
            if int(format or 0) > FORMAT:
                raise OnlineStoreError(
                    f"view {view!r} in {self.name!r} was made by a newer headrace (format {int(format)}; this release knows {FORMAT}): install that release"
                )
            schema, token = self.client.hmget(f"{_view(view)}:{int(number)}:about", ["schema", "token"])
        return Generation(view, int(number), schema or b"", token or b"")

    def make(self, view: str, schema: bytes) -> Generation:
        """See `Engine`."""
        return self._new(view, schema, "current")

    def begin(self, view: str, schema: bytes) -> Generation:
        """See `Engine`."""
        return self._new(view, schema, "begun")

    def drop(self, generation: Generation) -> None:
        """See `Engine`."""
        with self._told():
            self._drop(keys=[_view(generation.view)], args=[generation.number])

    def swap(self, generation: Generation) -> bool:
        """See `Engine`."""
        with self._told():
            return bool(self._swap(keys=[_view(generation.view)], args=[generation.number]))

    def fetch(self, generation: Generation, keys: Sequence[bytes]) -> list[bytes | None] | None:
        """See `Engine`."""
        with self._told():
            values: list[bytes | None] = self.client.execute_command("HMGET", _place(generation), *keys, MARKER)
        return values if values.pop() == generation.token else None

    def put(self, generation: Generation, keys: Sequence[bytes], values: Sequence[bytes], published_us: int) -> int | None:
        """See `Engine`."""
        pairs = [part for pair in zip(keys, values, strict=True) for part in pair]
        place = _place(generation)
        with self._told():
            kept = int(self._put(keys=[place, f"{place}:about"], args=[MARKER, generation.token, published_us, *pairs]))
        return None if kept < 0 else kept

    def standing(self, generation: Generation) -> Standing:
        """See `Engine`."""
        place = _place(generation)
        with self._told():
            newest, published = self.client.hmget(f"{place}:about", ["newest", "published"])
            keys = int(self.client.hlen(place))
        return Standing(instant_us(newest) if newest else None, int(published) if published else None, max(0, keys - 1))

    def sweep(self, generation: Generation, before: bytes) -> int:
        """See `Engine`."""
        removed, cursor, place = 0, 0, _place(generation)
        with self._told():
            while True:
                cursor, part = self.client.hscan(place, cursor, count=_SWEPT)
                expired = [(key, value[: EXPIRY.stop]) for key, value in part.items() if key != MARKER and value[EXPIRY] <= before]
                if expired:
                    removed += int(self._remove(keys=[place], args=[word for pair in expired for word in pair]))
                if not cursor:
                    return removed

    def settle(self) -> None:
        """See `Engine`. A Redis has everything in memory."""

    def _new(self, view: str, schema: bytes, state: str) -> Generation:
        with self._told():
            self.client.sadd(_VIEWS, view)
            number, kept, token = self._make(keys=[_view(view)], args=[schema, MARKER, new_token(), FORMAT, state])
        return Generation(view, int(number), kept, token)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what redis raises into what a user can mend."""
        failures = self._failures
        try:
            yield
        except failures.AuthenticationError as error:
            raise OnlineStoreError(f"the Redis at {self.name!r} refuses the user or the password in the URL ({error})") from error
        except (failures.ConnectionError, failures.TimeoutError) as error:
            raise OnlineStoreError(f"the Redis at {self.name!r} cannot be reached: {error}; is it running, and the URL right?") from error
        except failures.RedisError as error:
            why = str(error)
            if isinstance(error, failures.OutOfMemoryError) or "maxmemory" in why:
                why = f"its memory is full, and nothing of the batch was kept ({why}); give it more"
            raise OnlineStoreError(f"the Redis at {self.name!r} refuses: {why}") from error


def shown(url: str) -> str:
    """The URL as messages have it, without user, password and options."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return f"{url.partition('://')[0]}://..."


def _view(view: str) -> str:
    return f"headrace:{{{view}}}"  # in a cluster, what is in braces decides on which node it lies


def _place(generation: Generation) -> str:
    return f"{_view(generation.view)}:{generation.number}"
