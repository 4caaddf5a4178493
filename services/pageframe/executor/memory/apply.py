"""A plan is applied by a pure function of the memory's state and the plan.

    announce ─▶ finish ─▶ victims, only until `must` fits ─▶ branches ─▶ decodes ─▶ `must`
    ─▶ `may`, each whole or not at all ─▶ forks

First everything that may end in a refusal is decided on numbers alone (``choice``), then memory is
changed; so a refused plan has changed nothing. ``must`` is what is written there *and* every
running sequence that has caught up. Those are found by array comparison; only the few that cross
into a new block, or write into a shared one, cost Python work each.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.plan import Announcement, Entries, Fork, StepPlan
from pageframe.core.step import RefusedBecause, SequenceAccount, StepResult
from pageframe.core.trace import KvCause
from pageframe.core.units import ceil_div
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.announcing import know, why_never
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.branching import Branched, branch
from pageframe.executor.memory.choice import Choice, choose, num_uncomputed, rows_of
from pageframe.executor.memory.giving_up import preempt
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.matching import Match
from pageframe.executor.memory.options import StepBounds
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence
from pageframe.executor.memory.sharing import (
    can_fork,
    entries_to_copy,
    fork,
    make_writable,
)
from pageframe.executor.memory.yielding import make_room_below_ceiling, num_yieldable, yield_own

STEP_OUT_OF_ORDER = "STEP_OUT_OF_ORDER"
BRANCH_OUT_OF_RANGE = "BRANCH_OUT_OF_RANGE"

_NO_ROWS: Int64Array = np.empty(0, dtype=np.int64)


@dataclass(slots=True, kw_only=True)
class AppliedStep:
    """What a plan came to. Rows stand for running sequences.

    Attributes:
        result: Filled with all that is known before the step runs.
        decode_rows: int64 [D], caught-up sequences, in join order.
        chunks: Tokens to compute, by row, of those that are catching up.
        named_rows: Rows that ran because an entry of ``must`` or ``may`` names them.
        vacated_rows: Rows given up, before any was given out again.
        admitted: Sequences that got a row.
        forks: Parents and children that run from the next step on, in batch order.
        branched: Who goes on by a branch, and who ended by one.
        drafts: Draft tokens behind the newest one, by row; those rows are among ``chunks``.
        rejected: Announced sequences that can never run, with the reason; it may be empty.
    """

    result: StepResult
    decode_rows: Int64Array = field(default_factory=lambda: _NO_ROWS)
    chunks: dict[int, int] = field(default_factory=dict)
    named_rows: set[int] = field(default_factory=set)
    vacated_rows: list[int] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    branched: Branched = field(default_factory=Branched)
    drafts: dict[int, int] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute in all."""
        return len(self.decode_rows) + sum(self.chunks.values())

    def leave_out(self, row: int) -> None:
        """``row`` computes nothing after all."""
        self.chunks.pop(row, None)
        self.decode_rows = self.decode_rows[self.decode_rows != row]


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
    if max(plan.branches.token_ids, default=0) >= bounds.vocab_size:
        applied.result.refusal = BRANCH_OUT_OF_RANGE
        return applied
    choice = choose(memory, plan, bounds.max_step_tokens)
    if choice.refusal:
        applied.result.refusal = choice.refusal
        return applied
    memory.last_applied_step = plan.step
    memory.pool.current_step = plan.step
    applied.result.stale_ids += choice.stale_ids
    _announce(memory, plan.announce, bounds, applied)
    _finish(memory, plan.finish, applied)
    _preempt(memory, choice, applied)
    _run_must(memory, choice, applied)
    _run_may(memory, plan.may, bounds, applied)
    _fork(memory, plan.forks, applied)
    return applied


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
        reason = why_never(memory, announcement, bounds)
        if reason is not None:
            applied.rejected[announcement.sequence_id] = reason
            continue
        know(memory, announcement, applied.result)


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


def _preempt(memory: KvMemory, choice: Choice, applied: AppliedStep) -> None:
    result = applied.result
    for victim in choice.victims:
        sequence, row = victim.sequence, victim.sequence.row
        recovery, num_blocks, num_computed = preempt(
            memory, sequence, victim.recovery, victim.num_tail_blocks
        )
        if sequence.row == NO_ROW:
            applied.vacated_rows.append(row)
        result.preempted_ids.append(sequence.sequence_id)
        result.preempted_generations.append(sequence.generation)
        result.preempted_num_blocks.append(num_blocks)
        result.preempted_recoveries.append(recovery)
        result.preempted_num_computed.append(num_computed)


