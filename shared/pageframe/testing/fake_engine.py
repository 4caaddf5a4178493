"""A slow and obvious executor: counts tokens and blocks, computes nothing.

It reads plans as the module text of ``core.step`` says, one sequence at a time, so schedulers can
be tested without memory or model. Prefix hits are told by a function that is handed in, or, with
``shares_prefixes``, found among the sequences that run. A swapped sequence comes back in two steps:
its first admission is refused as PROMOTING, the next one finds everything on the device.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pageframe.core.plan import Announcement, Entries, Fork, Recovery, StepPlan
from pageframe.core.replica import ReplicaFacts
from pageframe.core.step import FinishReason, RefusedBecause, StepResult, StepTiming
from pageframe.core.units import ceil_div
from pageframe.testing.fake_books import FakeBooks
from pageframe.testing.fake_sequence import FakeSequence, next_token

_MILLISECOND_NS = 1_000_000

Victim = tuple[int, Recovery, int]
"""Sequence, how it gives way, and how many blocks it keeps."""


def make_facts(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 256,
    max_num_sequences: int = 64,
    max_step_tokens: int = 256,
    vocab_size: int = 1000,
    eos_token_ids: tuple[int, ...] = (0,),
    num_host_blocks: int = 0,
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
        num_host_blocks=num_host_blocks,
    )


@dataclass(slots=True)
class FakeEngine(FakeBooks):
    """Applies plans.

    Attributes:
        num_right: Of the drafts of a sequence in a step, how many the guesses have right; asked for
            each sequence and step. None for an engine that guesses nothing.
        now_ns: Its clock; each step lasts a millisecond.
        last_received: Number of the last plan that came in order.
        last_applied: Number of the last plan that was not refused.
        steps: Tokens computed, by applied step.
    """

    num_right: Callable[[], int] | None = None
    now_ns: int = 0
    last_received: int = 0
    last_applied: int = 0
    steps: list[int] = field(default_factory=list)

    def cancel(self, sequence_ids: Iterable[int]) -> StepResult:
        """End sequences between steps; unknown ids are ignored."""
        result = StepResult(step=0)
        self._release(sequence_ids, result)
        result.account = self.account()
        return result

    def step(self, plan: StepPlan) -> StepResult:
        """Apply a plan, compute and sample."""
        result = StepResult(step=plan.step)
        victims = self._victims(plan)
        result.refusal = self._refusal(plan, victims)
        if not result.refusal:
            self.last_applied = plan.step
            self._announce(plan.announce, result)
            self._release(plan.finish, result)
            self._preempt(victims or [], result)
            chunks = {i: 1 for i in self.join_order if self.sequences[i].has_caught_up}
            num_decodes = len(chunks)
            self._take_must(plan.must, chunks, result)
            num_found = self._take_may(plan.may, chunks, result)
            drafts = self._draft(plan, chunks, result)
            # Tokens that a prefix hit brought were not computed.
            num_computed = sum(chunks.values()) + sum(drafts.values())
            self.steps.append(num_computed - sum(num_found.values()))
            takers = self._compute(chunks, num_found, result)
            assert num_decodes <= len(takers), f"{num_decodes} decodes, {len(takers)} tokens"
            self._fork(plan.forks, takers, result)
            for sequence_id in takers:
                self._sample_all(sequence_id, drafts.get(sequence_id, 0), result)
        result.account = self.account()
        result.timing = StepTiming(start_ns=self.now_ns or 1, execute_ns=_MILLISECOND_NS)
        self.now_ns += _MILLISECOND_NS
        return result

    def _refusal(self, plan: StepPlan, victims: list[Victim] | None) -> str:
        if plan.step != self.last_received + 1:
            return "STEP_OUT_OF_ORDER"
        self.last_received = plan.step
        if plan.builds_on != self.last_applied:
            return "BUILDS_ON_UNAPPLIED_STEP"
        return "MUST_DOES_NOT_FIT" if victims is None else ""

    def _victims(self, plan: StepPlan) -> list[Victim] | None:
        """The victims that have to go so that everything that must run fits; None: it cannot."""
        must = {i: n for i, generation, n in _rows(plan.must) if self.runs(i, generation)}
        pool, running = self.pool.copy(), [i for i in self.join_order if i not in plan.finish]
        for sequence_id in plan.finish:
            pool.drop(sequence_id)
        candidates = self._candidates(plan, running)
        certain_ids = plan.victims.sequence_ids[: plan.victims.num_certain]
        num_certain = sum(candidate[0] in certain_ids for candidate in candidates)
        taken: list[Victim] = []
        while True:
            trial = pool.copy()
            for sequence_id in running:
                is_decode = self.sequences[sequence_id].has_caught_up
                self.write(trial, sequence_id, 1 if is_decode else must.get(sequence_id, 0))
            is_enough = len(taken) >= num_certain
            if is_enough and self.fits(trial) and not self.tenants_over(trial):
                return taken
            if not candidates:
                return None
            victim = candidates.pop(0)
            taken.append(victim)
            running.remove(victim[0])
            pool.cut(victim[0], victim[2])

    def _candidates(self, plan: StepPlan, running: list[int]) -> list[Victim]:
        """Victims that may be taken, as they would give way."""
        victims = plan.victims
        candidates: dict[int, Victim] = {}
        for index, sequence_id in enumerate(victims.sequence_ids):
            if sequence_id not in running or not self.runs(sequence_id, victims.generations[index]):
                continue
            recovery, num_kept = victims.recoveries[index], 0
            if recovery is Recovery.TAIL:
                num_kept = self.pool.num_blocks_of(sequence_id) - victims.num_blocks[index]
                if num_kept < 1:
                    recovery, num_kept = Recovery.RECOMPUTE, 0
            candidates.setdefault(sequence_id, (sequence_id, recovery, num_kept))
        return list(candidates.values())

    def _announce(self, announcements: list[Announcement], result: StepResult) -> None:
        for announcement in announcements:
            sequence_id = announcement.sequence_id
            assert sequence_id not in self.sequences, f"sequence {sequence_id} is known already"
            sequence = FakeSequence(
                announcement, list(announcement.token_ids), announcement.generation
            )
            num_cached = self.find(sequence)[1]
            leader_id, num_leader_tokens = self.leader(sequence, num_cached)
            self.sequences[sequence_id] = sequence
            result.announced_ids.append(sequence_id)
            result.num_cached_tokens.append(num_cached)
            result.leader_ids.append(leader_id)
            result.num_leader_tokens.append(num_leader_tokens)

    def _release(self, sequence_ids: Iterable[int], result: StepResult) -> None:
        for sequence_id in sequence_ids:
            if sequence_id in self.sequences:
                result.released.append(sequence_id)
                self.forget(sequence_id, result)

    def _preempt(self, victims: list[Victim], result: StepResult) -> None:
        for sequence_id, asked, num_kept in victims:
            sequence = self.sequences[sequence_id]
            num_blocks = self.pool.num_blocks_of(sequence_id)
            num_host_free = self.facts.num_host_blocks - self.num_host_used()
            fits_host = num_blocks <= num_host_free
            recovery = Recovery.RECOMPUTE if asked is Recovery.SWAP and not fits_host else asked
            if recovery is Recovery.SWAP:
                sequence.num_swapped = sequence.num_computed
                sequence.is_promoted = False
            self.pool.cut(sequence_id, num_kept)
            sequence.num_computed = min(sequence.num_computed, num_kept * self.facts.block_size)
            sequence.generation += 1
            sequence.num_preemptions += 1
            if not num_kept:
                sequence.is_running = False
                self.join_order.remove(sequence_id)
            result.preempted_ids.append(sequence_id)
            result.preempted_generations.append(sequence.generation)
            result.preempted_num_blocks.append(num_blocks - num_kept)
            result.preempted_recoveries.append(recovery)
            result.preempted_num_computed.append(sequence.num_computed)

    def _take_must(self, must: Entries, chunks: dict[int, int], result: StepResult) -> None:
        for sequence_id, generation, num_tokens in _rows(must):
            if not self.runs(sequence_id, generation):
                result.stale_ids.append(sequence_id)
                continue
            result.computed_ids.append(sequence_id)
            if sequence_id not in chunks:
                chunks[sequence_id] = min(num_tokens, self.sequences[sequence_id].num_uncomputed)
        for sequence_id, num_tokens in chunks.items():
            self.write(self.pool, sequence_id, num_tokens)
        assert self.num_free >= 0, f"{self.num_free} blocks are free"

    def _take_may(self, may: Entries, chunks: dict[int, int], result: StepResult) -> dict[int, int]:
        """Take what fits; returns how many tokens of each were found and need not be computed."""
        num_found: dict[int, int] = {}
        is_full = False
        for sequence_id, generation, num_tokens in _rows(may):
            sequence = self.sequences.get(sequence_id)
            if sequence is None or sequence.generation != generation:
                result.stale_ids.append(sequence_id)
                continue
            if sequence_id in chunks:
                result.computed_ids.append(sequence_id)
                continue
            if is_full:
                refused: RefusedBecause | None = RefusedBecause.BEHIND_REFUSED
            else:
                refused, num_found[sequence_id] = self._try(
                    sequence_id, sequence, num_tokens, chunks
                )
            if refused is None:
                result.computed_ids.append(sequence_id)
            else:
                result.refused_ids.append(sequence_id)
                result.refused_because.append(refused)
            is_full = is_full or refused is RefusedBecause.POOL_FULL
        return num_found

    def _try(
        self, sequence_id: int, sequence: FakeSequence, num_tokens: int, chunks: dict[int, int]
    ) -> tuple[RefusedBecause | None, int]:
        """Take one entry whole or not at all; also says how many of its tokens were found."""
        source_id, num_found = (0, 0) if sequence.is_running else self.find(sequence)
        if not sequence.is_running and self._has_no_row():
            return RefusedBecause.NOT_READY, 0
        trial = self.pool.copy()
        start = sequence.num_computed
        end = start + num_found + min(num_tokens, sequence.num_uncomputed - num_found)
        if source_id:
            trial.share(source_id, sequence_id, num_found // self.facts.block_size)
            start = num_found
        trial.write(sequence_id, start, end, sequence.announcement.tenant)
        if sequence.announcement.tenant in self.tenants_over(trial):
            return RefusedBecause.QUOTA, 0
        if not self.fits(trial):
            return RefusedBecause.POOL_FULL, 0
        if sequence.num_swapped and not sequence.is_promoted:
            sequence.is_promoted = True
            return RefusedBecause.PROMOTING, 0
        self.pool = trial
        chunks[sequence_id] = end - sequence.num_computed
        if not sequence.is_running:
            sequence.is_running = True
            sequence.num_swapped = 0
            sequence.num_blocks_shared += num_found // self.facts.block_size if source_id else 0
            self.join_order.append(sequence_id)
        return None, num_found

    def _draft(self, plan: StepPlan, chunks: dict[int, int], result: StepResult) -> dict[int, int]:
        """How many drafts of each sequence are computed; their blocks are taken."""
        drafts: dict[int, int] = {}
        busy = {*result.computed_ids, *(fork.parent_id for fork in plan.forks)}
        num_left, num_blocks = plan.drafts.num_tokens, plan.drafts.num_blocks
        for sequence_id in chunks if self.num_right is not None else ():
            sequence = self.sequences[sequence_id]
            if sequence_id in busy or not sequence.has_caught_up:
                continue
            num_useful = sequence.announcement.sampling.max_tokens - sequence.num_output - 1
            for length in range(min(num_left, plan.drafts.num_tokens_each, num_useful), 0, -1):
                trial = self.pool.copy()
                start = len(sequence.token_ids)
                trial.write(sequence_id, start, start + length, sequence.announcement.tenant)
                num_taken = trial.num_held - self.pool.num_held
                if num_taken <= min(num_blocks, self.num_free) and not self.tenants_over(trial):
                    self.pool = trial
                    num_blocks -= num_taken
                    num_left -= length
                    drafts[sequence_id] = length
                    break
        return drafts

    def _compute(
        self, chunks: dict[int, int], num_found: dict[int, int], result: StepResult
    ) -> list[int]:
        """Compute; returns who takes a token."""
        result.first_positions = [
            self.sequences[i].num_computed + num_found.get(i, 0) for i in result.computed_ids
        ]
        for sequence_id, num_tokens in chunks.items():
            sequence = self.sequences[sequence_id]
            sequence.num_computed += num_tokens
            num_blocks = self.pool.num_blocks_of(sequence_id)
            sequence.num_blocks_peak = max(sequence.num_blocks_peak, num_blocks)
        result.num_computed = [self.sequences[i].num_computed for i in result.computed_ids]
        return [i for i in chunks if not self.sequences[i].num_uncomputed]

    def _fork(self, forks: list[Fork], takers: list[int], result: StepResult) -> None:
        """Add the children of those who take a token to ``takers``."""
        for fork in forks:
            parent_id, parent = fork.parent_id, self.sequences.get(fork.parent_id)
            for child_id in fork.child_ids:
                is_sound = parent_id in takers and self.runs(parent_id, fork.generation)
                if parent is None or not is_sound or self._has_no_row():
                    result.unforked_ids.append(child_id)
                    continue
                num_blocks = self.pool.num_blocks_of(parent_id)
                self.pool.share(parent_id, child_id, num_blocks)
                self.sequences[child_id] = FakeSequence(
                    announcement=parent.announcement,
                    token_ids=list(parent.token_ids),
                    generation=0,
                    num_computed=parent.num_computed,
                    is_running=True,
                    num_blocks_peak=num_blocks,
                    num_blocks_shared=num_blocks,
                )
                self.join_order.append(child_id)
                takers.append(child_id)
                result.forked_ids.append(child_id)

    def _has_no_row(self) -> bool:
        return len(self.join_order) >= self.facts.max_num_sequences

    def _sample_all(self, sequence_id: int, num_drafted: int, result: StepResult) -> None:
        """Sample a token, and one more for each draft that is right."""
        self._sample(sequence_id, result)
        if not num_drafted:
            return
        assert self.num_right is not None, "nobody guesses"
        num_right, num_accepted = min(self.num_right(), num_drafted), 0
        while num_accepted < num_right and sequence_id in self.sequences:
            self.sequences[sequence_id].num_computed += 1
            num_accepted += 1
            self._sample(sequence_id, result)
        result.drafted_ids.append(sequence_id)
        result.num_drafted.append(num_drafted)
        result.num_accepted.append(num_accepted)
        if sequence_id in self.sequences:
            num_computed = self.sequences[sequence_id].num_computed
            self.pool.cut(sequence_id, ceil_div(num_computed, self.facts.block_size))

    def _sample(self, sequence_id: int, result: StepResult) -> None:
        sequence = self.sequences[sequence_id]
        token_id = next_token(sequence.token_ids, self.facts.vocab_size)
        sequence.token_ids.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        result.sampled_ids.append(sequence_id)
        result.token_ids.append(token_id)
        result.finish_reasons.append(reason)
        if reason:
            self.forget(sequence_id, result)

    def _finish_reason(self, sequence: FakeSequence, token_id: int) -> FinishReason:
        sampling = sequence.announcement.sampling
        num_output = sequence.num_output
        if token_id in sampling.stop_token_ids and num_output >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= sampling.max_tokens else FinishReason.NONE


def _rows(entries: Entries) -> Iterable[tuple[int, int, int]]:
    return zip(entries.sequence_ids, entries.generations, entries.num_tokens, strict=True)
