"""Paths to file systems: local paths, s3://, gs://, hdfs:// and anything that fsspec knows, behind pyarrow's one interface."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import fsspec
import pyarrow as pa
from fsspec.utils import glob_translate
from pyarrow import fs

from headrace.errors import HeadraceError

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Place:
    """A path on a file system; `uri` is what the user wrote."""

    filesystem: fs.FileSystem
    path: str
    uri: str

    @property
    def is_local(self) -> bool:
        """Whether the path is on this machine's own disks."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def child(self, name: str) -> Place:
        """The place below this one."""
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}")


def locate(uri: str, *, error: type[HeadraceError]) -> Place:
    """The place that a path or URI names. S3's endpoint and keys come from the usual AWS environment variables.

    Raises:
        `error`: the scheme is unknown, or its file system cannot be reached; with what to install or to set.
    """
    if "://" not in uri:
        return Place(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)), uri)
    scheme = uri.split("://", 1)[0].lower()
    try:
        if scheme in ("s3", "gs", "gcs", "hdfs", "file", "abfs", "abfss"):
            head, wild, tail = _split(uri)
            filesystem, path = fs.FileSystem.from_uri(_with_endpoint(head) if scheme == "s3" else head)
            return Place(filesystem, path.rstrip("/") + ("/" if wild and path else "") + tail if wild else path, uri)
        filesystem, path = fsspec.core.url_to_fs(uri)
        return Place(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path, uri)
    except (OSError, ValueError, ImportError, pa.ArrowException) as cause:
        raise error(f"cannot open {uri!r}: {cause}") from cause


def _split(uri: str) -> tuple[str, bool, str]:
    """A URI as (the part before the first path segment with a wildcard, whether there is one, the rest)."""
    scheme, rest = uri.split("://", 1)
    segments = rest.split("/")
    for at, segment in enumerate(segments):
        if re.search(r"[*\[]", segment):
            return f"{scheme}://{'/'.join(segments[:at])}", True, "/".join(segments[at:])
    return uri, False, ""


def _with_endpoint(uri: str) -> str:
    """The URI with AWS_ENDPOINT_URL as Arrow's own options, for S3 protocol servers other than Amazon's."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint or "endpoint_override=" in uri:
        return uri
    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    return f"{uri}{'&' if '?' in uri else '?'}scheme={scheme or 'https'}&endpoint_override={host.replace(':', '%3A')}"


def find(place: Place) -> list[fs.FileInfo]:
    """The files that a path means, sorted by path: the file itself, all files below a folder, or the matches of a glob.

    `*` stays within a folder, `**` crosses folders. Files and folders whose name starts with `_` or `.` are left out below
    a folder or a wildcard, as everywhere in this field.
    """
    info = place.filesystem.get_file_info(place.path)
    if info.type == fs.FileType.File:
        return [info]
    base, pattern = place.path.rstrip("/"), "**"
    if info.type == fs.FileType.NotFound and _WILD.search(place.path):
        segments = place.path.split("/")
        at = next(i for i, segment in enumerate(segments) if _WILD.search(segment))
        base, pattern = "/".join(segments[:at]), "/".join(segments[at:])
    wanted = re.compile(glob_translate(pattern))
    selector = fs.FileSelector(base or "/", allow_not_found=True, recursive="/" in pattern or "**" in pattern)
    found = []
    for info in place.filesystem.get_file_info(selector):
        below = info.path[len(base) + 1 :]
        hidden = any(part[:1] in ("_", ".") for part in below.split("/"))
        if info.type == fs.FileType.File and not hidden and wanted.match(below):
            found.append(info)
    return sorted(found, key=lambda info: info.path)
