"""Whole blocks that the next step has to move, and what becomes of them when it has.

    out    device block ─▶ host slot      demote, swap out
    copy   device block ─▶ device block   copy-on-write, compaction
    in     host slot ─▶ device block      promote, swap in

A step does them in this order and before its own writes. So a block that is given up while the plan
is applied may be taken again at once: whatever it held is read before anything is written to it.

Content that arrives is published late, like content that is computed: the block is held by the
transfer until the step has finished, then indexed and cached. Whoever waited for it finds it there
as any other hit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import BlockMoves, Int64Array
from pageframe.executor.memory.block_keys import BlockKey
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.block_supply import BlocksExhaustedError
from pageframe.executor.memory.host_tier import NO_SLOT, HostTier
from pageframe.executor.memory.purpose import Purpose


@dataclass(frozen=True, slots=True)
class Content:
    """What a block holds, of which group of layers: enough to enter it into the prefix index.

    ``token_ids`` is empty under a private key, which nobody else will look for.
    """

    key: BlockKey
    parent: BlockKey
    token_ids: bytes
    depth: int
    group: int = 0


class Transfers:
    """Collects moves while plans are applied; one object per pool and host tier."""

    def __init__(self, pool: BlockPool, host: HostTier) -> None:
        self._pool = pool
        self._host = host
        self._out: list[tuple[int, int]] = []
        self._copies: list[tuple[int, int]] = []
        self._in: list[tuple[int, int]] = []
        self._stored: list[BlockKey] = []
        self._arriving: list[tuple[Int32Array, Sequence[Content], Purpose]] = []

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks on the device; who refers to them is the caller's business."""
        self._copies += zip(sources, targets, strict=True)

    def store(
        self,
        operation: KvOperation,
        block_ids: Sequence[int],
        keys: Sequence[BlockKey],
        purpose: Purpose,
    ) -> int:
        """Copy blocks to the host tier, as far as it has room; present ones become newest.

        Returns:
            How many of them, from the first, are in the host tier now.
        """
        sources, slots = [], []
        num_stored = 0
        for block_id, key in zip(block_ids, keys, strict=True):
            if key not in self._host:
                slot = self._host.store(key)
                if slot == NO_SLOT:
                    break
                sources.append(block_id)
                slots.append(slot)
                self._stored.append(key)
            else:
                self._host.touch(key)
            num_stored += 1
        if sources:
            self._out += zip(sources, slots, strict=True)
            self._pool.recorder.record(operation, purpose, sources, slots)
        return num_stored

    def hold(
        self,
        operation: KvOperation,
        block_ids: Sequence[int],
        keys: Sequence[BlockKey],
        purpose: Purpose,
    ) -> list[BlockKey]:
        """Have the host tier hold blocks for somebody, copied there unless they are there already.

        Returns:
            The keys that it holds; the caller drops these holds some day. As many as have room.
        """
        is_here = [key in self._host for key in keys]
        held = [key for key, here in zip(keys, is_here, strict=True) if here]
        # Those that are there first: what is copied beside them might drop them else.
        for key in held:
            self._host.hold(key)
        lacking = [
            (block_id, key)
            for block_id, key, here in zip(block_ids, keys, is_here, strict=True)
            if not here
        ]
        new_keys = [key for _, key in lacking]
        num_stored = self.store(operation, [block for block, _ in lacking], new_keys, purpose)
        for key in new_keys[:num_stored]:
            self._host.hold(key)
        return held + new_keys[:num_stored]

    def fetch(
        self,
        operation: KvOperation,
        contents: Sequence[Content],
        found: Int32Array,
        purpose: Purpose,
    ) -> None:
        """Bring blocks back from the host tier; all their keys have to be in it.

        Args:
            operation: What to record.
            contents: What to bring, in the order of its chain.
            found: int32 [n], device blocks of the same chain. They are held until it has
                arrived: making room must not evict them, and a head must not become older than
                its tail.
            purpose: For whom.

        Raises:
            BlocksExhaustedError: too few blocks are available; nothing was changed.
        """
        if len(found):
            self._pool.acquire(found, purpose)
        # Before blocks are taken: making room for them may demote others, which may drop these.
        slots = [self._host.read(content.key) for content in contents]
        try:
            block_ids = self._pool.allocate(len(contents), purpose)
        except BlocksExhaustedError:
            for content in contents:
                self._host.finish_transfer(content.key)
            self._pool.release(found, purpose)
            raise
        targets = block_ids.tolist()
        self._in += zip(slots, targets, strict=True)
        self._arriving.append((np.concatenate([found, block_ids]), contents, purpose))
        self._pool.recorder.record(operation, purpose, slots, targets)

    def arriving_ids(self) -> list[int]:
        """Blocks held by transfers that have not finished, in a new list."""
        return [block_id for block_ids, _, _ in self._arriving for block_id in block_ids.tolist()]

    def take(self) -> BlockMoves | None:
        """The moves to make now, each handed out once; None when there are none."""
        if not (self._out or self._copies or self._in):
            return None
        moves = BlockMoves(
            out_sources=_column(self._out, 0),
            out_slots=_column(self._out, 1),
            copy_sources=_column(self._copies, 0),
            copy_targets=_column(self._copies, 1),
            in_slots=_column(self._in, 0),
            in_targets=_column(self._in, 1),
        )
        self._out, self._copies, self._in = [], [], []
        return moves

    def finish(self) -> list[BlockKey]:
        """The moves handed out have been made: publish what arrived, and keep it cached.

        Returns:
            Keys of what arrived, for those who want to pin it.
        """
        self._host.finish_transfers()
        self._stored.clear()
        arrived, self._arriving = self._arriving, []
        for block_ids, contents, purpose in arrived:
            new = block_ids[-len(contents) :]
            published = self._pool.publish(
                new,
                [content.key for content in contents],
                [content.parent for content in contents],
                [content.token_ids for content in contents],
                np.array([content.depth for content in contents]),
                np.array([content.group for content in contents]),
            )
            if published:
                self._pool.record_published(published, purpose)
            # What was found may stand behind what has arrived, or between it.
            order = np.argsort(self._pool.columns.depths[block_ids], kind="stable")
            self._pool.release(block_ids[order], purpose)
        return [content.key for _, contents, _ in arrived for content in contents]

    def fail(self) -> list[BlockKey]:
        """The moves handed out were not made: nothing arrived, nothing was stored.

        Returns:
            Keys whose content the host tier does not have after all; the caller drops its holds
            on them and then removes them.
        """
        self._host.finish_transfers()
        lost, self._stored = self._stored, []
        arrived, self._arriving = self._arriving, []
        for block_ids, _, purpose in arrived:
            self._pool.release(block_ids, purpose._replace(cause=KvCause.CANCELLED))
        return lost


def _column(pairs: list[tuple[int, int]], index: int) -> Int64Array:
    return np.fromiter((pair[index] for pair in pairs), dtype=np.int64, count=len(pairs))
