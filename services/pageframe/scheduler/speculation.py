"""What drafts may take of a step, and what the sequences that kept some have become.

The executor guesses and checks (see ``executor/drafting``); a plan only bounds it. Drafts get what
is left once everybody has got what is theirs: tokens of the budget that nobody asked for, blocks
that are promised to nobody, and nothing while somebody may have to give way.

    token budget   [ decodes ][ steered ][ chunks ][ drafts · · · ]

Whether a draft token pays is a question of price. A step with x tokens lasts about T(x) = a + c * x
and brings N tokens, so it makes N / T tokens in a unit of time. One draft token more costs c and
brings p tokens, where p is the chance that it is kept; that is more than the step makes anyway if

    p / c > N / T,   so if   p > c * N / T

and that is what the plan says: the least chance with which a draft token is worth computing. Alone
on a GPU c is next to nothing and any guess pays; the more sequences share a step, the higher the
price. ``a`` and ``c`` are fitted to the steps of late. What has not been seen is tried: as long as
all steps were of one size the price is a guess, and drafts themselves make sizes differ.

A sequence that keeps drafts is further than the books say, by as many tokens as it kept; until the
result is here, the plan after that one sets a block aside for each that may be.
"""

from dataclasses import dataclass
from math import sqrt

from pageframe.core.limits import LIMITS
from pageframe.core.plan import DraftBounds
from pageframe.core.step import StepResult
from pageframe.core.units import ceil_div
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.tracing import SchedulerTracer

# The price as long as it is not known.
_UNKNOWN_PRICE = 0.3
# Steps count less with each newer one: some fifty are remembered.
_MEMORY = 0.98
# Variance of the tokens of a step, in tokens², from which on c can be told.
_VARIANCE_MIN = 0.05
# After so many offers that were of no use to anybody, only now and then is one made.
_NUM_IDLE_MAX = 8
_REST_STEPS = 16


