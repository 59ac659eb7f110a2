"""Is a new version worse than the one that answers? A sequential test of errors, latency and outputs that may be looked at every second.

Each test is a betting e-process: a game that is fair, or worse, as long as the versions are alike, so that its gains exceed 1 / alpha at any time
whatever with a chance of at most alpha (Ville's inequality; Ramdas, Grunwald, Vovk, Shafer, "Game-theoretic statistics and safe anytime-valid
inference", Statistical Science 38, 2023; bets on means: Waudby-Smith and Ramdas, JRSS B 86, 2024). So looking often costs nothing, and stopping when it
looks bad is no cheating. Several stakes are played side by side and averaged, because nobody knows how much worse a bad version is.

- *errors of pairs*: each request that one version failed and the other did not is a coin: heads if it was the new one. Alike: at most 1/2. More than two
  in a second count as two, because what fails at once may fail for one reason.
- *latency of pairs*: each block of 2 s and 5 pairs at least is a coin: heads if the mean of ln(new / old) lies above what is tolerated. Alike: at most 1/2,
  since the two runs of a request are exchangeable, however heavy the tails and whatever slows both down. A whole block counts once, because
  a hiccup of one process slows all requests of a moment.
- *outputs of pairs*: the share that differs, against the share that may (0.1 % at least).
- *errors and latency without pairs*, of what clients were answered, block by block: that the share of the errors that falls on the new version is its
  share of the requests, and that its latencies rank like the others'. Slower, but nothing has to be mirrored.

`alpha` is split over the five. The first requests of a new replica are left out of latencies: its caches are cold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from headrace.errors import SettingError
from headrace.serving.routes import LATENCY_BOUNDS_S, VersionReport

ERRORS, LATENCY, OUTPUTS, ANSWERED_ERRORS, ANSWERED_LATENCY = "errors", "latency", "outputs", "answered_errors", "answered_latency"
BUDGET = {ERRORS: 0.35, LATENCY: 0.35, OUTPUTS: 0.2, ANSWERED_ERRORS: 0.05, ANSWERED_LATENCY: 0.05}
"""The share of alpha that each test has."""

WARM_UP_REQUESTS, WARM_UP_S = 20, 5.0
BLOCK_S, BLOCK_REQUESTS = 1.8, 5  # two looks, which come about once a second
LEAST_PAIRS = 20  # no verdict on outputs before
_TICK_S, _COINS_A_TICK = 0.9, 2  # a look
_LEAST_DIFFERENT = 0.001

_STAKES = ((0.85, 0.6), (0.6, 0.2), (0.3, 0.2))  # of what is held on heads, and the share of the money that is played so
_ODDS = (2.0, 4.0)  # how many times as often the new version fails
_SHARES = (0.004, 0.01, 0.03, 0.1, 0.5, 0.95)  # of pairs, beyond those tolerated
_NO_LATENCIES = (0,) * (len(LATENCY_BOUNDS_S) + 1)
_LN_STEP = math.log(LATENCY_BOUNDS_S[1] / LATENCY_BOUNDS_S[0])
_LN_MIDDLES = np.log(np.array([*LATENCY_BOUNDS_S, LATENCY_BOUNDS_S[-1] * math.exp(_LN_STEP)])) - _LN_STEP / 2


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much worse a version may be; None does not judge that.

    `slower` is the ratio of latencies, `slower_s` a difference in seconds that is always allowed; `errors` the difference of error rates;
    `different` the share of pairs whose outputs differ. `alpha` bounds the chance that two equal versions are ever told apart.
    """

    slower: float | None = 1.10
    slower_s: float = 0.001
    errors: float | None = 0.005
    different: float | None = 0.0
    alpha: float = 0.005

    def __post_init__(self) -> None:
        if self.slower is not None and self.slower < 1:
            raise SettingError(f"slower is {self.slower:g}; it is a ratio of latencies, 1 or more, as 1.1 for a tenth")
        for name, share in (("errors", self.errors), ("different", self.different)):
            if share is not None and not 0 <= share < 1:
                raise SettingError(f"{name} is {share:g}; it is a share, at least 0 and below 1")
        if not 0 < self.alpha < 1:
            raise SettingError(f"alpha is {self.alpha:g}; it is a probability between 0 and 1")

    def threshold(self, test: str) -> float:
        """The e-value above which a test says that the version is worse."""
        return 1 / (self.alpha * BUDGET[test])


