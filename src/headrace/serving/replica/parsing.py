"""Bodies of requests as a replica parses them: what is wrong with one is its answer."""

from __future__ import annotations

import traceback

import pyarrow as pa

from headrace.serving.bodies.codec import Codec, Incoming, Refused
from headrace.serving.wire import Content, Failure

LARGE_BYTES = 128 << 10  # a body from this size on is parsed in a thread of its own, so that the loop goes on
UNREADABLE = Failure(500, "internal", "the body could not be read, which is a mistake in the service; its log says why")
_OURS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError, pa.ArrowException)  # what a mistake in parsing may raise


def parse(codec: Codec, body: bytes | memoryview, content: Content) -> Incoming | Failure:
    """A request's rows, or why it has none."""
    try:
        return codec.decode(body, content)
    except Refused as refused:
        return refused.failure
    except _OURS:
        traceback.print_exc()
        return UNREADABLE
