"""Who computes what others may want too: running sequences by what their prompts begin with.

The executor knows which prefixes are about to be computed, and its answer to an announcement names
the leader. Between announcement and answer this is the scheduler's guess: same salt, same first
block, and that block was not found in the prefix index.
"""

from array import array

from pageframe.scheduler.sequence import Prefix, Sequence


class Prefixes:
    """Running sequences that have not caught up, by prefix; others share whole blocks of them.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._computing: dict[Prefix, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._computing)

    def begin(self, sequence: Sequence) -> None:
        """``sequence`` is being admitted."""
        prefix = self._prefix_of(sequence)
        if prefix is not None and sequence.num_cached_tokens < self._block_size:
            assert sequence.prefix is None, f"sequence {sequence.sequence_id} is in already"
            sequence.prefix = prefix
            self._computing.setdefault(prefix, []).append(sequence)

    def end(self, sequence: Sequence) -> None:
        """``sequence`` has caught up, or its first block was found, or it runs no longer."""
        prefix = sequence.prefix
        if prefix is None:
            return
        sequence.prefix = None
        others = self._computing[prefix]
        others.remove(sequence)
        if not others:
            del self._computing[prefix]

    def find(self, sequence: Sequence) -> Sequence | None:
        """The first that computes what ``sequence`` begins with, if somebody does."""
        # The newest token is never shared, so a prompt of one block has no whole block to share.
        if not self._computing or sequence.num_tokens <= self._block_size:
            return None
        prefix = self._prefix_of(sequence)
        others = self._computing.get(prefix) if prefix is not None else None
        return others[0] if others else None

    def _prefix_of(self, sequence: Sequence) -> Prefix | None:
        if sequence.num_prompt_tokens < self._block_size:
            return None
        submission = sequence.submission
        first = array("i", submission.prompt_token_ids[: self._block_size])
        return submission.cache_salt, first.tobytes()
