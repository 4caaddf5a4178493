"""What the scheduler and the executor tell each other: one plan and one result per step.

A plan carries *differences*. What does not change is not said: a sequence whose tokens are all
computed but the newest (it has *caught up*) takes one token in every step, in join order, until a
plan, a victim list or its own end stops it.

    sequence:   ANNOUNCED ──may──▶ RUNNING (catching up ⇄ caught up) ──▶ finished, forgotten
                    ▲                 │ victim
                    └── PREEMPTED ◀───┘ (generation += 1; a `may` entry resumes it)

Entries name a sequence *and its generation*; an entry of an older generation, or of a sequence
that is gone, is skipped and reported as stale. An entry asks for *up to* ``num_tokens`` more of
the sequence's uncomputed tokens, from wherever it stands, so a plan made before the previous
result is known is still right when it is applied.

Both messages are parallel arrays, as on the wire; element ``i`` of each list belongs together.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from pageframe.core.sampling import SamplingParams


@enum.unique
class Recovery(enum.IntEnum):
    """How a preempted sequence gets its keys and values back.

    Values equal those of ``pageframe.v1.Recovery``. ``TAIL`` gives up only the last blocks.
    """

    RECOMPUTE = 1
    SWAP = 2
    TAIL = 3


@dataclass(slots=True, kw_only=True)
class Announcement:
    """A sequence and all its known tokens, sent once and ahead of its admission.

    Attributes:
        sequence_id: See ``units.SequenceId``.
        generation: Counts preemptions; 0 for a new sequence.
        token_ids: Prompt, then output known so far (after a rebuild or a resume).
        num_prompt_tokens: How many of ``token_ids`` are prompt.
        sampling: Sampling parameters; ``sampling.seed`` with ``sample_index`` is the random key.
        sample_index: Which of the request's ``n`` samples this is.
        request_id: The caller's name for the request, for spans and logs.
        tenant: Whose request it is; salts the prefix index and is checked against quotas.
        cache_salt: Bytes derived at the gateway from the tenant.
        session_id: Turns of one chat carry one id; the blocks of a turn are kept for the next.
        prefix_handle: A retained prefix with which the prompt begins; empty for none.
        trace_id: W3C trace id, 16 bytes; empty when not traced.
        span_id: Span id of the sequence span, 8 bytes; parent of prefill and decode spans.
        is_steered: Whether it never takes a token by itself: each of its tokens is computed because
            an entry names it, the newest one too.
    """

    sequence_id: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    generation: int = 0
    sample_index: int = 0
    request_id: str = ""
    tenant: str = ""
    cache_salt: bytes = b""
    session_id: str = ""
    prefix_handle: str = ""
    trace_id: bytes = b""
    span_id: bytes = b""
    is_steered: bool = False


@dataclass(slots=True)
class Entries:
    """Sequences and how many uncomputed tokens each may compute in a step."""

    sequence_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def add(self, sequence_id: int, generation: int, num_tokens: int) -> None:
        """Append one entry."""
        self.sequence_ids.append(sequence_id)
        self.generations.append(generation)
        self.num_tokens.append(num_tokens)

    def __len__(self) -> int:
        return len(self.sequence_ids)


@dataclass(slots=True)
class Victims:
    """Running sequences that may lose their blocks, first victim first.

    ``beneficiary_ids[i]`` is the sequence for whose sake it would happen, for the trace;
    ``num_blocks[i]`` counts the tail blocks to give up under ``Recovery.TAIL``, else 0. The first
    ``num_certain`` give way even if all that must run fits; the others only until it does.
    """

    sequence_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    num_blocks: list[int] = field(default_factory=list)
    beneficiary_ids: list[int] = field(default_factory=list)
    num_certain: int = 0

    def add(
        self,
        sequence_id: int,
        generation: int,
        recovery: Recovery,
        beneficiary_id: int = 0,
        num_blocks: int = 0,
    ) -> None:
        """Append one victim."""
        self.sequence_ids.append(sequence_id)
        self.generations.append(generation)
        self.recoveries.append(recovery)
        self.num_blocks.append(num_blocks)
        self.beneficiary_ids.append(beneficiary_id)

    def __len__(self) -> int:
        return len(self.sequence_ids)


@dataclass(slots=True, kw_only=True)
class Fork:
    """After this step, ``child_ids`` share all blocks of the parent and sample for themselves.

    Each child takes its own token from the same row of logits, with its own sample index. It runs
    from the next step on, as if it had been announced and admitted. A child for which there is no
    row, or whose parent takes no token in this step, is refused and stays unknown.

    Attributes:
        parent_id: Runs in this step and takes a token in it.
        generation: Of the parent.
        child_ids: New sequences.
        sample_indices: The sample index of each child.
        span_ids: Span id of each child's sequence span; 0 when it is not traced.
    """

    parent_id: int
    generation: int
    child_ids: list[int]
    sample_indices: list[int]
    span_ids: list[int]


@dataclass(slots=True)
class Branches:
    """How sequences that asked for candidates go on; every branch computes its token in this step.

    A child shares all blocks of its parent, is of the same generation, and gets ``token_ids[i]``
    behind the parent's tokens. A parent that is a child of itself goes on; one that is not ends as
    if it stood in ``finish``, which is where those stand that have no child at all.

    Attributes:
        parent_ids: Running, all of whose tokens are computed.
        generations: Of the parents.
        child_ids: New sequences, or the parent itself.
        token_ids: The token that each child goes on with.
    """

    parent_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    child_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, parent_id: int, generation: int, child_id: int, token_id: int) -> None:
        """Append one branch."""
        self.parent_ids.append(parent_id)
        self.generations.append(generation)
        self.child_ids.append(child_id)
        self.token_ids.append(token_id)

    def __len__(self) -> int:
        return len(self.parent_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftBounds:
    """What drafts may take of a step; drafts are guesses at tokens to come, checked in one go.

    They take what nobody else wants, so they are bounded and not asked for: a caught-up sequence
    may compute some tokens behind its newest one, and keeps those that it would have sampled.

    Attributes:
        num_tokens: Most draft tokens of the step; 0 for no drafts.
        num_tokens_each: Most of one sequence.
        num_blocks: Most blocks that they may add to what the step takes without them.
        acceptance_min: A draft token is worth its computation only if the chance that it is kept
            is at least this; in [0, 1].
    """

    num_tokens: int = 0
    num_tokens_each: int = 0
    num_blocks: int = 0
    acceptance_min: float = 0.0


NO_DRAFTS = DraftBounds()


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """What to do in one step. See the module text for how an executor reads it.

    Attributes:
        step: Number of this step, from 1; each plan's is one higher than the one before.
        builds_on: The step whose effects this plan takes for granted; 0 before the first. An
            executor that did not apply that step refuses this plan.
        announce: New sequences, or known ones again after a rebuild.
        finish: Sequences that the scheduler ends; their blocks are released before anything else.
        must: Entries that have to run beside the caught-up sequences.
        victims: Taken in order, and only until ``must`` and the caught-up sequences fit.
        may: Admissions, resumptions and growth of prefill, each whole or not at all, in order.
            Once one is refused because the pool is full, those behind it are refused too.
        forks: See ``Fork``.
        branches: See ``Branches``; they have to run, as what is in ``must``.
        drafts: What drafts may take of what is left of the step.
    """

    step: int
    builds_on: int
    announce: list[Announcement] = field(default_factory=list)
    finish: list[int] = field(default_factory=list)
    must: Entries = field(default_factory=Entries)
    victims: Victims = field(default_factory=Victims)
    may: Entries = field(default_factory=Entries)
    forks: list[Fork] = field(default_factory=list)
    branches: Branches = field(default_factory=Branches)
    drafts: DraftBounds = NO_DRAFTS

    @property
    def only_goes_on(self) -> bool:
        """Whether all that it does is to let the caught-up sequences go on."""
        has_entries = len(self.must) or len(self.victims) or len(self.may) or self.branches
        has_names = self.announce or self.finish or self.forks
        return not (has_entries or has_names or self.drafts.num_tokens)
