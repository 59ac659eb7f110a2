"""A language model by the name that an MLflow registry has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import registered
from conftest import ENGINE

import headrace as hr


def test_a_model_by_its_alias_says_what_its_folder_says(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def said(model: str, *, name: str) -> list[dict[str, Any]]:
        stage = hr.LLM(out="said", model=model, prompt="Say: {text}", on=hr.cpu(1), sampling=hr.Sampling(max_tokens=16), engine=ENGINE)
        assert stage.speaks().model == name
        return hr.Pipeline("talk", stage).local([{"text": f"room {at}"} for at in range(4)])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with registered.asked(registered.in_file(tmp_path)) as client:
        registered.register(client, "little", tiny.lm, "champion")
        assert said("models:/little@champion", name="little") == said(tiny.lm, name="tiny")
    assert list((tmp_path / "cache" / "headrace" / "registry").glob("*/config.json"))
