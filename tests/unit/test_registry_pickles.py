"""Pickles in a model's folder: found by name and by content, whatever the name; and nothing else taken for one."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from headrace.errors import RegistryError, SettingError
from headrace.registry import pickles
from headrace.registry.folders import Manifest, check

CALL = b"cos\nsystem\n(S'true'\ntR."  # protocol 0, which runs a command
OBJECTS = np.array([{}], dtype=object)


def archive(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/").replace("_", "."), content)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_are_found_by_their_content(tmp_path: Path, protocol: int):
    (tmp_path / "weights").write_bytes(pickle.dumps({"join": os.path.join, "array": np.zeros(3)}, protocol))
    assert list(pickles.pickles(tmp_path)) == ["weights"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zlib.compress])
def test_and_through_compression(tmp_path: Path, pack: object):
    (tmp_path / "weights").write_bytes(pack(pickle.dumps({"a": 1}, 4)))  # type: ignore[operator]
    (tmp_path / "text").write_bytes(pack(b"only text, and long enough to be some"))  # type: ignore[operator]
    assert list(pickles.pickles(tmp_path)) == ["weights"]


@pytest.mark.parametrize("name", ["model.pkl", "a/model.PICKLE", "model.joblib", "model.pkl.gz", "model.joblib.xz", "pytorch_model.pt", "last.ckpt", "w.pth"])
def test_names_alone_are_enough(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert list(pickles.pickles(tmp_path)) == [name]


def test_code_that_is_followed_by_rubbish_runs_all_the_same(tmp_path: Path):
    (tmp_path / "a").write_bytes(CALL + b"\xff rubbish")
    (tmp_path / "b").write_bytes(CALL.removesuffix(b".") + b"\xff")
    assert list(pickles.pickles(tmp_path)) == ["a", "b"]


def test_archives_are_looked_into(tmp_path: Path):
    archive(tmp_path / "pytorch_model.bin", model__data_pkl=pickle.dumps(1, 2), model__data__0=bytes(64))
    archive(tmp_path / "hidden.zip", harmless_txt=pickle.dumps([1], 4))
    np.savez(tmp_path / "objects.npz", a=OBJECTS)
    np.savez(tmp_path / "numbers.npz", a=np.zeros(3))
    archive(tmp_path / "skops.zip", schema_json=b"{}")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    assert list(pickles.pickles(tmp_path)) == ["broken.zip", "hidden.zip", "objects.npz", "pytorch_model.bin"]


def test_arrays_of_objects_are_pickled(tmp_path: Path):
    np.save(tmp_path / "objects.npy", OBJECTS)
    np.save(tmp_path / "mixed.npy", np.array([(1, {})], dtype=[("a", "i4"), ("b", object)]))
    np.save(tmp_path / "named.npy", np.zeros(2, dtype=[("Otto", "f4")]))
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY\x01\x00\x05\x00{{{{{")
    assert list(pickles.pickles(tmp_path)) == ["damaged.npy", "mixed.npy", "objects.npy"]


def test_weights_and_texts_are_none(tmp_path: Path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (tmp_path / "model.bin").write_bytes(np.random.default_rng(0).random(1000).tobytes())
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "vocab.txt").write_text("config\nvalue\n(c\n.\n")
    (tmp_path / "model.txt").write_text("tree\nversion=v4\nnum_class=1\n")
    (tmp_path / "README.md").write_text("# A model\n\nIt computes.\n")
    (tmp_path / "empty").write_bytes(b"")
    assert pickles.pickles(tmp_path) == {}


def test_the_manifest_of_a_folder_refuses_them_in_words(tmp_path: Path):
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "b.pkl").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"has 'b.pkl', which is a pickle by its name \(\*.pkl\): reading it would run .*; save weights with safetensors"):
        Manifest.of(tmp_path)
    assert Manifest.of(tmp_path, trust_pickles=True).pickles == ("b.pkl",)
    (tmp_path / "c.pkl").write_bytes(b"")
    with pytest.raises(RegistryError, match="one more file"):
        Manifest.of(tmp_path)


@pytest.mark.parametrize("change", ["other", "more", "less", "manifest"])
def test_a_folder_is_held_to_its_manifest(tmp_path: Path, change: str):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    manifest = Manifest.of(tmp_path)
    (tmp_path / "headrace.json").write_text(manifest.to_json())
    check(tmp_path, manifest.digest, "model 'm'")
    assert Manifest.read(tmp_path) == manifest and Manifest.of(tmp_path).digest == manifest.digest
    if change == "less":
        (tmp_path / "b").unlink()
    else:
        (tmp_path / {"other": "b", "more": "c", "manifest": "headrace.json"}[change]).write_text("{}")
    said = "not the one that was registered" if change == "manifest" else "is not as it was registered"
    with pytest.raises(SettingError, match=f"model 'm': .*{said}"):
        check(tmp_path, manifest.digest, "model 'm'")


def test_a_folder_without_files_is_no_model(tmp_path: Path):
    with pytest.raises(RegistryError, match="has no files"):
        Manifest.of(tmp_path)
    with pytest.raises(RegistryError, match="is no folder"):
        Manifest.of(tmp_path / "none")
