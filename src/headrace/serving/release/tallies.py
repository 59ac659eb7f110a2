"""What the doors have counted, added up: doors start again and count from nothing, the sums go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.serving.release.versions import Load
from headrace.serving.routes import DoorReport, VersionReport

SILENT_S = 5.0
"""A door that has not reported for so long holds nothing any more."""


class Tallies:
    """The latest report of each door, and what its predecessors had counted. Times are of one monotonic clock.

    One that is `resumed` counts from the first report of each door that it hears: what was before has been counted by the control that was before.
    """

    def __init__(self, *, resumed: bool = False) -> None:
        self._resumed = resumed
        self._reports: dict[str, tuple[float, DoorReport]] = {}
        self._before: dict[int, VersionReport] = {}
        self._rejected: dict[int, int] = {}
        self._shed: dict[tuple[int, str], int] = {}

    def take(self, report: DoorReport, *, now_s: float) -> None:
        """Note a report in place of the door's last."""
        _, last = self._reports.get(report.door, (0.0, DoorReport(report.door)))
        for version, counted in last.versions.items():
            if report.versions.get(version, VersionReport()).answered < counted.answered:  # it began anew, or dropped the version
                self._before[version] = _sum([self._before.get(version, VersionReport()), _counts(counted)])
        if self._resumed and report.door not in self._reports:
            for version, counted in report.versions.items():
                self._before[version] = _sum([self._before.get(version, VersionReport()), _minus(_counts(counted))])
        self._reports[report.door] = (now_s, report)

    def forget(self, version: int) -> None:
        """Drop what was counted of a version."""
        self._before.pop(version, None)

    def doors(self, *, now_s: float) -> dict[str, float]:
        """The seconds since each door's last report."""
        return {door: now_s - at_s for door, (at_s, _) in sorted(self._reports.items())}

    def current(self, *, now_s: float) -> list[DoorReport]:
        """The reports of the doors that are there, the latest last."""
        return [report for at_s, report in sorted(self._reports.values(), key=lambda entry: entry[0]) if now_s - at_s <= SILENT_S]

    def sums(self, *, now_s: float) -> dict[int, VersionReport]:
        """By version, what all doors have counted since this began."""
        found: dict[int, list[VersionReport]] = {version: [counted] for version, counted in self._before.items()}
        for at_s, report in self._reports.values():
            for version, counted in report.versions.items():
                found.setdefault(version, []).append(counted if now_s - at_s <= SILENT_S else _counts(counted))
        return {version: _sum(counted) for version, counted in found.items()}

    def replicas(self, *, now_s: float) -> dict[str, Mapping[str, Any]]:
        """By replica, the latest that any door has heard of it."""
        found: dict[str, Mapping[str, Any]] = {}
        for report in self.current(now_s=now_s):
            found |= report.replicas
        return found

    def hung(self, *, now_s: float) -> set[str]:
        """Replicas that a door has ejected because they do not answer."""
        return {replica for report in self.current(now_s=now_s) for replica in report.hung}

    def loads(self, members: Mapping[tuple[int, str], Iterable[str]], *, now_s: float) -> dict[tuple[int, str], Load]:
        """By version and group with these replicas: requests there, waiting, shed, and of the background.

        Doors count what they shed by version. It is put down to that of its groups whose replicas have most to do.
        """
        stats = self.replicas(now_s=now_s)
        there = {key: [stats[replica] for replica in replicas if replica in stats] for key, replicas in members.items()}
        background = {key: sum((one.get("engine") or {}).get("background", 0.0) for one in told) for key, told in there.items()}
        busy = {key: float(sum(one["in_flight"] for one in told)) - background[key] for key, told in there.items()}
        crowd = {key: busy[key] / max(1, len(list(replicas))) for key, replicas in members.items()}
        for version, counted in self.sums(now_s=now_s).items():
            more = counted.rejected - self._rejected.get(version, 0)
            self._rejected[version] = counted.rejected
            groups = [key for key in members if key[0] == version]
            if more > 0 and groups:
                fullest = max(groups, key=lambda key: crowd[key])
                self._shed[fullest] = self._shed.get(fullest, 0) + more
        waiting: dict[tuple[int, str], int] = {}
        for report in self.current(now_s=now_s):
            for key, count in report.waiting.items():
                waiting[key] = waiting.get(key, 0) + count
        return {key: Load(busy[key], waiting.get(key, 0), self._shed.get(key, 0), background[key]) for key in members}


def _minus(report: VersionReport) -> VersionReport:
    counts: dict[str, Any] = {field.name: getattr(report, field.name) for field in dataclasses.fields(VersionReport)}
    counts = {name: [-each for each in count] if name == "latencies" else -count for name, count in counts.items()}
    return VersionReport(**counts)


def _counts(report: VersionReport) -> VersionReport:
    return dataclasses.replace(report, in_flight=0, queued=0)


def _sum(reports: list[VersionReport]) -> VersionReport:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(VersionReport):
        column = [getattr(report, field.name) for report in reports]
        values[field.name] = [sum(counts) for counts in zip(*column, strict=True)] if field.name == "latencies" else sum(column)
    return VersionReport(**values)
