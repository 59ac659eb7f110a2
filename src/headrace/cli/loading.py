"""From `FILE` or `FILE::name` to a pipeline, a training, or feature views."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from headrace.errors import HeadraceError, PipelineFileError, listing, nearest
from headrace.features.view import FeatureView
from headrace.pipeline import Pipeline
from headrace.training import Training

T = TypeVar("T", Pipeline, Training)


def load(target: str) -> Pipeline:
    """The pipeline that a file defines; `FILE::name` picks one of several by variable or name.

    Raises:
        PipelineFileError: no such file, it does not run, or it does not hold exactly the pipeline asked for.
    """
    return _load(target, Pipeline, "pipeline", "reviews = hr.Pipeline('reviews', clean)")


def load_training(target: str) -> Training:
    """The training that a file defines, likewise."""
    return _load(target, Training, "training", "prices = hr.Training('prices', fit)")


def _load(target: str, kind: type[T], noun: str, example: str) -> T:
    file, wanted, module = _module(target)
    found = {name: value for name, value in vars(module).items() if isinstance(value, kind)}
    if wanted:
        named = {one.name: one for one in found.values()} | found
        if wanted not in named:
            raise PipelineFileError(f"{file} has no {noun} {wanted!r}; it has {listing(named)}" + nearest(wanted, named))
        return named[wanted]
    if len({id(one) for one in found.values()}) != 1:
        fix = f"say which: {file}::{next(iter(found))}" if found else f"define one, such as {example}"
        raise PipelineFileError(f"{file} has {len(found) or 'no'} {noun}s" + (f", {listing(found)}" if found else "") + f"; {fix}")
    return next(iter(found.values()))


def load_views(target: str) -> tuple[FeatureView, ...]:
    """The feature views that a file defines, in order; `FILE::name` picks one by variable or name.

    Raises:
        PipelineFileError: no such file, it does not run, or it holds no such view.
    """
    file, wanted, module = _module(target)
    found = {name: value for name, value in vars(module).items() if isinstance(value, FeatureView)}
    named = {view.name: view for view in found.values()}
    if not found:
        raise PipelineFileError(f"{file} has no feature view; define one, such as stays = hr.FeatureView('stays', ...)")
    if len(named) < len({id(view) for view in found.values()}):
        raise PipelineFileError(f"{file} has two feature views of one name; they are called {listing(view.name for view in found.values())}")
    if wanted and wanted not in named | found:
        raise PipelineFileError(f"{file} has no feature view {wanted!r}; it has {listing(named)}" + nearest(wanted, named))
    return ((named | found)[wanted],) if wanted else tuple(named.values())


def _module(target: str) -> tuple[str, str, ModuleType]:
    """The file, the name behind `::`, and the file as a module."""
    file, _, wanted = target.partition("::")
    path = Path(file)
    if not path.is_file():
        single = file.rpartition(":")
        hint = f"; did you mean {single[0]}::{single[2]}?" if single[0] and Path(single[0]).is_file() else ""
        raise PipelineFileError(f"no file {file!r}" + (hint or _neighbours(path)))
    return file, wanted, _import(path.resolve())


def _neighbours(path: Path) -> str:
    folder = path.parent
    return nearest(path.name, [other.name for other in folder.glob("*.py")]) if folder.is_dir() else f"; there is no folder {str(folder)!r}"


def _import(path: Path) -> ModuleType:
    """Run the file as a module of its own name, with its folder on the path as `python FILE` would have it."""
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"pipeline_file_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PipelineFileError(f"{str(path)!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = f"{os.path.relpath(error.filename or path)}, line {error.lineno}"
        raise PipelineFileError(f"{where}: {error.msg}\n    {(error.text or '').strip()}") from error
    except HeadraceError as error:
        raise type(error)(f"{error}\n    at {_own_frame(error, path)}") from error
    except (Exception, SystemExit) as error:  # the user's file may raise anything while it is run: this is its boundary
        raise PipelineFileError(f"{_own_frame(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _own_frame(error: BaseException, path: Path) -> str:
    """Where in the user's file it happened: the innermost of its frames, as `file, line n: source`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{os.path.relpath(path)}, line {frames[-1].lineno}: {frames[-1].line}" if frames else os.path.relpath(path)
