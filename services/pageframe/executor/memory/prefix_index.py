"""Which blocks can be found again by what they hold.

The simple thing is a radix tree of tokens. Because a key names everything up to and including its
block, the tree is already in the keys: one dictionary finds a block, and a prompt matches as far as
its keys are known, one after the other.

    keys of a prompt     k0 ─▶ k1 ─▶ k2 ─▶ k3            match([k0, k1, k2, k3]) = [12, 3]
    _block_of            12    3     ·     7 ← found, but nobody comes here without k2

The last hit may end inside a block: a child of ``k1`` that begins with the tokens that follow. For
that, the children of a parent form a list, newest first. The simple thing is a dictionary of sets;
but almost every parent has one child, so the list is kept in columns over block ids: the newest
child of each parent, and the older and newer sibling of each block. That makes no object per block
that the garbage collector would have to visit.

    _newest_child[k1] = 9      9 ─older─▶ 4 ─older─▶ NO_BLOCK

Finding blocks by chained hashes is vLLM's prefix caching; ending inside a block is what SGLang's
RadixAttention does with a token-level tree.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_keys import KEY_BYTES, TOKEN_BYTES, BlockKey, token_bytes

NO_BLOCK = -1

# A root has as many children as there are conversations. Looking at the newest few bounds the
# cost of a match; whoever repeats a prompt with a small change does it soon.
NUM_CHILDREN_LOOKED_AT_MAX = 16


class PrefixIndex:
    """Keys to blocks and back. A block has at most one key, a key at most one block.

    The index holds no reference and decides nothing; who adds a block has to see to it that its
    content is complete and stays as it is until it is removed.

    Attributes:
        block_size: Tokens per block.
        is_indexed: bool [num_blocks_max], whether a block can be found. Read only for others.
    """

    def __init__(self, num_blocks_max: int, block_size: int) -> None:
        self.block_size = block_size
        self.is_indexed: NDArray[np.bool_] = np.zeros(num_blocks_max, dtype=np.bool_)
        self._block_of: dict[BlockKey, int] = {}
        self._keys: list[BlockKey | None] = [None] * num_blocks_max
        self._parents: list[BlockKey] = [b""] * num_blocks_max
        self._token_ids: list[bytes] = [b""] * num_blocks_max
        self._newest_child: dict[BlockKey, int] = {}
        self._older = [NO_BLOCK] * num_blocks_max
        self._newer = [NO_BLOCK] * num_blocks_max

    def __len__(self) -> int:
        """How many blocks can be found."""
        return len(self._block_of)

    def block_of(self, key: BlockKey) -> int:
        """The block that has this key, or ``NO_BLOCK``."""
        return self._block_of.get(key, NO_BLOCK)

    def key_of(self, block_id: int) -> BlockKey | None:
        """The key of this block; None if it cannot be found."""
        assert block_id >= 0, f"block {block_id}"
        return self._keys[block_id]

    def block_before(self, block_id: int) -> int:
        """The block under the key of the block before this indexed one, or ``NO_BLOCK``."""
        assert self.key_of(block_id) is not None, f"block {block_id} has no key"
        return self._block_of.get(self._parents[block_id], NO_BLOCK)

    def add(self, block_id: int, key: BlockKey, parent: BlockKey, token_ids: bytes) -> bool:
        """Let ``block_id``, which has no key yet, be found under ``key``.

        Args:
            block_id: A block whose content is complete.
            key: Its key.
            parent: Key of the block before it, or the root.
            token_ids: Its tokens, little-endian int32, ``4 * block_size`` bytes. Empty under a
                private key: then it is found by its whole key only.

        Returns:
            False if another block has this key already; nothing was changed.
        """
        assert self.key_of(block_id) is None, f"block {block_id} has a key already"
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        assert len(token_ids) in (0, TOKEN_BYTES * self.block_size), (
            f"{len(token_ids)} bytes of tokens for a block of {self.block_size}"
        )
        return bool(self.add_each([block_id], [key], [parent], [token_ids]))

    def add_each(
        self,
        block_ids: Sequence[int],
        keys: Sequence[BlockKey],
        parents: Sequence[BlockKey],
        token_ids: Sequence[bytes],
    ) -> list[int]:
        """Let blocks be found; see ``add`` for each. Those that have a key are passed over.

        One loop for all of a step: what it looks at is looked up once.

        Returns:
            The blocks that were entered, in order.
        """
        block_of, newest_child = self._block_of, self._newest_child
        keys_of, parents_of, tokens_of = self._keys, self._parents, self._token_ids
        entered: list[int] = []
        for block_id, key, parent, tokens in zip(block_ids, keys, parents, token_ids, strict=True):
            if keys_of[block_id] is not None or block_of.setdefault(key, block_id) != block_id:
                continue
            keys_of[block_id] = key
            parents_of[block_id] = parent
            entered.append(block_id)
            if tokens:
                tokens_of[block_id] = tokens
                older = newest_child.setdefault(parent, block_id)
                if older != block_id:
                    self._older[block_id], self._newer[older] = older, block_id
                    newest_child[parent] = block_id
        self.is_indexed[entered] = True
        return entered

    def remove(self, block_id: int) -> BlockKey:
        """Let an indexed block be found no longer, and return the key that it had."""
        key = self.key_of(block_id)
        assert key is not None, f"block {block_id} has no key"
        del self._block_of[key]
        if self._token_ids[block_id]:
            older, newer = self._older[block_id], self._newer[block_id]
            self._set_older(newer, older, self._parents[block_id])
            if older != NO_BLOCK:
                self._newer[older] = newer
        self._clear(block_id)
        return key

    def expel(self, block_id: int) -> None:
        """As ``remove``, of a block whose entries may contradict each other. For faults only."""
        key = self.key_of(block_id)
        if key is not None and self._block_of.get(key) == block_id:
            self.remove(block_id)
        else:
            self._clear(block_id)

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """Blocks of the longest run of known keys from the start. Changes nothing.

        Args:
            keys: Keys of consecutive blocks, from the first of the sequence.
        """
        find = self._block_of.get
        block_ids = []
        for key in keys:
            block_id = find(key, NO_BLOCK)
            if block_id == NO_BLOCK:
                break
            block_ids.append(block_id)
        return block_ids

    def match_inside(self, parent: BlockKey, token_ids: Int32Array) -> tuple[int, int]:
        """The child of ``parent`` that begins with the most of ``token_ids``. Changes nothing.

        Looks at the ``NUM_CHILDREN_LOOKED_AT_MAX`` newest children; of equals, the newest wins.

        Args:
            parent: Key of the last block matched, or the root.
            token_ids: int32 [n], the tokens that follow; no more than ``block_size`` count.

        Returns:
            The block and how many tokens agree, in ``[1, block_size]``; ``(NO_BLOCK, 0)`` if
            none begins with the first of them.
        """
        best, num_best = NO_BLOCK, 0
        wanted = token_bytes(token_ids[: self.block_size])
        num_wanted = len(wanted) // TOKEN_BYTES
        child = self._newest_child.get(parent, NO_BLOCK)
        for _ in range(NUM_CHILDREN_LOOKED_AT_MAX):
            if child == NO_BLOCK or num_best == num_wanted:
                break
            # Only a child that agrees in one token more than the best so far is compared in full.
            if self._token_ids[child].startswith(wanted[: TOKEN_BYTES * (num_best + 1)]):
                best, num_best = child, _num_equal(self._token_ids[child], wanted)
            child = self._older[child]
        return best, num_best

    def move(self, source: int, target: int) -> None:
        """The content of ``source``, which is indexed, now lies in ``target``, which is not."""
        key = self.key_of(source)
        assert key is not None, f"block {source} has no key"
        assert self.key_of(target) is None, f"block {target} has a key already"
        self._block_of[key] = target
        self._keys[target] = key
        self._parents[target] = self._parents[source]
        self.is_indexed[target] = True
        if self._token_ids[source]:
            # The target takes the source's place among its siblings: content is not newer.
            older, newer = self._older[source], self._newer[source]
            self._token_ids[target] = self._token_ids[source]
            self._older[target], self._newer[target] = older, newer
            self._set_older(newer, target, self._parents[source])
            if older != NO_BLOCK:
                self._newer[older] = target
        self._clear(source)

    def _set_older(self, newer: int, older: int, parent: BlockKey) -> None:
        """Let ``older`` follow ``newer`` in the list of the parent's children."""
        if newer != NO_BLOCK:
            self._older[newer] = older
        elif older != NO_BLOCK:
            self._newest_child[parent] = older
        else:
            del self._newest_child[parent]

    def _clear(self, block_id: int) -> None:
        self.is_indexed[block_id] = False
        self._keys[block_id] = None
        self._parents[block_id] = self._token_ids[block_id] = b""
        self._older[block_id] = self._newer[block_id] = NO_BLOCK


def _num_equal(tokens: bytes, wanted: bytes) -> int:
    """How many tokens at the start are equal; ``wanted`` is not the longer one.

    As two long integers, both differ first where their exclusive or has its lowest bit: one
    operation in place of a loop.
    """
    left = int.from_bytes(tokens[: len(wanted)], "little")
    difference = left ^ int.from_bytes(wanted, "little")
    if difference == 0:
        return len(wanted) // TOKEN_BYTES
    lowest_bit = (difference & -difference).bit_length() - 1
    return lowest_bit // (8 * TOKEN_BYTES)
