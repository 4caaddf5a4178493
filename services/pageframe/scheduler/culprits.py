"""For whose sake a sequence waits, as far as a plan can tell at no cost.

A culprit is not at fault: it is whose end, or whose next step, would let the other one move.

| waits for    | culprit                                                              |
|--------------|----------------------------------------------------------------------|
| token_budget | the largest chunk of the step: its tokens went there first           |
| kv_full      | who has run longest: its blocks come back first                      |
| swap_in      | for whose sake it had been swapped out                               |

Who was preempted, and who waits for a prefix that another one computes, is told at that place.
"""

from pageframe.core.request import StallCause
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence


def culprit_of(
    sequence: Sequence, cause: StallCause, flight: Flight, roster: Roster
) -> Sequence | None:
    """The sequence for whose sake ``flight`` leaves ``sequence`` out; None where nobody is known.

    Costs as much as the flight has chunks.
    """
    culprit = None
    if cause is StallCause.TOKEN_BUDGET:
        largest = max(flight.chunks, key=lambda chunk: chunk.num_tokens, default=None)
        culprit = largest.sequence if largest else None
    elif cause is StallCause.KV_FULL:
        culprit = roster.oldest
    elif cause is StallCause.SWAP_IN and sequence.loss is not None:
        culprit = sequence.loss.beneficiary
    return culprit if culprit is not sequence else None
