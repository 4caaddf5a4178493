"""Plans that were sent and not yet answered, and what they will do to the pool."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pageframe.core.errors import InternalError
from pageframe.core.plan import NO_DRAFTS, DraftBounds
from pageframe.core.replica import PoolAccount
from pageframe.core.request import StallCause
from pageframe.scheduler.policies.protocols import Costs
from pageframe.scheduler.sequence import Sequence

if TYPE_CHECKING:
    from pageframe.scheduler.searches import Search


class Chunk(NamedTuple):
    """One entry of a plan: up to ``num_tokens`` more of a sequence in a generation.

    ``num_cached`` tokens before them are expected from the prefix index and cost no budget.
    """

    sequence: Sequence
    generation: int
    num_tokens: int
    num_cached: int

    @property
    def is_current(self) -> bool:
        """Whether the entry still speaks of the sequence as it is."""
        return self.generation == self.sequence.generation

    def take_off(self) -> None:
        """Count the entry as in flight."""
        self.sequence.num_tokens_in_flight += self.num_cached + self.num_tokens

    def touch_down(self) -> None:
        """Count it no longer, whatever became of it."""
        if self.is_current:
            self.sequence.num_tokens_in_flight -= self.num_cached + self.num_tokens


@dataclass(slots=True, kw_only=True)
class Flight:
    """What the scheduler remembers of a plan until its result lands.

    Attributes:
        step: Number of the plan.
        builds_on: The step before it, in flight or applied.
        tick: Which step this is among those that are applied.
        planned_ns: When it was made.
        num_decodes: Tokens of the sequences that decode by themselves.
        num_context: Positions that those attend to, at most.
        num_blocks: Blocks that it may take at most.
        drafts: What drafts may take of it.
        chunks: Its entries.
        announced: Sequences that it announces.
        searches: Searches whose beams go on.
        forked: Sequences that fork from one of its chunks, or of its decodes.
        passed_over: Running prefills that got no chunk, and why.
        is_short: Whether victims are named because the pool may have too few blocks.
        over_quota: Tenants of which some may, because of their ceilings.
        beneficiaries: For whose sake each of its victims would give way, by victim.
        costs: Of getting each of them back, by victim.
    """

    step: int
    builds_on: int
    tick: int
    planned_ns: int
    num_decodes: int = 0
    num_context: int = 0
    num_blocks: int = 0
    drafts: DraftBounds = NO_DRAFTS
    chunks: list[Chunk] = field(default_factory=list)
    announced: list[Sequence] = field(default_factory=list)
    searches: list["Search"] = field(default_factory=list)
    forked: list[Sequence] = field(default_factory=list)
    passed_over: list[tuple[Sequence, StallCause]] = field(default_factory=list)
    is_short: bool = False
    over_quota: set[str] = field(default_factory=set)
    beneficiaries: dict[int, Sequence] = field(default_factory=dict)
    costs: dict[int, Costs] = field(default_factory=dict)

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens that its entries ask for."""
        return sum(chunk.num_tokens for chunk in self.chunks)


class Flights:
    """At most two plans: the step that runs and its successor.

    Attributes:
        last_applied_step: Number of the last step that the executor applied; 0 before the first.
        num_applied: How many it applied, which is the tick of that step.
        account: The pool after that step, or after a later cancel at rest.
        began_ns: When the step that runs began, as far as can be told from here.
    """

    def __init__(self, num_flights_max: int, account: PoolAccount) -> None:
        self._num_flights_max = num_flights_max
        self._flights: deque[Flight] = deque()
        self._is_broken = False
        self._last_sent_step = 0
        self.num_applied = 0
        self.last_applied_step = 0
        self.account = account
        self.began_ns = 0

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights)

    @property
    def can_send(self) -> bool:
        """Whether another plan may be sent.

        After a refusal the plans that build on the refused one come back refused too; only then
        can a plan build on the last step that was applied.
        """
        return len(self._flights) < self._num_flights_max and not self._is_broken

    @property
    def next_step(self) -> int:
        """Number of the next plan, one higher than the one before, whatever became of that."""
        return self._last_sent_step + 1

    @property
    def next_builds_on(self) -> int:
        """The step that the next plan follows."""
        return self._flights[-1].step if self._flights else self.last_applied_step

    @property
    def next_tick(self) -> int:
        """Which step the next plan will be, among those that are applied."""
        return self.num_applied + len(self._flights) + 1

    @property
    def num_blocks_free(self) -> int:
        """Blocks that are surely allocatable once the plans in flight are applied.

        Blocks behind the fence count: they come back when the step that may touch them is done,
        which is before the next one allocates. So do those of idle sessions, which give way.
        """
        account = self.account
        num_blocks = account.free + account.cached + account.fenced + account.yieldable
        for flight in self._flights:
            num_blocks -= flight.num_blocks
        return num_blocks

    @property
    def victim_ids(self) -> set[int]:
        """Sequences that may give way in the plans in flight."""
        return {victim_id for flight in self._flights for victim_id in flight.beneficiaries}

    def send(self, flight: Flight) -> None:
        """Remember a plan that is being sent."""
        assert flight.step == self.next_step, f"step {flight.step}, expected {self.next_step}"
        self._last_sent_step = flight.step
        if not self._flights:
            self.began_ns = flight.planned_ns
        self._flights.append(flight)

    def land(self, step: int, now_ns: int) -> Flight:
        """The flight that an applied step answers.

        Raises:
            InternalError: RESULT_OUT_OF_ORDER.
        """
        flight = self._pop(step)
        self.began_ns = now_ns
        self.last_applied_step = step
        self.num_applied += 1
        return flight

    def land_refused(self, step: int) -> Flight:
        """The flight that a refusal answers.

        Raises:
            InternalError: RESULT_OUT_OF_ORDER.
        """
        flight = self._pop(step)
        self._is_broken = bool(self._flights)
        return flight

    def restart(self, account: PoolAccount) -> None:
        """Forget everything: another executor, or the same one in a new epoch."""
        self._flights.clear()
        self._is_broken = False
        self._last_sent_step = 0
        self.num_applied = 0
        self.last_applied_step = 0
        self.account = account

    def _pop(self, step: int) -> Flight:
        if not self._flights or self._flights[0].step != step:
            expected = self._flights[0].step if self._flights else 0
            raise InternalError(
                "RESULT_OUT_OF_ORDER",
                f"the executor answered step {step}; step {expected} was expected",
                step=step,
                step_expected=expected,
            )
        return self._flights.popleft()