@dataclass(frozen=True, slots=True)
class Counts:
    """What a trial needs of a `VersionReport`, as a value: see there."""

    answered: int = 0
    errors: int = 0
    pairs: int = 0
    pair_errors: int = 0
    pair_base_errors: int = 0
    pair_different: int = 0
    pair_log_ratio: float = 0.0
    latencies: tuple[int, ...] = _NO_LATENCIES

    @classmethod
    def of(cls, report: VersionReport) -> Counts:
        """The counts of a report. A request that was not answered in time is a failed one."""
        return cls(
            max(report.answered, report.errors) + report.expired,
            report.errors + report.expired,
            report.pairs,
            report.pair_errors,
            report.pair_base_errors,
            report.pair_different,
            report.pair_log_ratio,
            tuple(report.latencies),
        )

    def plus(self, other: Counts, sign: int = 1) -> Counts:
        """The sum, or with -1 the difference."""
        return Counts(
            self.answered + sign * other.answered,
            self.errors + sign * other.errors,
            self.pairs + sign * other.pairs,
            self.pair_errors + sign * other.pair_errors,
            self.pair_base_errors + sign * other.pair_base_errors,
            self.pair_different + sign * other.pair_different,
            self.pair_log_ratio + sign * other.pair_log_ratio,
            self.latencies if other.latencies is _NO_LATENCIES else tuple((np.array(self.latencies) + sign * np.array(other.latencies)).tolist()),
        )

    @property
    def timed(self) -> int:
        """Pairs that have a ratio of latencies: those that both versions answered, but for the few that both failed."""
        return max(0, self.pairs - self.pair_errors - self.pair_base_errors)

    @property
    def sound(self) -> bool:
        """Whether these can be counts; a difference is none where whoever counts began anew."""
        return min(self.answered, self.errors, self.pairs, self.pair_errors, self.pair_base_errors, self.pair_different, *self.latencies) >= 0

    def without_latencies(self) -> Counts:
        """The same but for what tells of latencies."""
        return dataclasses.replace(self, pair_log_ratio=0.0, latencies=_NO_LATENCIES)


@dataclass(frozen=True, slots=True)
class Coins:
    """Tosses of a coin that comes up heads half the time at most, if the versions are alike."""

    heads: float = 0.0
    tails: float = 0.0

    def toss(self, heads: float, tails: float, *, most: float = math.inf) -> Coins:
        """Some tosses more. Of more than `most` each counts in part: it is the gain to a power below 1, which makes a fair game no better."""
        part = min(1.0, most / (heads + tails)) if heads + tails else 0.0
        return Coins(self.heads + part * heads, self.tails + part * tails)

    @property
    def e_value(self) -> float:
        """What 1 has become: a share s of it bet on heads multiplies it by 1 + s or 1 - s; stakes are averaged."""
        return sum(part * _exp(self.heads * math.log1p(stake) + self.tails * math.log1p(-stake)) for stake, part in _STAKES)


@dataclass(frozen=True, slots=True)
class Block:
    """Requests of a few seconds, taken together: since when, and counts of both versions."""

    since_s: float = 0.0
    candidate: Counts = Counts()
    base: Counts = Counts()

    def add(self, candidate: Counts, base: Counts) -> Block:
        """The block with more requests in it."""
        return Block(self.since_s, self.candidate.plus(candidate), self.base.plus(base))


