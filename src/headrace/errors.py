"""Every error that headrace raises on purpose.

    HeadraceError
    ├── DefinitionError        a stage or a pipeline is written wrongly
    │   ├── WiringError        column names or types do not fit together
    │   ├── SettingError       a setting does not exist, or has a value that its annotation forbids
    │   └── PipelineFileError  the pipeline file cannot be loaded, or names no pipeline
    ├── HardwareError          no node has what a stage asks for
    ├── AccountsError          a gateway's database of accounts is missing, damaged or out of reach, or cannot take a change
    ├── RegistryError          a registry of models is missing or out of reach, has no such model, or cannot take a change
    ├── KeyFileError           a file of API keys is missing, damaged, or cannot take a change
    ├── OnlineStoreError       an online store is missing, damaged or out of reach, or what it holds is not what was asked for
    │   └── WrongKeyError      a key is of another kind than those of the view
    ├── ServingError           no service of that name runs, or none can be started so
    ├── SourceError            the input cannot be found, read, or used by this pipeline
    ├── OutputError            the output cannot take this run, or belongs to something else
    │   ├── ChangedError       input, code or settings are not those that the output was begun with
    │   ├── TakenOverError     another run holds the output
    │   ├── StorageError       the output's file system refused: full, read-only or out of reach
    │   └── LedgerError        the ledger of the output is damaged
    ├── StageError             a stage raised; carries the user's own frames
    │   └── ContractError      a stage returned something other than it declared
    ├── RunError               the engine failed, or rows are missing at the end
    │   ├── DeadLetterError    more rows failed than --max-dead-letters allows
    │   ├── GateError          a version of a model does not pass what is asked of it before an alias names it
    │   ├── DeployError        a version of a service did not take over
    │   ├── EngineLostError    an engine that a stage stands on died or hangs; no row is to blame
    │   ├── ParityError        two ways of running a pipeline give different values for the same rows
    │   └── StoppedError       the run was told to stop, and can be resumed
    └── ServiceError           a service gave no answer; carries status, code, request id and details
        ├── RowError           a row is not what the pipeline reads (also what `local` raises for it: wiring)
        ├── FailedError        a stage raised on a row there (also what `local` raises for it: a stage's error)
        ├── UnauthorizedError  the key is missing, unknown or revoked
        ├── OverloadedError    the service has more work than it can do in time
        ├── DeadlineError      there was no answer within the time allowed
        └── UnavailableError   nobody answers there, or no replica is ready

A message says what is wrong, the value, what is allowed and the nearest fix. `exit_code` is what the command ends with.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any


class HeadraceError(Exception):
    """Something that the user of headrace can mend."""

    exit_code = 2


class DefinitionError(HeadraceError):
    """A stage or a pipeline is written wrongly."""


class WiringError(DefinitionError):
    """Column names or column types do not fit together."""


class SettingError(DefinitionError):
    """A setting does not exist, or has a value that its annotation forbids."""


class PipelineFileError(DefinitionError):
    """The pipeline file cannot be loaded, or does not hold the pipeline asked for."""


class HardwareError(HeadraceError):
    """No node of the cluster has what a stage asks for."""


class ServingError(HeadraceError):
    """No service of that name runs, or none can be started in the way asked for."""


class AccountsError(HeadraceError):
    """A database of accounts is missing, damaged or out of reach, or cannot take what was asked of it."""


class OnlineStoreError(HeadraceError):
    """An online store of features is missing, damaged or out of reach, or cannot take or give what was asked of it."""


class RegistryError(HeadraceError):
    """A registry of models is missing or out of reach, has no such model, or cannot take what was asked of it."""


class WrongKeyError(OnlineStoreError):
    """A key that was asked for is of another kind than the keys of the view."""


class KeyFileError(HeadraceError):
    """A file of API keys is missing or damaged, or cannot take the change asked for."""


class SourceError(HeadraceError):
    """The input cannot be found, read, or used by this pipeline."""


class OutputError(HeadraceError):
    """The output cannot take this run, or belongs to something else."""


class ChangedError(OutputError):
    """Input, code or settings are not those that the output was begun with."""

    exit_code = 4


class TakenOverError(OutputError):
    """Another run holds the output."""

    exit_code = 5


class StorageError(OutputError):
    """The output's file system refused: full, read-only or out of reach."""

    exit_code = 6


