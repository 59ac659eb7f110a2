"""The answer to a row as server-sent events: its text as it is written, then the row.

    event: text    data: {"column": "summary", "text": "a piece"}    as often as there are pieces
    event: row     data: the row, exactly as it is answered without streaming; the end
    event: error   data: {"code": "...", "message": "..."}            instead, if there is no row; the end

An event is two lines and a blank one (https://html.spec.whatwg.org/multipage/server-sent-events.html); `data` is JSON without line breaks.
"""

from __future__ import annotations

from collections.abc import Iterator

TEXT, ROW, ERROR = "text", "row", "error"


def event(name: str, data: bytes | memoryview) -> bytes:
    """An event with its data."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), bytes(data))


class Events:
    """Events out of a stream of bytes."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Name and data of all events that `data` completes."""
        searched = max(0, len(self._held) - 1)
        self._held += data
        start = 0
        while (end := self._held.find(b"\n\n", max(start, searched))) >= 0:
            lines = [line.partition(b": ") for line in bytes(self._held[start:end]).split(b"\n")]
            found = {name: value for name, _, value in lines}
            yield found.get(b"event", b"").decode("utf-8", "replace"), found.get(b"data", b"")
            start = end + 2
        del self._held[:start]
