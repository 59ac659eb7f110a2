"""The doctor's checks: each says what it found, and what to do unless all is well."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace import doctor
from headrace.doctor import Finding


def test_every_finding_that_is_not_well_has_advice(tmp_path: Path) -> None:
    """Nothing is only complained about."""
    found = list(doctor.findings(ray_temp=str(tmp_path)))
    assert {finding.state for finding in found} <= {"ok", "warning", "problem"}
    assert all(bool(finding.advice) == (finding.state != "ok") for finding in found)
    text = "\n".join(finding.what for finding in found)
    assert all(word in text for word in ("Python 3", "ray ", "headrace ", "pyarrow ", "memory", "open files", str(tmp_path)))


def usage(total: float, free: float) -> Any:
    """What a disk of `total` GB with `free` GB left says."""
    return lambda path: shutil._ntuple_diskusage(int(total * 1e9), int((total - free) * 1e9), int(free * 1e9))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("total", "free", "state", "advice"),
    [(100, 50, "ok", ""), (100, 8, "warning", "at least 10 GB"), (1000, 30, "problem", "Ray stops spilling"), (100, 1, "problem", "RAY_TMPDIR")],
)
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: float, free: float, state: str, advice: str) -> None:
    """Ray stops spilling on a disk that is 95 % full, however large the rest."""
    monkeypatch.setattr(shutil, "disk_usage", usage(total, free))
    found = doctor.disk(str(tmp_path), need_gb=10)
    assert found.state == state and advice in found.advice


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    """A temporary folder that is not there is a finding, not a traceback."""
    assert doctor.disk(str(tmp_path / "none"), need_gb=10).state == "problem"
    assert doctor.shared_memory(str(tmp_path / "none")).state == "ok"


def test_shared_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64 MB of a container as it comes are a problem, with the flag that mends it."""
    monkeypatch.setattr(shutil, "disk_usage", usage(0.064, 0.064))
    assert "--shm-size=8g" in doctor.shared_memory(str(tmp_path)).advice


def test_limits_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few open files, too little memory, an old Python and another Ray are told with what to do."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    assert doctor.open_files() == Finding("warning", "at most 1024 open files", "raise it before a large run: ulimit -n 4096")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 500_000}[name])
    assert doctor.memory().state == "warning"
    monkeypatch.setattr(doctor, "RAY_VERSION", "0.0.1")
    assert "pip install 'ray[data,default]==0.0.1'" in doctor.ray_version().advice
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert doctor.python().state == "problem"
