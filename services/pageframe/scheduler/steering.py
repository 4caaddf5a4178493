"""Cuts prefills so that whoever decodes gets the next token within a target.

The time of a step is predicted from what is in it, and learnt from every step that was measured:

    base + a * decodes + b * context   +   c * tokens + d * pairs
    ╰───────── the decodes alone ────╯     ╰─ prefill beside them ─╯

``context`` counts the positions that decodes read; ``pairs`` each prefill token with each position
before it. A draft token reads what its sequence's decode does and counts as one more decode; how
many there will be is not known when a step is planned, so it is taken to be as many as of late.

What the decodes leave of the target goes to chunks, the largest that fit: those at the end of a
long prompt come out smaller. To bound the time between tokens by how much prefill runs beside
decodes is the idea of Sarathi-Serve (Agrawal et al., OSDI 2024, arXiv 2403.02310); there the budget
is a constant that is found by measuring beforehand.

How it learns follows from what steering does to its own measurements. Where it succeeds all steps
last equally long, whatever is in them, and many planes go through such points. So now and then a
step beside decodes has no prefill: it shows what the decodes alone cost, and prefill is the rest.
The coefficients are the state of a Kalman filter with relative noise. What is not known yet is
taken from the first steps that show it; what is known moves slowly, but for one direction: a
machine that slows down slows down as a whole, so all coefficients may change by one factor at once.
Then decodes alone tell that prefill has become slower too.

The plan of step k+1 is made while step k runs. Nothing here looks back to the step before: what is
in step k+1 is known when it is planned, so its own time is predicted.
"""

from collections.abc import Sequence as Numbers
from dataclasses import dataclass, field
from math import sqrt

from pageframe.core.step import StepResult
from pageframe.scheduler.flights import Flight

NUM_PREFILL_TOKENS_MIN = 16
"""Prefill tokens that a step may always have: a target that cannot be met must starve nobody."""

# Divisors that bring features of usual steps near 1, so that one variance fits all of them.
_SCALES = (1.0, 64.0, 65536.0, 256.0, 256.0 * 8192.0)
_NS_PER_UNIT = 1e6
# Standard deviations: of what is not known; and relative ones, of the noise of one step, of what
# all coefficients change by together in a step, and of what each changes by alone, as part of a
# whole step.
_UNKNOWN = 50.0
_NOISE = 0.04
_PACE_DRIFT = 0.03
_DRIFT = 0.001
# How quickly the draft tokens of a decode are followed.
_DRAFTS_GAIN = 0.05
# A step that surprises by more counts for no more; unless the one before it did so too.
_NUM_DEVIATIONS_MAX = 3.0
_ERROR_GAIN = 0.05
_ERROR_MAX = 0.3
# Of errors that are spread like a bell, 99 % stay below 3.2 times their mean.
_NUM_ERRORS = 3.5
_HEADROOM = 0.01
# Chunks grow to this many times the largest that was measured.
_GROWTH = 2
# Steps with prefill after which one beside decodes has none.
_NUM_MIXED_STEPS_MAX = 100
# Steps beside decodes without prefill, at first: until the first was measured, two are planned.
_NUM_BARE_STEPS = 2


@dataclass(slots=True)
class StepLoad:
    """What one step computes, as far as its time depends on it.

    Attributes:
        num_decodes: Sequences that take one token each, and draft tokens.
        num_context: Positions that those attend to.
        num_tokens: Tokens of prefill.
        num_pairs: Each of these tokens with each position before it, itself included.
    """

    num_decodes: int = 0
    num_context: int = 0
    num_tokens: int = 0
    num_pairs: float = 0.0

    def add_chunk(self, position: int, num_tokens: int) -> None:
        """Put the chunk ``[position, position + num_tokens)`` of a prefill in."""
        self.num_tokens += num_tokens
        self.num_pairs += num_tokens * (position + (num_tokens + 1) / 2)


