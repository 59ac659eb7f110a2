"""What held a run back, in one sentence with advice: a reading of the report's figures."""

from __future__ import annotations

import math

from headrace.report import GroupReport, Report, duration
from headrace.tally import READER, WRITER

_COLD = 0.5  # of the run: it was start-up that took the time
_PADDING = 0.25  # of a model's tokens
_BUSY = 0.8  # of a model's time: it is what the run waits for
_TINY_S = 5.0  # below that, a run's figures say more of chance than of the job


def bottleneck(report: Report) -> str:
    """One sentence on what the run waited for, and what to do about it; empty where nothing can be told.

    The model that was busiest is what a run pays for. Where it was busy, it is the bottleneck, unless it computed padding; where
    it was not, it waited for what comes before it or for what comes after, and among these that with the most work is to blame.
    """
    stages = [group for group in report.stages if group.rows]
    if not stages or report.wall_s < _TINY_S:
        return ""
    if report.startup_s > _COLD * report.wall_s:
        return _cold(report)
    models = [group for group in stages if group.kind == "model" and group.shares is not None]
    if not models:
        return _without_model(report, stages)
    model = max(models, key=lambda one: one.busy_s)
    shares = model.shares
    assert shares is not None, "chosen above"
    if shares.blocked > max(shares.starved, 1 - _BUSY):
        return _blocked(report, model)
    if shares.starved > max(shares.between, 1 - _BUSY):
        return _starved(report, model)
    if shares.between > 1 - _BUSY:
        return (
            f"{_subject(model)} {model.name} computed {shares.computing:.0%} of the time and spent {shares.between:.0%} between blocks: "
            "give it more work per call, with longer rows per batch or larger input files"
        )
    if model.padding > _PADDING:
        return (
            f"{model.padding:.0%} of the tokens that {model.name} computed were padding (batches of {', '.join(model.rules)}): "
            "batch by hr.tokens over a column of token ids, so that rows of one length go together"
        )
    more = f"more replicas (it had {model.replicas})" if model.replicas else "more replicas"
    return f"{model.name} was the bottleneck, busy {shares.computing:.0%} of the time: it goes faster with {more}, a faster device, or a faster runtime"


def _cold(report: Report) -> str:
    models = [group for group in report.stages if group.setup_s]
    slowest = max(models, key=lambda one: one.setup_s, default=None)
    setup = f", {duration(slowest.setup_s)} of it the set-up of {slowest.name}" if slowest and slowest.setup_s > report.startup_s / 4 else ""
    return (
        f"{duration(report.startup_s)} of {duration(report.wall_s)} went by before everything was up{setup}: "
        "start-up is paid once, so give one run more rows, or join a cluster that is up with --address"
    )


def _without_model(report: Report, stages: list[GroupReport]) -> str:
    group = max([*stages, *_ends(report)], key=lambda one: one.busy_s)
    if group.name == READER:
        return "reading was the bottleneck: cut the input into more files or row groups, or bring it nearer to the cluster"
    if group.name == WRITER:
        return "writing was the bottleneck: keep fewer columns, or write to faster storage"
    return f"{group.name} was the bottleneck: it goes faster with more CPUs, or with a leaner function"


def _blocked(report: Report, model: GroupReport) -> str:
    waited = f"{_subject(model)} {model.name} waited {model.shares.blocked:.0%} of the time for" if model.shares else ""
    names = [group.name for group in report.groups]
    after = [group for group in report.groups if names.index(group.name) > names.index(model.name)]
    slow = max(after, key=lambda one: one.busy_s, default=None)
    if slow is None or slow.name == WRITER:
        return f"{waited} the output to be written: keep fewer columns, or write to faster storage"
    return f"{waited} {slow.name}, which comes after it: {_more(slow, model, report)}"


def _starved(report: Report, model: GroupReport) -> str:
    waited = f"{_subject(model)} {model.name} waited {model.shares.starved:.0%} of the time for" if model.shares else ""
    names = [group.name for group in report.groups]
    before = [group for group in report.groups if names.index(group.name) < names.index(model.name)]
    slow = max(before, key=lambda one: one.busy_s, default=None)
    if slow is None or slow.name == READER:
        return f"{waited} input: cut it into more files or row groups, or bring it nearer to the cluster"
    return f"{waited} {slow.name}: {_more(slow, model, report)}"


def _more(slow: GroupReport, model: GroupReport, report: Report) -> str:
    """How much more of it would keep the model busy: the CPUs that it used, over the share of the time that the model computed."""
    steady_s = max(1e-9, report.wall_s - report.startup_s)
    if slow.kind == "model":
        return f"give it more replicas than {slow.replicas}"
    used = slow.busy_s * max(slow.cpus, 1.0) / steady_s
    needed = math.ceil(used / max(model.shares.computing, 0.01)) if model.shares else 0
    return f"give it {needed} CPUs" if needed <= 1000 else "give it more CPUs"


def _subject(model: GroupReport) -> str:
    return "the accelerator of" if model.gpus else "the model"


def _ends(report: Report) -> list[GroupReport]:
    return [group for group in report.groups if group.kind in ("reader", "writer")]