def _run_must(memory: KvMemory, choice: Choice, applied: AppliedStep) -> None:
    applied.decode_rows = choice.decode_rows
    applied.chunks = choice.chunks
    applied.named_rows = choice.named_rows
    for tenant_id, num_blocks in choice.own_yields.items():
        yield_own(memory, tenant_id, num_blocks)
    if choice.families:
        _branch(memory, choice, applied)
    if choice.has_writers:
        make_writable(memory, applied.decode_rows, KvCause.DECODE)
    memory.cover_next(applied.decode_rows)
    for row, num_tokens in choice.chunks.items():
        if choice.has_writers:
            make_writable(memory, np.array([row], dtype=np.int64), KvCause.PREFILL)
        memory.cover(row, int(memory.sequences.num_computed[row]) + num_tokens)


def _branch(memory: KvMemory, choice: Choice, applied: AppliedStep) -> None:
    """Whoever branches has one token to compute, as the decodes have."""
    branched = branch(memory, choice.families.values())
    rows: Int64Array = np.array(branched.rows, dtype=np.int64)
    applied.decode_rows = np.concatenate([choice.decode_rows, rows])
    applied.branched = branched
    for parent_id, row, account in branched.ended:
        applied.vacated_rows.append(row)
        applied.result.released.append(parent_id)
        applied.result.accounts[parent_id] = account


def _run_may(memory: KvMemory, may: Entries, bounds: StepBounds, applied: AppliedStep) -> None:
    result = applied.result
    num_tokens_left = bounds.max_step_tokens - applied.num_tokens
    is_full = False
    for sequence_id, generation, num_tokens in rows_of(may):
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
    if sequence.row == NO_ROW:
        return _try_admission(memory, sequence, num_tokens, num_tokens_left, applied)
    row = sequence.row
    num_computed = int(memory.sequences.num_computed[row])
    num_left = num_uncomputed(memory, row)
    # A running sequence without a chunk that lacks one token is among the decodes already.
    planned = applied.chunks.get(row, 1 if num_left == 1 and row in applied.decode_rows else 0)
    num_added = min(num_tokens, num_left - planned)
    if num_added < 1 and planned:
        applied.named_rows.add(row)
        return None, 0
    if num_added < 1 or num_added > num_tokens_left:
        return RefusedBecause.NOT_READY, 0
    end = num_computed + planned + num_added
    refused = _grow(memory, sequence, end, is_new=not planned)
    if refused is not None:
        return refused, 0
    applied.chunks[row] = planned + num_added
    applied.named_rows.add(row)
    return None, num_added


def _grow(memory: KvMemory, sequence: Sequence, end: int, *, is_new: bool) -> RefusedBecause | None:
    """Give a running sequence what it lacks to hold ``end`` tokens."""
    row: Int64Array = np.array([sequence.row], dtype=np.int64)
    num_copies_max = memory.options.num_groups if is_new else 0
    num_blocks = memory.tables.num_missing(sequence.row, end) + num_copies_max
    refused = _obstacle(memory, sequence, num_blocks)
    if refused is not None and is_new:
        # More blocks than missing were asked for, should it have to copy; look closer.
        num_blocks -= num_copies_max - len(entries_to_copy(memory, row)[0])
        refused = _obstacle(memory, sequence, num_blocks)
    if refused is None:
        make_writable(memory, row, KvCause.PREFILL)
        memory.cover(sequence.row, end)
    return refused


def _obstacle(
    memory: KvMemory, sequence: Sequence, num_blocks: int, shared: Iterable[int] = ()
) -> RefusedBecause | None:
    """Why a sequence cannot have so many more blocks; pins that may give way to it do not count."""
    if not num_blocks:
        return None
    refused = _obstacle_now(memory, sequence, num_blocks, shared)
    is_over = refused is RefusedBecause.QUOTA and not shared
    if is_over and make_room_below_ceiling(memory, sequence.tenant_id, num_blocks):
        refused = _obstacle_now(memory, sequence, num_blocks, shared)
    return refused


def _obstacle_now(
    memory: KvMemory, sequence: Sequence, num_blocks: int, shared: Iterable[int]
) -> RefusedBecause | None:
    refused = memory.obstacle(sequence.tenant_id, num_blocks)
    if refused is RefusedBecause.POOL_FULL:
        # Too few blocks are available, or floors of others keep those that are.
        nobody_runs = not len(memory.sequences.running_rows())
        needs = {sequence.tenant_id: num_blocks}
        num_more = num_yieldable(memory, needs, shared, with_handles=nobody_runs)
        refused = memory.obstacle(sequence.tenant_id, num_blocks, num_more)
    return refused


