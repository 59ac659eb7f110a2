"""Whether this process is one that is started again when it ends: then a replica that cannot go on had better end.

Whoever runs a replica declares it; a pipeline that runs in a user's own process must never end that.
"""

from __future__ import annotations

import os
import signal
import sys

_declared_in: int | None = None


def declare() -> None:
    """Whoever started this process starts another if it ends, and has its rows run again."""
    global _declared_in  # noqa: PLW0603 - it holds for the process as a whole
    _declared_in = os.getpid()


def give_up(why: str, *, own_doing: bool) -> None:
    """End this process if it is expendable, with `why` as its last words on stderr; else return.

    `own_doing` is whether what it computes may be the cause: then a service asks for its rows one by one from now on. Else it ends as
    if killed from outside, which casts no suspicion on them.
    """
    if _declared_in != os.getpid():
        return
    print(f"headrace: {why}; this process ends, and another takes its rows", file=sys.stderr, flush=True)
    if not own_doing:
        signal.raise_signal(signal.SIGKILL)
    os._exit(1)
