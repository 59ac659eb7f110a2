"""A model's folder: weights, and `headrace.json`, which says what they are, which stage uses them, and what each file was when they were registered."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace import __version__
from headrace.errors import DefinitionError, RegistryError, SettingError
from headrace.registry import pickles
from headrace.stage import MARK, Stage

MANIFEST = "headrace.json"
_FORM = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `headrace.json` says: `files` by their paths in the folder, with SHA-256; `stage`, the one that uses them: its name, class, settings and columns."""

    files: Mapping[str, str]
    stage: Mapping[str, Any] = field(default_factory=dict)
    pickles: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A name for these files: what is registered under it is what is loaded."""
        return hashlib.sha256(json.dumps(sorted(self.files.items())).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """The file's text."""
        told = {"form": _FORM, "headrace": __version__, "stage": dict(self.stage), "pickles": list(self.pickles), "files": dict(self.files)}
        return json.dumps(told, indent=1) + "\n"

    @staticmethod
    def of(folder: Path, *, stage: Any = None, trust_pickles: bool = False) -> Manifest:
        """The manifest of a folder that is to be registered.

        Raises:
            RegistryError: it is none, has no files, or has pickles that nobody answers for.
            DefinitionError: `stage` is none.
        """
        if not folder.is_dir():
            raise RegistryError(f"{str(folder)!r} is no folder; save the model's files into one, in safetensors or in its library's own format")
        files = {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        files.pop(MANIFEST, None)  # of a folder that was fetched from a registry
        if not files:
            raise RegistryError(f"{str(folder)!r} has no files; save the model into it first")
        if not trust_pickles:
            advice = "save weights with safetensors, or in the library's own format (xgboost's and LightGBM's save_model), or say trust_pickles=True"
            pickles.refuse(folder, f"{str(folder)!r}", advice=advice, error=RegistryError)
        return Manifest(files, {} if stage is None else describe(stage), tuple(pickles.pickles(folder)))

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of a folder; None where there is none, or none of ours."""
        try:
            told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return Manifest(dict(told["files"]), dict(told["stage"]), tuple(told["pickles"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def check(folder: Path, digest_registered: str, what: str) -> None:
    """Raise unless the files of a folder are those that were registered; `what` opens the message.

    Raises:
        SettingError: one is missing, added or changed since.
    """
    kept = Manifest.read(folder)
    if kept is None or kept.digest != digest_registered:
        raise SettingError(f"{what}: its {MANIFEST} is not the one that was registered, so nobody says what these files are; register them as the next version")
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    there.pop(MANIFEST)
    odd = sorted(kept.files.keys() ^ there.keys()) or [name for name, path in there.items() if digest(path) != kept.files[name]]
    if odd:
        raise SettingError(f"{what}: {odd[0]!r} is not as it was registered; register the files as the next version, or put back what was there")


def describe(stage: Any) -> dict[str, Any]:
    """A stage as the manifest names it. It is told, and not imported by anybody: what runs is in the user's own file.

    Raises:
        DefinitionError: it is no stage.
    """
    spec = getattr(stage, MARK, None) if inspect.isclass(stage) else Stage.of(stage)
    if not isinstance(spec, Stage):
        raise DefinitionError(f"stage must be one that uses the model, such as Score(), got {stage!r}")
    call = spec.call if inspect.isfunction(spec.call) or inspect.isclass(spec.call) else type(spec.call)
    return {
        "name": spec.name,
        "of": f"{call.__module__}.{call.__qualname__}",
        "settings": {} if inspect.isclass(stage) else {name: repr(value) for name, value in spec.settings.items()},
        "reads": {name: str(column) for name, column in spec.reads.items()},
        "writes": {name: str(column) for name, column in spec.writes.items()},
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
