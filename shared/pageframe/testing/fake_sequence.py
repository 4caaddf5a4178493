"""What the fake engine knows of a sequence, and how much two sequences have in common."""

from dataclasses import dataclass

from pageframe.core.plan import Announcement


def next_token(token_ids: list[int], vocab_size: int) -> int:
    """The token after ``token_ids``, in ``[1, vocab_size)``; depends on each of them."""
    mixed = len(token_ids)
    for token_id in token_ids:
        mixed = (mixed * 31 + token_id + 1) % 1_000_003
    return 1 + mixed % (vocab_size - 1)


@dataclass(slots=True)
class FakeSequence:
    """A sequence; it runs when ``is_running``.

    Attributes:
        announcement: As it came, or the parent's if it was forked.
        token_ids: Prompt and output so far.
        generation: Counts preemptions.
        num_computed: Tokens that its blocks hold.
        is_running: Whether it was admitted.
        num_swapped: Tokens whose blocks the host tier holds for it.
        is_promoted: Whether those are back on the device, for its next admission.
        num_blocks_peak: Most blocks it held.
        num_blocks_shared: Blocks that it used without allocating them.
        num_preemptions: How often it gave blocks up.
    """

    announcement: Announcement
    token_ids: list[int]
    generation: int
    num_computed: int = 0
    is_running: bool = False
    num_swapped: int = 0
    is_promoted: bool = False
    num_blocks_peak: int = 0
    num_blocks_shared: int = 0
    num_preemptions: int = 0

    @property
    def num_output(self) -> int:
        """Tokens behind the prompt."""
        return len(self.token_ids) - self.announcement.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that its blocks do not hold."""
        return len(self.token_ids) - self.num_computed

    @property
    def has_caught_up(self) -> bool:
        """Whether all tokens are computed but the newest, which is computed unasked."""
        is_steered = self.announcement.is_steered
        return self.is_running and self.num_uncomputed == 1 and not is_steered

    def num_common(self, other: "FakeSequence", num_tokens: int, block_size: int) -> int:
        """Tokens in whole blocks that ``other`` could lend out of its first ``num_tokens``."""
        if self.announcement.cache_salt != other.announcement.cache_salt:
            return 0
        limit = min(num_tokens, len(self.token_ids) - 1)
        num_equal = 0
        while num_equal < limit and self.token_ids[num_equal] == other.token_ids[num_equal]:
            num_equal += 1
        return num_equal // block_size * block_size
