"""The keys of one sequence's full blocks, made as far as they were asked for."""

from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_keys import BlockKey, chain_keys, child_key


class KeyChain:
    """Keys of consecutive full blocks; they depend on tokens alone and so never change.

    Attributes:
        root: The key before block 0.
    """

    __slots__ = ("_keys", "root")

    def __init__(self, root: BlockKey, keys: list[BlockKey] | None = None) -> None:
        self.root = root
        self._keys: list[BlockKey] = keys or []

    def __len__(self) -> int:
        """How many keys were asked for so far."""
        return len(self._keys)

    def __getitem__(self, logical_block: int) -> BlockKey:
        return self._keys[logical_block]

    def parent_of(self, logical_block: int) -> BlockKey:
        """The key before that of ``logical_block``."""
        return self._keys[logical_block - 1] if logical_block else self.root

    def up_to(
        self, num_tokens: int, token_ids: Int32Array, block_size: int, *, first: int = 0
    ) -> list[BlockKey]:
        """Keys of the full blocks, from block ``first`` on, of the first ``num_tokens`` tokens.

        A new list; ``token_ids`` are the sequence's from the start.
        """
        num_blocks = num_tokens // block_size
        num_known = len(self._keys)
        if num_blocks > num_known:
            tokens = token_ids[num_known * block_size : num_blocks * block_size]
            self._keys += chain_keys(self.parent_of(num_known), tokens, block_size)
        return self._keys[first:num_blocks]

    def link(self, depth: int, token_ids: bytes) -> tuple[BlockKey, BlockKey]:
        """The key before block ``depth`` and its own; these are its tokens.

        The keys of all blocks before it were asked for.
        """
        keys = self._keys
        parent = keys[depth - 1] if depth else self.root
        if depth < len(keys):
            return parent, keys[depth]
        assert depth == len(keys), f"block {depth} behind {len(keys)} known ones"
        key = child_key(parent, token_ids)
        keys.append(key)
        return parent, key

    def fork(self) -> "KeyChain":
        """The chain of a child, which goes on by itself."""
        return KeyChain(self.root, self._keys.copy())
