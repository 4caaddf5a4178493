"""A plan is applied by a pure function of the memory's state and the plan.

    announce ─▶ finish ─▶ victims, only until `must` fits ─▶ decodes ─▶ `must` ─▶ `may`, each whole
                                                                                    or not at all

First everything that may end in a refusal is decided on numbers alone, then memory is changed; so
a refused plan has changed nothing. ``must`` is what is written there *and* every running sequence
that has caught up. Those are found by array comparison; only the few that cross into a new block in
this step cost Python work each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.errors import InvalidRequestError
from pageframe.core.step import (
    Announcement,
    Entries,
    Recovery,
    RefusedBecause,
    SequenceAccount,
    StepPlan,
    StepResult,
)
from pageframe.core.trace import KvCause
from pageframe.core.units import ceil_div
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence

STEP_OUT_OF_ORDER = "STEP_OUT_OF_ORDER"
BUILDS_ON_UNAPPLIED_STEP = "BUILDS_ON_UNAPPLIED_STEP"
RECOVERY_UNAVAILABLE = "RECOVERY_UNAVAILABLE"
FORK_UNAVAILABLE = "FORK_UNAVAILABLE"
MUST_DOES_NOT_FIT = "MUST_DOES_NOT_FIT"
STEP_TOKENS_EXCEEDED = "STEP_TOKENS_EXCEEDED"

_NO_ROWS: Int32Array = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """What a step and a sequence may ask for.

    Attributes:
        max_step_tokens: Most tokens one step may compute.
        max_model_len: Most tokens of one sequence, prompt and output together.
        vocab_size: Token ids lie in ``[0, vocab_size)``.
    """

    max_step_tokens: int
    max_model_len: int
    vocab_size: int


@dataclass(slots=True, kw_only=True)
class AppliedStep:
    """What a plan came to. Rows stand for running sequences.

    Attributes:
        result: Filled with all that is known before the step runs.
        decode_rows: int32 [D], caught-up sequences, in join order.
        chunks: Tokens to compute, by row, of those that are catching up.
        named_rows: Rows that ran because an entry of ``must`` or ``may`` names them.
        vacated_rows: Rows given up, before any was given out again.
        admitted: Sequences that got a row.
        rejected_ids: Announced sequences that can never run.
    """

    result: StepResult
    decode_rows: Int32Array = field(default_factory=lambda: _NO_ROWS)
    chunks: dict[int, int] = field(default_factory=dict)
    named_rows: set[int] = field(default_factory=set)
    vacated_rows: list[int] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute in all."""
        return len(self.decode_rows) + sum(self.chunks.values())


@dataclass(slots=True, kw_only=True)
class _Choice:
    """What must run and who must go for it; decided before anything is changed."""

    refusal: str = ""
    decode_rows: Int32Array = field(default_factory=lambda: _NO_ROWS)
    chunks: dict[int, int] = field(default_factory=dict)
    named_rows: set[int] = field(default_factory=set)
    victims: list[Sequence] = field(default_factory=list)
    stale_ids: list[int] = field(default_factory=list)


class _Forecast:
    """How many blocks would be free if some rows gave up theirs, exact under sharing."""

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._references: Int32Array | None = None
        self.num_free = memory.pool.num_free

    def give_up(self, row: int) -> None:
        """Count the blocks of ``row`` that nobody else refers to."""
        if not self._memory.pool.is_quiet:
            return  # They come free only when the step in flight has finished.
        if self._references is None:
            self._references = self._memory.pool.ref_counts.copy()
        block_ids = self._memory.tables.blocks_of(row)
        self._references[block_ids] -= 1
        self.num_free += int(np.count_nonzero(self._references[block_ids] == 0))


def apply(memory: KvMemory, plan: StepPlan, bounds: StepBounds) -> AppliedStep:
    """Bring memory to where ``plan`` wants it, as far as its blocks reach.

    Mutates ``memory``, except when the result carries a refusal. Rows and their tables are then
    ready for the step to run: every chunk and every decode has the blocks that it writes to.
    """
    applied = AppliedStep(result=StepResult(step=plan.step))
    if plan.step != memory.last_received_step + 1:
        applied.result.refusal = STEP_OUT_OF_ORDER
        return applied
    memory.last_received_step = plan.step
    choice = _choose(memory, plan, bounds)
    if choice.refusal:
        applied.result.refusal = choice.refusal
        return applied
    memory.last_applied_step = plan.step
    memory.pool.current_step = plan.step
    applied.result.stale_ids += choice.stale_ids
    _announce(memory, plan.announce, bounds, applied)
    _finish(memory, plan.finish, applied)
    _preempt(memory, choice.victims, applied)
    _run_must(memory, choice, applied)
    _run_may(memory, plan.may, bounds, applied)
    return applied


