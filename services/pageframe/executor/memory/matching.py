"""How much of a sequence is in memory already, and where.

    tokens      [ block 0 ][ block 1 ][ block 2 ][ block 3 ][ 4.. )
    device        hit        hit
    host                                in         in                   promote, then ask again
    inside                   or: the first k tokens of some cached block go on where hits end

Where layers have a sliding window, only what the next token reads has to be there:

    full        hit        hit        hit        hit
    window      gone       gone       hit        hit        4 blocks are found

so the match is the longest at whose end no group of layers lacks anything. At least the newest
token has to be computed, or nothing would be sampled, so a hit covers at most ``num_tokens - 1``
tokens and may end inside a block; whoever writes there copies it first.

Looking from the end of the prompt for the last window's worth of a group is how vLLM's hybrid KV
cache manager finds hits in models with several kinds of layers.
"""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.units import ceil_div
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_keys import BlockKey, token_bytes
from pageframe.executor.memory.host_tier import HostTier
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.prefix_index import NO_BLOCK, PrefixIndex
from pageframe.executor.memory.sequence_table import Sequence, SwappedTail
from pageframe.executor.memory.transfers import Content

_NO_TOKENS: Int32Array = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Match:
    """What was found.

    Attributes:
        block_ids: Device blocks to share, in the order of a block table.
        num_tokens: Tokens that they hold for this sequence, from the first.
        promotions: What the host tier has in between or behind.
        ends_in_own: Whether the last block is nobody else's, and may be written in place.
        num_blocks: Logical blocks that will be there once the promotions are.
        first_blocks: The logical block with which each group of layers begins; one for all.
    """

    block_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    promotions: list[Content] = field(default_factory=list)
    ends_in_own: bool = False
    num_blocks: int = 0
    first_blocks: AbstractSequence[int] = (0,)

    def needs_copy(self, block_size: int) -> bool:
        """Whether the last block has to be copied before the sequence can go on."""
        return self.num_tokens % block_size != 0 and not (self.promotions or self.ends_in_own)

    def leave_out_last(self, block_size: int) -> None:
        """Do without the last logical block, of which only a part is of use."""
        self.num_blocks -= 1
        del self.block_ids[-len(self.first_blocks) :]
        self.num_tokens = self.num_blocks * block_size

    def num_tokens_in_all(self, block_size: int, num_tokens: int) -> int:
        """Tokens that will be there once the promotions are, of a sequence of ``num_tokens``."""
        if not self.promotions:
            return self.num_tokens
        return min(self.num_blocks * block_size, num_tokens - 1)


def find_prefix(
    sequence: Sequence, options: MemoryOptions, index: PrefixIndex, host: HostTier
) -> Match:
    """The longest prefix of a sequence without a row that is in memory; changes nothing.

    Args:
        sequence: Whose tokens and keys to use.
        options: Block size, and windows of the groups of layers.
        index: Where the device's blocks are found.
        host: Where the host's are.
    """
    token_ids, block_size = sequence.parked_tokens, options.block_size
    num_tokens = len(token_ids)
    if num_tokens < 2 or _wants_every_logit(sequence, num_tokens):
        return Match()
    keys = [chain.up_to(num_tokens, token_ids, block_size) for chain in sequence.chains]
    search = _Search(sequence, keys, options, index, host)
    # With blocks of one token the last one found would be written anew: it is of no use.
    num_blocks_max = ceil_div(num_tokens - 1, block_size)
    # Who finds every token goes on in a copy of the last block, or without it: see that both work.
    position_max = (num_tokens - 1) // block_size * block_size
    num_blocks = search.longest(num_blocks_max, position_max)
    tail = sequence.swapped_tail
    if tail is not None and num_blocks <= tail.depth and search.has_tail(tail):
        return search.match_with_tail(tail)
    match = search.match(num_blocks, min(num_blocks * block_size, position_max))
    is_whole = match.num_tokens == num_blocks * block_size and not match.promotions
    match.num_tokens = min(match.num_tokens, num_tokens - 1)
    if is_whole and match.num_tokens == num_blocks * block_size:
        _go_inside(match, sequence, keys, index)
    return match


