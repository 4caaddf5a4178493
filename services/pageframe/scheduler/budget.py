"""How much may be planned: what a replica can carry at all, and what is left of one step."""

from dataclasses import dataclass
from typing import Self

from pageframe.core.limits import LIMITS
from pageframe.core.plan import Announcement, Entries, StepPlan
from pageframe.core.replica import ReplicaFacts
from pageframe.core.units import ceil_div
from pageframe.scheduler.flights import Chunk, Flight
from pageframe.scheduler.sequence import Knowledge, Sequence
from pageframe.scheduler.steering import Allowance

_BYTES_PER_TOKEN_ID = 4
_WATERMARK_DIVISOR = 100
_NO_WINDOWS = (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bounds of every plan, from the operator's wishes and what the executor can do.

    Attributes:
        token_budget: Most tokens that one step computes.
        max_num_running: Most sequences that run at once. Decodes are never left out of a step,
            so it is at most the token budget.
        prefill_chunk_tokens: Most tokens of one sequence's prefill in a step.
        block_size: Tokens per block.
        num_blocks_total: Blocks of the pool.
        num_blocks_watermark: Blocks that admissions leave free for those who run already.
        facts: What the executor serves: its blocks, and the windows of its groups of layers.
    """

    token_budget: int
    max_num_running: int
    prefill_chunk_tokens: int
    block_size: int
    num_blocks_total: int
    num_blocks_watermark: int
    facts: ReplicaFacts

    @classmethod
    def of(
        cls,
        facts: ReplicaFacts,
        *,
        token_budget: int,
        max_num_running: int,
        prefill_chunk_tokens: int,
    ) -> Self:
        """Combine wishes with facts; ``prefill_chunk_tokens`` of 0 is no bound."""
        tokens = min(token_budget, facts.max_step_tokens)
        running = min(max_num_running, facts.max_num_sequences, tokens)
        assert running > 0, f"token budget {tokens}, at most {running} running"
        return cls(
            token_budget=tokens,
            max_num_running=running,
            prefill_chunk_tokens=prefill_chunk_tokens or tokens,
            block_size=facts.block_size,
            num_blocks_total=facts.num_blocks,
            num_blocks_watermark=ceil_div(facts.num_blocks, _WATERMARK_DIVISOR),
            facts=facts,
        )

    @property
    def num_kv_groups(self) -> int:
        """Groups of layers, each with blocks of its own."""
        return self.facts.num_kv_groups

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take, those given back behind a window included."""
        return ceil_div(num_tokens, self.block_size) * self.num_kv_groups

    def num_blocks_peak(self, num_tokens: int) -> int:
        """Most blocks that a sequence holds at a time on its way to ``num_tokens`` tokens."""
        if self.facts.kv_group_windows == _NO_WINDOWS:
            # Of nearly all models, and asked several times for each admission.
            return ceil_div(num_tokens, self.block_size)
        num_step_tokens = min(self.prefill_chunk_tokens, self.token_budget)
        return self.facts.num_blocks_peak(num_tokens, num_step_tokens)

    def num_blocks_held(self, num_tokens: int) -> int:
        """Blocks that a sequence holds whose ``num_tokens`` tokens are computed, and no others."""
        num_all = ceil_div(num_tokens, self.block_size)
        windows = self.facts.kv_group_windows
        num_back = sum(max(0, num_tokens - w + 1) // self.block_size for w in windows if w)
        return num_all * len(windows) - num_back

    def num_blocks_owed(self, num_computed: int, num_tokens: int) -> int:
        """Blocks that a sequence takes at most until ``num_tokens`` tokens are computed."""
        return max(0, self.num_blocks_peak(num_tokens) - self.num_blocks_held(num_computed))

    def num_shared_blocks(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill for good, whatever is computed behind them."""
        return num_tokens // self.block_size * self.facts.kv_group_windows.count(0)

    def floor(self, num_tokens: int) -> int:
        """Tokens of the blocks that ``num_tokens`` tokens fill."""
        return num_tokens // self.block_size * self.block_size

    def num_full_blocks(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill."""
        return num_tokens // self.block_size * self.num_kv_groups


class PlanBuilder:
    """A plan in the making, and what is left to give away in its step.

    Attributes:
        plan: What will be sent.
        flight: What will be remembered.
        head: The prefill that has to go on at the expense of all others, in ``must``; usually none.
        num_tokens_left: Of the token budget, and of the time that is left under a target.
        num_blocks_left: Blocks that are promised to nobody, neither by plans in flight nor to
            prefills that are not yet complete; may be negative.
    """

    __slots__ = (
        "_allowance",
        "_capacity",
        "_num_bytes_left",
        "flight",
        "head",
        "num_blocks_left",
        "num_tokens_left",
        "plan",
    )

    def __init__(
        self,
        capacity: Capacity,
        flight: Flight,
        *,
        num_blocks_left: int,
        allowance: Allowance | None = None,
    ) -> None:
        self._capacity = capacity
        self._allowance = allowance
        self._num_bytes_left = LIMITS.announced_bytes_per_plan_max
        self.flight = flight
        self.head: Sequence | None = None
        self.plan = StepPlan(step=flight.step, builds_on=flight.builds_on)
        self.num_tokens_left = capacity.token_budget - flight.num_decodes
        self.num_blocks_left = num_blocks_left
        self._keep_in_time()

    @property
    def has_news(self) -> bool:
        """Whether the plan says anything at all."""
        flight = self.flight
        return bool(flight.chunks or flight.announced or flight.searches)

    @property
    def num_chunk_tokens_max(self) -> int:
        """Most tokens that one more chunk may have; at least 1."""
        return self._num_chunk_tokens_from(0)

    def ask(self, sequence: Sequence, entries: Entries) -> None:
        """Ask for as many tokens of ``sequence`` as the budget allows; at least one is left.

        0          num_planned                               num_tokens
        [── planned ──)[── num_cached ──)[── num_tokens ──)[── later ──)
                         only at the start  asked for now
        """
        num_planned = sequence.num_planned
        num_cached = 0 if num_planned else sequence.num_cached_tokens
        position = num_planned + num_cached
        num_tokens = min(sequence.num_tokens - position, self._num_chunk_tokens_from(position))
        assert num_tokens > 0, f"sequence {sequence.sequence_id}: {num_tokens} tokens to ask for"
        num_blocks = self._capacity.num_blocks
        num_planned_after = position + num_tokens
        self.flight.num_blocks += num_blocks(num_planned_after) - num_blocks(num_planned)
        self.num_tokens_left -= num_tokens
        if self._allowance is not None:
            self._allowance.take(position, num_tokens)
            self._keep_in_time()
        entries.add(sequence.sequence_id, sequence.generation, num_tokens)
        chunk = Chunk(sequence, sequence.generation, num_tokens, num_cached)
        chunk.take_off()
        self.flight.chunks.append(chunk)
        sequence.last_chunk_tick = self.flight.tick
        sequence.last_chunk_tokens = num_tokens

    def _num_chunk_tokens_from(self, position: int) -> int:
        num_tokens = min(self.num_tokens_left, self._capacity.prefill_chunk_tokens)
        if self._allowance is not None:
            num_tokens = min(num_tokens, self._allowance.num_tokens_at(position))
        return max(1, num_tokens)

    def _keep_in_time(self) -> None:
        """Once the time is used up, the token budget is too, for whoever asks."""
        if self._allowance is not None:
            self.num_tokens_left = min(self.num_tokens_left, self._allowance.num_tokens_at(0))

    def ask_head(self, sequence: Sequence) -> None:
        """Ask for a prefill that has to go on, whoever has to give way for it."""
        self.head = sequence
        self.ask(sequence, self.plan.must)

    def can_announce(self, sequence: Sequence) -> bool:
        """Whether the message stays small; a huge prompt goes in a plan of its own."""
        num_bytes = _BYTES_PER_TOKEN_ID * sequence.num_tokens
        return num_bytes <= self._num_bytes_left or not self.flight.announced

    def announce(self, sequence: Sequence) -> None:
        """Tell the executor all about a sequence."""
        submission = sequence.submission
        self._num_bytes_left -= _BYTES_PER_TOKEN_ID * sequence.num_tokens
        sequence.knowledge = Knowledge.SENT
        self.flight.announced.append(sequence)
        output = sequence.output.tolist()
        self.plan.announce.append(
            Announcement(
                sequence_id=sequence.sequence_id,
                generation=sequence.generation,
                token_ids=submission.prompt_token_ids + output
                if output
                else submission.prompt_token_ids,
                num_prompt_tokens=sequence.num_prompt_tokens,
                sampling=submission.sampling,
                sample_index=sequence.sample_index,
                request_id=submission.request_id,
                tenant=submission.tenant,
                cache_salt=submission.cache_salt,
                session_id=submission.session_id,
                prefix_handle=submission.prefix_handle,
                trace_id=submission.trace_id,
                span_id=sequence.span_id.to_bytes(8, "big") if sequence.span_id else b"",
                is_steered=sequence.is_steered,
            )
        )
