"""What a training tells of itself: sums, report, page and lines."""

import itertools
import json

import pytest

from headrace.cli.train import parse_workers
from headrace.cli.training_progress import TrainingProgress, line
from headrace.console.runs import parse
from headrace.cost import Meter, Prices
from headrace.errors import SettingError
from headrace.events import CheckpointSaved, MachinesSeen, MetricsReported, RowsFailed, RunFailed, RunFinished, RunStarted, StepsDone, UnitLost, WorkersStarted
from headrace.loops.page import page
from headrace.loops.result import Result, Sums, TrainingReport

BEGUN_S = 1_800_000_000.0


def at(second):
    return {"at_s": BEGUN_S + second}


EVENTS = [
    RunStarted("prices", ("in.parquet",), "out", "000001-abc", BEGUN_S, 4000, 0, (("headrace", "0.1.0"),), **at(1)),
    MachinesSeen((("10.0.0.1", None, None, 4.0, 16.0, 0.0, None),), **at(1)),
    WorkersStarted(2, 0, **at(5)),
    StepsDone(0, 10, 1000, 1.0, 10.0, **at(20)),
    StepsDone(1, 10, 1000, 3.0, 10.0, **at(20)),
    MetricsReported((5, 10), ((("loss", 0.5),), (("loss", 0.25),)), **at(20)),
    CheckpointSaved(10, 0.5, **at(21)),
    RowsFailed((("ValueError in clean", 3),), **at(22)),
]


def summed(*more):
    sums = Sums(Meter(Prices.parse(["3.60"])))
    sums.add([*EVENTS, *more])
    return sums


def test_a_report_adds_up():
    """Rates are from the first batch to the last: what comes after is no training."""
    report = TrainingReport.of(summed(RunFinished(2000, 2000, 0, 30.0, **at(30))), epochs=2)
    assert (report.state, report.step, report.rows_in, report.rows, report.workers, report.epochs) == ("succeeded", 10, 2000, 4000, 2, 2)
    assert (report.startup_s, report.wall_s, report.wait_share, report.rows_per_s, report.now_per_s) == (10, 30, 0.2, 200, 200)
    assert (report.checkpoints, report.saving_s, report.saved_step, report.metrics) == (1, 0.5, 10, {"loss": 0.25})
    assert report.curves == {"loss": ((5, 20.0, 0.5), (10, 20.0, 0.25))}
    assert report.cost.usd == pytest.approx(0.029)
    text = str(report)
    assert "2,000 rows in 30.0 s on 2 workers: 200 rows/s, 20.0% of the time waiting for rows" in text
    assert "step 10: loss 0.25" in text and "3 rows left out: 3 ValueError in clean" in text


def test_how_busy_accelerators_are_is_told_where_their_driver_does():
    assert TrainingReport.of(summed()).accelerator_share is None and "accelerators" not in page(TrainingReport.of(summed())).lower()
    report = TrainingReport.of(summed(StepsDone(0, 12, 100, 0.0, 1.0, 0.5, **at(25)), StepsDone(1, 12, 100, 0.0, 3.0, 0.9, **at(25))))
    assert report.accelerator_share == pytest.approx(0.8)
    assert "accelerators busy for 80.0%" in str(report) and "Accelerators busy</dt><dd>80.0%" in page(report)


def test_the_report_is_one_that_headrace_runs_lists():
    values = parse(json.dumps(TrainingReport.of(summed()).to_dict()).encode())
    assert (values["pipeline"], values["kind"], values["state"], values["rows_in"], values["dead_letters"]) == ("prices", "training", "running", 2000, 3)


def test_workers_that_begin_again_make_their_last_steps_again():
    again = [WorkersStarted(1, 5, **at(30)), MetricsReported((6, 7), ((("loss", 0.4),), (("loss", 0.3),)), **at(31))]
    report = TrainingReport.of(summed(*again))
    assert (report.restarts, report.workers, report.step) == (1, 1, 5)
    assert [(step, value) for step, _, value in report.curves["loss"]] == [(5, 0.5), (6, 0.4), (7, 0.3)]
    assert "started again 1 time" in str(report) and "started again 1 time" in page(report)


