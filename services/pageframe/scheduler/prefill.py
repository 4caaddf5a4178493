"""Growth of prefills that run already: first joined first, as much as the budget leaves."""

from collections.abc import Callable

from pageframe.core.request import StallCause
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.forks import is_certain
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence


def num_blocks_owed(roster: Roster) -> int:
    """Blocks that running sequences still need until their prompts, and siblings', are complete.

    Admission promised them; nobody else may be promised the same. Each sibling gets one: a copy of
    the last block, or one of its own behind it.
    """
    num_blocks_owed = roster.capacity.num_blocks_owed
    num_owed = sum(num_blocks_owed(it.num_planned, it.num_tokens) for it in roster.prefills)
    return num_owed + roster.num_siblings_promised * roster.capacity.num_kv_groups


def grow_prefills(
    builder: PlanBuilder,
    roster: Roster,
    admit_ahead_of: Callable[[PlanBuilder, Sequence], None],
    *,
    is_cooling: bool,
) -> None:
    """Give each prefill its next chunk, in order, until the token budget is used up.

    The order is that of joining; between tenants it is that of the line, and who waits there and is
    ahead of a prefill comes in first. So a long prompt of a tenant that was served much keeps
    nobody waiting who was served little.

    Chunks go into ``may``: one that the pool has no room for waits without disturbing the decodes.
    A head that went into ``must`` has the rest as its victims, so they get nothing. ``is_cooling``
    says that somebody lost blocks not long ago.
    """
    if builder.head is not None:
        roster.expect(builder.head)
        return
    prefills, tick = list(roster.prefills), builder.flight.tick
    # One that found more than expected has caught up by then, and takes a token unasked.
    uncertain = {s.sequence_id for s in prefills if not is_certain(s, tick)}
    builder.num_tokens_left -= len(uncertain)
    has_tenants = len(roster.shares) > 1
    if has_tenants:
        prefills.sort(key=roster.line.rank_of)
    for sequence in prefills:
        if has_tenants:
            admit_ahead_of(builder, sequence)
        num_set_aside = sequence.sequence_id in uncertain
        builder.num_tokens_left += num_set_aside
        cause = _wait_cause(builder, roster, sequence, is_cooling=is_cooling)
        if cause is None:
            builder.ask(sequence, builder.plan.may)
            roster.expect(sequence)
            continue
        builder.flight.passed_over.append((sequence, cause))
        if builder.num_tokens_left > 0:
            builder.num_tokens_left -= num_set_aside


def _wait_cause(
    builder: PlanBuilder, roster: Roster, sequence: Sequence, *, is_cooling: bool
) -> StallCause | None:
    """What the prefill has to wait for; None when it gets its next chunk."""
    if builder.num_tokens_left <= 0:
        return StallCause.TOKEN_BUDGET
    if _may_not_grow(builder, roster, sequence, is_cooling=is_cooling):
        return StallCause.KV_FULL
    if _may_not_end(builder, roster, sequence):
        return StallCause.EXECUTOR
    return None


def _may_not_grow(
    builder: PlanBuilder, roster: Roster, sequence: Sequence, *, is_cooling: bool
) -> bool:
    """Whether it gave its last blocks to those who decode, and would only lose them again.

    The rule is that of admissions: some blocks have to be left, and for some steps as many as the
    sequence will ever take. It does not hold when nobody decodes.
    """
    if not sequence.has_lost_tail or not builder.flight.num_decodes:
        return False
    capacity = roster.capacity
    num_blocks = capacity.num_blocks_watermark
    if is_cooling:
        num_blocks += capacity.num_blocks_peak(sequence.num_positions_max)
        num_blocks -= capacity.num_blocks_peak(sequence.num_tokens)
    # What it lacks until all its known tokens are computed is set aside already.
    return builder.num_blocks_left < num_blocks


def _may_not_end(builder: PlanBuilder, roster: Roster, sequence: Sequence) -> bool:
    """Whether its next chunk is worth a fork, but not certain to be the last; see ``forks``."""
    if sequence.sequence_id not in roster.parents or is_certain(sequence, builder.flight.tick):
        return False
    return sequence.num_uncomputed - builder.num_chunk_tokens_max <= 1
