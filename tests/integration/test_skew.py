"""Every skew between two sides of a pipeline is caught, every time. Starts a service in this process, and no Ray."""

from __future__ import annotations

import pytest
from skews import SEEDS, SKEWS


@pytest.mark.parametrize("skew", SKEWS)
def test_a_skewed_service_is_caught_every_time(skew: str) -> None:
    """By each way to ask it, whatever the rows; without the skew, by none."""
    pytest.importorskip(SKEWS[skew].needs)
    for seed, ways in SKEWS[skew].caught(SEEDS).items():
        assert len(ways) == 3, f"seed {seed}: only {ways}"
