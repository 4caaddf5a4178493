"""Who computes what others may want too: running sequences by what their prompts begin with.

The executor knows which prefixes are about to be computed, and its answer to an announcement names
the leader. Between announcement and answer this is the scheduler's guess: same salt, same first
block, and some whole block in common that is neither computed yet nor usually found.

    other      [── found or computed ──)[───────────── to compute ──)
    sequence   [──────────── equal ────────────────)[── other tokens ─)
               [─ usually found ─)      [─ worth ─)
"""

import hashlib
from array import array
from collections import OrderedDict

from pageframe.core.request import Submission
from pageframe.scheduler.sequence import Prefix, Sequence

# Of those that begin alike so many are looked at.
_NUM_COMPARED_MAX = 8
# Prompts that have so many first tokens in common are of one group.
_NUM_GROUP_TOKENS = 64
# Prefixes of which it is remembered how much is usually found.
_NUM_USUAL_MAX = 1024


def prefix_group(submission: Submission) -> int:
    """A number for how the prompt begins, the same in every process; below 2**64."""
    digest = hashlib.blake2b(submission.cache_salt, digest_size=8)
    digest.update(array("i", submission.prompt_token_ids[:_NUM_GROUP_TOKENS]).tobytes())
    return int.from_bytes(digest.digest(), "big")


class Prefixes:
    """Running sequences that have not caught up, by prefix.

    Many prompts begin with the same words of the house, and those are in the prefix index nearly
    always: they are no reason to wait. So it is remembered how much admissions find that begin with
    one first block: the least of it, or the latest if the one before found nothing.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._computing: dict[Prefix, list[Sequence]] = {}
        self._num_usual: OrderedDict[Prefix, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._computing)

    def begin(self, sequence: Sequence) -> None:
        """``sequence`` is being admitted."""
        prefix = self._prefix_of(sequence)
        if prefix is not None:
            assert sequence.prefix is None, f"sequence {sequence.sequence_id} is in already"
            sequence.prefix = prefix
            self._computing.setdefault(prefix, []).append(sequence)

    def confirm(self, sequence: Sequence, num_found: int) -> None:
        """``sequence`` was admitted, and its first ``num_found`` tokens were found."""
        prefix = sequence.prefix
        if prefix is None:
            return
        num_usual = self._num_usual.pop(prefix, 0)
        self._num_usual[prefix] = min(num_usual, num_found) if num_usual else num_found
        if len(self._num_usual) > _NUM_USUAL_MAX:
            self._num_usual.popitem(last=False)

    def end(self, sequence: Sequence) -> None:
        """``sequence`` has caught up, or runs no longer; it need not be in."""
        prefix = sequence.prefix
        if prefix is None:
            return
        sequence.prefix = None
        others = self._computing[prefix]
        others.remove(sequence)
        if not others:
            del self._computing[prefix]

    def find(self, sequence: Sequence) -> Sequence | None:
        """The first that computes what ``sequence`` would have to compute too, if somebody does."""
        if not self._computing:
            return None
        prefix = self._prefix_of(sequence)
        others = self._computing.get(prefix) if prefix is not None else None
        if prefix is None or others is None:
            return None
        num_usual = self._num_usual.get(prefix, 0)
        for other in others[:_NUM_COMPARED_MAX]:
            num_there = max(num_usual, other.num_computed, other.num_cached_tokens)
            if self._num_common(sequence, other) > num_there:
                return other
        return None

    def _num_common(self, sequence: Sequence, other: Sequence) -> int:
        """Tokens of whole blocks that both prompts have in common; the newest is never shared."""
        ours, theirs = sequence.submission.prompt_token_ids, other.submission.prompt_token_ids
        num_blocks = min(sequence.num_tokens - 1, len(ours), len(theirs)) // self._block_size
        low, high = 0, num_blocks
        while low < high:
            middle = (low + high + 1) // 2
            part = slice(low * self._block_size, middle * self._block_size)
            if ours[part] == theirs[part]:
                low = middle
            else:
                high = middle - 1
        return low * self._block_size

    def _prefix_of(self, sequence: Sequence) -> Prefix | None:
        if sequence.num_prompt_tokens < self._block_size:
            return None
        if sequence.first_block is None:
            submission = sequence.submission
            first = array("i", submission.prompt_token_ids[: self._block_size])
            sequence.first_block = submission.cache_salt, first.tobytes()
        return sequence.first_block
