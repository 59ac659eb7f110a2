"""Errors: one tree, messages with a hint, and nothing lost on the way between processes."""

import pickle

import pytest

from headrace import cli, errors
from headrace.errors import ContractError, DefinitionError, HeadraceError, ServiceError, StageError, check_number, listing, nearest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HeadraceError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_drawn_in_the_tree(kind):
    """The module's docstring names each kind of error once, and each has a docstring of its own."""
    assert errors.__doc__.count(kind.__name__) == 1
    assert kind.__doc__


def test_exit_codes():
    """What a shell script can tell apart; the command's own docstring lists the same numbers."""
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    failed = {"StageError": 1, "ContractError": 1, "RunError": 1, "EngineLostError": 1, "DeadLetterError": 3, "ChangedError": 4, "TakenOverError": 5}
    unserved = [
        "ServiceError",
        "FailedError",
        "UnauthorizedError",
        "OverloadedError",
        "DeadlineError",
        "UnavailableError",
        "ParityError",
        "GateError",
        "DeployError",
    ]
    failed |= dict.fromkeys(unserved, 1)
    assert codes == dict.fromkeys(codes, 2) | failed | {"StorageError": 6, "LedgerError": 6, "StoppedError": 130}
    told = {int(line.split()[0]) for line in cli.__doc__.splitlines() if line[:4].isspace() and line.strip()[:1].isdigit()}
    assert told == {0, *codes.values()}


@pytest.mark.parametrize("kind", [StageError, ContractError])
def test_a_stage_error_survives_pickling(kind):
    """Message, stage and the user's frames come through a pickle, and the text is the message alone."""
    copy = pickle.loads(pickle.dumps(kind("it broke", "embed", "line 3")))
    assert (type(copy), str(copy), copy.message, copy.stage, copy.frames) == (kind, "it broke", "it broke", "embed", "line 3")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, ServiceError)])
def test_a_service_error_survives_pickling(kind):
    """What the service said comes through a pickle, and the text is the message alone."""
    given = ("stage 'embed' raised", 500, "stage_failed", "id", ({"loc": []},))
    copy = pickle.loads(pickle.dumps(kind(*given)))
    assert (type(copy), str(copy), copy.status, copy.code, copy.request_id, copy.details) == (kind, *given)
    assert not isinstance(copy, StageError) or (copy.stage, copy.frames) == ("embed", "")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [("txet", ["text", "title"], "; did you mean 'text'?"), ("text", [], ""), ("text", ["vector"], ""), ("text", [1, "texts"], "; did you mean 'texts'?")],
)
def test_nearest(name, known, hint):
    """The hint names the closest known name, if one is close, whatever else the names are."""
    assert nearest(name, known) == hint


@pytest.mark.parametrize(
    ("names", "text"), [([], "nothing"), (["a", "b"], "'a', 'b'"), (map(str, range(15)), ", ".join(repr(str(n)) for n in range(12)) + " and 3 more")]
)
def test_listing(names, text):
    """At most twelve names are shown, and the rest is counted."""
    assert listing(names) == text


@pytest.mark.parametrize(
    ("value", "options", "allowed"),
    [
        (0, {}, "number above 0"),
        (-1, {"zero": True}, "number of at least 0"),
        (1.5, {"whole": True}, "whole number of at least 1"),
        (True, {"whole": True}, "whole number of at least 1"),
        (-1, {"whole": True, "zero": True}, "whole number of at least 0"),
        (float("nan"), {}, "number above 0"),
        (float("inf"), {"zero": True}, "number of at least 0"),
        ("2", {}, "number above 0"),
    ],
)
def test_check_number_refuses(value, options, allowed):
    """A number out of range, or no number, is refused with what is allowed and the value."""
    with pytest.raises(DefinitionError) as caught:
        check_number(value, "depth", **options)
    assert str(caught.value) == f"depth must be a {allowed}, got {value!r}"
