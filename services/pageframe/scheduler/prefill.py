"""Growth of prefills that run already: first joined first, as much as the budget leaves."""

from pageframe.scheduler.budget import Draft
from pageframe.scheduler.forks import is_certain
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence


def num_blocks_owed(roster: Roster) -> int:
    """Blocks that running sequences still need until their prompts, and siblings', are complete.

    Admission promised them; nobody else may be promised the same. Each sibling gets one: a copy of
    the last block, or one of its own behind it.
    """
    num_blocks = roster.capacity.num_blocks
    num_owed = sum(
        num_blocks(sequence.num_tokens) - num_blocks(sequence.num_planned)
        for sequence in roster.prefills
    )
    return num_owed + roster.num_siblings_promised


def grow_prefills(draft: Draft, roster: Roster) -> None:
    """Give each prefill its next chunk, in order, until the token budget is used up.

    Chunks go into ``may``: one that the pool has no room for waits without disturbing the decodes.
    A head that went into ``must`` has the rest as its victims, so they get nothing.
    """
    if draft.plan.must.sequence_ids:
        (head_id,) = draft.plan.must.sequence_ids
        roster.expect(roster.running[head_id])
        return
    prefills, tick = list(roster.prefills), draft.flight.tick
    # One that found more than expected has caught up by then, and takes a token unasked.
    uncertain = {s.sequence_id for s in prefills if not is_certain(s, tick)}
    draft.num_tokens_left -= len(uncertain)
    for sequence in prefills:
        num_set_aside = sequence.sequence_id in uncertain
        draft.num_tokens_left += num_set_aside
        if draft.num_tokens_left <= 0:
            draft.flight.passed_over.append(sequence)
        elif _has_to_wait(draft, roster, sequence):
            draft.num_tokens_left -= num_set_aside
        else:
            draft.ask(sequence, draft.plan.may)
            roster.expect(sequence)


def _has_to_wait(draft: Draft, roster: Roster, sequence: Sequence) -> bool:
    if sequence.has_lost_tail and draft.num_blocks_left < 0 and draft.flight.num_decodes:
        # It gave its blocks to those who decode, and would take them back from under them.
        return True
    if sequence.sequence_id not in roster.parents or is_certain(sequence, draft.flight.tick):
        return False
    # Its last chunk is worth a fork only when it is certain to be the last; see ``forks``.
    return sequence.num_uncomputed - draft.num_chunk_tokens_max <= 1
