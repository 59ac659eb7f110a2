"""Which files of a folder are pickles. Reading a pickle runs whatever code its maker put there, so a model that has one is loaded only by request."""

from __future__ import annotations

import ast
import bz2
import gzip
import lzma
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from headrace.errors import HeadraceError, SettingError

_ENDINGS = (".pkl", ".pickle", ".pck", ".pcl", ".p", ".joblib", ".dill", ".cloudpickle", ".pt", ".pth", ".ckpt")
_PACKED = (".gz", ".bz2", ".xz", ".lzma", ".z", ".lz4", ".zst")  # model.pkl.gz
_OPCODES = {ord(one.code) for one in pickletools.opcodes}
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
_HEAD_BYTES = 64  # of which a pickle's beginning is told
_TEXT_BYTES = 1 << 20  # of a file without a pickle's first byte, which is read as one of the old protocols


def pickles(folder: Path) -> dict[str, str]:
    """The files below `folder` that are pickles, or hold some, by their paths in it, and how that is told. By name and by content, whatever the name."""
    found = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        if why := _told(path):
            found[path.relative_to(folder).as_posix()] = why
    return found


def refuse(folder: Path, what: str, *, advice: str, error: type[HeadraceError] = SettingError) -> None:
    """Raise `error` if files of a folder are pickles; `what` opens the message, and `advice` ends it.

    Raises:
        `error`: names the first of them.
    """
    if found := pickles(folder):
        name, why = next(iter(found.items()))
        rest = f", and {len(found) - 1} more files" if len(found) > 2 else ", and one more file" if len(found) == 2 else ""
        raise error(f"{what} has {name!r}, which is {why}{rest}: reading it would run whatever code its maker put there; {advice}")


def _told(path: Path) -> str:
    """What kind of pickle a file is; empty for none."""
    endings = [one.lower() for one in path.suffixes]
    if endings and (endings[-1] in _ENDINGS or (endings[-1] in _PACKED and endings[-2:-1] and endings[-2] in _ENDINGS)):
        return f"a pickle by its name (*{''.join(endings[-2:] if endings[-1] in _PACKED else endings[-1:])})"
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if head.startswith(b"PK\x03\x04"):
            return _in_zip(file)
        if head.startswith(b"\x93NUMPY"):
            return "an array of pickled objects" if _has_objects(file) else ""
        if _is_pickle(_unpacked(head, file)):
            return "a pickle by its content"
        file.seek(0)
        return "a pickle by its content" if _is_old(file.read(_TEXT_BYTES)) else ""


def _is_pickle(head: bytes) -> bool:
    """Whether a file begins as pickles do since protocol 2: with the protocol's number, and an instruction."""
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[2] in _OPCODES


def _is_old(content: bytes) -> bool:
    """Whether content is a pickle of protocol 0 or 1, which begins with its first instruction, and calls something."""
    names = set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about texts in what is no pickle
            for opcode, _, _ in pickletools.genops(content):
                names.add(opcode.name)
    except (ValueError, IndexError, OverflowError):  # an instruction that there is none of, or an argument that is cut off
        return "REDUCE" in names and bool(names & {"GLOBAL", "STACK_GLOBAL"})  # whoever reads it has made the call by then
    return bool(names & _CALLS)


def _unpacked(head: bytes, file: IO[bytes]) -> bytes:
    """The beginning of what a compressed file holds, as joblib compresses; of any other file its own."""
    try:
        if head.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=file).read(_HEAD_BYTES)
        if head.startswith(b"BZh"):
            return bz2.BZ2File(file).read(_HEAD_BYTES)
        if head.startswith((b"\xfd7zXZ", b"\x5d\x00\x00")):
            return lzma.LZMAFile(file).read(_HEAD_BYTES)
        if head[:1] == b"\x78":
            return zlib.decompressobj().decompress(head, _HEAD_BYTES)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return b""  # it only looks like that
    return head


def _in_zip(file: IO[bytes]) -> str:
    """What is pickled inside an archive: torch's files, and numpy's."""
    try:
        with zipfile.ZipFile(file) as archive:
            return next(_pickled(archive), "")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError):  # damaged, or closed to us: no loader takes it without a word
        return "an archive that cannot be looked into"


def _pickled(archive: zipfile.ZipFile) -> Iterator[str]:
    for name in archive.namelist():
        with archive.open(name) as member:
            head = member.read(_HEAD_BYTES)
        if name.lower().endswith(_ENDINGS) or _is_pickle(head):
            yield f"an archive with a pickle in it ({name})"
        elif head.startswith(b"\x93NUMPY"):
            with archive.open(name) as member:
                if _has_objects(member):
                    yield f"an archive with an array of pickled objects in it ({name})"


def _has_objects(file: IO[bytes]) -> bool:
    """Whether a file of numpy's holds Python objects, which are pickled: by its header, which is a dict as text behind its length."""
    version = file.read(8)[6:7]
    size = int.from_bytes(file.read(2 if version == b"\x01" else 4), "little")
    try:
        described = ast.literal_eval(file.read(min(size, 1 << 16)).decode("latin-1"))["descr"]
    except (ValueError, SyntaxError, KeyError, TypeError):
        return True  # not readable as data: whatever reads it is told so
    return any("O" in kind for kind in _kinds(described))


def _kinds(described: object) -> Iterator[str]:
    """The types in numpy's description of an array: of one alone, or of each field."""
    if isinstance(described, (list, tuple)):
        for field in described:
            yield from _kinds(field[1] if isinstance(field, tuple) and len(field) > 1 else field)
    else:
        yield str(described)