class StepTimes:
    """Learns how long steps last: a Kalman filter (Kalman, 1960) over what features cost.

    Attributes:
        error: Mean relative error of what was predicted for steps with prefill.
        num_tokens_seen: Most prefill tokens in one measured step.
        num_mixed_steps: Steps with prefill since the last one without.
    """

    def __init__(self) -> None:
        places = range(len(_SCALES))
        self._costs = [0.0] * len(_SCALES)
        self._covariance = [
            [_UNKNOWN**2 if row == column else 0.0 for column in places] for row in places
        ]
        self._patience = _NUM_DEVIATIONS_MAX
        self.error = 0.0
        self.num_tokens_seen = 0
        self.num_mixed_steps = 0

    def predict_ns(self, load: StepLoad) -> float:
        """Nanoseconds that a step of ``load`` is expected to last."""
        return _dot(self._costs, _features(load)) * _NS_PER_UNIT

    @property
    def prefill_costs_ns(self) -> tuple[float, float]:
        """What a prefill token costs, and what a pair does."""
        token, pair = (
            cost / scale for cost, scale in zip(self._costs[3:], _SCALES[3:], strict=True)
        )
        return token * _NS_PER_UNIT, pair * _NS_PER_UNIT

    def learn(self, load: StepLoad, measured_ns: int) -> None:
        """A step of ``load`` lasted ``measured_ns``, which is more than 0."""
        measured, features = measured_ns / _NS_PER_UNIT, _features(load)
        if load.num_tokens:
            self._note_error(measured, _dot(self._costs, features))
            self.num_tokens_seen = max(self.num_tokens_seen, load.num_tokens)
            self.num_mixed_steps += 1
        else:
            self.num_mixed_steps = 0
        self._drift(_dot(self._costs, features))
        self._correct(features, measured)
        self._keep_positive()

    def _note_error(self, measured: float, expected: float) -> None:
        if self.num_tokens_seen and expected > 0:
            error = min(abs(measured - expected) / expected, 1.0)
            self.error += _ERROR_GAIN * (error - self.error)

    def _drift(self, expected: float) -> None:
        """What was known a step ago is a little less certain, in all costs and in each."""
        scaled = [_PACE_DRIFT * cost for cost in self._costs]
        self._covariance = [
            [cell + part * other for cell, other in zip(row, scaled, strict=True)]
            for row, part in zip(self._covariance, scaled, strict=True)
        ]
        for place in range(len(_SCALES)):
            self._covariance[place][place] += (_DRIFT * expected) ** 2

    def _correct(self, features: list[float], measured: float) -> None:
        """Take a measurement in, outliers cut off (Huber, 1964)."""
        spread = [_dot(row, features) for row in self._covariance]
        expected = _dot(self._costs, features)
        variance = _dot(spread, features) + (_NOISE * max(measured, expected)) ** 2
        surprise = measured - expected
        bound = self._patience * sqrt(variance)
        self._patience = 2 * self._patience if abs(surprise) > bound else _NUM_DEVIATIONS_MAX
        step = min(max(surprise, -bound), bound) / variance
        self._costs = [cost + step * part for cost, part in zip(self._costs, spread, strict=True)]
        self._covariance = [
            [cell - part * other / variance for cell, other in zip(row, spread, strict=True)]
            for row, part in zip(self._covariance, spread, strict=True)
        ]

    def _keep_positive(self) -> None:
        """Nothing takes less time because it is in a step.

        What a negative cost is raised by, others that were mistaken for it are lowered by: a
        projection along the covariance (Simon and Chia, 2002). Cut off alone, it would pull the
        estimate away from what was measured, again in every step.
        """
        for _ in _SCALES:
            place = min(range(len(_SCALES)), key=self._costs.__getitem__)
            lowest = self._costs[place]
            if lowest >= 0:
                return
            column = self._covariance[place]
            self._costs = [
                cost - lowest * part / column[place]
                for cost, part in zip(self._costs, column, strict=True)
            ]
            self._costs[place] = 0.0
        self._costs = [max(0.0, cost) for cost in self._costs]


class Allowance:
    """What is left for prefill in one step.

    Args:
        time_left_ns: Nanoseconds that the decodes leave of the target; may be negative.
        token_ns: What a prefill token costs.
        pair_ns: What a pair of such a token with a position before it costs.
        num_tokens_max: Most tokens, however short they are expected to last.
        num_tokens_sure: Tokens that are given even if there is no time left.
    """

    __slots__ = (
        "_num_tokens_left",
        "_num_tokens_sure",
        "_pair_ns",
        "_time_left_ns",
        "_token_ns",
    )

    def __init__(
        self,
        time_left_ns: float,
        token_ns: float,
        pair_ns: float,
        num_tokens_max: int,
        *,
        num_tokens_sure: int = NUM_PREFILL_TOKENS_MIN,
    ) -> None:
        self._time_left_ns = time_left_ns
        self._token_ns = token_ns
        self._pair_ns = pair_ns
        self._num_tokens_left = num_tokens_max
        self._num_tokens_sure = num_tokens_sure

    def num_tokens_at(self, position: int) -> int:
        """The largest chunk from ``position`` on that fits; may be 0."""
        num_tokens = min(self._num_tokens_left, self._num_tokens_in_time(position))
        return max(self._num_tokens_sure, num_tokens)

    def take(self, position: int, num_tokens: int) -> None:
        """Take the chunk ``[position, position + num_tokens)`` off what is left."""
        load = StepLoad()
        load.add_chunk(position, num_tokens)
        self._time_left_ns -= self._token_ns * num_tokens + self._pair_ns * load.num_pairs
        self._num_tokens_left = max(0, self._num_tokens_left - num_tokens)
        self._num_tokens_sure = max(0, self._num_tokens_sure - num_tokens)

    def _num_tokens_in_time(self, position: int) -> int:
        """Solve for the n that take what is left: pair / 2 * n² + (token + ...) * n = left."""
        left = self._time_left_ns
        if left <= 0:
            return 0
        first = self._token_ns + self._pair_ns * (position + 0.5)
        # This form of the solution holds for pairs that cost nothing, too.
        root = first + sqrt(first * first + 2 * self._pair_ns * left)
        return int(min(2 * left / root, self._num_tokens_left)) if root else self._num_tokens_left


