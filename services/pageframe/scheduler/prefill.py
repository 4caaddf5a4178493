"""Growth of prefills that run already: first joined first, as much as the budget leaves."""

from pageframe.scheduler.budget import Draft
from pageframe.scheduler.roster import Roster


def num_blocks_owed(roster: Roster) -> int:
    """Blocks that prefills still need until all their tokens are computed.

    Admission promised them; nobody else may be promised the same.
    """
    num_blocks = roster.capacity.num_blocks
    return sum(
        num_blocks(sequence.num_tokens) - num_blocks(sequence.num_planned)
        for sequence in roster.prefills
    )


def grow_prefills(draft: Draft, roster: Roster) -> None:
    """Give each prefill its next chunk, in order, until the token budget is used up.

    Chunks go into ``may``: one that the pool has no room for waits without disturbing the decodes.
    A head that went into ``must`` has the rest as its victims, so they get nothing.
    """
    if draft.plan.must.sequence_ids:
        roster.expect(roster.prefills.first)
        return
    for sequence in list(roster.prefills):
        if draft.num_tokens_left > 0:
            draft.ask(sequence, draft.plan.may)
            roster.expect(sequence)
        else:
            draft.flight.passed_over.append(sequence)
