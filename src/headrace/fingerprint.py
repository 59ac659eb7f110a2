"""What the results of a run depend on, as facts that can be kept and compared: code, settings, models, and what is read.

A resumed run must not mix the rows of two programs. Each fact has a name that a person understands, so that a difference can be
told in words. Code is compared by its syntax tree: comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from headrace.batching import Rows
from headrace.errors import ChangedError
from headrace.pipeline import Pipeline
from headrace.stage import Stage
from headrace.training import Training

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OWN = str(Path(__file__).parent)
OUTPUT_COLUMNS = "the output's columns"
_NO_FACTS = ("input", "origin", "pipeline")  # what is read is told by its files; a moved or renamed pipeline is the same
_SHOWN = 60  # characters of a value in a message
_MODEL_ENDINGS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".joblib",
    ".json",
    ".model",
    ".npy",
    ".npz",
    ".onnx",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".txt",
    ".ubj",
    ".xml",
)
_MODEL_FILES = ("adapter_config.json", "config.json", "modules.json", "tokenizer.json", "MLmodel", "model.safetensors", "model.onnx")


def facts(pipeline: Pipeline, request: Mapping[str, Any], columns: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The facts of a run: its request (what is read, kept and written), and for each stage its wiring, settings and code.

    `columns` are those of the output, with their types.

    The code is that of the modules in which stages are defined, and of the user's own modules that these import. A setting
    that names a local file or folder, or a model in Hugging Face's cache, counts with that model's version.
    """
    found = {f"--{name}": str(value) for name, value in request.items() if value is not None and name not in _NO_FACTS}
    if columns is not None:
        found[OUTPUT_COLUMNS] = _columns(columns)
    found["stages"] = ", ".join(stage.name for stage in pipeline.stages)
    modules: dict[str, ModuleType] = {}
    for stage in pipeline.stages:
        found[f"columns of {stage.name}"] = f"{_columns(stage.reads)} -> {_columns(stage.writes)}"
        for name, value in stage.settings.items():
            # Of a function or a class the name: its code counts below, and its repr has an address that is never the same.
            found[f"{stage.name}.{name}"] = f"{value.__module__}.{value.__qualname__}" if _has_code(value) else repr(value)
            if version := _version(value):
                found[f"version of {stage.name}.{name}"] = version
        own = {module.__name__: module for module in _modules(stage)}
        modules |= own
        if not own and (code := _typed_in(stage.call)):
            found[f"code of {stage.name}"] = code
    for module in sorted(modules.values(), key=lambda module: module.__name__):
        name = f"code of {Path(str(module.__file__)).name}"
        found[name] = found.get(name, "") + _code(str(module.__file__))  # several packages have an __init__.py
    return found


def loop_facts(training: Training) -> dict[str, str]:
    """The facts of a training's own: its settings, and the code of its loop with the user's own modules that this imports."""
    found = {f"setting {name}": repr(value) for name, value in training.values.items()}
    found |= {f"version of {name}": version for name, value in training.values.items() if (version := _version(value))}
    loop = Stage(name=training.name, call=training.loop, reads={}, writes={}, on=(), batch=Rows(1), replicas=(1, None))
    modules = {module.__name__: module for module in _modules(loop)}
    if not modules and (code := _typed_in(training.loop)):
        found["code of the loop"] = code
    for module in sorted(modules.values(), key=lambda module: module.__name__):
        name = f"code of {Path(str(module.__file__)).name}"
        found[name] = found.get(name, "") + _code(str(module.__file__))
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What changed, a line each."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith(("code of ", "version of ")) and old and new:
            lines.append(f"{name}: changed")
        else:
            lines.append(f"{name}: was {_short(old)}, is {_short(new)}")
    return lines


def refuse(output: str, changes: Iterable[str]) -> ChangedError:
    """The error that tells what changed since an output was begun, and the choices."""
    return ChangedError(
        f"output {output!r} was begun with something else:\n"
        + "".join(f"  {line}\n" for line in changes)
        + "Choose: --accept-change goes on, and leaves the rows that are done as they are; --restart throws them away and begins again."
    )


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _SHOWN else value[: _SHOWN - 3] + "..."


def _columns(types: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {column}" for name, column in types.items())


def _modules(stage: Stage) -> Iterator[ModuleType]:
    """The user's modules that a stage is made of: those of its classes or function and of its settings, and what they import."""
    call = stage.call
    given = filter(_has_code, stage.settings.values())
    waiting = [sys.modules.get(kind.__module__) for kind in ([call] if inspect.isfunction(call) else [*type(call).__mro__, *given])]
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module is None or module.__name__ in seen or not _is_users(module):
            continue
        seen.add(module.__name__)
        yield module
        waiting += [sys.modules.get(name) for name in _imported(module)]


def _has_code(value: Any) -> bool:
    return inspect.isfunction(value) or inspect.isclass(value)


def _imported(module: ModuleType) -> Iterator[str]:
    """The names of what a module imports, and may be modules. What a function imports counts only when the module does, too."""
    nodes: list[ast.AST] = [ast.parse(Path(str(module.__file__)).read_bytes())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__) if node.level else str(node.module)
            yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


def _is_users(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and file.endswith(".py") and not file.startswith((*_INSTALLED, _OWN)) and os.path.exists(file)


def _code(path: str) -> str:
    """A digest of a module's code."""
    return _digest(Path(path).read_text(encoding="utf-8"))


def _typed_in(call: Any) -> str:
    """A digest of a stage that was typed into a notebook; nothing for one of an installed package."""
    if getattr(inspect.getmodule(call), "__file__", None):
        return ""
    found = ""
    for function in [call] if inspect.isfunction(call) else filter(inspect.isfunction, vars(type(call)).values()):
        with contextlib.suppress(OSError, TypeError):  # what dataclasses add has no source
            found += _digest(inspect.getsource(function))
    return found


def _digest(source: str) -> str:
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _version(value: Any) -> str | None:
    """The version of the model that a setting names: the state of a local model file or folder, or the commit in Hugging Face's cache."""
    if not isinstance(value, (str, os.PathLike)) or not (text := str(value)) or "\0" in text or len(text) > 1024:
        return None
    path = Path(text).expanduser()
    if (path.is_file() and path.suffix.lower() in _MODEL_ENDINGS) or any(
        (path / name).is_file() for name in _MODEL_FILES
    ):  # nothing else: it may be a log, or a cache
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        states = [(str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns) for one in files]
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    reference = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{text.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if text.count("/") == 1 and reference.is_file() else None
