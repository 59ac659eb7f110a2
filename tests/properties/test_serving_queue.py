"""A replica's queue: whatever comes, every row is computed exactly once, within the rule, and nobody starves."""

import itertools
from queue import SimpleQueue

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

import headrace as hr
from headrace.serving.replica.floor import Floor
from headrace.serving.replica.jobs import AGE_S, Cut, Job, assemble, cut
from headrace.serving.replica.queue import PADDING, Line, fit
from headrace.serving.routes import Limits
from headrace.worker import measure

REQUESTS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=25)
RULES = st.integers(1, 10).map(hr.rows) | st.integers(1, 120).map(lambda budget: hr.tokens(budget, of="text"))


def job_of(priority, lengths, *, number=0, alone=False, arrived_s=0.0, deadline_s=float("inf")):
    job = Job(None, number, 10 * len(lengths), priority=priority, rows=len(lengths), arrived_s=arrived_s, alone=alone, deadline_s=deadline_s)
    job.enter(0, arrived_s)
    job.measured(np.array(lengths))
    return job


def padded(rule, share_list, lengths_of):
    widths = [lengths_of[id(share.job)][row] for share in share_list for row in share.rows]
    return len(widths) if isinstance(rule, type(hr.rows(1))) else len(widths) * max(widths), widths


@given(RULES, REQUESTS, st.integers(0, 3).map(lambda power: 2**power))
def test_every_row_is_taken_once_within_the_rule_and_the_next_request_is_always_in(rule, requests, shrink):
    line, lengths_of, seen = Line(rule), {}, {}
    for at, (priority, lengths) in enumerate(requests):
        job = job_of(priority, lengths, arrived_s=at / 1000)
        lengths_of[id(job)], seen[id(job)] = lengths, []
        line.put(job)
    jobs = list(line.ordered(0.1))
    assert [job.priority for job in jobs] == sorted(job.priority for job in jobs)
    while line:
        head = line.head(0.1)
        shares, expired, filled = line.take(0.1, shrink=shrink)
        assert not expired
        assert shares[0].job is head
        assert 0 < filled <= 1
        size, widths = padded(rule, shares, lengths_of)
        most = max(1, (rule.count if isinstance(rule, type(hr.rows(1))) else rule.budget) // shrink)
        assert size <= most or len(widths) == 1
        for share in shares:
            seen[id(share.job)] += list(share.rows)
    for job in jobs:
        assert sorted(seen[id(job)]) == list(range(job.rows))
        if isinstance(rule, type(hr.rows(1))):
            assert seen[id(job)] == list(range(job.rows))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300), st.data())
def test_a_call_is_of_neighbours_in_length_and_no_better_one_holds_the_anchor(lengths, budget, data):
    lengths = np.array(lengths)
    anchor = int((lengths == data.draw(st.sampled_from(lengths.tolist()))).argmax())  # the first of its length, as the next request's is
    chosen = fit(lengths, anchor, budget)
    assert anchor in chosen
    assert (np.diff(chosen) > 0).all()
    size = len(chosen) * lengths[chosen].max()
    assert (size <= budget and size - lengths[chosen].sum() <= budget * PADDING) or len(chosen) == 1
    ordered = np.sort(lengths)
    for start, stop in itertools.combinations(range(len(ordered) + 1), 2):  # any other run that holds the anchor's length
        run = ordered[start:stop]
        like = len(run) * run.max() - run.sum() <= budget * PADDING
        if like and lengths[anchor] in run and len(run) * run.max() <= budget and size <= budget:
            assert run.sum() <= lengths[chosen].sum()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 3))
def test_age_lifts_a_request_over_a_steady_stream_of_better_ones(priorities, count):
    """Interactive requests keep the station busy; still, each of the others gets its turn soon after it has aged to their class."""
    line, now_s = Line(hr.rows(count)), 0.0
    waiting = {job_of(priority, [1], arrived_s=0.0) for priority in priorities}
    for job in waiting:
        line.put(job)
    while waiting:
        for _ in range(count):
            line.put(job_of(0, [1], arrived_s=now_s))
        waiting -= {share.job for share in line.take(now_s).shares}
        now_s += 0.5
        assert now_s < 2 * AGE_S + 0.5 * (len(priorities) + 3)


@given(REQUESTS)
def test_what_is_pushed_out_is_the_newest_of_the_worst_class(requests):
    line = Line(hr.rows(8))
    for at, (priority, lengths) in enumerate(requests):
        line.put(job_of(priority, lengths, number=at, arrived_s=at / 1000))
    least = list(line.least(0, 0.1))
    assert [(-job.priority, -job.number) for job in least] == sorted((-job.priority, -job.number) for job in least)
    assert len(least) == sum(priority > 0 for priority, _ in requests)


