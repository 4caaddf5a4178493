"""What an executor answers to a plan: see ``plan`` for what the two tell each other."""

import enum
from dataclasses import dataclass, field

from pageframe.core.plan import Recovery
from pageframe.core.replica import PoolAccount


@enum.unique
class FinishReason(enum.IntEnum):
    """Why a sequence ended. Values equal those of ``pageframe.v1.FinishReason``."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    DEADLINE = 4
    ERROR = 5


@enum.unique
class RefusedBecause(enum.IntEnum):
    """Why a ``may`` entry was not taken. Values equal those of ``pageframe.v1.RefusedBecause``."""

    POOL_FULL = 1
    QUOTA = 2
    NOT_READY = 3
    BEHIND_REFUSED = 4
    PROMOTING = 5


@dataclass(slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithm) around one token.

    ``top_token_ids`` and ``top_logprobs`` run from the best token down, as many as were asked for.
    """

    token_id: int
    logprob: float
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Candidates:
    """The best tokens that a sequence could go on with, best first, and their log-probabilities.

    Those of the model's own distribution, then edited as ``SamplingParams`` says: penalties, bias,
    tokens held back. They are not normalised again. Impossible tokens are left out.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SequenceAccount:
    """What one finished sequence cost in KV memory.

    Attributes:
        num_blocks_peak: Most blocks it held at one time.
        num_blocks_shared: Blocks that it used without allocating them.
        num_copies_on_write: Blocks copied because it wrote into a shared one.
        num_cached_tokens: Prompt tokens found in the prefix index at first admission.
        num_preemptions: How often it lost its blocks.
        num_draft_tokens: Draft tokens that were computed for it.
        num_accepted_tokens: Those of them that it kept.
    """

    num_blocks_peak: int = 0
    num_blocks_shared: int = 0
    num_copies_on_write: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_blocks_saved(self) -> int:
        """Blocks that it did not have to allocate thanks to sharing."""
        return max(0, self.num_blocks_shared - self.num_copies_on_write)


@dataclass(slots=True, kw_only=True)
class StepTiming:
    """Where the executor's time went in one step; nanoseconds, start since the Unix epoch.

    ``copy_ns`` is the part of ``execute_ns`` in which the step waited for ``num_blocks_moved``
    blocks to the host tier or from there, both ways together. A step that was launched behind
    another begins when that one is over; nobody waited for its plan to be applied.
    """

    start_ns: int = 0
    apply_ns: int = 0
    execute_ns: int = 0
    sample_ns: int = 0
    copy_ns: int = 0
    num_blocks_moved: int = 0

    @property
    def end_ns(self) -> int:
        """When the step's tokens were known."""
        return self.start_ns + self.apply_ns + self.execute_ns + self.sample_ns


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What happened in one step.

    ``step == 0`` marks a report outside any step: only ``released`` and ``account`` are filled.

    Attributes:
        step: The plan's number.
        refusal: Empty, or why the whole plan was refused (UPPER_SNAKE); then nothing was changed.
        sampled_ids: Sequences that got a token, in batch order; one that kept drafts stands there
            once for each token that it got.
        token_ids: That token; -1 where it ended with ``FinishReason.ERROR`` and got none.
        finish_reasons: ``FinishReason.NONE`` or why it ended with that token. Blocks of an
            ended sequence are released already and the executor has forgotten it.
        logprobs: By position in ``sampled_ids``, where asked for.
        prompt_logprobs: By sequence id, once its whole prompt is computed, where asked for; the
            first entry belongs to the second prompt token.
        candidates: By sequence id, of those that have computed all their tokens in this step and
            asked for candidates instead of a token; they go on by ``StepPlan.branches``.
        computed_ids: Sequences of ``must`` and ``may`` that ran, in batch order.
        num_computed: Their computed tokens after the step.
        first_positions: Position of the first token that each computed in the step; what lies
            before it was computed earlier or found in the prefix index.
        refused_ids: Sequences of ``may`` entries that were not taken.
        refused_because: Why.
        preempted_ids: Victims that were taken.
        preempted_generations: Their new generation.
        preempted_num_blocks: Blocks each gave up.
        preempted_recoveries: How each gave way; ``RECOMPUTE`` instead of ``SWAP`` when the host
            tier had no room.
        preempted_num_computed: Tokens that each keeps computed; it still runs if there are any.
        forked_ids: Children of forks that run now.
        unforked_ids: Children that were refused, and are not known.
        stale_ids: Sequences of skipped entries.
        released: Sequences ended by ``finish`` or by a cancel message since the last result.
        announced_ids: Sequences newly known.
        num_cached_tokens: How many of their tokens are in the prefix index or the host tier now.
        leader_ids: The running or announced sequence that will compute more of the same prefix; 0
            for none.
        num_leader_tokens: Tokens that they will share once the leader has computed them.
        drafted_ids: Sequences for which drafts were checked.
        num_drafted: How many draft tokens of each were computed.
        num_accepted: How many of those it kept; it got them, and one token more, in this step.
        errors: UPPER_SNAKE reason by sequence id, of those that ended with ``ERROR`` for one.
        accounts: By sequence id, for each sequence that ended or was released.
        account: The pool after the step.
        timing: Where the time went.
        is_followed: Whether the next step had been launched when the tokens of this one were taken
            in: ``account`` has the blocks of that one, too.
    """

    step: int
    refusal: str = ""
    sampled_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    candidates: dict[int, Candidates] = field(default_factory=dict)
    computed_ids: list[int] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    first_positions: list[int] = field(default_factory=list)
    refused_ids: list[int] = field(default_factory=list)
    refused_because: list[int] = field(default_factory=list)
    preempted_ids: list[int] = field(default_factory=list)
    preempted_generations: list[int] = field(default_factory=list)
    preempted_num_blocks: list[int] = field(default_factory=list)
    preempted_recoveries: list[Recovery] = field(default_factory=list)
    preempted_num_computed: list[int] = field(default_factory=list)
    forked_ids: list[int] = field(default_factory=list)
    unforked_ids: list[int] = field(default_factory=list)
    stale_ids: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    announced_ids: list[int] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)
    leader_ids: list[int] = field(default_factory=list)
    num_leader_tokens: list[int] = field(default_factory=list)
    drafted_ids: list[int] = field(default_factory=list)
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    accounts: dict[int, SequenceAccount] = field(default_factory=dict)
    account: PoolAccount = field(default_factory=PoolAccount)
    timing: StepTiming = field(default_factory=StepTiming)
    is_followed: bool = False
