"""Places: what a path, a folder, a glob and a URI mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow import fs

from headrace.errors import OutputError, SourceError
from headrace.filesystems import find, locate

FILES = ("a.parquet", "b.csv", "x/c.parquet", "x/y/d.parquet", "_hidden.parquet", ".dot.parquet", "_meta/e.parquet", "x/.tmp/f.parquet", "g[1].parquet")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the files above."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.parquet", ["a.parquet"]),
        ("", ["a.parquet", "b.csv", "g[1].parquet", "x/c.parquet", "x/y/d.parquet"]),
        ("x/", ["x/c.parquet", "x/y/d.parquet"]),
        ("*.parquet", ["a.parquet", "g[1].parquet"]),
        ("*/*.parquet", ["x/c.parquet"]),
        ("**/*.parquet", ["a.parquet", "g[1].parquet", "x/c.parquet", "x/y/d.parquet"]),
        ("x/**/*.parquet", ["x/c.parquet", "x/y/d.parquet"]),
        ("**", ["a.parquet", "b.csv", "g[1].parquet", "x/c.parquet", "x/y/d.parquet"]),
        ("?.csv", ["b.csv"]),
        ("[ab].*", ["a.parquet", "b.csv"]),
        ("g[1].parquet", ["g[1].parquet"]),
        ("_hidden.parquet", ["_hidden.parquet"]),
        ("_meta", ["_meta/e.parquet"]),
        ("*.json", []),
        ("none/*.json", []),
        ("none", []),
    ],
)
def test_what_a_path_means(tree: Path, pattern: str, found: list[str]) -> None:
    """A file itself, all below a folder, the matches of a glob; hidden names only when they are said."""
    infos = find(locate(f"{tree}/{pattern}", error=SourceError))
    assert [str(Path(info.path).relative_to(tree)) for info in infos] == found


def test_file_uris_and_home(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """file:// and ~ are local paths, relative ones start here."""
    monkeypatch.setenv("HOME", str(tree))
    monkeypatch.chdir(tree)
    for uri in (f"file://{tree}/a.parquet", "~/a.parquet", "a.parquet"):
        place = locate(uri, error=SourceError)
        assert place.is_local and Path(place.path) == tree / "a.parquet" and place.uri == uri
    assert len(find(locate(f"file://{tree}/*.parquet", error=SourceError))) == 2


def test_anything_that_fsspec_knows() -> None:
    """A scheme that Arrow does not know goes through fsspec, globs as well."""
    memory = fsspec.filesystem("memory")
    for name in ("one.csv", "deep/two.csv"):
        memory.pipe(f"/headrace-test/{name}", b"x")
    try:
        assert len(find(locate("memory://headrace-test", error=SourceError))) == 2
        assert [info.base_name for info in find(locate("memory://headrace-test/*.csv", error=SourceError))] == ["one.csv"]
    finally:
        memory.rm("/headrace-test", recursive=True)


@pytest.mark.parametrize("error", [SourceError, OutputError])
def test_unknown_places(error: type[Any]) -> None:
    """An unknown scheme is refused as an error of the side that named it."""
    with pytest.raises(error, match="cannot open 'nope://x/y'.*nope"):
        locate("nope://x/y", error=error)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_other_s3_servers(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """The endpoint comes from the usual environment variable; paths and globs keep their bucket."""
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1", variable: "http://127.0.0.1:9/"}.items():
        monkeypatch.setenv(name, value)
    assert {locate(uri, error=SourceError).path for uri in ("s3://b/in/x.parquet", "s3://b/in/*.parquet")} == {"b/in/x.parquet", "b/in/*.parquet"}
    assert locate("s3://b/*.parquet", error=SourceError).path == "b/*.parquet"
    assert isinstance(locate("s3://b", error=SourceError).filesystem, fs.S3FileSystem)


def test_children() -> None:
    """A place below a place, in path and in what is shown."""
    child = locate("/data/out/", error=OutputError).child("part-1")
    assert (child.path, child.uri) == ("/data/out/part-1", "/data/out/part-1")
