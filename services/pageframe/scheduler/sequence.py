"""One sampled sequence as the scheduler sees it: tokens, how many are computed, and a state.

                 admit                confirm
    WAITING ────────────▶ ADMITTING ──────────▶ RUNNING
     ▲ ▲                   │  ▲  │                 │ preempt
     │ └──────withdraw─────┘  │  └─withdraw─▶ PREEMPTED
     │ release       │        └──────admit────────┘
    SIBLING ◀────────┴────────── fork: ADMITTING as well
    each of them ──cancel──▶ CANCELLING ──▶ ENDED       (or ENDED at once)

A SIBLING is a sample that waits for sample 0 of its request to compute the prompt for both.

There is no prefill state and no decode state. One quantity, ``num_computed``, catches up with
``num_tokens``; what plans in flight will add to it is ``num_tokens_in_flight``:

    tokens   0          num_computed        num_planned      num_tokens
             [── computed ──)[── in flight ──)[── to plan ────)
"""

import enum
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pageframe.core.errors import PageframeError
from pageframe.core.plan import Recovery
from pageframe.core.request import Delivery, Submission
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.shares import Share
from pageframe.scheduler.stalls import StallMeter

if TYPE_CHECKING:
    from pageframe.scheduler.policies.protocols import WaitingView
    from pageframe.scheduler.searches import Search

Prefix = tuple[bytes, bytes]
"""Salt of the cache, and the first block's tokens."""

NEVER = 2**62
"""More tokens than any event or sequence will ever hold."""


@enum.unique
class SequenceState(enum.Enum):
    """Where a sequence stands between submission and its end."""

    WAITING = "waiting"
    SIBLING = "sibling"
    ADMITTING = "admitting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    CANCELLING = "cancelling"
    ENDED = "ended"

    followers: tuple["SequenceState", ...]


_S = SequenceState

LEGAL_TRANSITIONS: Mapping[SequenceState, frozenset[SequenceState]] = {
    _S.WAITING: frozenset({_S.ADMITTING, _S.CANCELLING, _S.ENDED}),
    _S.SIBLING: frozenset({_S.WAITING, _S.ADMITTING, _S.ENDED}),
    _S.ADMITTING: frozenset(
        {_S.RUNNING, _S.WAITING, _S.SIBLING, _S.PREEMPTED, _S.CANCELLING, _S.ENDED}
    ),
    _S.RUNNING: frozenset({_S.PREEMPTED, _S.CANCELLING, _S.ENDED}),
    _S.PREEMPTED: frozenset({_S.ADMITTING, _S.CANCELLING, _S.ENDED}),
    _S.CANCELLING: frozenset({_S.ENDED}),
    _S.ENDED: frozenset(),
}
# Looked at with every move: a tuple is searched by identity, without hashing an enum in Python.
for _state, _followers in LEGAL_TRANSITIONS.items():
    _state.followers = tuple(_followers)