class _Search:
    """What is in memory of the full blocks of one sequence; ``keys`` are those of each group."""

    def __init__(
        self,
        sequence: Sequence,
        keys: list[list[BlockKey]],
        options: MemoryOptions,
        index: PrefixIndex,
        host: HostTier,
    ) -> None:
        self._sequence = sequence
        self._keys = keys
        self._options = options
        self._index = index
        self._host = host
        # Of groups without a window, what is there from the first block on. Of the others only
        # the last few blocks matter, wherever that is.
        self._runs = {
            group: self._run(keys[group])
            for group, window in enumerate(options.windows)
            if not window
        }
        self._windowed = [group for group, window in enumerate(options.windows) if window]

    def longest(self, num_blocks_max: int, position_max: int) -> int:
        """The most logical blocks at whose end no group lacks what the next token reads.

        Each block is looked at once or twice.

        Args:
            num_blocks_max: No more than so many.
            position_max: The next token stands behind the blocks, but at most there.
        """
        end = min(num_blocks_max, len(self._keys[0]), *(len(run) for run in self._runs.values()))
        lows = dict.fromkeys(self._windowed, end)  # Of each group, [low, end) is in memory.
        lacks = bool(lows)
        while lacks:
            lacks = False
            firsts = self._options.first_blocks(min(end * self._options.block_size, position_max))
            for group in self._windowed:
                lows[group] = self._lowest(group, lows[group], firsts[group])
                if lows[group] > firsts[group]:
                    # Block low - 1 is lacking, which is read from every end behind it.
                    end, lacks = self._last(group, lows[group] - 1), True
                    lows = {other: min(low, end) for other, low in lows.items()}
                    break
        return end

    def has_tail(self, tail: SwappedTail) -> bool:
        """Whether a tail is in memory, and all that the token behind it reads."""
        position = tail.depth * self._options.block_size + tail.num_tokens
        firsts = self._options.first_blocks(position)
        return (
            all(self._has(key) for key in tail.keys)
            and all(len(run) >= tail.depth for run in self._runs.values())
            and all(self._lowest(it, tail.depth, firsts[it]) <= firsts[it] for it in self._windowed)
        )

    def match(self, end: int, position: int) -> Match:
        """Where the first ``end`` blocks lie, as far as the token at ``position`` reads them."""
        firsts = self._options.first_blocks(position)
        match = Match(num_blocks=end, num_tokens=end * self._options.block_size)
        match.first_blocks = firsts
        if len(firsts) == 1 and self._runs:
            match.block_ids = self._runs[0][:end]
            if NO_BLOCK not in match.block_ids:
                return match
            match.block_ids = []
        for depth in range(min(firsts), end):
            for group, first in enumerate(firsts):
                if depth >= first:
                    self._add(match, self._keys[group][depth], group, depth)
        if match.promotions:
            match.num_tokens = match.promotions[0].depth * self._options.block_size
        return match

    def match_with_tail(self, tail: SwappedTail) -> Match:
        """The same for all blocks before a tail, and the tail itself."""
        match = self.match(tail.depth, tail.depth * self._options.block_size + tail.num_tokens)
        for group, key in enumerate(tail.keys):
            self._add(match, key, group, tail.depth)
        match.num_blocks += 1
        if not match.promotions:
            match.num_tokens += tail.num_tokens
            match.ends_in_own = True
        return match

    def _run(self, keys: list[BlockKey]) -> list[int]:
        """Blocks from the first on, ``NO_BLOCK`` for those that only the host tier has."""
        found = self._index.match(keys)
        if self._host.num_slots:
            for key in keys[len(found) :]:
                block_id = self._index.block_of(key)
                if block_id == NO_BLOCK and key not in self._host:
                    break
                found.append(block_id)
        return found

    def _lowest(self, group: int, low: int, first: int) -> int:
        """How far back from block ``low`` a group has everything; no further than ``first``."""
        keys = self._keys[group]
        while low > first and self._has(keys[low - 1]):
            low -= 1
        return low

    def _last(self, group: int, end: int) -> int:
        """The nearest end, from ``end`` backwards, before which a group has a block."""
        keys = self._keys[group]
        while end and not self._has(keys[end - 1]):
            end -= 1
        return end

    def _has(self, key: BlockKey) -> bool:
        return self._index.block_of(key) != NO_BLOCK or key in self._host

    def _add(self, match: Match, key: BlockKey, group: int, depth: int) -> None:
        block_id = self._index.block_of(key)
        if block_id != NO_BLOCK:
            match.block_ids.append(block_id)
            return
        start, block_size = depth * self._options.block_size, self._options.block_size
        is_full = depth < len(self._keys[group]) and key == self._keys[group][depth]
        tokens = self._sequence.parked_tokens[start : start + block_size] if is_full else _NO_TOKENS
        parent = self._sequence.chains[group].parent_of(depth)
        match.promotions.append(Content(key, parent, token_bytes(tokens), depth, group))


def _wants_every_logit(sequence: Sequence, num_tokens: int) -> bool:
    """Whether log-probabilities of its prompt are still to be told: they have to be computed."""
    is_untold = num_tokens <= sequence.num_prompt_tokens
    return sequence.sampling.num_prompt_logprobs >= 0 and is_untold


def _go_inside(
    match: Match, sequence: Sequence, keys: list[list[BlockKey]], index: PrefixIndex
) -> None:
    """Add the block of each group that goes on for some tokens where whole blocks end."""
    block_size, end = index.block_size, match.num_blocks
    start = end * block_size
    token_ids = sequence.parked_tokens
    wanted = token_ids[start : min(start + block_size, len(token_ids) - 1)]
    if not len(wanted):
        return
    # Groups may go on in blocks of different prompts: what agrees in tokens agrees in content.
    found = [
        index.match_inside(keys[group][end - 1] if end else chain.root, wanted)
        for group, chain in enumerate(sequence.chains)
    ]
    num_inside = min(num_tokens for _, num_tokens in found)
    if num_inside:
        match.block_ids += [block_id for block_id, _ in found]
        match.num_tokens += num_inside
        match.num_blocks += 1