def test_a_late_request_is_put_out_when_a_call_is_made():
    line = Line(hr.rows(8))
    late, good = job_of(1, [1], deadline_s=1.0), job_of(1, [1])
    line.put(late)
    line.put(good)
    shares, expired, _ = line.take(2.0)
    assert [share.job for share in shares] == [good]
    assert expired == [late]
    assert not line


@hr.stage(out={"clean": str}, batch=5)
def clean(text: hr.Column[str]):
    return {"clean": list(text)}


@hr.stage(out={"y": int}, batch=hr.tokens(60, of="clean", bytes_per_token=1))
class Embed:
    def __call__(self, clean: hr.Column[str]):
        return {"y": list(map(len, clean))}


PIPELINE = hr.Pipeline("p", clean, Embed())
STEPS = st.lists(st.sampled_from(["put", "put", "alone", "begin", "begin", "end", "end", "told", "cancel", "raise"]), max_size=80)


class Run:
    """A floor whose calls begin and end when the test says so."""

    def __init__(self, threads):
        self.floor = Floor(PIPELINE.stages, writes=["n", "y"], limits=Limits(), threads=threads)
        self.under_way, self.jobs, self.answered, self.wake = [], [], {}, SimpleQueue()
        self.untold = []  # answers that are still in the process

    def put(self, lengths, priority, alone):
        at = len(self.jobs)
        table = pa.table({"n": pa.array(range(100 * at, 100 * at + len(lengths))), "text": ["x" * length for length in lengths]})
        job = Job(None, at, 50, rows=len(lengths), priority=priority, alone=alone, arrived_s=0.0, data=Cut(table, 0, len(lengths)))
        self.jobs.append(job)
        self.floor.put([job])

    def begin(self, at):
        station = self.floor.stations[at]
        free = [seat for seat, since in enumerate(station.since) if not since]
        if free and (call := self.floor.next_call(station, free[0], self.wake)[0]) is not None:
            self.under_way.append((station, free[0], call))
            jobs = {share.job for _, _, other in self.under_way for share in other.shares}
            assert len(jobs) == 1 or not any(job.alone for job in jobs)
            assert not any(job.alone and job not in jobs for job in self.untold)

    def tell(self):
        for job in self.untold:
            self.floor.release(job)
        self.untold.clear()

    def finish(self):
        for _ in range(400):
            self.tell()
            for at in (0, 1):
                self.begin(at)
            if not self.under_way:
                return
            self.end(0)

    def cancel(self, at):
        if not self.jobs:
            return set()
        job = self.jobs[at % len(self.jobs)]
        self.floor.cancel([job])
        self.untold = [other for other in self.untold if other is not job]
        return {job.number} - self.answered.keys()

    def fail(self):
        if not self.under_way:
            return set()
        station, seat, call = self.under_way.pop()
        self.floor.end(station, seat, call)
        self.untold += {share.job for share in call.shares}
        return {share.job.number for share in call.shares} - self.answered.keys()

    def end(self, at):
        if not self.under_way:
            return
        station, seat, call = self.under_way.pop(at % len(self.under_way))
        data = assemble([cut(share) for share in call.shares])
        if station.at:
            assert data.num_rows * max(map(len, data["clean"].to_pylist())) <= 60 or data.num_rows == 1
            out = data.append_column("y", pa.array(list(map(len, data["clean"].to_pylist()))))
        else:
            assert data.num_rows <= 5
            out = data.append_column("clean", data["text"])
        complete, failed = self.floor.settle(station, seat, call, out, {}, 0.001)
        assert not failed
        for job in complete:
            job.join()
            if station.at:
                table, start, stop = job.data
                self.answered[job.number] = table["n"].to_pylist()[start:stop]
                self.untold.append(job)
            else:
                job.measured(measure(PIPELINE.stages[1], assemble([job.data])))
        if complete and not station.at:
            self.floor.pass_on(complete, self.floor.stations[1])


@given(st.integers(1, 3), STEPS, st.data())
def test_a_floor_answers_every_request_once_in_order_and_those_alone_by_themselves(threads, steps, data):
    run, gone = Run(threads), set()
    for step in steps:
        match step:
            case "put" | "alone":
                run.put(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=12)), data.draw(st.integers(0, 2)), step == "alone")
            case "begin":
                run.begin(data.draw(st.integers(0, 1)))
            case "end":
                run.end(data.draw(st.integers(0, 5)))
            case "told":
                run.tell()
            case "cancel":
                gone |= run.cancel(data.draw(st.integers(0, 99)))
            case "raise":
                gone |= run.fail()
    run.finish()
    assert run.answered == {job.number: list(range(100 * job.number, 100 * job.number + job.rows)) for job in run.jobs if job.number not in gone}
    for station in run.floor.stations:
        assert not station.line
        assert abs(station.backlog) < 1e-6
        assert abs(station.busy) < 1e-6