@enum.unique
class Knowledge(enum.Enum):
    """What the executor knows of a sequence."""

    UNKNOWN = "unknown"
    SENT = "sent"
    KNOWN = "known"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A sequence and its bookkeeping.

    Attributes:
        sequence_id: Rises with submission, so it is also the order of arrival.
        sample_index: Which sample of the request.
        submission: The request; never changed here.
        gateway_id: Whose request it is.
        outbox: Where its tokens leave.
        output: Tokens after the prompt.
        span_id: Id of its sequence span; 0 when it is not traced.
        submit_ns: When it came.
        stalls: What it waits for, and has waited for.
        num_tokens_per_event: Send when this many tokens are waiting.
        is_steered: Whether plans ask for each of its tokens; see ``steered``.
        generation: Counts losses of its keys and values.
        knowledge: What the executor knows of it.
        num_computed_known: As last reported; ``num_computed`` is the quantity to read.
        is_caught_up: All tokens are computed but the newest, so it decodes by itself.
        num_tokens_in_flight: Tokens asked for by entries of plans in flight.
        last_chunk_tick: Tick of its newest entry, see ``decode``.
        last_chunk_tokens: What that entry asked for.
        admit_tick: Tick of its newest admission.
        join_number: Order of the newest admission.
        has_run: Whether an admission was ever confirmed.
        num_cached_tokens: Expected to be found in the prefix index or the host tier when it is
            admitted next, less than ``num_tokens``; a hint and no more.
        num_shared_tokens: Tokens at its start whose blocks it may share with others.
        num_given_tokens: Those of them that others had computed: found as it first came in, or
            forked. What it finds when it comes again was mostly its own.
        num_host_blocks: Its blocks of which the host tier had a copy when it last came back; a
            hint: what is full there makes room.
        may_share: Whether what is cached is expected in blocks that others hold, so that an
            admission takes fewer; false once that has proved wrong.
        leader_id: Who computes the same prefix, as the executor said; 0 for nobody.
        num_leader_tokens: Tokens that they share once the leader has computed them.
        first_block: What it begins with, once somebody asked.
        prefix: The same, while others may wait for it; see ``prefixes``.
        has_lost_tail: Whether it gave up its last blocks and has not caught up since.
        decode_origin: Position minus tick, constant while it decodes; ``None`` when it does not.
        copy_tick: Tick in which its first write copies a block; ``None`` when it copies none.
        num_delivered: Output tokens that were sent, where more than one waits for the other.
        pending_logprobs: Of the output tokens not yet sent, where asked for.
        num_preemptions: How often it was a victim.
        num_draft_tokens: Draft tokens that were computed for it.
        num_accepted_tokens: Those of them that it kept.
        share: Account of its tenant; one of its own until it enters a roster.
        place: Key of its place in line, see ``line``; as of the last time that it waited.
        view: What policies saw of it last while it waited; see ``Line.view``.
        prefix_group: See ``prefixes.prefix_group``; 0 before it stood in line.
        num_tokens_charged: What its tenant was charged for it that a result has not confirmed.
        preempt_tick: When it last was; ``None`` for never, or with another executor.
        loss: What it lost then, until it has caught up; see ``losses``.
        cancel_ns: Up to when its time is accounted for if it was cancelled, else 0.
        search: Its beams, once they run for it; see ``searches``.
        is_muted: Its tokens are of no interest any more.
        cancel_reason: Why it is being cancelled.
        cancel_error: What its completion shall say of that.
        run_start: First position of the decode span that is open.
        run_start_ns: When that span began.
        run_drafts_start: Its draft tokens, and those it had kept, by then.
    """

    sequence_id: int
    sample_index: int
    submission: Submission
    gateway_id: int
    outbox: Outbox
    output: "array[int]"
    span_id: int
    submit_ns: int
    stalls: StallMeter
    num_tokens_per_event: int = field(init=False)
    handle: int = field(init=False)
    num_prompt_tokens: int = field(init=False)
    state: SequenceState = SequenceState.WAITING
    is_steered: bool = False
    generation: int = 0
    knowledge: Knowledge = Knowledge.UNKNOWN
    num_computed_known: int = 0
    is_caught_up: bool = False
    num_tokens_in_flight: int = 0
    last_chunk_tick: int = 0
    last_chunk_tokens: int = 0
    admit_tick: int = 0
    join_number: int = 0
    has_run: bool = False
    num_cached_tokens: int = 0
    num_shared_tokens: int = 0
    num_given_tokens: int = 0
    num_host_blocks: int = 0
    may_share: bool = True
    leader_id: int = 0
    num_leader_tokens: int = 0
    first_block: Prefix | None = None
    prefix: Prefix | None = None
    has_lost_tail: bool = False
    decode_origin: int | None = None
    copy_tick: int | None = None
    num_delivered: int = 0
    pending_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    share: Share = field(default_factory=Share)
    place: tuple[int, ...] = ()
    view: "WaitingView | None" = None
    prefix_group: int = 0
    num_tokens_charged: int = 0
    preempt_tick: int | None = None
    loss: "Loss | None" = None
    cancel_ns: int = 0
    search: "Search | None" = None
    is_muted: bool = False
    cancel_reason: FinishReason = FinishReason.NONE
    cancel_error: PageframeError | None = None
    run_start: int = 0
    run_start_ns: int = 0
    run_drafts_start: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        submission = self.submission
        self.handle = submission.handle
        self.num_prompt_tokens = len(submission.prompt_token_ids)
        self.num_delivered = len(self.output)
        # One quantity for three ways of delivery: how many tokens make an event.
        if submission.delivery is Delivery.EVERY_TOKEN:
            self.num_tokens_per_event = 1
        elif submission.delivery is Delivery.COALESCED:
            self.num_tokens_per_event = max(1, submission.num_tokens_per_event_max)
        else:
            self.num_tokens_per_event = NEVER

    @property
    def num_tokens(self) -> int:
        """Prompt and output known so far."""
        return self.num_prompt_tokens + len(self.output)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values the executor is known to hold."""
        # Derived while it decodes, so that a sampled token costs one append and nothing else.
        if not self.is_caught_up:
            return self.num_computed_known
        # Behind the prompt of a search it is the beams that go on; nothing is left to ask for.
        return self.num_tokens - 1 if self.search is None else self.search.num_computed

    @property
    def num_planned(self) -> int:
        """Computed tokens once all plans in flight are applied as asked."""
        num_tokens = self.num_prompt_tokens + len(self.output)
        return min(self.num_computed + self.num_tokens_in_flight, num_tokens)

    @property
    def num_uncomputed(self) -> int:
        """Tokens for which no plan has asked yet."""
        return self.num_tokens - self.num_planned

    @property
    def num_reached(self) -> int:
        """Tokens that were computed before it lost any, or are by now: what it needs to go on."""
        if self.loss is None:
            return self.num_computed
        return max(self.loss.num_reached, self.num_computed)

    @property
    def num_positions_max(self) -> int:
        """Positions that it can ever compute; the last output token is never computed."""
        return self.num_prompt_tokens + self.submission.sampling.max_tokens - 1

    @property
    def is_living(self) -> bool:
        """Whether it may still get tokens that somebody wants."""
        return self.state not in (SequenceState.CANCELLING, SequenceState.ENDED)

    def move_to(self, state: SequenceState) -> None:
        """Change state."""
        assert state in self.state.followers, (
            f"sequence {self.sequence_id}: {self.state.value} -> {state.value} is not legal"
        )
        self.state = state

    def advance(self, num_computed: int) -> None:
        """Take the executor's word for how many tokens are computed."""
        self.num_computed_known = num_computed
        # Its newest token may be about to come with the same result, or is the last of the
        # prompt; either way it takes one token in each step from now on.
        self.is_caught_up = num_computed >= self.num_tokens - 1
        if self.is_caught_up:
            self.has_lost_tail = False

    def lose_blocks(self, generation: int, *, num_swapped: int = 0) -> None:
        """Start over: nothing is computed, and entries in flight are of an older generation.

        The host tier keeps the first ``num_swapped`` tokens for it.
        """
        self._grow_older(generation)
        self.num_computed_known = 0
        self.is_caught_up = False
        self.num_cached_tokens = min(num_swapped, self.num_tokens - 1)
        self.num_shared_tokens = 0
        self.may_share = False
        self.has_lost_tail = False
        self.leader_id = 0

    def lose_tail(self, generation: int, num_computed: int) -> None:
        """Only the first ``num_computed`` tokens are left; entries in flight are stale."""
        assert 0 < num_computed <= self.num_computed, (
            f"sequence {self.sequence_id} keeps {num_computed} of {self.num_computed} tokens"
        )
        self._grow_older(generation)
        self.has_lost_tail = True
        self.advance(num_computed)

    def _grow_older(self, generation: int) -> None:
        assert generation > self.generation, (
            f"sequence {self.sequence_id}: generation {generation} after {self.generation}"
        )
        self.generation = generation
        self.num_tokens_in_flight = 0


@dataclass(slots=True, kw_only=True)
class Loss:
    """Blocks that one victim gave up in one step.

    Attributes:
        start_ns: Start of that step.
        recovery: How it comes back.
        num_blocks: Blocks it gave up.
        num_kept: Tokens that stayed computed.
        num_computed: Tokens that were computed before.
        num_reached: Tokens that were computed before it lacked any: it is back once these are.
        num_full_blocks: Blocks that these filled, and that others had not given it.
        generation: Of the victim, before.
        beneficiary: For whose sake; ``None`` when nobody knows.
        estimate_ns: What getting it back was expected to cost.
        spent_ns: What it has cost so far.
        num_again_tokens: Tokens up to ``num_reached`` that were computed again.
        num_moved_blocks: Blocks that came from the host tier for it, at most.
        is_back: Whether the victim has caught up.
    """

    start_ns: int
    recovery: Recovery
    num_blocks: int
    num_kept: int
    num_computed: int
    num_reached: int
    num_full_blocks: int
    generation: int
    beneficiary: Sequence | None
    estimate_ns: int
    spent_ns: float = 0.0
    num_again_tokens: int = 0
    num_moved_blocks: int = 0
    is_back: bool = False
