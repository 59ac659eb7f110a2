"""Runs of loops: when they are saved, what the workers agree on, what is told."""

import numpy as np
import pyarrow as pa
import pytest

from headrace.errors import ContractError
from headrace.events import CheckpointSaved, MetricsReported, StepsDone
from headrace.lineage import trace
from headrace.loops.checkpoints import read
from headrace.loops.run import Agreement, Halted, Notes, Run
from headrace.loops.shard import Shard


class Clock:
    """Time that goes by when a test says so."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Site:
    """Where nothing happens but what a test says. `says` is what the first worker decides, where this is not the first."""

    def __init__(self, folder, *, rank=0, workers=1, says=()):
        self.folder, self.rank, self.workers, self.says = folder, rank, workers, list(says)
        self.kept, self.events, self.meetings, self.stop, self.notice = [], [], [], False, False

    def restored(self):
        return None

    def agree(self, mine):
        self.meetings.append(mine)
        return (self.says.pop(0) if self.rank else mine), self.notice

    def told_to_stop(self):
        return self.stop

    def keep(self, write, notes, *, final):
        folder = self.folder / f"{len(self.kept)}"
        folder.mkdir()
        write(folder)
        self.kept.append((notes, final))

    def accelerator_share(self):
        return 0.5

    def tell(self, event):
        self.events.append(event)

    @property
    def steps(self):
        return [notes.step for notes, _ in self.kept]


def runs(tmp_path, *, every=(None, 60.0), notes=None, rows=1000, **site):
    data = trace(pa.table({"x": np.arange(rows)}), 0, np.arange(rows))
    here = Site(tmp_path, **site)
    begun = notes or Notes()
    shard = Shard(lambda: iter([data]), epoch_rows=rows, epochs=1, workers=here.workers, step=begun.batches, given=begun.rows)
    return shard, here, Run(shard, here, every=every, notes=notes)


def nothing(folder):
    pass


def test_it_is_saved_every_so_many_steps_and_at_the_end(tmp_path, clock):
    shard, site, run = runs(tmp_path, every=(3, None))
    for at, _ in zip(range(7), shard.batches(10), strict=False):
        run.report(loss=at)
        run.checkpoint(lambda folder, at=at: (folder / "at").write_text(str(at)))
    run.finish()
    assert site.steps == [3, 6, 7]
    assert [(tmp_path / f"{number}/at").read_text() for number in range(3)] == ["2", "5", "6"]
    assert [(notes.done, final, notes.rows, notes.metrics) for notes, final in site.kept] == [
        (False, False, 30, {"loss": 2.0}),
        (False, False, 60, {"loss": 5.0}),
        (True, True, 70, {"loss": 6.0}),
    ]
    assert [event.step for event in site.events if isinstance(event, CheckpointSaved)] == [3, 6, 7]


def test_it_is_saved_every_so_many_seconds(tmp_path, clock):
    shard, site, run = runs(tmp_path, every=(None, 60.0))
    for _ in zip(range(40), shard.batches(10), strict=False):
        clock.now_s += 5
        run.checkpoint(nothing)
    assert site.steps == [12, 24, 36]


def test_workers_meet_about_once_a_second_however_fast_the_loop_is(tmp_path, clock):
    shard, site, run = runs(tmp_path, rows=20_000)
    for _ in shard.batches(10):
        clock.now_s += 0.001
        run.checkpoint(nothing)
    assert 8 <= len(site.meetings) <= 14  # of 2,000 steps in two seconds: 1, 2, 4, ... and then every thousandth


def test_other_workers_do_what_the_first_one_says(tmp_path, clock):
    shard, site, run = runs(tmp_path, rank=1, workers=2, says=[Agreement(again=2), Agreement(save=True, again=100)])
    for _ in zip(range(6), shard.batches(10), strict=False):
        clock.now_s += 1000  # its own clock has no say
        run.checkpoint(lambda folder: (folder / "model").touch())
    assert site.steps == [3] and site.meetings == [Agreement()] * 2
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["_position-00001.json"]
    run.checkpoint(lambda folder: (folder / "part").touch(), now=True, every_worker=True)
    assert (tmp_path / "1/part").exists()


def test_told_to_stop_it_is_saved_and_the_loop_ends(tmp_path, clock):
    shard, site, run = runs(tmp_path)
    with pytest.raises(Halted):
        for _ in shard.batches(10):
            site.stop = shard.step == 4
            clock.now_s += 2
            try:
                run.checkpoint(nothing)
            except Exception:  # noqa: BLE001 - as loops may have it: it is no business of theirs
                pytest.fail("it was caught")
    assert [(notes.step, notes.done, final) for notes, final in site.kept] == [(4, False, True)]


def test_before_a_machine_goes_it_is_saved_once(tmp_path, clock):
    shard, site, run = runs(tmp_path)
    for _ in zip(range(8), shard.batches(10), strict=False):
        site.notice = shard.step >= 3
        clock.now_s += 2
        run.checkpoint(nothing)
        assert run.stopping is (shard.step >= 3)
    assert site.steps == [3]


def test_a_resumed_run_counts_on(tmp_path, clock):
    before = Notes(step=7, batches=7, calls=7, rows=70, metrics={"loss": 1.0})
    shard, site, run = runs(tmp_path, every=(4, None), notes=before)
    for _ in zip(range(4), shard.batches(10), strict=False):
        run.checkpoint(nothing)
    (notes, _), *_ = site.kept
    assert (notes.step, notes.rows, notes.metrics) == (11, 110, {"loss": 1.0})


def test_a_checkpoint_says_what_was_given(tmp_path, clock):
    from headrace.errors import OutputError
    from headrace.filesystems import locate

    shard, _, run = runs(tmp_path, every=(1, None))
    next(shard.batches(25))
    run.checkpoint(nothing)
    notes, taken = read(locate(str(tmp_path / "0"), error=OutputError))
    assert notes == Notes(step=1, batches=1, calls=1, rows=25)
    assert {unit: list(rows) for unit, rows in taken.items()} == {0: [(0, 25)]}


def test_reports_are_told_twice_a_second_and_thinned_out(tmp_path, clock):
    shard, site, run = runs(tmp_path, rows=30_000)
    for _ in shard.batches(10):
        clock.now_s += 0.0005
        run.report(loss=1 / shard.step, step=shard.step)
    run.finish()
    told = [event for event in site.events if isinstance(event, MetricsReported)]
    assert 3 <= len(told) <= 5
    assert all(len(event.steps) <= 512 for event in told)
    assert told[-1].steps[-1] == 3000 and dict(told[-1].values[-1]) == {"loss": 1 / 3000, "step": 3000.0}
    done = [event for event in site.events if isinstance(event, StepsDone)]
    assert sum(event.rows for event in done) == 30_000 and sum(event.span_s for event in done) == pytest.approx(1.5)


def test_only_the_first_worker_tells_metrics(tmp_path, clock):
    _, site, run = runs(tmp_path, rank=1, workers=2)
    run.report(loss=1.0)
    run.finish()
    assert not [event for event in site.events if isinstance(event, (MetricsReported, CheckpointSaved))]


def test_what_float_takes_is_a_number_and_else_it_is_told(tmp_path, clock):
    _, _, run = runs(tmp_path)
    run.report(loss=np.float32(0.5), count=3)
    with pytest.raises(ContractError, match=r"run.report takes numbers, such as loss=0.3, got \{'loss': \[1\]\}"):
        run.report(loss=[1])