@dataclass(frozen=True, slots=True)
class Trial:
    """What has been compared so far, as a value; `feed` makes the next.

    `candidate` and `base` are the counts since the trial began; `last` what both had counted when last fed. `cold` requests and the time until `cold_s`
    are still to be left out of latencies. `timed` counts pairs of which the latency counts, `log_ratio` is the sum of theirs.
    """

    tolerance: Tolerance = Tolerance()
    began_s: float = 0.0
    cold: int = WARM_UP_REQUESTS
    cold_s: float = WARM_UP_S
    last: tuple[Counts, Counts] | None = None
    candidate: Counts = Counts()
    base: Counts = Counts()
    timed: int = 0
    log_ratio: float = 0.0
    second: Block = Block()
    paired: Block = Block()
    answered: Block = Block()
    failures: Coins = Coins()
    slower: Coins = Coins()
    answered_failures: tuple[float, ...] = (0.0,) * len(_ODDS)  # logarithms of what each stake has become
    answered_slower: tuple[float, ...] = (0.0,) * len(_STAKES)

    @classmethod
    def begin(cls, tolerance: Tolerance, *, at_s: float) -> Trial:
        """A trial of which nothing is known yet."""
        empty = Block(at_s)
        return cls(tolerance, at_s, WARM_UP_REQUESTS, at_s + WARM_UP_S, second=empty, paired=empty, answered=empty)

    def warm_up(self, *, at_s: float) -> Trial:
        """The trial after a further replica got ready, whose first requests tell nothing of latency."""
        return dataclasses.replace(self, cold=WARM_UP_REQUESTS, cold_s=at_s + WARM_UP_S)

    @property
    def ln_tolerated(self) -> float:
        """The logarithm of the ratio of latencies that is tolerated: `slower`, or `slower_s` on top of a typical latency of the base."""
        ratio = self.tolerance.slower or 1.0
        typical_ln = _ln_mean(self.base.latencies)
        return math.log(ratio if typical_ln is None else max(ratio, 1 + self.tolerance.slower_s / math.exp(typical_ln)))

    @property
    def sample(self) -> int:
        """Requests compared: pairs, or what the new version answered where that is more."""
        return max(self.candidate.pairs, self.candidate.answered)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial says now. `worse` is final, with `why`; `within` says whether what was seen lies within the tolerances, so that a step may be taken.

    `text` tells what was seen, of pairs alone where there are any (`paired`), and `numbers` the same for programs.
    """

    worse: bool
    why: str
    within: bool
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    paired: bool = False


def feed(trial: Trial, *, at_s: float, candidate: VersionReport, base: VersionReport) -> Trial:
    """The trial after one more look, at most once a second, at what both versions have counted since whenever."""
    last = (Counts.of(candidate), Counts.of(base))
    if trial.last is None:
        return dataclasses.replace(trial, last=last)
    if last == trial.last:
        return trial
    new, old = (now.plus(before, -1) for now, before in zip(last, trial.last, strict=True))
    trial = dataclasses.replace(trial, last=last)
    if not new.sound or not old.sound:
        return trial  # somebody counts from zero again: what lies between is lost
    requests = max(new.pairs, new.answered)
    cold = trial.cold > 0 or at_s < trial.cold_s
    tepid = new.without_latencies() if cold else new
    trial = dataclasses.replace(
        trial,
        cold=max(0, trial.cold - requests),
        candidate=trial.candidate.plus(tepid),
        base=trial.base.plus(old),
        timed=trial.timed + (0 if cold else new.timed),
        log_ratio=trial.log_ratio + tepid.pair_log_ratio,
    )
    trial = _second(trial, at_s, new)
    if cold:
        empty = Block(at_s)
        return dataclasses.replace(trial, paired=empty, answered=empty)
    trial = _paired(trial, at_s, new)
    return _answered(trial, at_s, new, old)


def _second(trial: Trial, at_s: float, new: Counts) -> Trial:
    block = trial.second.add(new.without_latencies(), Counts())
    if at_s - block.since_s < _TICK_S:
        return dataclasses.replace(trial, second=block)
    failures = trial.failures.toss(block.candidate.pair_errors, block.candidate.pair_base_errors, most=_COINS_A_TICK)
    return dataclasses.replace(trial, second=Block(at_s), failures=failures)


def _paired(trial: Trial, at_s: float, new: Counts) -> Trial:
    block = trial.paired.add(new, Counts())
    if at_s - block.since_s < BLOCK_S or block.candidate.timed < BLOCK_REQUESTS:
        return dataclasses.replace(trial, paired=block)
    excess = block.candidate.pair_log_ratio / block.candidate.timed - trial.ln_tolerated
    return dataclasses.replace(trial, paired=Block(at_s), slower=trial.slower.toss(excess > 0, excess < 0))


def _answered(trial: Trial, at_s: float, new: Counts, old: Counts) -> Trial:
    block = trial.answered.add(new, old)
    of_new, of_old = block.candidate, block.base
    if at_s - block.since_s < BLOCK_S or min(of_new.answered, of_old.answered) < BLOCK_REQUESTS:
        return dataclasses.replace(trial, answered=block)
    share = of_new.answered / (of_new.answered + of_old.answered)
    failed = of_new.errors + of_old.errors
    failures = trial.answered_failures
    if failed:  # one of the errors, drawn by lot: a burst counts once
        blamed = of_new.errors / failed
        failures = tuple(was + math.log((1 - blamed + blamed * odds) / (1 - share + share * odds)) for was, odds in zip(failures, _ODDS, strict=True))
    lead = _lead(of_new.latencies, of_old.latencies, trial.ln_tolerated)
    slower = tuple(was + math.log1p(stake * lead) for was, (stake, _) in zip(trial.answered_slower, _STAKES, strict=True))
    return dataclasses.replace(trial, answered=Block(at_s), answered_failures=failures, answered_slower=slower)


def _lead(new: tuple[int, ...], old: tuple[int, ...], ln_tolerated: float) -> float:
    """How far the new latencies, divided by what is tolerated, rank above all of them together: 0 for equal ones on average, within -1..1."""
    moved = np.array(new, dtype=float)
    steps, part = divmod(ln_tolerated / _LN_STEP, 1)
    moved = (1 - part) * _down(moved, int(steps)) + part * _down(moved, int(steps) + 1)
    every = moved + np.array(old, dtype=float)
    if not moved.sum() or moved.sum() == every.sum():
        return 0.0
    ranks = (np.cumsum(every) - every / 2) / every.sum()
    return float(np.clip(2 * (moved @ ranks) / moved.sum() - 1, -1, 1))


def _down(histogram: np.ndarray, steps: int) -> np.ndarray:
    """A histogram moved down by so many buckets; what would fall out below stays in the first."""
    steps = min(steps, len(histogram) - 1)
    moved = np.zeros_like(histogram)
    moved[: len(histogram) - steps] = histogram[steps:]
    moved[0] += histogram[:steps].sum()
    return moved


def _ln_mean(latencies: tuple[int, ...]) -> float | None:
    counts = np.array(latencies)
    return float(counts @ _LN_MIDDLES / counts.sum()) if counts.any() else None


def _exp(value: float) -> float:
    return math.exp(min(value, 600.0))


def _e_different(different: int, pairs: int, tolerated: float) -> float:
    """The e-value of so many differing pairs where at most the tolerated share should: the likelihood of a larger share over that of this one."""
    may = max(tolerated, _LEAST_DIFFERENT)
    logs = []
    for beyond in _SHARES:
        share = may + (1 - may) * beyond
        logs.append(different * math.log(share / may) + (pairs - different) * math.log((1 - share) / (1 - may)))
    return sum(_exp(log) for log in logs) / len(logs)


def judge(trial: Trial) -> Verdict:
    """What the trial says now."""
    found = list(_findings(trial))
    worse = next((finding for finding in found if finding.worse), None)
    numbers = {"pairs": float(trial.candidate.pairs), "answered": float(trial.candidate.answered)}
    for finding in found:
        numbers |= finding.numbers
    told = [finding for finding in found if finding.paired] or found
    text = "; ".join(finding.text for finding in told) or "nothing compared yet"
    return Verdict(worse is not None, worse.why if worse else "", all(finding.within for finding in found), text, numbers)


def _findings(trial: Trial) -> Iterator[Verdict]:
    """A verdict for each test that has something to say."""
    limits, new, old = trial.tolerance, trial.candidate, trial.base
    answered = min(new.answered, old.answered) >= BLOCK_REQUESTS
    if limits.errors is not None and new.pairs:
        here, there = new.pair_errors / new.pairs, new.pair_base_errors / new.pairs
        text = f"errors in {here:.1%} of {new.pairs:,} pairs against {there:.1%}"
        yield _finding(trial, ERRORS, trial.failures.e_value, (here, there), here - there <= limits.errors, text)
    if limits.slower is not None and trial.timed:
        ratio = math.exp(trial.log_ratio / trial.timed)
        text = f"latency {ratio:.2f} times the other version's on {trial.timed:,} pairs"
        yield _finding(trial, LATENCY, trial.slower.e_value, (ratio,), math.log(ratio) <= trial.ln_tolerated, text)
    if limits.different is not None and new.pairs >= LEAST_PAIRS:
        share = new.pair_different / new.pairs
        text = f"outputs differ in {share:.1%} of {new.pairs:,} pairs"
        e_value = _e_different(new.pair_different, new.pairs, limits.different)
        yield _finding(trial, OUTPUTS, e_value, (share,), share <= max(limits.different, _LEAST_DIFFERENT), text)
    if limits.errors is not None and answered:
        here, there = new.errors / new.answered, old.errors / old.answered
        e_value = sum(map(_exp, trial.answered_failures)) / len(_ODDS)
        text = f"errors {here:.1%} of {new.answered:,} answers against {there:.1%} of {old.answered:,}"
        yield _finding(trial, ANSWERED_ERRORS, e_value, (here, there), here - there <= limits.errors, text)
    means = _ln_mean(new.latencies), _ln_mean(old.latencies)
    if limits.slower is not None and answered and means[0] is not None and means[1] is not None:
        ratio = math.exp(means[0] - means[1])
        e_value = sum(part * _exp(log) for log, (_, part) in zip(trial.answered_slower, _STAKES, strict=True))
        text = f"latency {ratio:.2f} times the other version's, of {new.answered:,} answers against {old.answered:,}"
        yield _finding(trial, ANSWERED_LATENCY, e_value, (ratio,), math.log(ratio) <= trial.ln_tolerated, text)


def _finding(trial: Trial, test: str, e_value: float, seen: tuple[float, ...], within: bool, text: str) -> Verdict:
    limit = trial.tolerance.threshold(test)
    # The e-value says that the versions differ, the tolerance whether anybody minds. Without pairs few requests say little: pairs have the word.
    paired = test in (ERRORS, LATENCY, OUTPUTS)
    worse = e_value >= limit and not within
    numbers = {f"{test}_e_value": e_value, **dict(zip((test, f"{test}_base"), seen, strict=False))}
    why = f"{text}; e-value {e_value:{',.0f' if e_value < 1e6 else '.1e'}} > {limit:,.0f}" if worse else ""
    return Verdict(worse, why, within or (not paired and trial.candidate.pairs > 0), text, numbers, paired)