class StepPrices:
    """Learns what a token costs, from steps without prefill: least squares that forget.

    Times are noisy, and a price that is too high stops drafts and with them the learning. So a
    token is taken to cost what was measured less the standard error of that.

    Attributes:
        num_drafted: Draft tokens computed in a step, for each sequence that decodes; a mean.
        num_accepted: Those of them that were kept; likewise.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0
        self._time_ns = 0.0
        self._tokens_squared = 0.0
        self._tokens_time = 0.0
        self._time_squared = 0.0
        self.num_drafted = 0.0
        self.num_accepted = 0.0

    def learn(
        self, num_decodes: int, num_drafted: int, num_accepted: int, measured_ns: int
    ) -> None:
        """A step of ``num_decodes`` sequences, all drafts included, lasted ``measured_ns``."""
        num_tokens = num_decodes + num_drafted
        self._weight = self._weight * _MEMORY + 1
        self._tokens = self._tokens * _MEMORY + num_tokens
        self._time_ns = self._time_ns * _MEMORY + measured_ns
        self._tokens_squared = self._tokens_squared * _MEMORY + num_tokens**2
        self._tokens_time = self._tokens_time * _MEMORY + num_tokens * measured_ns
        self._time_squared = self._time_squared * _MEMORY + float(measured_ns) ** 2
        gain = 1 - _MEMORY
        self.num_drafted += gain * (num_drafted / num_decodes - self.num_drafted)
        self.num_accepted += gain * (num_accepted / num_decodes - self.num_accepted)

    def price(self, num_decodes: int, num_others: int) -> float:
        """The least chance of being kept with which a draft token pays, in [0, 1].

        Args:
            num_decodes: Sequences that take a token in the step; at least 1.
            num_others: Tokens of prefill beside them.
        """
        if not self._weight:
            return _UNKNOWN_PRICE
        mean_tokens, mean_ns = self._tokens / self._weight, self._time_ns / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        if variance < _VARIANCE_MIN or mean_ns <= 0:
            return _UNKNOWN_PRICE
        slope = (self._tokens_time / self._weight - mean_tokens * mean_ns) / variance
        unexplained = self._time_squared / self._weight - mean_ns**2 - slope**2 * variance
        error = sqrt(max(unexplained, 0.0) / (variance * self._weight))
        # A token costs something between nothing and its share of all.
        token_ns = min(max(slope - error, 0.0), mean_ns / mean_tokens)
        num_computed = num_decodes * (1 + self.num_drafted) + num_others
        step_ns = mean_ns + token_ns * (num_computed - mean_tokens)
        return min(1.0, token_ns * num_decodes * (1 + self.num_accepted) / step_ns)


@dataclass(slots=True)
class _Offers:
    """How useful it is to offer drafts at all: looking for them costs time too."""

    num_idle: int = 0

    def is_due(self, tick: int) -> bool:
        return self.num_idle < _NUM_IDLE_MAX or tick % _REST_STEPS == 0

    def note(self, *, is_taken: bool) -> None:
        self.num_idle = 0 if is_taken else self.num_idle + 1


class Speculation:
    """Bounds drafts, and takes in what they brought.

    Args:
        num_tokens_each: Most draft tokens of one sequence in a step; 0 for no drafts at all.
        roster: Who runs.
        flights: Plans not yet answered.
        tracer: Cuts decode spans where drafts leap over an end.
    """

    def __init__(
        self, num_tokens_each: int, roster: Roster, flights: Flights, tracer: SchedulerTracer
    ) -> None:
        self._num_tokens_each = num_tokens_each
        self._roster = roster
        self._flights = flights
        self._tracer = tracer
        self._prices = StepPrices()
        self._offers = _Offers()

    def look_ahead(self) -> None:
        """Say how far decodes may be ahead of what is counted, by drafts of plans in flight."""
        decodes = self._roster.decodes
        decodes.num_tokens_ahead = decodes.num_sequences_ahead = 0
        for flight in self._flights:
            decodes.num_tokens_ahead += flight.drafts.num_tokens_each
            decodes.num_sequences_ahead += min(flight.drafts.num_tokens, flight.num_decodes)

    def add_to(self, builder: PlanBuilder) -> None:
        """Bound the drafts of the step of ``builder``, which is complete but for that."""
        flight, each = builder.flight, self._num_tokens_each
        if not (each and flight.num_decodes) or flight.beneficiaries or builder.num_tokens_left < 1:
            return
        if not self._offers.is_due(flight.tick):
            return
        num_tokens = min(builder.num_tokens_left, each * flight.num_decodes)
        capacity = self._roster.capacity
        num_blocks_max = min(num_tokens, flight.num_decodes * ceil_div(each, capacity.block_size))
        num_blocks_left = builder.num_blocks_left - capacity.num_blocks_watermark
        num_blocks = max(0, min(num_blocks_max * capacity.num_kv_groups, num_blocks_left))
        num_others = sum(chunk.num_tokens for chunk in flight.chunks)
        flight.drafts = builder.plan.drafts = DraftBounds(
            num_tokens=num_tokens,
            num_tokens_each=each,
            num_blocks=num_blocks,
            acceptance_min=self._prices.price(flight.num_decodes, num_others),
        )
        flight.num_blocks += num_blocks

    def count(self, result: StepResult) -> None:
        """Count drafts of sequences, some of which end with this result."""
        for sequence_id, num_drafted, num_accepted in zip(
            result.drafted_ids, result.num_drafted, result.num_accepted, strict=True
        ):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is not None:
                sequence.num_draft_tokens += num_drafted
                sequence.num_accepted_tokens += num_accepted

    def settle(self, result: StepResult, end_ns: int) -> None:
        """Put sequences where they are that kept drafts; their tokens are delivered already."""
        next_tick = self._flights.num_applied + 1
        for sequence_id, num_accepted in zip(result.drafted_ids, result.num_accepted, strict=True):
            sequence = self._roster.sequences.get(sequence_id)
            if num_accepted and sequence is not None and sequence.is_living:
                self._roster.correct(sequence, next_tick)
                self._tracer.cut_run(sequence, end_ns)

    def observe(self, flight: Flight, result: StepResult) -> None:
        """Learn from a step that was applied."""
        if flight.drafts.num_tokens:
            self._offers.note(is_taken=bool(result.drafted_ids))
        timing = result.timing
        measured_ns = timing.apply_ns + timing.execute_ns + timing.sample_ns
        num_accepted = sum(result.num_accepted)
        num_decodes = len(result.sampled_ids) - num_accepted
        if self._num_tokens_each and num_decodes > 0 and measured_ns and not flight.chunks:
            num_drafted = sum(result.num_drafted)
            self._prices.learn(num_decodes, num_drafted, num_accepted, measured_ns)

    def forget(self) -> None:
        """Another executor, perhaps another machine: nothing is known of it."""
        self._prices = StepPrices()
        self._offers = _Offers()


assert LIMITS.num_draft_tokens_max >= 1, "there are no drafts of no tokens"
