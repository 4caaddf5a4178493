"""Sequences that take no token unless a plan asks for it, because it depends on the one before.

tick           k                      k + 1
caught up      token                  token, unasked
steered        asked for: a result    decide what follows; ask again

Which token a steered sequence goes on with is decided here, from what the last result said of it;
so as long as one runs, each plan waits for the result before it, and there is no look-ahead. In
everything else it is a sequence like any other: it is admitted, catches up with chunks, gives way
to others and comes back. Only what it computes once it has caught up is an entry of ``must``.
"""

from collections.abc import Iterator

from pageframe.core.limits import LIMITS
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.sequence import Sequence

_CUT = LIMITS.num_tokens_per_decode_span_max


class Steered:
    """Running sequences that are steered and have caught up, or will with the plan in flight.

    Attributes:
        num_copies: Blocks that their next tokens copy because they are shared; whoever forks them
            counts them here, and the next plan takes them off.
    """

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}
        self.num_copies = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._sequences

    def join(self, sequence: Sequence) -> None:
        """From now on each of its tokens is asked for; nothing changes if that is so already."""
        self._sequences.setdefault(sequence.sequence_id, sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is asked for no longer; it must be among them."""
        del self._sequences[sequence.sequence_id]

    def ask(self, builder: PlanBuilder) -> None:
        """Put the next token of each into ``must``; the plan has asked for nothing yet.

        Like tokens of those that decode by themselves they are never left out of a step, and the
        blocks they need are promised to nobody else.
        """
        num_blocks = builder.flight.num_blocks
        builder.flight.num_blocks += self.num_copies
        self.num_copies = 0
        for sequence in self._sequences.values():
            if sequence.num_uncomputed:
                builder.ask(sequence, builder.plan.must)
        builder.num_blocks_left -= builder.flight.num_blocks - num_blocks

    def cut(self) -> Iterator[Sequence]:
        """Those whose decode span is as long as it may become."""
        return (s for s in self if s.num_computed - s.run_start >= _CUT)
