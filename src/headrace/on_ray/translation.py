"""Ray's exceptions as headrace's own."""

from __future__ import annotations

import ray
import ray.exceptions

from headrace.errors import HeadraceError, RunError


def translated(error: BaseException) -> HeadraceError:
    """The HeadraceError that a worker raised, dug out of Ray's wrapping; else a RunError that says what was raised."""
    seen: BaseException | None = error
    innermost = error
    while seen is not None:
        if not isinstance(seen, ray.exceptions.RayError):  # Ray's wrapper of an error is of both kinds, and prints its own frames
            if isinstance(seen, HeadraceError):
                return seen
            innermost = seen
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    first = str(innermost).strip().splitlines()
    return RunError(f"Ray stopped the run: {type(innermost).__name__}: {first[0] if first else 'no message'}")
