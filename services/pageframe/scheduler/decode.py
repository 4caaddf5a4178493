"""The sequences that take one token in every step without being asked, counted in constant time.

Time is counted in *ticks*: one for each step that is applied, none for a plan that is refused.
While a sequence decodes, the position it computes minus the tick is constant: its *origin*. All
that a plan needs to know of the decodes follows from counts by origin, so no plan and no result
walks over them:

    tick t computes position           origin + t
    it needs a new block when          (origin + t) % block_size == 0
    its decode span is cut after       (origin + t) % 128 == 127
    it makes its last token in tick    last position - origin

The children of a fork share the block that their first write goes into; each of them but one copies
it, all in the same tick. Those copies are counted by tick.
"""

from collections.abc import Iterable

from pageframe.core.limits import LIMITS
from pageframe.scheduler.sequence import Sequence

_CUT = LIMITS.num_tokens_per_decode_span_max


class DecodeSet:
    """Sequences that decode, or will once the plans in flight are applied.

    Attributes:
        num_tokens_ahead: Most tokens by which one may be further than counted here, because of
            drafts in plans in flight; see ``speculation``.
        num_sequences_ahead: Most of them that may be.
    """

    def __init__(self, block_size: int, num_kv_groups: int = 1) -> None:
        self._block_size = block_size
        self._num_kv_groups = num_kv_groups
        self._num_by_phase = [0] * block_size
        self._wheel: list[dict[int, Sequence]] = [{} for _ in range(_CUT)]
        self._num_ending: dict[int, int] = {}
        self._num_copies: dict[int, int] = {}
        self._num_sequences = 0
        self._sum_origins = 0
        self.num_tokens_ahead = 0
        self.num_sequences_ahead = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.decode_origin is not None

    def join(
        self, sequence: Sequence, *, position: int, tick: int, copies_block: bool = False
    ) -> None:
        """From ``tick`` on, ``sequence`` computes one token each, the first at ``position``.

        With ``copies_block`` it copies the block of that position first.
        """
        origin = position - tick
        if sequence.decode_origin == origin:
            return
        if sequence.decode_origin is not None:
            self.leave(sequence)
        sequence.decode_origin = origin
        if copies_block:
            sequence.copy_tick = tick
            _change(self._num_copies, tick, 1)
        self._count(sequence, origin, 1)
        self._wheel[origin % _CUT][sequence.sequence_id] = sequence

    def leave(self, sequence: Sequence) -> None:
        """Decode no longer; the sequence must be in the set."""
        origin = sequence.decode_origin
        assert origin is not None, f"sequence {sequence.sequence_id} does not decode"
        sequence.decode_origin = None
        if sequence.copy_tick is not None:
            _change(self._num_copies, sequence.copy_tick, -1)
            sequence.copy_tick = None
        self._count(sequence, origin, -1)
        del self._wheel[origin % _CUT][sequence.sequence_id]

    def num_at(self, tick: int, num_in_flight: int) -> int:
        """How many take a token in ``tick``, less those whose last one is in flight before it."""
        num_ending = 0
        for tick_in_flight in range(tick - num_in_flight, tick):
            num_ending += self._num_ending.get(tick_in_flight, 0)
        return self._num_sequences - num_ending

    def num_blocks_at(self, tick: int) -> int:
        """How many blocks they need in ``tick``, at most."""
        num_each = self._num_by_phase[-tick % self._block_size] + self._num_copies.get(tick, 0)
        return (num_each + self.num_sequences_ahead) * self._num_kv_groups

    def num_context_at(self, tick: int) -> int:
        """How many positions they attend to in ``tick``, at most; each sees its own as well."""
        return self._sum_origins + self._num_sequences * (tick + 1)

    def tick_of(self, sequence: Sequence, position: int) -> int:
        """In which tick ``sequence`` computes ``position``; it must be in the set."""
        assert sequence.decode_origin is not None, (
            f"sequence {sequence.sequence_id} does not decode"
        )
        return position - sequence.decode_origin

    def cut_after(self, tick: int) -> Iterable[Sequence]:
        """Those that computed the last position of a decode span in ``tick``."""
        return self._wheel[(_CUT - 1 - tick) % _CUT].values()

    def _count(self, sequence: Sequence, origin: int, change: int) -> None:
        self._num_sequences += change
        self._sum_origins += change * origin
        self._num_by_phase[origin % self._block_size] += change
        _change(self._num_ending, sequence.num_positions_max - 1 - origin, change)


def _change(counts: dict[int, int], tick: int, change: int) -> None:
    """Add to a count that is left out while it is 0."""
    count = counts.get(tick, 0) + change
    if count:
        counts[tick] = count
    else:
        del counts[tick]