def _choose(memory: KvMemory, plan: StepPlan, bounds: StepBounds) -> _Choice:
    """Decide what must run, which victims it takes, or why the plan is refused. Mutates nothing."""
    if plan.builds_on != memory.last_applied_step:
        return _Choice(refusal=BUILDS_ON_UNAPPLIED_STEP)
    if any(recovery != Recovery.RECOMPUTE for recovery in plan.victims.recoveries):
        return _Choice(refusal=RECOVERY_UNAVAILABLE)
    if plan.forks:
        return _Choice(refusal=FORK_UNAVAILABLE)
    leaving = _leaving(memory, plan)
    forecast = _Forecast(memory)
    for row in leaving:
        forecast.give_up(row)
    choice = _Choice()
    decode_rows = memory.sequences.caught_up_rows()
    choice.decode_rows = decode_rows[~np.isin(decode_rows, leaving)] if leaving else decode_rows
    _choose_chunks(memory, plan.must, leaving, choice)
    _choose_victims(memory, plan, leaving, forecast, choice)
    if len(choice.decode_rows) + sum(choice.chunks.values()) > bounds.max_step_tokens:
        choice.refusal = choice.refusal or STEP_TOKENS_EXCEEDED
    return choice


def _leaving(memory: KvMemory, plan: StepPlan) -> list[int]:
    """Rows of sequences that the plan ends, or announces anew after a rebuild."""
    sequences = [memory.sequences.get(sequence_id) for sequence_id in plan.finish]
    for announcement in plan.announce:
        known = memory.sequences.get(announcement.sequence_id)
        if known is not None and known.generation < announcement.generation:
            sequences.append(known)
    rows = (sequence.row for sequence in sequences if sequence is not None)
    return list(dict.fromkeys(row for row in rows if row != NO_ROW))


def _running(
    memory: KvMemory, sequence_id: int, generation: int, leaving: list[int]
) -> Sequence | None:
    """The sequence if it runs on, in this generation."""
    sequence = memory.sequences.get(sequence_id)
    if sequence is None or sequence.generation != generation:
        return None
    return None if sequence.row == NO_ROW or sequence.row in leaving else sequence


def _choose_chunks(memory: KvMemory, must: Entries, leaving: list[int], choice: _Choice) -> None:
    for sequence_id, generation, num_tokens in _rows_of(must):
        sequence = _running(memory, sequence_id, generation, leaving)
        if sequence is None:
            choice.stale_ids.append(sequence_id)
            continue
        num_uncomputed = _num_uncomputed(memory, sequence.row)
        if num_uncomputed > 1 and num_tokens > 0:
            chunk = choice.chunks.get(sequence.row, 0) + num_tokens
            choice.chunks[sequence.row] = min(chunk, num_uncomputed)
        if num_uncomputed == 1 or num_tokens > 0:
            choice.named_rows.add(sequence.row)


def _choose_victims(
    memory: KvMemory, plan: StepPlan, leaving: list[int], forecast: _Forecast, choice: _Choice
) -> None:
    """Take victims in order until the blocks that ``must`` lacks are there."""
    sequences, tables = memory.sequences, memory.tables
    crossing = set(tables.rows_at_boundary(choice.decode_rows, sequences.num_computed).tolist())
    lacking = dict.fromkeys(crossing, 1)
    for row, num_tokens in choice.chunks.items():
        lacking[row] = tables.num_missing(row, int(sequences.num_computed[row]) + num_tokens)
    num_lacking = sum(lacking.values())
    victims = dict.fromkeys(_live_victims(memory, plan, leaving, choice.stale_ids))
    for victim in victims:
        if num_lacking <= forecast.num_free:
            break
        forecast.give_up(victim.row)
        num_lacking -= lacking.get(victim.row, 0)
        choice.victims.append(victim)
    if num_lacking > forecast.num_free:
        choice.refusal = MUST_DOES_NOT_FIT
        return
    gone = [victim.row for victim in choice.victims]
    if gone:
        choice.decode_rows = choice.decode_rows[~np.isin(choice.decode_rows, gone)]
        choice.named_rows.difference_update(gone)
        for row in gone:
            choice.chunks.pop(row, None)


def _live_victims(
    memory: KvMemory, plan: StepPlan, leaving: list[int], stale_ids: list[int]
) -> Iterator[Sequence]:
    victims = zip(plan.victims.sequence_ids, plan.victims.generations, strict=True)
    for sequence_id, generation in victims:
        sequence = _running(memory, sequence_id, generation, leaving)
        if sequence is None:
            stale_ids.append(sequence_id)
        else:
            yield sequence


def _announce(
    memory: KvMemory,
    announcements: list[Announcement],
    bounds: StepBounds,
    applied: AppliedStep,
) -> None:
    for announcement in announcements:
        known = memory.sequences.get(announcement.sequence_id)
        if known is not None and announcement.generation <= known.generation:
            applied.result.stale_ids.append(announcement.sequence_id)
            continue
        if known is not None:
            _forget(memory, known, KvCause.PREEMPTED, applied)
        if not _can_ever_run(announcement, bounds):
            applied.rejected_ids.append(announcement.sequence_id)
            continue
        memory.announce(announcement)
        applied.result.announced_ids.append(announcement.sequence_id)
        applied.result.num_cached_tokens.append(0)


