"""Where the services of this machine are: one small file each, by which a second command finds the Ray that the first one started."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.errors import ServingError, listing, nearest


@dataclass(frozen=True, slots=True)
class Place:
    """A service of this machine: the Ray that it runs on, the token that this Ray asks for, where it answers, and the process that started it.

    That process lives as long as the service does; told to stop, it ends within `drain_s` and a little. A service that is `behind` another one
    is told by its name instead: the process is that one's.
    """

    service: str
    address: str
    token: str
    url: str
    drain_s: float
    pid: int
    born: str
    behind: str = ""

    @property
    def lives(self) -> bool:
        """Whether the service is there."""
        return self.born == _born(self.pid) != ""


def here(service: str, *, address: str, token: str, url: str, drain_s: float, behind: str = "") -> Place:
    """The place of a service that this process has started."""
    return Place(service, address, token, url, drain_s, os.getpid(), _born(os.getpid()), behind)


def write(place: Place) -> None:
    """Let other commands of this user find the service; nobody else can read the token."""
    file = _folder() / f"{place.service}.json"
    draft = file.with_suffix(f".{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as out:
        json.dump(asdict(place), out)
    os.replace(draft, file)


def forget(place: Place) -> None:
    """Take the file away, unless another service of this name has put its own there."""
    if find(place.service) == place:
        (_folder() / f"{place.service}.json").unlink(missing_ok=True)


def find(service: str) -> Place | None:
    """The running service of that name, or None. A file that a killed process left behind counts for nothing."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        place = Place(**json.loads((_folder() / f"{service}.json").read_text(encoding="utf-8")))
        if place.lives:
            return place
    return None


def known() -> list[Place]:
    """All services that run on this machine and belong to this user."""
    return [place for file in sorted(_folder().glob("*.json")) if (place := find(file.stem))]


def unknown(service: str, running: list[str]) -> ServingError:
    """What to say to a name that no service has."""
    there = f"; there is {listing(running)}" if running else ", nor any other; headrace serve FILE starts one"
    return ServingError(f"no service {service!r} is running here{there}" + nearest(service, running))


def _folder() -> Path:
    """A folder of this user alone, made when first asked for."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "headrace" if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise ServingError(f"{str(folder)!r} must be a folder that only this user can open: it holds tokens; remove it, or set XDG_RUNTIME_DIR")
    return folder


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks: numbers of processes are used again. Empty for none, and for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if status[0] == "Z" else status[19]
