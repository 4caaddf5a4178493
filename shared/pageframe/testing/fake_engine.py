"""A slow and obvious executor: counts tokens and blocks, computes nothing.

It reads plans as the module text of ``core.step`` says, one sequence at a time, so schedulers can
be tested without memory or model. Which tokens are in the prefix index is told by a function that
is handed in.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pageframe.core.step import (
    Announcement,
    Entries,
    FinishReason,
    PoolAccount,
    RefusedBecause,
    ReplicaFacts,
    SequenceAccount,
    StepPlan,
    StepResult,
    StepTiming,
)
from pageframe.core.units import ceil_div

_MILLISECOND_NS = 1_000_000


def make_facts(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 256,
    max_num_sequences: int = 64,
    max_step_tokens: int = 256,
    vocab_size: int = 1000,
    eos_token_ids: tuple[int, ...] = (0,),
) -> ReplicaFacts:
    """Facts of a tiny replica."""
    return ReplicaFacts(
        replica_id="fake-0",
        model="fake",
        model_folder="",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=1,
        max_num_sequences=max_num_sequences,
        max_step_tokens=max_step_tokens,
        device="sim",
        dtype="float32",
        kv_dtype="float32",
        runner="sim",
    )


def next_token(token_ids: list[int], vocab_size: int) -> int:
    """The token after ``token_ids``, in ``[1, vocab_size)``; depends on each of them."""
    mixed = len(token_ids)
    for token_id in token_ids:
        mixed = (mixed * 31 + token_id + 1) % 1_000_003
    return 1 + mixed % (vocab_size - 1)


@dataclass(slots=True)
class FakeSequence:
    """What the engine knows of a sequence; it runs when ``is_running``."""

    announcement: Announcement
    token_ids: list[int]
    generation: int
    num_computed: int = 0
    is_running: bool = False
    num_blocks_peak: int = 0
    num_preemptions: int = 0

    @property
    def has_caught_up(self) -> bool:
        """Whether all tokens are computed but the newest."""
        return self.is_running and self.num_computed == len(self.token_ids) - 1


@dataclass(slots=True)
class FakeEngine:
    """Applies plans.

    Attributes:
        facts: What it serves.
        num_hit_tokens: How many tokens of an announcement are in the prefix index.
        now_ns: Its clock; each step lasts a millisecond.
        sequences: By id.
        join_order: Running sequences, first admitted first.
        last_received: Number of the last plan that came in order.
        last_applied: Number of the last plan that was not refused.
        steps: Tokens computed, by applied step.
    """

    facts: ReplicaFacts
    num_hit_tokens: Callable[[Announcement], int] = lambda _: 0
    now_ns: int = 0
    sequences: dict[int, FakeSequence] = field(default_factory=dict)
    join_order: list[int] = field(default_factory=list)
    last_received: int = 0
    last_applied: int = 0
    steps: list[int] = field(default_factory=list)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.facts.num_blocks - sum(map(self._num_blocks, self.sequences.values()))

    def account(self) -> PoolAccount:
        """Blocks by state."""
        total, free = self.facts.num_blocks, self.num_free
        return PoolAccount(total=total, free=free, held=total - free)

    def cancel(self, sequence_ids: Iterable[int]) -> StepResult:
        """End sequences between steps; unknown ids are ignored."""
        result = StepResult(step=0)
        self._release(sequence_ids, result)
        result.account = self.account()
        return result

    def step(self, plan: StepPlan) -> StepResult:
        """Apply a plan, compute and sample."""
        result = StepResult(step=plan.step)
        result.refusal = self._refusal(plan)
        if not result.refusal:
            self.last_applied = plan.step
            self._announce(plan.announce, result)
            self._release(plan.finish, result)
            self._preempt(plan, result)
            chunks = {
                sequence_id: 1
                for sequence_id in self.join_order
                if self.sequences[sequence_id].has_caught_up
            }
            num_decodes = len(chunks)
            self._take_must(plan.must, chunks, result)
            self._take_may(plan.may, chunks, result)
            self._compute(chunks, num_decodes, plan, result)
        result.account = self.account()
        result.timing = StepTiming(start_ns=self.now_ns or 1, execute_ns=_MILLISECOND_NS)
        self.now_ns += _MILLISECOND_NS
        return result

    def _refusal(self, plan: StepPlan) -> str:
        if plan.step != self.last_received + 1:
            return "STEP_OUT_OF_ORDER"
        self.last_received = plan.step
        if plan.builds_on != self.last_applied:
            return "BUILDS_ON_UNAPPLIED_STEP"
        victims = self._victims(plan)
        return "" if victims is not None else "MUST_DOES_NOT_FIT"

    def _victims(self, plan: StepPlan) -> list[int] | None:
        """The victims that have to go so that everything that must run fits."""
        must = dict(zip(plan.must.sequence_ids, plan.must.num_tokens, strict=True))
        free = self.num_free + sum(
            self._num_blocks(self.sequences[i]) for i in plan.finish if i in self.sequences
        )
        running = [i for i in self.join_order if i not in plan.finish]
        candidates = [
            sequence_id
            for sequence_id, generation in zip(
                plan.victims.sequence_ids, plan.victims.generations, strict=True
            )
            if sequence_id in running and self.sequences[sequence_id].generation == generation
        ]
        victims: list[int] = []
        while True:
            need = sum(self._need(i, must.get(i, 0)) for i in running)
            if need <= free:
                return victims
            if not candidates:
                return None
            victim = candidates.pop(0)
            victims.append(victim)
            running.remove(victim)
            free += self._num_blocks(self.sequences[victim])

    def _need(self, sequence_id: int, num_tokens: int) -> int:
        sequence = self.sequences[sequence_id]
        num_tokens = 1 if sequence.has_caught_up else num_tokens
        end = min(sequence.num_computed + num_tokens, len(sequence.token_ids))
        return ceil_div(end, self.facts.block_size) - self._num_blocks(sequence)

    def _num_blocks(self, sequence: FakeSequence) -> int:
        return ceil_div(sequence.num_computed, self.facts.block_size)

    def _announce(self, announcements: list[Announcement], result: StepResult) -> None:
        for announcement in announcements:
            sequence_id = announcement.sequence_id
            assert sequence_id not in self.sequences, f"sequence {sequence_id} is known already"
            self.sequences[sequence_id] = FakeSequence(
                announcement, list(announcement.token_ids), announcement.generation
            )
            result.announced_ids.append(sequence_id)
            result.num_cached_tokens.append(self.num_hit_tokens(announcement))

    def _release(self, sequence_ids: Iterable[int], result: StepResult) -> None:
        for sequence_id in sequence_ids:
            if sequence_id in self.sequences:
                result.released.append(sequence_id)
                self._forget(sequence_id, result)

    def _forget(self, sequence_id: int, result: StepResult) -> None:
        sequence = self.sequences.pop(sequence_id)
        if sequence.is_running:
            self.join_order.remove(sequence_id)
        result.accounts[sequence_id] = SequenceAccount(
            num_blocks_peak=sequence.num_blocks_peak, num_preemptions=sequence.num_preemptions
        )

    def _preempt(self, plan: StepPlan, result: StepResult) -> None:
        for sequence_id in self._victims(plan) or ():
            sequence = self.sequences[sequence_id]
            result.preempted_ids.append(sequence_id)
            result.preempted_num_blocks.append(self._num_blocks(sequence))
            sequence.generation += 1
            sequence.num_preemptions += 1
            sequence.num_computed = 0
            sequence.is_running = False
            self.join_order.remove(sequence_id)
            result.preempted_generations.append(sequence.generation)

    def _take_must(self, must: Entries, chunks: dict[int, int], result: StepResult) -> None:
        for sequence_id, generation, num_tokens in _rows(must):
            sequence = self.sequences.get(sequence_id)
            if sequence is None or sequence.generation != generation or not sequence.is_running:
                result.stale_ids.append(sequence_id)
                continue
            result.computed_ids.append(sequence_id)
            if sequence_id not in chunks:
                chunks[sequence_id] = min(
                    num_tokens, len(sequence.token_ids) - sequence.num_computed
                )

    def _take_may(self, may: Entries, chunks: dict[int, int], result: StepResult) -> None:
        taken = sum(self._need_for(i, n) for i, n in chunks.items())
        is_full = False
        for sequence_id, generation, num_tokens in _rows(may):
            sequence = self.sequences.get(sequence_id)
            if sequence is None or sequence.generation != generation:
                result.stale_ids.append(sequence_id)
                continue
            if sequence_id in chunks:
                result.computed_ids.append(sequence_id)
                continue
            hit = 0 if sequence.is_running else self._num_hit(sequence)
            left = len(sequence.token_ids) - sequence.num_computed - hit
            chunk = hit + min(num_tokens, left)
            need = self._need_for(sequence_id, chunk)
            if is_full or need > self.num_free - taken:
                because = RefusedBecause.BEHIND_REFUSED if is_full else RefusedBecause.POOL_FULL
                result.refused_ids.append(sequence_id)
                result.refused_because.append(because)
                is_full = True
                continue
            taken += need
            chunks[sequence_id] = chunk
            result.computed_ids.append(sequence_id)
            if not sequence.is_running:
                sequence.is_running = True
                self.join_order.append(sequence_id)

    def _num_hit(self, sequence: FakeSequence) -> int:
        if sequence.generation:
            return 0
        return min(self.num_hit_tokens(sequence.announcement), len(sequence.token_ids) - 1)

    def _need_for(self, sequence_id: int, num_tokens: int) -> int:
        sequence = self.sequences[sequence_id]
        after = ceil_div(sequence.num_computed + num_tokens, self.facts.block_size)
        return after - self._num_blocks(sequence)

    def _compute(
        self, chunks: dict[int, int], num_decodes: int, plan: StepPlan, result: StepResult
    ) -> None:
        asked = dict(zip(plan.may.sequence_ids, plan.may.num_tokens, strict=True))
        # Tokens that a prefix hit brought were not computed.
        self.steps.append(
            num_decodes
            + sum(
                min(num_tokens, asked.get(i, num_tokens))
                for i, num_tokens in list(chunks.items())[num_decodes:]
            )
        )
        for sequence_id, num_tokens in chunks.items():
            sequence = self.sequences[sequence_id]
            sequence.num_computed += num_tokens
            held = self._num_blocks(sequence)
            sequence.num_blocks_peak = max(sequence.num_blocks_peak, held)
        assert self.num_free >= 0, f"{self.num_free} blocks are free"
        result.num_computed = [self.sequences[i].num_computed for i in result.computed_ids]
        for sequence_id in chunks:
            sequence = self.sequences[sequence_id]
            if sequence.num_computed == len(sequence.token_ids):
                self._sample(sequence_id, sequence, result)

    def _sample(self, sequence_id: int, sequence: FakeSequence, result: StepResult) -> None:
        token_id = next_token(sequence.token_ids, self.facts.vocab_size)
        sequence.token_ids.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        result.sampled_ids.append(sequence_id)
        result.token_ids.append(token_id)
        result.finish_reasons.append(reason)
        if reason:
            self._forget(sequence_id, result)

    def _finish_reason(self, sequence: FakeSequence, token_id: int) -> FinishReason:
        sampling = sequence.announcement.sampling
        num_output = len(sequence.token_ids) - sequence.announcement.num_prompt_tokens
        if token_id in sampling.stop_token_ids and num_output >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= sampling.max_tokens else FinishReason.NONE


def _rows(entries: Entries) -> Iterable[tuple[int, int, int]]:
    return zip(entries.sequence_ids, entries.generations, entries.num_tokens, strict=True)
