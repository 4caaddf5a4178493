"""What it costs a victim to get its keys and values back, as far as that is known beforehand.

    0        given            num_computed     num_reached
    [── others' ──)[────── own ──────)[── lacking ──)[..)
                   [block][block][block][block][block][..)
                   ╰───── published: found, moved or ────╯╰─ computed, always
                          computed again, by ``rates``

Only full blocks are published, so what is behind the last of them is computed again in any case.
Where the full ones are by the time that the victim comes back nobody knows yet: untouched on the
device, on the host, or gone. What became of those of others that came back is the best guess.

``num_reached`` is where it stood before it lost anything. Who loses again on its way back gets back
all of that, once: what it then finds, it finds whichever loss it was that gave it up.
"""

from pageframe.scheduler.rates import Rates
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence


class GettingBack:
    """Estimates, in nanoseconds of the device that nothing else can have.

    Args:
        roster: Knows the sizes of blocks.
        rates: What tokens and copies cost, and where blocks of victims end up.
    """

    def __init__(self, roster: Roster, rates: Rates) -> None:
        self._roster = roster
        self._rates = rates

    def by_finding_ns(self, sequence: Sequence) -> int:
        """All blocks go, and what is found again is not computed; others keep what they gave."""
        return round(self._finding_ns(sequence.num_given_tokens, sequence.num_reached))

    def by_swap_ns(self, sequence: Sequence) -> int:
        """Each block comes from the host tier; of most it goes there first, if none is there.

        What it lacks already is found or computed, as if it had not been swapped.
        """
        num_blocks = self._roster.capacity.num_blocks_held(sequence.num_computed)
        num_out = max(0, num_blocks - sequence.num_host_blocks)
        copies_ns = (num_out + num_blocks) * self._rates.block_ns
        return round(copies_ns + self._finding_ns(sequence.num_computed, sequence.num_reached))

    def by_computing_ns(self, sequence: Sequence, num_kept: int) -> int:
        """It keeps the first ``num_kept`` tokens and computes the others; it looks for none."""
        return round(max(0, sequence.num_reached - num_kept) * self._rates.token_ns)

    def _finding_ns(self, start: int, end: int) -> float:
        """Tokens ``[start, end)`` are looked for, and those that are not found are computed."""
        rates = self._rates
        num_found = max(0, self._roster.capacity.floor(end) - start)
        num_blocks = num_own_full_blocks(self._roster, start, end)
        num_computed = max(0, end - start) - num_found * (1 - rates.gone_share)
        return num_computed * rates.token_ns + num_blocks * rates.moved_share * rates.block_ns


def num_own_full_blocks(roster: Roster, start: int, end: int) -> int:
    """Blocks that ``end`` tokens fill, less those that the first ``start`` of them fill."""
    num_full_blocks = roster.capacity.num_full_blocks
    return max(0, num_full_blocks(end) - num_full_blocks(start))
