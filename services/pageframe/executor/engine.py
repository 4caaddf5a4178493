"""One step after another: apply a plan, run the model over it, take in what it sampled.

    launch    plan ─▶ apply ─▶ admit / release rows ─▶ build batch ─▶ move blocks, launch
    collect   tokens ─▶ append, finish ─▶ result

Where a device computes beside Python, and a plan lets everybody merely go on, its step is launched
before the one before it is collected (``in_flight``).

One thread calls everything here. What a step costs grows with what changed in it: the sequences
that merely go on are handled by array instructions, however many they are. A failure of the model
ends the sequences of its step and nothing else.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import structlog

from pageframe.core.clock import Clock
from pageframe.core.errors import InvalidRequestError, ResourceExhaustedError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, SequenceAccount, StepResult, StepTiming
from pageframe.core.trace import KvCause, TraceSink
from pageframe.executor.batch import ModelRunner, StepBatch, StepOutput, do_nothing
from pageframe.executor.describing import describe
from pageframe.executor.desk import MemoryDesk
from pageframe.executor.drafting import Drafter, Drafting, without_rejected
from pageframe.executor.finish import FinishRules
from pageframe.executor.in_flight import (
    StepInFlight,
    promise,
)
from pageframe.executor.launching import Launching
from pageframe.executor.memory.apply import AppliedStep, apply
from pageframe.executor.memory.eviction import EvictionPolicy
from pageframe.executor.memory.giving_up import leave_window
from pageframe.executor.memory.integrity import NO_BLOCK, Violation, check_integrity
from pageframe.executor.memory.options import MemoryOptions, StepBounds
from pageframe.executor.memory.publishing import Publisher
from pageframe.executor.memory.retaining import (
    SessionTimes,
    forget_block,
    keep_session,
)
from pageframe.executor.memory.retention import HANDLE_TTL_NS_MAX
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence
from pageframe.executor.memory.yielding import build_memory
from pageframe.executor.readiness import unready_by
from pageframe.executor.reporting import (
    report_candidates,
    report_computed,
    report_error,
    report_sampled,
    without_candidates,
)
from pageframe.executor.step_failure import StepFailedError, note_failure, told_of

_NO_SESSIONS = SessionTimes(idle_ns=0, ttl_ns=0)

_log = structlog.get_logger(__name__)


class StepEngine:
    """Executes plans over one pool and one model.

    The constructor reserves the runner's arena; ``runner.warm_up`` is left to the caller.

    Args:
        runner: The model.
        num_blocks: Blocks in the pool.
        block_size: Tokens per block.
        max_num_sequences: Most sequences that run at once.
        max_step_tokens: Most tokens one step may compute.
        max_model_len: Most tokens of one sequence, prompt and output together.
        trace: Takes a record of every block operation.
        clock: Times the steps.
        check_every_step: Recompute conservation after every step, not only when the pool is idle.
        num_blocks_max: Blocks that the pool may grow to; 0 for no growth.
        num_host_slots: Blocks that the host tier holds; 0 for none.
        has_prefix_cache: Whether sequences share what others computed.
        eviction: Which cached block goes first; least recently used when absent.
        session_times: How long the blocks of a chat are kept.
        handle_ttl_max_ns: Longest time that a prefix may be kept under a handle.
        drafter: Guesses tokens where a plan asks for drafts; from n-grams when absent.

    Attributes:
        on_launch: Called in each step that runs, just before the model does.
        desk: Everything that may be asked of KV memory between steps.
        memory: KV memory; read only for others.
        publisher: Enters full blocks into the prefix index; memory is behind until it catches up.
        launching: Steps in flight, and which plan may follow them.
        last_failure: What the runner last failed with, or None.

    Raises:
        ResourceExhaustedError: the arena does not fit into memory.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        num_blocks: int,
        block_size: int,
        max_num_sequences: int,
        max_step_tokens: int,
        max_model_len: int,
        trace: TraceSink,
        clock: Clock,
        check_every_step: bool = False,
        num_blocks_max: int = 0,
        num_host_slots: int = 0,
        has_prefix_cache: bool = True,
        eviction: EvictionPolicy | None = None,
        session_times: SessionTimes = _NO_SESSIONS,
        handle_ttl_max_ns: int = HANDLE_TTL_NS_MAX,
        drafter: Drafter | None = None,
    ) -> None:
        facts = runner.facts
        self.last_failure: StepFailedError | None = None
        self.memory = build_memory(
            MemoryOptions(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_sequences=max_num_sequences,
                max_model_len=max_model_len,
                num_blocks_max=num_blocks_max,
                num_host_slots=num_host_slots,
                window_tokens=facts.window_tokens,
                group_windows=facts.group_windows,
                has_prefix_cache=has_prefix_cache,
                model=facts.name,
                kv_dtype=facts.kv_dtype,
                handle_ttl_max_ns=handle_ttl_max_ns,
            ),
            trace=trace,
            eviction=eviction,
        )
        self.publisher = Publisher(self.memory)
        self.desk = MemoryDesk(self.memory, runner, clock, self.publisher.catch_up)
        self._session_times = session_times
        self._broken_ids: list[int] = []
        self._leaving_rows: list[int] = []
        self._runner = runner
        self.on_launch: Callable[[], None] = do_nothing
        self.find_unready = unready_by(runner.prepare)
        self._clock = clock
        self._check_every_step = check_every_step
        self._bounds = StepBounds(
            max_step_tokens=max_step_tokens,
            max_model_len=max_model_len,
            vocab_size=facts.vocab_size,
            takes_grammars=facts.takes_grammars,
        )
        self.launching = Launching(
            runner, self.memory, self.publisher, clock, max_step_tokens=max_step_tokens
        )
        self._finish_rules = FinishRules(
            max_num_sequences, max_model_len=max_model_len, eos_token_ids=facts.eos_token_ids
        )
        self._drafting = Drafting(self.memory, self._finish_rules, drafter)
        runner.allocate_pool(
            num_blocks,
            block_size,
            num_blocks_max=num_blocks_max,
            num_host_slots=num_host_slots,
        )

    @property
    def last_applied_step(self) -> int:
        """Number of the last plan that was not refused; 0 before the first of an epoch."""
        return self.memory.last_applied_step

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is known."""
        return not len(self.memory.sequences)

    def account(self) -> PoolAccount:
        """Blocks by state."""
        return self.memory.account()

    def describe(self, replica_id: str) -> ReplicaFacts:
        """What this replica serves."""
        return describe(replica_id, self._runner.facts, self.memory, self._bounds)

    def step(self, plan: StepPlan) -> StepResult:
        """Execute one plan; returns when its tokens are known.

        A refused plan changes nothing but the expected number of the next plan. A failure of the
        runner does not raise: the sequences of the batch end with ``FinishReason.ERROR``.
        """
        self.launch(plan)
        return self.collect()

    def launch(self, plan: StepPlan) -> None:
        """Apply a plan and begin its step; ``collect`` has to follow.

        Nothing else may be done between the two, but ``launch`` of a plan that ``may_follow``.
        """
        start_ns = self._clock.now_ns()
        before = self.launching.newest
        if before is None:
            self.publisher.before(plan)
        else:
            # Blocks that the step in flight fills are full from here on, by what the books say.
            self.publisher.catch_up()
            promise(before, self.memory.sequences, self._finish_rules)
        if self._bounds.takes_grammars:
            self.memory.unready_ids = self.find_unready(plan, self.memory)
        applied = apply(self.memory, plan, self._bounds)
        step = StepInFlight(applied=applied, start_ns=start_ns, follows=before is not None)
        result = applied.result
        if result.refusal:
            result.account = self.account()
            result.timing = StepTiming(start_ns=start_ns)
            result.timing.apply_ns = self._clock.now_ns() - start_ns
        else:
            self._change_rows(applied)
            if plan.drafts.num_tokens:
                self._drafting.add(applied, plan.drafts, plan.forks, self._bounds.max_step_tokens)
        self.launching.begin(step, self.on_launch)
        if before is None:
            self.publisher.catch_up()

    def collect(self) -> StepResult:
        """Wait for the step launched first of those in flight, and take in its tokens."""
        step, output = self.launching.wait()
        self._release_rows()
        result, batch = step.applied.result, step.batch
        if batch is None:
            return result
        result.is_followed = self.launching.num_in_flight > 0
        self.memory.pool.current_step = batch.step
        if output is None:
            self.last_failure = step.failure
            children = [child.row for _, child in step.applied.forks if child.row != NO_ROW]
            rows = batch.rows[step.is_known(self.memory.sequences)].tolist()
            self._fail([*rows, *children], result, told_of(step.failure))
        else:
            batch, output = step.without_ended(output, self.memory.sequences)
            self._take_in(batch, output, step.applied)
        if result.is_followed:
            # What this step has filled is full, and what the next one fills is not promised yet.
            self.publisher.catch_up()
        self._conclude(result)
        return result

    def cancel(self, sequence_ids: Iterable[int]) -> StepResult:
        """End sequences between steps, in whatever state; ids that are not known are ignored."""
        assert not self.launching.num_in_flight, "a step is in flight"
        self.publisher.catch_up()
        self.memory.pool.current_step = 0
        result = StepResult(step=0)
        for sequence_id in sequence_ids:
            sequence = self.memory.sequences.get(sequence_id)
            if sequence is not None:
                self._end(sequence, KvCause.CANCELLED, result)
                result.released.append(sequence_id)
        self._conclude(result)
        return result

    def reset(self) -> None:
        """Forget all sequences and release their blocks, for a new scheduler epoch."""
        assert not self.launching.num_in_flight, "a step is in flight"
        self.publisher.catch_up()
        rows = self.memory.sequences.running_rows().tolist()
        self.memory.reset()
        self._drafting.reset()
        self._broken_ids.clear()
        for row in rows:
            self._runner.release(row)

    def check_integrity(self) -> list[Violation]:
        """Recompute conservation and quarantine what is wrong; empty when all is well.

        Sequences that hold such a block are ended, and reported, by the next step or cancel.
        """
        violations = check_integrity(self.memory)
        for violation in violations:
            self._broken_ids += violation.sequence_ids
            if violation.block_id != NO_BLOCK:
                forget_block(self.memory, violation.block_id)
        return violations

    def close(self) -> None:
        """Give back the runner's weights and arena; the engine is not used after it."""
        self._runner.close()

    def _change_rows(self, applied: AppliedStep) -> None:
        """Tell the runner who lost a row and who got one; an admission may fail by itself."""
        for row in applied.vacated_rows:
            self._runner.release(row)
        for sequence in applied.admitted:
            self._admit(sequence, sequence.sampling, applied)
        for child in list(applied.branched.children):
            self._admit(child, replace(child.sampling, num_prompt_logprobs=-1), applied)
        for row, token_id in applied.branched.extended:
            self._runner.extend(row, token_id)
        for _, child in list(applied.forks):
            # The log-probabilities of the prompt are told once, by the parent.
            self._admit(child, replace(child.sampling, num_prompt_logprobs=-1), applied)
        for sequence_id, reason in applied.rejected.items():
            applied.result.accounts[sequence_id] = SequenceAccount()
            report_error(applied.result, sequence_id, reason)

    def _admit(self, sequence: Sequence, sampling: SamplingParams, applied: AppliedStep) -> None:
        row = sequence.row
        try:
            self._finish_rules.admit(row, sampling, sequence.num_prompt_tokens)
            self._runner.admit(
                row,
                sampling=sampling,
                sample_index=sequence.sample_index,
                token_ids=self.memory.sequences.tokens_of(row),
                num_prompt_tokens=sequence.num_prompt_tokens,
            )
        except Exception as error:
            reason = error.reason if isinstance(error, InvalidRequestError) else ""
            if not reason:
                self.last_failure = note_failure(applied.result.step, error)
            applied.leave_out(row)
            orphans = [child for parent, child in applied.forks if parent is sequence]
            applied.forks = [pair for pair in applied.forks if sequence not in pair]
            self._fail([row], applied.result, reason)
            for child in orphans:
                # The runner has not heard of it yet.
                account = self.memory.forget(child, KvCause.CANCELLED)
                applied.result.accounts[child.sequence_id] = account
                report_error(applied.result, child.sequence_id)

    def _take_in(self, batch: StepBatch, output: StepOutput, applied: AppliedStep) -> None:
        """Append sampled tokens, and end the sequences that are done."""
        sequences, result = self.memory.sequences, applied.result
        if output.candidates:
            report_candidates(sequences, batch, output, result)
            batch, output = without_candidates(batch, output)
        if applied.drafts:
            batch, output = without_rejected(batch, output, self._finish_rules)
        if applied.named_rows:
            report_computed(sequences, batch, applied.named_rows, result)
        sequences.num_computed[batch.rows] = batch.context_lens
        if applied.drafts:
            self._drafting.settle(applied, batch)
        for parent, child in applied.forks:
            sequences.num_computed[child.row] = sequences.num_computed[parent.row]
        self.publisher.note_step()
        leave_window(self.memory, batch.rows)
        rows, positions, token_ids = batch.sample_rows, batch.sample_positions, output.token_ids
        sequences.put_tokens(rows, positions, token_ids)
        reasons = self._finish_rules.reasons(rows, positions + 1, token_ids)
        report_sampled(sequences, batch, output, reasons, result)
        for row, reason in output.failures.items():
            report_error(result, int(sequences.sequence_ids[row]), reason)
        for row in rows[reasons != FinishReason.NONE].tolist():
            self.publisher.catch_up()
            sequence = sequences.at_row(row)
            if sequence.session_id and self._session_times.ttl_ns:
                self._keep_session(sequence)
            self._end(sequence, KvCause.FINISHED, result)

    def _keep_session(self, sequence: Sequence) -> None:
        now_ns = self._clock.now_ns()
        try:
            keep_session(self.memory, sequence, self._session_times, now_ns=now_ns)
        except ResourceExhaustedError as error:
            # The next turn may still find its blocks in the cache.
            _log.warning("session_not_kept", session=sequence.session_id, reason=error.reason)

    def _fail(self, rows: list[int], result: StepResult, reason: str = "") -> None:
        for row in rows:
            sequence = self.memory.sequences.at_row(row)
            self._end(sequence, KvCause.CANCELLED, result)
            report_error(result, sequence.sequence_id, reason)

    def _end(self, sequence: Sequence, cause: KvCause, result: StepResult) -> None:
        self.publisher.catch_up()
        row = sequence.row
        result.accounts[sequence.sequence_id] = self.memory.forget(sequence, cause)
        if row != NO_ROW:
            self._leaving_rows.append(row)
        self._release_rows()

    def _release_rows(self) -> None:
        """Let the runner forget who has ended, unless a step in flight still has them."""
        if not self.launching.num_in_flight:
            while self._leaving_rows:
                self._runner.release(self._leaving_rows.pop())

    def _conclude(self, result: StepResult) -> None:
        if self._check_every_step or not self.memory.pool.num_held:
            self.check_integrity()
        for sequence_id in self._broken_ids:
            sequence = self.memory.sequences.get(sequence_id)
            if sequence is not None:
                self._end(sequence, KvCause.INTEGRITY, result)
                report_error(result, sequence_id)
        self._broken_ids.clear()
        result.account = self.account()
