"""Blocks of the ``sim`` runner: the token of every slot, and what stands for a whole history.

The history of a sequence with tokens ``t[0], t[1], …`` hashes to

    sum over p of (t[p] + 1) * G**p    modulo 2**64,  G odd

which is a sum over blocks of (a sum inside the block) times (a power for the block's place). The
inner sums are kept current as slots are written, so a decode reads one number per full block and
the tokens of the last one; the block size cancels out.

Blocks move, leave for host slots and come back as those of a model do, and what is above the end
of a pool that shrank is gone, so a move that is lost or made in the wrong order changes a token.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.units import ceil_div, is_power_of_two
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model.reserved_range import ReservedRange

UInt64Array = NDArray[np.uint64]

_POSITION_FACTOR = np.uint64(0xD6E8FEB86659FD93)


class TokenArena:
    """The token of each slot, as its term of the hash, and the sum of terms of each block.

    Memory is taken as slots are written.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens per block, a power of two.
        max_model_len: Most tokens of one sequence.
        num_blocks_max: Most blocks that the pool can be given; 0 for ``num_blocks``.
        num_host_slots: Blocks that the host tier holds.

    Attributes:
        num_blocks: Blocks in the pool.
        num_blocks_max: Most blocks that it can be given.
        num_host_slots: Blocks that the host tier holds.
        block_bytes: Bytes of one block: 8 for each token, whatever the simulated model takes.

    Raises:
        MemoryError: not even the addresses fit.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        *,
        num_blocks_max: int = 0,
        num_host_slots: int = 0,
    ) -> None:
        assert is_power_of_two(block_size), f"block size {block_size} is no power of two"
        self.num_blocks = num_blocks
        self.num_blocks_max = num_blocks_max or num_blocks
        self.num_host_slots = num_host_slots
        assert num_blocks <= self.num_blocks_max, f"{num_blocks} of {num_blocks_max} blocks"
        self._block_size = block_size
        self._shift = block_size.bit_length() - 1
        self.block_bytes = 8 * block_size
        # A slot never written holds 0, which is no token's term.
        self._range = ReservedRange(self.num_blocks_max * self.block_bytes)
        self._terms = _rows(self._range, self.num_blocks_max, block_size)
        # One more than there are blocks: the block that is not there sums to nothing.
        self._sums = np.zeros(self.num_blocks_max + 1, dtype=np.uint64)
        host_range = ReservedRange(num_host_slots * self.block_bytes)
        self._host_terms = _rows(host_range, num_host_slots, block_size)
        powers = _powers(_POSITION_FACTOR, block_size + 1)
        self._offset_powers = powers[:-1]
        self._block_powers = _powers(powers[-1], ceil_div(max_model_len, block_size) + 1)
        # Row n is n ones, then zeros.
        self._first = np.tri(block_size + 1, block_size, -1, dtype=np.uint64)

    def move(self, moves: BlockMoves) -> None:
        """Move whole blocks: out, then copies, then in.

        Raises:
            InternalError: MOVE_INVALID; nothing was moved.
        """
        moves.check(self.num_blocks, self.num_host_slots)
        if len(moves.out_slots):
            self._host_terms[moves.out_slots] = self._terms[moves.out_sources]
        if len(moves.copy_targets):
            self._put(moves.copy_targets, self._terms[moves.copy_sources])
        if len(moves.in_targets):
            self._put(moves.in_targets, self._host_terms[moves.in_slots])

    def resize(self, num_blocks: int) -> None:
        """Give the pool more blocks or fewer; what a block held that goes is gone.

        Args:
            num_blocks: Blocks from now on, at most ``num_blocks_max``.
        """
        end = self._range.release(num_blocks * self.block_bytes) // self.block_bytes
        # The rest of the page in which the pool ends; no more blocks than there are.
        self._terms[num_blocks : end + 1] = 0
        self._sums[num_blocks : self.num_blocks] = 0
        self.num_blocks = num_blocks

    def write(self, slots: NDArray[np.int64], token_ids: Int32Array) -> None:
        """Put each token into its slot; no slot twice."""
        last_block = int(slots.max(initial=0)) >> self._shift
        assert last_block < max(self.num_blocks, 1), f"block {last_block} of {self.num_blocks}"
        flat = self._terms.reshape(-1)
        terms = (token_ids + np.int32(1)).astype(np.uint64)
        terms *= self._offset_powers[slots & (self._block_size - 1)]
        change = terms - flat[slots]
        flat[slots] = terms
        # Several tokens may go to one block.
        np.add.at(self._sums, slots >> self._shift, change)

    def hash_histories(self, block_tables: Int32Array, context_lens: Int32Array) -> UInt64Array:
        """One number per sequence that stands for all its tokens.

        Args:
            block_tables: int32 [K, W].
            context_lens: int32 [K], how many tokens of each sequence to read, at least one.

        Returns:
            uint64 [K].
        """
        # All blocks but the last are full; the last one holds 1 to block_size of the tokens.
        num_full = (context_lens - 1) >> self._shift
        num_last = context_lens - (num_full << self._shift)
        width = int(num_full.max(initial=0))
        is_full = np.arange(width, dtype=np.int32) < num_full[:, None]
        blocks = np.where(is_full, block_tables[:, :width], self.num_blocks_max)
        full: UInt64Array = self._sums[blocks] @ self._block_powers[:width]
        last_blocks = block_tables[np.arange(len(num_full)), num_full]
        last: UInt64Array = (self._terms[last_blocks] * self._first[num_last]).sum(1)
        full += last * self._block_powers[num_full]
        return full

    def read(self, block_id: int) -> bytes:
        """Everything that a block of the pool holds."""
        return bytes(self._terms[block_id].data)

    def write_block(self, block_id: int, data: bytes) -> None:
        """Make a block hold what ``read`` gave."""
        terms = np.frombuffer(data, dtype=np.uint64)
        self._put(np.array([block_id]), terms[None])

    def read_host(self, slot: int) -> bytes:
        """Everything that a host slot holds."""
        return bytes(self._host_terms[slot].data)

    def write_host(self, slot: int, data: bytes) -> None:
        """Make a host slot hold what ``read_host`` gave."""
        self._host_terms[slot] = np.frombuffer(data, dtype=np.uint64)

    def _put(self, block_ids: NDArray[np.int64], terms: UInt64Array) -> None:
        self._terms[block_ids] = terms
        self._sums[block_ids] = terms.sum(1)


def _rows(reserved: ReservedRange, num_rows: int, block_size: int) -> UInt64Array:
    flat = np.frombuffer(reserved.buffer, dtype=np.uint64, count=num_rows * block_size)
    return flat.reshape(num_rows, block_size)


def _powers(base: np.uint64, count: int) -> UInt64Array:
    """``base`` to the powers 0 to ``count - 1``, modulo 2**64."""
    factors = np.full(max(count, 1), base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
