"""What all tests share. pytest puts this folder on the path, so that tests can import the modules beside this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Holds a text to the one in tests/golden; with HEADRACE_RENEW_GOLDENS=1, puts it there instead."""

    def hold(name: str, text: str) -> None:
        file = GOLDEN / name
        if os.environ.get("HEADRACE_RENEW_GOLDENS"):
            GOLDEN.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert text == file.read_text(encoding="utf-8"), f"tests/golden/{name} says otherwise; if this is right, renew it (CONTRIBUTING.md says how)"

    return hold