def _can_ever_run(announcement: Announcement, bounds: StepBounds) -> bool:
    """Whether tokens and sampling are sound, and at least one more token may follow."""
    num_tokens, num_prompt_tokens = len(announcement.token_ids), announcement.num_prompt_tokens
    if not 1 <= num_prompt_tokens <= num_tokens or num_tokens >= bounds.max_model_len:
        return False
    if num_tokens - num_prompt_tokens >= announcement.sampling.max_tokens:
        return False
    try:
        announcement.sampling.validate(bounds.vocab_size)
    except InvalidRequestError:
        return False
    token_ids = np.asarray(announcement.token_ids, dtype=np.int64)
    return bool(token_ids.min() >= 0 and token_ids.max() < bounds.vocab_size)


def _finish(memory: KvMemory, sequence_ids: Iterable[int], applied: AppliedStep) -> None:
    for sequence_id in sequence_ids:
        sequence = memory.sequences.get(sequence_id)
        if sequence is not None:
            account = _forget(memory, sequence, KvCause.FINISHED, applied)
            applied.result.released.append(sequence_id)
            applied.result.accounts[sequence_id] = account


def _forget(
    memory: KvMemory, sequence: Sequence, cause: KvCause, applied: AppliedStep
) -> SequenceAccount:
    if sequence.row != NO_ROW:
        applied.vacated_rows.append(sequence.row)
    return memory.forget(sequence, cause)


def _preempt(memory: KvMemory, victims: list[Sequence], applied: AppliedStep) -> None:
    for victim in victims:
        applied.vacated_rows.append(victim.row)
        applied.result.preempted_num_blocks.append(memory.preempt(victim))
        applied.result.preempted_ids.append(victim.sequence_id)
        applied.result.preempted_generations.append(victim.generation)


def _run_must(memory: KvMemory, choice: _Choice, applied: AppliedStep) -> None:
    applied.decode_rows = choice.decode_rows
    applied.chunks = choice.chunks
    applied.named_rows = choice.named_rows
    memory.cover_next(choice.decode_rows)
    for row, num_tokens in choice.chunks.items():
        memory.cover(row, int(memory.sequences.num_computed[row]) + num_tokens)


def _run_may(memory: KvMemory, may: Entries, bounds: StepBounds, applied: AppliedStep) -> None:
    result = applied.result
    num_tokens_left = bounds.max_step_tokens - applied.num_tokens
    is_full = False
    for sequence_id, generation, num_tokens in _rows_of(may):
        sequence = memory.sequences.get(sequence_id)
        if sequence is None or sequence.generation != generation:
            result.stale_ids.append(sequence_id)
            continue
        if is_full:
            refused: RefusedBecause | None = RefusedBecause.BEHIND_REFUSED
        else:
            refused, num_taken = _try_entry(memory, sequence, num_tokens, num_tokens_left, applied)
            num_tokens_left -= num_taken
            is_full = refused is RefusedBecause.POOL_FULL
        if refused is not None:
            result.refused_ids.append(sequence_id)
            result.refused_because.append(refused)


def _try_entry(
    memory: KvMemory,
    sequence: Sequence,
    num_tokens: int,
    num_tokens_left: int,
    applied: AppliedStep,
) -> tuple[RefusedBecause | None, int]:
    """Take one ``may`` entry whole or not at all; also says how many tokens it added."""
    row = sequence.row
    planned, num_computed, num_uncomputed = 0, 0, len(sequence.parked_tokens)
    if row != NO_ROW:
        num_computed = int(memory.sequences.num_computed[row])
        num_uncomputed = _num_uncomputed(memory, row)
        # A running sequence without a chunk that lacks one token is among the decodes already.
        planned = applied.chunks.get(row, 1 if num_uncomputed == 1 else 0)
    num_added = min(num_tokens, num_uncomputed - planned)
    if num_added < 1 and planned:
        applied.named_rows.add(row)
        return None, 0
    has_no_row = row == NO_ROW and not memory.sequences.has_empty_row
    if num_added < 1 or num_added > num_tokens_left or has_no_row:
        return RefusedBecause.NOT_READY, 0
    end = num_computed + planned + num_added
    num_missing = (
        ceil_div(end, memory.tables.block_size)
        if row == NO_ROW
        else memory.tables.num_missing(row, end)
    )
    if num_missing > memory.pool.num_free:
        return RefusedBecause.POOL_FULL, 0
    if row == NO_ROW:
        memory.sequences.seat(sequence)
        applied.admitted.append(sequence)
    memory.cover(sequence.row, end)
    applied.chunks[sequence.row] = planned + num_added
    applied.named_rows.add(sequence.row)
    return None, num_added


def _rows_of(entries: Entries) -> Iterator[tuple[int, int, int]]:
    return zip(entries.sequence_ids, entries.generations, entries.num_tokens, strict=True)


def _num_uncomputed(memory: KvMemory, row: int) -> int:
    return int(memory.sequences.num_tokens[row] - memory.sequences.num_computed[row])
