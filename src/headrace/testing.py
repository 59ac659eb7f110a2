"""Contract tests for your own stages: `check(stage, rows)` in a test of yours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from headrace.errors import ContractError
from headrace.local import local
from headrace.pipeline import Pipeline
from headrace.stage import Stage


def check(step: Any, rows: Sequence[Mapping[str, Any]], *, tolerance: float = 1e-4) -> list[dict[str, Any]]:
    """Run a stage (or a pipeline) over `rows` and hold it to its contract; returns the outputs.

    Beyond what every run checks (columns, types, one value per row), the result must be the same when run again, and must
    not depend on which rows share a call: each row alone, and all rows in reverse order, must give the same values.

    Args:
        step: a decorated function, an instance of a decorated class, or a pipeline.
        rows: at least two input rows; the more they differ in length, the better.
        tolerance: the largest absolute difference between two floating-point results that count as equal.

    Raises:
        ContractError: says which row and column differ, and under which change.
        StageError, WiringError: as for `Pipeline.local`.
    """
    if len(rows) < 2:
        raise ContractError(f"check needs at least two rows to see whether they influence each other, got {len(rows)}")
    pipeline = step if isinstance(step, Pipeline) else Pipeline(Stage.of(step).name, step)
    expected = local(pipeline, rows)
    trials: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "run a second time": lambda: local(pipeline, rows),
        "run in reverse order": lambda: local(pipeline, rows[::-1])[::-1],
        "each row is run alone": lambda: [local(pipeline, [row])[0] for row in rows],
    }
    for change, trial in trials.items():
        for at, (one, other) in enumerate(zip(expected, trial(), strict=True)):
            for name in one:
                if not same(one[name], other[name], tolerance=tolerance):
                    raise ContractError(
                        f"{pipeline.name!r}: column {name!r} of row {at} changes when {change}: {_short(one[name])} became {_short(other[name])}. "
                        f"A stage's result for a row must depend on that row alone; if rounding is all it is, raise tolerance={tolerance}",
                        pipeline.name,
                    )
    return expected


def same(one: Any, other: Any, *, tolerance: float) -> bool:
    """Whether two values of a column are equal; numbers and vectors within `tolerance`, NaN equal to NaN."""
    if isinstance(one, (float, np.ndarray)) and isinstance(other, (float, np.ndarray)):
        return np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b, tolerance=tolerance) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