def _try_admission(
    memory: KvMemory,
    sequence: Sequence,
    num_tokens: int,
    num_tokens_left: int,
    applied: AppliedStep,
) -> tuple[RefusedBecause | None, int]:
    """Seat a sequence on what is in memory already, and let it compute ``num_tokens`` more."""
    if num_tokens < 1 or not memory.sequences.has_empty_row:
        return RefusedBecause.NOT_READY, 0
    if sequence.sequence_id in memory.unready_ids:
        return RefusedBecause.NOT_READY, 0
    match = memory.match(sequence)
    refused = _obstacle_to_seat(memory, sequence, match, num_tokens)
    if refused is not None and match.needs_copy(memory.options.block_size):
        # The copy is one block more than the sequence alone would take.
        match.leave_out_last(memory.options.block_size)
        refused = _obstacle_to_seat(memory, sequence, match, num_tokens)
    end = _end_of(sequence, match, num_tokens)
    if refused is None and end - match.num_tokens > num_tokens_left:
        refused = RefusedBecause.NOT_READY
    if refused is not None:
        return refused, 0
    if any(content.key not in memory.host for content in match.promotions):
        # What gave way for it went to the host tier over what was to come; try again.
        return RefusedBecause.NOT_READY, 0
    if match.promotions:
        memory.fetch(sequence, match)
        return RefusedBecause.PROMOTING, 0
    memory.seat(sequence, match)
    make_writable(memory, np.array([sequence.row], dtype=np.int64), KvCause.PREFILL)
    memory.cover(sequence.row, end)
    applied.admitted.append(sequence)
    applied.chunks[sequence.row] = end - match.num_tokens
    applied.named_rows.add(sequence.row)
    return None, end - match.num_tokens


def _end_of(sequence: Sequence, match: Match, num_tokens: int) -> int:
    """Where a chunk of ``num_tokens`` after what was found ends."""
    return min(match.num_tokens + num_tokens, len(sequence.parked_tokens))


def _obstacle_to_seat(
    memory: KvMemory, sequence: Sequence, match: Match, num_tokens: int
) -> RefusedBecause | None:
    """Why there are too few blocks for a first chunk of ``num_tokens``."""
    end = _end_of(sequence, match, num_tokens)
    return _obstacle(memory, sequence, _num_blocks_to_hold(memory, match, end), match.block_ids)


def _num_blocks_to_hold(memory: KvMemory, match: Match, end: int) -> int:
    """Blocks that an admission takes from those available: new ones, and cached ones it shares."""
    block_size = memory.options.block_size
    if match.promotions:
        num_new = len(match.promotions)
    else:
        num_copies = int(match.needs_copy(block_size))
        num_new = ceil_div(end, block_size) - match.num_blocks + num_copies
        num_new *= memory.options.num_groups
    states = memory.pool.columns.states[match.block_ids]
    return num_new + int(np.count_nonzero(states == BlockState.CACHED))


def _fork(memory: KvMemory, forks: list[Fork], applied: AppliedStep) -> None:
    """Seat the children of parents that take a token in this step."""
    decoding = set(applied.decode_rows.tolist()) if forks else set()
    for entry in forks:
        parent = memory.sequences.get(entry.parent_id)
        takes_token = (
            parent is not None
            and parent.generation == entry.generation
            and (
                parent.row in decoding
                or applied.chunks.get(parent.row, 0) == _num_left(memory, parent)
            )
        )
        for child_id, sample_index, span_id in zip(
            entry.child_ids, entry.sample_indices, entry.span_ids, strict=True
        ):
            is_new = memory.sequences.get(child_id) is None
            if (
                parent is None
                or not (takes_token and is_new and can_fork(memory, parent))
                or not memory.sequences.has_empty_row
            ):
                applied.result.unforked_ids.append(child_id)
                continue
            trace_span_id = span_id.to_bytes(8, "big") if span_id else b""
            child = fork(memory, parent, child_id, sample_index, trace_span_id)
            applied.forks.append((parent, child))
            applied.result.forked_ids.append(child_id)


def _num_left(memory: KvMemory, sequence: Sequence) -> int:
    """Uncomputed tokens of a running sequence; -1 when it does not run."""
    return num_uncomputed(memory, sequence.row) if sequence.row != NO_ROW else -1
