"""How much of a sequence is in memory already, and where.

    tokens      [ block 0 ][ block 1 ][ block 2 ][ block 3 ][ 4.. )
    device        hit        hit
    host                                in         in                   promote, then ask again
    inside                   or: the first k tokens of some cached block go on where hits end

At least the newest token has to be computed, or nothing would be sampled, so a hit covers at most
``num_tokens - 1`` tokens and may end inside a block; whoever writes there copies it first.
"""

from dataclasses import dataclass, field

from pageframe.core.units import ceil_div
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_keys import BlockKey, token_bytes
from pageframe.executor.memory.host_tier import HostTier
from pageframe.executor.memory.prefix_index import NO_BLOCK, PrefixIndex
from pageframe.executor.memory.sequence_table import Sequence
from pageframe.executor.memory.transfers import Content


@dataclass(slots=True)
class Match:
    """What was found.

    Attributes:
        block_ids: Device blocks to share, from logical block 0.
        num_tokens: Tokens that they hold for this sequence.
        promotions: What follows in the host tier.
        ends_in_own: Whether the last block is nobody else's, and may be written in place.
    """

    block_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    promotions: list[Content] = field(default_factory=list)
    ends_in_own: bool = False

    def needs_copy(self, block_size: int) -> bool:
        """Whether the last block has to be copied before the sequence can go on."""
        return self.num_tokens % block_size != 0 and not (self.promotions or self.ends_in_own)

    def leave_out_last(self, block_size: int) -> None:
        """Do without the last block, of which only a part is of use."""
        self.block_ids.pop()
        self.num_tokens = len(self.block_ids) * block_size

    def num_tokens_in_all(self, block_size: int, num_tokens: int) -> int:
        """Tokens that will be there once the promotions are, of a sequence of ``num_tokens``."""
        if not self.promotions:
            return self.num_tokens
        return min((len(self.block_ids) + len(self.promotions)) * block_size, num_tokens - 1)


def find_prefix(
    sequence: Sequence, token_ids: Int32Array, index: PrefixIndex, host: HostTier
) -> Match:
    """The longest prefix of ``token_ids`` that is in memory; changes nothing.

    Args:
        sequence: Whose keys to use.
        token_ids: int32 [num_tokens], all its tokens.
        index: Where the device's blocks are found.
        host: Where the host's are.
    """
    num_tokens, block_size = len(token_ids), index.block_size
    if num_tokens < 2 or _wants_every_logit(sequence, num_tokens):
        return Match()
    keys = sequence.keys.up_to(num_tokens, token_ids, block_size)
    match = Match(index.match(keys))
    num_found = len(match.block_ids)
    match.num_tokens = min(num_found * block_size, num_tokens - 1)
    if host.num_slots:
        match.promotions = _in_host(sequence, keys, num_found, token_ids, index, host)
    # With blocks of one token the last one found would be written anew: it is of no use.
    del match.block_ids[ceil_div(match.num_tokens, block_size) :]
    if not match.promotions and match.num_tokens == num_found * block_size:
        _go_inside(match, sequence, keys, token_ids, index)
    return match


def _wants_every_logit(sequence: Sequence, num_tokens: int) -> bool:
    """Whether log-probabilities of its prompt are still to be told: they have to be computed."""
    is_untold = num_tokens <= sequence.num_prompt_tokens
    return sequence.sampling.num_prompt_logprobs >= 0 and is_untold


def _in_host(
    sequence: Sequence,
    keys: list[BlockKey],
    num_found: int,
    token_ids: Int32Array,
    index: PrefixIndex,
    host: HostTier,
) -> list[Content]:
    block_size = index.block_size
    contents: list[Content] = []
    depth = num_found
    while depth < len(keys) and _is_only_in_host(keys[depth], index, host):
        tokens = token_bytes(token_ids[depth * block_size : (depth + 1) * block_size])
        contents.append(Content(keys[depth], sequence.keys.parent_of(depth), tokens, depth))
        depth += 1
    tail = sequence.swapped_tail
    if tail is not None and tail.depth == depth and _is_only_in_host(tail.key, index, host):
        contents.append(Content(tail.key, sequence.keys.parent_of(depth), b"", depth))
    return contents


def _is_only_in_host(key: BlockKey, index: PrefixIndex, host: HostTier) -> bool:
    return key in host and index.block_of(key) == NO_BLOCK


def _go_inside(
    match: Match,
    sequence: Sequence,
    keys: list[BlockKey],
    token_ids: Int32Array,
    index: PrefixIndex,
) -> None:
    """Add the block that goes on for some tokens where whole blocks end."""
    num_found, num_tokens, block_size = len(match.block_ids), len(token_ids), index.block_size
    tail = sequence.swapped_tail
    if tail is not None and tail.depth == num_found:
        block_id = index.block_of(tail.key)
        if block_id != NO_BLOCK:
            match.block_ids.append(block_id)
            match.num_tokens += tail.num_tokens
            match.ends_in_own = True
            return
    start = num_found * block_size
    wanted = token_ids[start : min(start + block_size, num_tokens - 1)]
    if len(wanted):
        parent = keys[num_found - 1] if num_found else sequence.keys.root
        block_id, num_inside = index.match_inside(parent, wanted)
        if num_inside:
            match.block_ids.append(block_id)
            match.num_tokens += num_inside
