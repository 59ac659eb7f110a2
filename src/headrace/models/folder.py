"""A model's folder in the format of sentence-transformers, read without loading the model or any library for it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import DefinitionError, listing

_KNOWN = ("Dense", "Dropout", "LayerNorm", "Normalize", "Pooling", "Transformer")
_WHOLE_BYTES = 1 << 20  # files up to this size are digested whole, of larger ones the beginning and the end
_LONGEST_PLAUSIBLE = 1_000_000  # tokenizers without a limit name an astronomical one


@dataclass(frozen=True, slots=True)
class Card:
    """What the files of a model say: `size` numbers per vector, texts cut after `longest` tokens, put behind `prompt`, in lower case if `lower`."""

    size: int
    longest: int
    prompt: str
    lower: bool
    tokenizer: Path


def find(model: str) -> Path | None:
    """The folder of a model: a local folder, or the copy of a hub's model in Hugging Face's cache; None if it is in neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.count("/") > 1 or not model or "\0" in model:
        return None
    name = model if "/" in model else f"sentence-transformers/{model}"  # where the library itself looks for a bare name
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    kept = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    reference = kept / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = kept / "snapshots" / reference.read_text(encoding="utf-8").strip()
    return snapshot if (snapshot / "modules.json").is_file() else None


def read(folder: Path) -> Card:
    """The card of a model.

    Raises:
        DefinitionError: it is no model of sentence-transformers, or one that cannot be run as the library would.
    """
    if not (folder / "modules.json").is_file():
        raise DefinitionError(
            f"model {str(folder)!r} has no modules.json, so how its vectors are pooled is not known; "
            "save it in the format of sentence-transformers: SentenceTransformer(...).save(folder)"
        )
    modules = _json(folder / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if unknown := [kind for kind in kinds if kind not in _KNOWN]:
        raise DefinitionError(
            f"model {str(folder)!r} has a module {unknown[0]!r}; hr.models.Embedder knows {listing(_KNOWN)}; write a stage of your own for it"
        )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Transformer") + kinds.count("Pooling") > 2:
        raise DefinitionError(
            f"model {str(folder)!r} is made of {listing(kinds)}; hr.models.Embedder takes a Transformer, then a Pooling, then any of "
            f"{listing(kind for kind in _KNOWN if kind not in ('Transformer', 'Pooling'))}; write a stage of your own for it"
        )
    inner = folder / modules[0]["path"]
    if not (inner / "tokenizer.json").is_file():
        raise DefinitionError(f"model {str(folder)!r} has no tokenizer.json; make one with AutoTokenizer.from_pretrained(...).save_pretrained(folder)")
    pooling = _json(folder / modules[1]["path"] / "config.json")
    library, wrapper = _json(folder / "config_sentence_transformers.json"), _json(inner / "sentence_bert_config.json")
    prompt = str((library.get("prompts") or {}).get(library.get("default_prompt_name")) or "")
    if prompt and pooling.get("include_prompt") is False:
        raise DefinitionError(
            f"model {str(folder)!r} leaves its prompt {prompt!r} out of the pooling, which hr.models.Embedder cannot do; write a stage of your own"
        )
    return Card(
        size=_size(folder, modules, kinds, pooling),
        longest=_longest(inner, wrapper),
        prompt=prompt,
        lower=bool(wrapper.get("do_lower_case")),
        tokenizer=inner / "tokenizer.json",
    )


def digest(folder: Path) -> str:
    """A digest of the model's files. Of large ones (weights) the size, the time of change, the beginning and the end count."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state = path.stat()
        found.update(f"{path.relative_to(folder)}\0{state.st_size}\0".encode())
        with path.open("rb") as file:
            found.update(file.read(_WHOLE_BYTES))
            if state.st_size > _WHOLE_BYTES:
                file.seek(-min(_WHOLE_BYTES, state.st_size - _WHOLE_BYTES), os.SEEK_END)
                found.update(file.read())
                found.update(str(state.st_mtime_ns).encode())
    return found.hexdigest()[:24]


def _size(folder: Path, modules: list[dict[str, Any]], kinds: list[str], pooling: dict[str, Any]) -> int:
    """Numbers per vector: the pooling's, times its modes, unless a dense layer after it says otherwise."""
    mode = pooling.get("pooling_mode")
    modes = 1 if isinstance(mode, str) else len(mode) if mode else sum(value is True for key, value in pooling.items() if key.startswith("pooling_mode_"))
    size = max(1, modes) * int(pooling.get("embedding_dimension") or pooling["word_embedding_dimension"])
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Dense":
            size = int(_json(folder / module["path"] / "config.json")["out_features"])
    return size


def _longest(inner: Path, wrapper: dict[str, Any]) -> int:
    """Tokens after which the model cuts a text: as the wrapper says, else as the tokenizer and the positions allow."""
    if stated := wrapper.get("max_seq_length"):
        return int(stated)
    limits = [_json(inner / "tokenizer_config.json").get("model_max_length"), _json(inner / "config.json").get("max_position_embeddings")]
    return int(min((limit for limit in limits if limit and limit < _LONGEST_PLAUSIBLE), default=512))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DefinitionError(f"{str(path)!r} is no JSON: {error}; fetch the model again") from None