def test_curves_are_thinned_out_evenly():
    sums = summed()
    for first in range(11, 10_011, 500):
        sums.add([MetricsReported(tuple(range(first, first + 500)), tuple((("loss", float(step)),) for step in range(first, first + 500)), **at(first))])
    steps = [step for step, _, _ in sums.curves["loss"]]
    assert 1000 <= len(steps) <= 2001 and max(b - a for a, b in itertools.pairwise(steps)) <= 16 and steps[-1] >= 10_000
    assert sums.metrics == {"loss": 10_010.0}


@pytest.mark.parametrize(("error", "state"), [("StoppedError", "stopped"), ("StageError", "failed")])
def test_a_training_that_ended_early_says_why(error, state):
    report = TrainingReport.of(summed(RunFailed(error, "it <b>hurts</b>", **at(30))))
    assert (report.state, report.error) == (state, f"{error}: it <b>hurts</b>")
    shown = page(report)
    assert "it &lt;b&gt;hurts&lt;/b&gt;" in shown and "What was saved stays" in shown


def test_a_part_of_the_input_that_cannot_be_read_is_told():
    assert "cannot be read (it is gone)" in str(TrainingReport.of(summed(UnitLost(3, "it is gone", **at(25)))))


def test_the_page_shows_curves_speed_and_money():
    shown = page(TrainingReport.of(summed(RunFinished(2000, 2000, 0, 30.0, **at(30)))))
    assert shown.count("<svg") == 2 and "loss</bdi> over time: 0.5 at step 5, 0.25 at step 10" in shown
    assert "Waiting for rows" in shown and "USD" in shown and "<script" not in shown


@pytest.mark.parametrize("values", [(-1.0, 2.0), (float("nan"), 1.0), (1.0,), ()])
def test_a_metric_that_cannot_be_drawn_is_left_to_the_figures(values):
    sums = Sums()
    sums.add([EVENTS[0], MetricsReported(tuple(range(len(values))), tuple((("score", value),) for value in values), **at(2))])
    assert "over time" not in page(TrainingReport.of(sums))


def test_an_empty_training_has_a_report_and_a_page():
    report = TrainingReport.of(Sums())
    assert page(report) and str(report).startswith("nothing to do") and line(report).endswith("starting")


def test_a_line_says_how_far_it_is():
    said = line(TrainingReport.of(summed()))
    assert "step 10, 2,000 of 4,000 rows, 200 rows/s, 20.0% waiting for rows, loss 0.25" in said


def test_the_live_view_takes_every_event():
    import numpy as np
    from rich.console import Console

    import headrace as hr

    console = Console(record=True, force_terminal=True, width=120, file=open("/dev/null", "w"))
    training = hr.Training("prices", lambda shard, settings, run: np.nan)
    with console.file, TrainingProgress(training, console=console) as progress:
        progress.update(EVENTS)
        progress.update([WorkersStarted(1, 5, **at(30))])
        from headrace.cli.training_progress import frame

        console.print(frame(TrainingReport.of(progress.sums)))
    text = console.export_text()
    assert "rows are left out: ValueError in clean" in text and "1 worker go on from step 5" in text and "waiting for rows" in text and "0.25" in text


def test_a_result_has_its_curves():
    result = Result({"loss": 0.25}, "out/checkpoint", TrainingReport.of(summed()))
    assert result.curve("loss") == [(5, 0.5), (10, 0.25)] and result.curve("other") == []


@pytest.mark.parametrize(("text", "workers"), [("4", 4), ("2:8", (2, 8))])
def test_workers_are_a_number_or_a_range(text, workers):
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["0", "8:2", "many", "-1", "2:"])
def test_other_numbers_of_workers_are_refused(text):
    with pytest.raises(SettingError, match="--workers must be a number of at least 1, or LEAST:MOST such as 2:8"):
        parse_workers(text)
