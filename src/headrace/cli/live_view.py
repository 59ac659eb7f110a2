"""What a command shows while it works: a view that is drawn anew on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

BAR = 30  # characters of a bar that shows how far it is

_PLAIN_EVERY_S = 5.0

T = TypeVar("T")


class LiveView(Generic[T]):
    """Shows states of type T on standard error, from `with` on: `frame` draws one for a terminal, `line` says it in a line."""

    def __init__(self, frame: Callable[[T], RenderableType], line: Callable[[T], str], *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self._frame, self._line = frame, line
        self._printed = time.monotonic()
        live = self.console.is_terminal and not quiet
        self._live = Live(Text("starting"), console=self.console, refresh_per_second=4, transient=True) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, state: Callable[[], T]) -> None:
        """Show the state that a call gives, which is made only when something is drawn."""
        now = time.monotonic()
        if self._live:
            self._live.update(self._frame(state()))
        elif now - self._printed >= _PLAIN_EVERY_S:
            self._printed = now
            self.console.print(self._line(state()), markup=False, soft_wrap=True)
