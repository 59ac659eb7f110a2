"""--set: text becomes a checked value of a stage's setting."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import pytest

import headrace as hr
from headrace.errors import SettingError
from headrace.settings import override

if TYPE_CHECKING:
    from decimal import Decimal as Unseen


class Mode(enum.Enum):
    """A choice."""

    FAST = "fast"
    EXACT = "exact"


class Opaque:
    """A type that text says nothing about."""


@hr.stage(out={"y": int})
class Model:
    """A stage with a setting of every kind."""

    model: str = "small"
    size: int = 1
    rate: float = 0.5
    deep: bool = False
    stops: list[str] = ()  # type: ignore[assignment]
    top: int | None = 3
    kind: Literal["mean", "max"] = "mean"
    mode: Mode = Mode.FAST
    share: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    opaque: Opaque | None = None

    def __call__(self, x: hr.Column[int]) -> dict[str, Any]:
        """Nothing of interest."""
        return {"y": x}


@hr.stage(out={"z": int})
def plain(y: hr.Column[int]) -> dict[str, Any]:
    """A stage without settings."""
    return {"z": y}


PIPELINE = hr.Pipeline("p", Model(), plain)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("model=large", "large"),
        ("model=007", "007"),
        ("model=a=b", "a=b"),
        ("model=", ""),
        ("model=null", "null"),
        ("size=12", 12),
        ("rate=1e-3", 0.001),
        ("deep=true", True),
        ("deep=0", False),
        ('stops=["a", "b"]', ["a", "b"]),
        ("top=null", None),
        ("top=5", 5),
        ("kind=max", "max"),
        ("mode=exact", Mode.EXACT),
        ("share=0.25", 0.25),
    ],
)
def test_values(assignment: str, value: Any) -> None:
    """Text stays text; all else is held to the setting's annotation. The pipeline itself is not changed."""
    name = assignment.partition("=")[0]
    found = override(PIPELINE, [f"model.{assignment}"]).stage("model").settings[name]
    assert (type(found), found) == (type(value), value)
    assert PIPELINE.stage("model").settings["model"] == "small"


def test_in_order() -> None:
    """The last of two assignments to a setting counts, and others are kept."""
    settings = override(PIPELINE, ["model.size=2", "model.model=x", "model.size=3"]).stage("model").settings
    assert (settings["size"], settings["model"], settings["rate"]) == (3, "x", 0.5)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("size=3", "--set 'size=3' must have the form stage.setting=value, such as embed.model=small"),
        ("model.size", "must have the form"),
        (".size=3", "must have the form"),
        ("modle.size=3", "has no stage 'modle'; it has 'model', 'plain'; did you mean 'model'"),
        ("model.sise=3", "stage 'model' has no setting 'sise'; it has 'model', 'size', .*did you mean 'size'"),
        ("plain.x=1", "stage 'plain' has no setting 'x'; it has no settings"),
        ("model.size=big", "--set model.size='big': Input should be a valid integer.*; the setting is declared as int"),
        ("model.size=1.5", "valid integer"),
        ("model.deep=perhaps", "valid boolean"),
        ("model.kind=median", "Input should be 'mean' or 'max'; the setting is declared as .*Literal"),
        ("model.mode=slow", "Input should be 'fast' or 'exact'; the setting is declared as Mode"),
        ("model.share=2", "less than or equal to 1"),
        ("model.opaque=x", "--set model.opaque='x': its annotation is nothing that text can be checked against"),
    ],
)
def test_refusals(assignment: str, message: str) -> None:
    """What cannot be set is refused with the value, what is allowed, and the nearest name."""
    with pytest.raises(SettingError, match=message):
        override(PIPELINE, [assignment])


def test_an_annotation_that_cannot_be_evaluated() -> None:
    """An annotation of a name that exists for type checkers only is the user's to mend, not a traceback."""

    @hr.stage(out={"y": int})
    class Hidden:
        size: Unseen = 1  # type: ignore[assignment]

        def __call__(self, x: hr.Column[int]) -> dict[str, Any]:
            return {"y": x}

    with pytest.raises(SettingError, match="hidden.size='3': its annotation is nothing"):
        override(hr.Pipeline("p", Hidden()), ["hidden.size=3"])
