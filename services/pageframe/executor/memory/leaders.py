"""Who is about to compute which prefix, so that others may wait and share it (law 5).

announce a, 40 tokens    k0 k1 k2          will compute k0, k1, k2
announce b, same start   k0 k1 x2          k0 and k1 are a's: a leads, 2 blocks to share
"""

from collections.abc import Sequence

from pageframe.executor.memory.block_keys import BlockKey


class Leaders:
    """Keys that somebody will compute, each with the first who announced it."""

    def __init__(self) -> None:
        self._leader_of: dict[BlockKey, int] = {}
        self._keys_of: dict[int, set[BlockKey]] = {}

    def __len__(self) -> int:
        return len(self._leader_of)

    def find(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """The leader of the first of ``keys``, and how many of them in a row it leads.

        ``(0, 0)`` when nobody is about to compute it.
        """
        leader = self._leader_of.get(keys[0], 0) if keys else 0
        if not leader:
            return 0, 0
        num_led = 1
        while num_led < len(keys) and self._leader_of.get(keys[num_led]) == leader:
            num_led += 1
        return leader, num_led

    def lead(self, sequence_id: int, keys: Sequence[BlockKey]) -> None:
        """``sequence_id`` will compute those of ``keys`` that nobody else is about to."""
        own = [key for key in keys if key not in self._leader_of]
        if own:
            self._leader_of.update(dict.fromkeys(own, sequence_id))
            self._keys_of.setdefault(sequence_id, set()).update(own)

    def computed(self, keys: Sequence[BlockKey]) -> None:
        """``keys`` are in the prefix index now."""
        if not self._leader_of:
            return
        for key in keys:
            leader = self._leader_of.pop(key, 0)
            if leader:
                own = self._keys_of[leader]
                own.discard(key)
                if not own:
                    del self._keys_of[leader]

    def forget(self, sequence_id: int) -> None:
        """``sequence_id`` will compute nothing any more."""
        for key in self._keys_of.pop(sequence_id, ()):
            del self._leader_of[key]
