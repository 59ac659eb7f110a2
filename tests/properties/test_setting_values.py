"""Settings: what is set is what the stage has, and nothing else changes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace as hr
from headrace.errors import SettingError
from headrace.stage import Stage

VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
SETTINGS = st.dictionaries(st.sampled_from(["model", "size", "scale", "mode"]), VALUES)


@hr.stage(out={"y": int}, replicas=(1, 2), ray={"max_restarts": 1})
class Model:
    model: object = "small"
    size: object = 4
    scale: object = 1.0
    mode: object = None

    def __call__(self, x: hr.Column[int]):
        return {"y": x}


@given(SETTINGS, SETTINGS)
def test_settings_are_replaced_and_the_rest_stays(made, changed):
    """Later values win over earlier ones, defaults fill the rest, and the spec is otherwise equal."""
    stage = Stage.of(Model(**made))
    variant = stage.with_settings(changed)
    defaults = {"model": "small", "size": 4, "scale": 1.0, "mode": None}
    assert variant.settings == {**defaults, **made, **changed}
    assert stage.settings == {**defaults, **made}
    assert dataclasses.replace(variant, call=stage.call) == stage


@given(SETTINGS, SETTINGS)
def test_a_pipeline_passes_settings_on(made, changed):
    """A pipeline's variant equals the pipeline written with those settings."""
    variant = hr.Pipeline("p", Model(**made)).with_settings(model=changed)
    assert variant.stages == hr.Pipeline("p", Model(**{**made, **changed})).stages


@given(SETTINGS, st.text("abcdelmoz", min_size=1, max_size=6))
def test_an_unknown_setting_changes_nothing(made, name):
    """A name that is no setting is refused with it and with all that are."""
    if name in ("model", "size", "scale", "mode"):
        return
    with pytest.raises(SettingError) as caught:
        Stage.of(Model(**made)).with_settings({name: 1})
    assert f"no setting '{name}'; it has 'model', 'size', 'scale', 'mode'" in str(caught.value)