class LedgerError(OutputError):
    """The ledger of the output is damaged."""

    exit_code = 6


class StageError(HeadraceError):
    """A stage raised. `frames` is the user's part of the traceback, ready to print."""

    exit_code = 1

    def __init__(self, message: str, stage: str = "", frames: str = "") -> None:
        super().__init__(message, stage, frames)  # all three in args, so that it survives pickling
        self.message = message
        self.stage = stage
        self.frames = frames

    def __str__(self) -> str:
        return self.message


class ContractError(StageError):
    """A stage returned something other than it declared."""


class RunError(HeadraceError):
    """The engine failed, or rows are missing at the end."""

    exit_code = 1


class DeadLetterError(RunError):
    """More rows failed than `--max-dead-letters` allows."""

    exit_code = 3


class DeployError(RunError):
    """A version of a service did not take over; the one before it answers as it did."""


class GateError(RunError):
    """A version of a model does not pass what is asked of it before an alias names it; the alias stays where it is."""


class EngineLostError(RunError):
    """An engine that a stage stands on died or hangs. Where something runs the process again, it ends instead, and its rows are run again."""


class StoppedError(RunError):
    """The run was told to stop, and can be resumed."""

    exit_code = 130  # as shells have it for Ctrl-C


class ParityError(RunError):
    """Two ways of running a pipeline give different values for the same rows."""


class ServiceError(HeadraceError):
    """A service gave no answer.

    Attributes:
        status: the HTTP status, or 0 where there was no answer at all.
        code: the service's word for it, such as `overloaded`.
        request_id: what the request is called in the service's logs.
        details: what is wrong with each field, as the service lists it: maps with `loc` and `message`.
    """

    exit_code = 1

    def __init__(self, message: str, status: int = 0, code: str = "", request_id: str = "", details: Sequence[Mapping[str, Any]] = ()) -> None:
        Exception.__init__(self, message, status, code, request_id, details)  # all in args, so that it survives pickling
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id
        self.details = tuple(details)

    def __str__(self) -> str:
        return self.message


class RowError(ServiceError, WiringError):
    """A row lacks a column, has one too many, or holds a value that its type forbids."""

    exit_code = 2


class FailedError(ServiceError, StageError):
    """A stage of the service raised on a row; `stage` says which."""

    frames = ""  # a service never tells them

    @property
    def stage(self) -> str:  # type: ignore[override]
        """The stage that raised, as far as the service says which."""
        named = re.search(r"stage '([^']+)'", self.message)
        return named[1] if named else ""


class UnauthorizedError(ServiceError):
    """The key is missing, unknown or revoked."""


class OverloadedError(ServiceError):
    """The service has more work than it can do in time."""


class DeadlineError(ServiceError):
    """There was no answer within the time allowed."""


class UnavailableError(ServiceError):
    """Nobody answers there, or no replica is ready."""


def check_number(value: Any, what: str, *, whole: bool = False, zero: bool = False) -> None:
    """Raise DefinitionError unless `value` is a finite number above 0 (or, with `zero`, 0), without a fraction if `whole`."""
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        allowed = f"whole number of at least {0 if zero else 1}" if whole else f"number {'of at least' if zero else 'above'} 0"
        raise DefinitionError(f"{what} must be a {allowed}, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: `'; did you mean 'text'?'`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, map(str, known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listing(names: Iterable[str]) -> str:
    """Names for an error message, `'a', 'b'`, at most twelve of them."""
    shown = [repr(name) for name in names]
    rest = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return (", ".join(shown[:12]) + rest) or "nothing"