@dataclass(slots=True)
class Steering:
    """Keeps steps within a target, if there is one.

    Attributes:
        target_ns: Longest time between two tokens of a sequence; 0 for no target.
        times: What was learnt.
    """

    target_ns: int
    times: StepTimes = field(default_factory=StepTimes)
    _last_end_ns: int = 0
    _num_drafts_each: float = 0.0
    _num_bare_steps: int = _NUM_BARE_STEPS

    def allowance(self, flight: Flight) -> Allowance | None:
        """What prefill may take in the step of ``flight``; ``None`` is no bound.

        Where nobody decodes, nobody waits for the next token.
        """
        if not self.target_ns or not flight.num_decodes:
            return None
        times = self.times
        # Aim lower, the less predictions were worth lately.
        aim_ns = self.target_ns / (1 + _HEADROOM + _NUM_ERRORS * min(times.error, _ERROR_MAX))
        if times.num_mixed_steps >= _NUM_MIXED_STEPS_MAX:
            times.num_mixed_steps = 0
            self._num_bare_steps = 1
        if self._num_bare_steps:
            self._num_bare_steps -= 1
            return Allowance(0.0, 0.0, 0.0, 0, num_tokens_sure=0)
        alone_ns = times.predict_ns(_decodes(flight, self._num_drafts_each))
        num_tokens_max = max(NUM_PREFILL_TOKENS_MIN, _GROWTH * times.num_tokens_seen)
        return Allowance(aim_ns - alone_ns, *times.prefill_costs_ns, num_tokens_max)

    def observe(self, flight: Flight, result: StepResult) -> None:
        """Learn from a step that was applied.

        With decodes in it, it lasted from the tokens before until its own: that is what a reader
        sees, with everything between two steps. Else the executor's own time is all there is.
        """
        if not self.target_ns:
            return
        if flight.num_decodes:
            num_each = sum(result.num_drafted) / flight.num_decodes
            self._num_drafts_each += _DRAFTS_GAIN * (num_each - self._num_drafts_each)
        timing = result.timing
        start_ns = timing.start_ns
        if flight.num_decodes and self._last_end_ns:
            start_ns = self._last_end_ns
        self._last_end_ns = timing.end_ns
        if timing.start_ns and timing.end_ns > start_ns:
            self.times.learn(load_of(flight, result), timing.end_ns - start_ns)

    def forget(self) -> None:
        """Another executor, perhaps another machine: nothing is known of it."""
        self.times = StepTimes()
        self._last_end_ns = 0
        self._num_drafts_each = 0.0
        self._num_bare_steps = _NUM_BARE_STEPS


def load_of(flight: Flight, result: StepResult) -> StepLoad:
    """What a step computed, which is less than its plan asked for if entries were refused."""
    load = _decodes(flight, sum(result.num_drafted) / max(1, flight.num_decodes))
    for first_position, num_computed in zip(
        result.first_positions, result.num_computed, strict=True
    ):
        load.add_chunk(first_position, num_computed - first_position)
    return load


def _decodes(flight: Flight, num_drafts_each: float) -> StepLoad:
    """The decodes of a step, with so many draft tokens for each."""
    num_each = 1 + num_drafts_each
    return StepLoad(round(flight.num_decodes * num_each), round(flight.num_context * num_each))


def _features(load: StepLoad) -> list[float]:
    values = (1, load.num_decodes, load.num_context, load.num_tokens, load.num_pairs)
    return [value / scale for value, scale in zip(values, _SCALES, strict=True)]


def _dot(first: Numbers[float], second: Numbers[float]) -> float:
    return sum(one * other for one, other in zip(first, second, strict=True))
