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
class FinishReason(enum.IntEnum):
    """Why a sequence ended. Values equal those of ``pageframe.v1.FinishReason``."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    DEADLINE = 4
    ERROR = 5


@enum.unique
class Recovery(enum.IntEnum):
    """How a preempted sequence gets its keys and values back.

    Values equal those of ``pageframe.v1.Recovery``. ``TAIL`` gives up only the last blocks.
    """

    RECOMPUTE = 1
    SWAP = 2
    TAIL = 3


@enum.unique
class RefusedBecause(enum.IntEnum):
    """Why a ``may`` entry was not taken. Values equal those of ``pageframe.v1.RefusedBecause``."""

    POOL_FULL = 1
    QUOTA = 2
    NOT_READY = 3
    BEHIND_REFUSED = 4
    PROMOTING = 5


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
    ``num_blocks[i]`` counts the tail blocks to give up under ``Recovery.TAIL``, else 0.
    """

    sequence_ids: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    num_blocks: list[int] = field(default_factory=list)
    beneficiary_ids: list[int] = field(default_factory=list)

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
    """

    step: int
    builds_on: int
    announce: list[Announcement] = field(default_factory=list)
    finish: list[int] = field(default_factory=list)
    must: Entries = field(default_factory=Entries)
    victims: Victims = field(default_factory=Victims)
    may: Entries = field(default_factory=Entries)
    forks: list[Fork] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantQuota:
    """Bounds of one tenant's held blocks.

    Attributes:
        tenant: Whose.
        floor_blocks: Blocks that others cannot take.
        ceiling_blocks: Blocks that it cannot pass; None for no ceiling.
    """

    tenant: str
    floor_blocks: int = 0
    ceiling_blocks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAccount:
    """Blocks of the pool by state; ``free + held + cached + fenced + quarantined == total``.

    ``pinned`` is part of ``held``; ``host_total`` and ``host_used`` are those of the host tier.
    """

    total: int = 0
    free: int = 0
    held: int = 0
    cached: int = 0
    fenced: int = 0
    quarantined: int = 0
    pinned: int = 0
    host_total: int = 0
    host_used: int = 0

    @property
    def is_conserved(self) -> bool:
        """Whether the states add up to the total."""
        parts = self.free + self.held + self.cached + self.fenced + self.quarantined
        return parts == self.total


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
class SequenceAccount:
    """What one finished sequence cost in KV memory.

    Attributes:
        num_blocks_peak: Most blocks it held at one time.
        num_blocks_shared: Blocks that it used without allocating them.
        num_copies_on_write: Blocks copied because it wrote into a shared one.
        num_cached_tokens: Prompt tokens found in the prefix index at first admission.
        num_preemptions: How often it lost its blocks.
    """

    num_blocks_peak: int = 0
    num_blocks_shared: int = 0
    num_copies_on_write: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def num_blocks_saved(self) -> int:
        """Blocks that it did not have to allocate thanks to sharing."""
        return max(0, self.num_blocks_shared - self.num_copies_on_write)


@dataclass(slots=True, kw_only=True)
class StepTiming:
    """Where the executor's time went in one step; nanoseconds, start since the Unix epoch."""

    start_ns: int = 0
    apply_ns: int = 0
    execute_ns: int = 0
    sample_ns: int = 0

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
        sampled_ids: Sequences that got a token, in batch order.
        token_ids: That token; -1 where it ended with ``FinishReason.ERROR`` and got none.
        finish_reasons: ``FinishReason.NONE`` or why it ended with that token. Blocks of an
            ended sequence are released already and the executor has forgotten it.
        logprobs: By position in ``sampled_ids``, where asked for.
        prompt_logprobs: By sequence id, once its whole prompt is computed, where asked for; the
            first entry belongs to the second prompt token.
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
        errors: UPPER_SNAKE reason by sequence id, of those that ended with ``ERROR`` for one.
        accounts: By sequence id, for each sequence that ended or was released.
        account: The pool after the step.
        timing: Where the time went.
    """

    step: int
    refusal: str = ""
    sampled_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
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
    errors: dict[int, str] = field(default_factory=dict)
    accounts: dict[int, SequenceAccount] = field(default_factory=dict)
    account: PoolAccount = field(default_factory=PoolAccount)
    timing: StepTiming = field(default_factory=StepTiming)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """What an executor serves; told once to a scheduler, and by it to gateways.

    Attributes:
        replica_id: Name of the model replica; constant over restarts.
        model: Name under which the model is served.
        model_folder: Hugging Face folder that holds tokenizer and chat template.
        vocab_size: Number of token ids that logits have.
        max_model_len: Most tokens, prompt and output together, of one sequence.
        eos_token_ids: Tokens that end a sequence unless ``ignore_eos``.
        block_size: Tokens per block.
        num_blocks: Blocks in the pool.
        kv_bytes_per_token: Bytes of keys and values that one token takes over all layers.
        max_num_sequences: Most sequences that may run at once.
        max_step_tokens: Most tokens that one step may compute.
        device: ``cpu``, ``cuda:0``, or ``sim``.
        dtype: Type of weights and activations.
        kv_dtype: Type of keys and values in the pool.
        runner: ``native``, ``transformers`` or ``sim``.
        num_host_blocks: Blocks that the host tier holds; 0 when there is none.
    """

    replica_id: str
    model: str
    model_folder: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    max_num_sequences: int
    max_step_tokens: int
    device: str
    dtype: str
    kv_dtype: str
    runner: str
    num_host_blocks: int = 0
