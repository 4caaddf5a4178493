"""A pool as it is elsewhere, kept up to date from what a watch tells of it.

    snapshot at operation N ──▶ columns over block ids ◀── operations N+1, N+2, …

What each operation does to a block is the contract of KV memory's states (docs/architecture.md).
An operation that does not follow from what is known, or that moves blocks about, is not guessed
at: the mirror asks for another snapshot.

No clock, no waiting, no wire: time is an argument.
"""

from array import array
from collections import Counter
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import CONTENT_OPERATIONS, KvOperation
from pageframe.rpc.auth import Caller
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    MemorySnapshot,
    OperationBatch,
    OperationRecord,
)

KIND_NAMES: Final = ("free", "cached", "held", "shared", "pinned", "fenced", "quarantined")
"""How a block is shown; the index is its number. Pinned goes before shared."""

ANOTHER_TENANT: Final = 0
"""Stands for sequences of other tenants, and for references that are no sequence's."""

NOBODY: Final = -1
"""Stands for the holder of a block that is in no block table."""

_FREE, _HELD, _CACHED, _FENCED, _QUARANTINED = range(len(BLOCK_STATE_NAMES))
_KIND_OF_STATE: Final = np.array(
    [KIND_NAMES.index(name) for name in BLOCK_STATE_NAMES], dtype=np.uint8
)
_SHARED, _PINNED = KIND_NAMES.index("shared"), KIND_NAMES.index("pinned")

_RESHAPING: Final = frozenset({KvOperation.MOVE, KvOperation.RESIZE})
# One more reference, or one less; and whether that is a sequence's or a pin.
_GAINS: Final = frozenset({KvOperation.ALLOCATE, KvOperation.SHARE, KvOperation.PIN})
_LOSSES: Final = frozenset({KvOperation.RELEASE, KvOperation.UNPIN})
_PINS: Final = frozenset({KvOperation.PIN, KvOperation.UNPIN})
_BEFORE: Final = {
    KvOperation.ALLOCATE: (_FREE,),
    KvOperation.SHARE: (_HELD, _CACHED),
    KvOperation.PIN: (_HELD, _CACHED),
    KvOperation.RELEASE: (_HELD,),
    KvOperation.UNPIN: (_HELD,),
    KvOperation.EVICT: (_CACHED,),
    KvOperation.FREE: (_FENCED,),
}


class MirrorLostError(Exception):
    """The mirror no longer knows how the pool is; another snapshot is needed."""


class SequenceName(NamedTuple):
    """Whose a sequence is; times are nanoseconds since the Unix epoch."""

    tenant: str
    request_id: str
    since_ns: int


class PoolMirror:
    """The mirror, as one caller may see it.

    Args:
        caller: Whose names are shown; the executor takes out those of others, and so does this.
        snapshot: Where it begins.

    Attributes:
        snapshot: The last one, for what operations do not tell: quotas, retentions, host tier.
        operation: Number of the last operation taken in.
        step: Step of the last operation.
        changed: Blocks that were touched since somebody last emptied this.
        names: Of sequences that hold blocks, as far as they are known.
        named: Sequences that were named since somebody last emptied this.
    """

    def __init__(self, caller: Caller, snapshot: MemorySnapshot) -> None:
        self._caller = caller
        self.snapshot = snapshot
        self.operation = snapshot.operation
        self.step = snapshot.step
        self.changed: set[int] = set()
        self.names: dict[int, SequenceName] = {}
        self.named: set[int] = set()
        num_blocks = len(snapshot.states)
        # Columns over block ids, each of a size that never changes: arrays are laid over them.
        self._states = bytearray(snapshot.states.tobytes())
        self._refs = array("i", snapshot.ref_counts.astype(np.int32).tobytes())
        self._pins = array("i", snapshot.pin_counts.astype(np.int32).tobytes())
        self._indexed = bytearray(snapshot.is_indexed.tobytes())
        self._operations = bytearray(num_blocks)
        self._causes = bytearray(num_blocks)
        self._steps = array("d", bytes(8 * num_blocks))
        self._seen_ms = array("d", bytes(8 * num_blocks))
        self._holder = array("d", [NOBODY]) * num_blocks
        self._holders: dict[int, tuple[int, ...]] = {}
        self._num_held: Counter[int] = Counter()
        for table in snapshot.tables:
            if table.block_ids:
                self._hold_all(
                    np.array(table.block_ids, dtype=np.int64),
                    self._shown_id(table.tenant, table.sequence_id),
                )
        self.learn(snapshot)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return len(self._states)

    def learn(self, snapshot: MemorySnapshot) -> None:
        """Take what operations do not tell from another snapshot, and names that are missing.

        It may be of another moment: what a watch has said of a name is not taken back.
        """
        self.snapshot = snapshot
        for table in snapshot.tables:
            sequence_id = self._shown_id(table.tenant, table.sequence_id)
            if sequence_id not in self.names:
                name = SequenceName(table.tenant, table.request_id, table.since_ns)
                self._name(sequence_id, name)

    def take(self, batch: OperationBatch, now_ns: int) -> None:
        """Take operations in.

        Args:
            batch: The next ones.
            now_ns: When they were heard of, nanoseconds since the Unix epoch.

        Raises:
            MirrorLostError: some are missing, or blocks were moved about.
        """
        now_ms = now_ns // 1_000_000
        for record in batch.operations:
            if record.number != self.operation + 1:
                raise MirrorLostError(f"operation {record.number} follows {self.operation}")
            self.operation = record.number
            self.step = record.step or self.step
            self._take_one(record, now_ms)
        for it in batch.sequences:
            sequence_id = self._shown_id(it.tenant, it.sequence_id)
            self._name(sequence_id, SequenceName(it.tenant, it.request_id, it.since_ns))

    def columns(self, block_ids: "NDArray[np.uint32] | slice") -> dict[str, NDArray[Any]]:
        """What is shown of blocks, each column in their order.

        Returns:
            ``kind`` (uint8, index into ``KIND_NAMES``), ``references`` (int32, table entries and
            pins), ``holder`` (float64, the first sequence that has it in its table, else
            ``NOBODY``); and of the last operation that the watch told of ``operation`` and
            ``cause`` (uint8, 0 for none), ``step`` and ``seen`` (float64, milliseconds since the
            Unix epoch; 0 for never). Numbers that may be large are float64, as JavaScript has them.
        """
        states = np.frombuffer(self._states, dtype=np.uint8)[block_ids]
        refs = np.frombuffer(self._refs, dtype=np.int32)[block_ids]
        pins = np.frombuffer(self._pins, dtype=np.int32)[block_ids]
        kinds = _KIND_OF_STATE[states]
        kinds[(states == _HELD) & (refs > 1)] = _SHARED
        kinds[(states == _HELD) & (pins > 0)] = _PINNED
        return {
            "kind": kinds,
            "references": refs,
            "holder": np.frombuffer(self._holder, dtype=np.float64)[block_ids],
            "operation": np.frombuffer(self._operations, dtype=np.uint8)[block_ids],
            "cause": np.frombuffer(self._causes, dtype=np.uint8)[block_ids],
            "step": np.frombuffer(self._steps, dtype=np.float64)[block_ids],
            "seen": np.frombuffer(self._seen_ms, dtype=np.float64)[block_ids],
        }

    def holders(self) -> dict[int, tuple[int, ...]]:
        """All sequences that hold a block, of blocks that several hold."""
        return self._holders

    def _take_one(self, record: OperationRecord, now_ms: int) -> None:
        operation = record.operation
        if operation in _RESHAPING:
            raise MirrorLostError(f"operation {record.number} moves blocks about")
        if operation in CONTENT_OPERATIONS:
            # No block changes, and some of these ids are slots of the host tier.
            return
        for block_id in record.block_ids:
            if block_id >= len(self._states):
                raise MirrorLostError(f"block {block_id} is not in a pool of {self.num_blocks}")
            self._change(record, block_id)
            self._operations[block_id] = operation
            self._causes[block_id] = record.cause
            self._steps[block_id] = record.step
            self._seen_ms[block_id] = now_ms
        self.changed.update(record.block_ids)

    def _change(self, record: OperationRecord, block_id: int) -> None:
        operation, state = record.operation, self._states[block_id]
        if state not in _BEFORE.get(operation, (state,)):
            raise MirrorLostError(
                f"{operation.span_name} of block {block_id}, which is {BLOCK_STATE_NAMES[state]}"
            )
        if operation in _GAINS:
            self._states[block_id] = _HELD
            self._refs[block_id] += 1
            self._pins[block_id] += operation in _PINS
            if operation not in _PINS:
                self._hold(block_id, record.sequence_id)
        elif operation in _LOSSES:
            self._refs[block_id] -= 1
            self._pins[block_id] -= operation in _PINS
            if operation not in _PINS:
                self._let_go(block_id, record.sequence_id)
            if self._refs[block_id] <= 0:
                self._states[block_id] = _CACHED if self._indexed[block_id] else _FENCED
        elif operation is KvOperation.FREE:
            self._states[block_id] = _FREE
        elif operation is KvOperation.EVICT:
            self._states[block_id], self._indexed[block_id] = _FENCED, 0
        elif operation is KvOperation.QUARANTINE:
            self._states[block_id] = _QUARANTINED
            self._refs[block_id] = self._pins[block_id] = self._indexed[block_id] = 0
            for sequence_id in self._holders_of(block_id):
                self._let_go(block_id, sequence_id)
        else:
            self._indexed[block_id] = operation is KvOperation.INDEX

    def _holders_of(self, block_id: int) -> tuple[int, ...]:
        first = int(self._holder[block_id])
        return self._holders.get(block_id, () if first == NOBODY else (first,))

    def _hold(self, block_id: int, sequence_id: int) -> None:
        holders = self._holders_of(block_id)
        if holders:
            self._holders[block_id] = (*holders, sequence_id)
        else:
            self._holder[block_id] = sequence_id
        self._num_held[sequence_id] += 1

    def _hold_all(self, block_ids: NDArray[np.int64], sequence_id: int) -> None:
        """``_hold`` for many blocks; one by one a large pool would hold up every other stream."""
        first = np.frombuffer(self._holder, dtype=np.float64)
        is_first = first[block_ids] == NOBODY
        first[block_ids[is_first]] = sequence_id
        self._num_held[sequence_id] += int(is_first.sum())
        for block_id in block_ids[~is_first].tolist():
            self._hold(block_id, sequence_id)

    def _let_go(self, block_id: int, sequence_id: int) -> None:
        holders = list(self._holders_of(block_id))
        if sequence_id not in holders:
            # A reference that stood in no table, while a copy was on its way for example.
            return
        holders.remove(sequence_id)
        self._holders.pop(block_id, None)
        self._holder[block_id] = holders[0] if holders else NOBODY
        if len(holders) > 1:
            self._holders[block_id] = tuple(holders)
        self._num_held[sequence_id] -= 1
        if not self._num_held[sequence_id]:
            # Its number may come up again, under another scheduler, for somebody else.
            del self._num_held[sequence_id]
            self.names.pop(sequence_id, None)

    def _name(self, sequence_id: int, name: SequenceName) -> None:
        """Note whose a sequence is, while it holds blocks and the caller may know."""
        is_told = sequence_id == ANOTHER_TENANT or self.names.get(sequence_id) == name
        if sequence_id in self._num_held and not is_told:
            self.names[sequence_id] = name
            self.named.add(sequence_id)

    def _shown_id(self, tenant: str, sequence_id: int) -> int:
        caller = self._caller
        return sequence_id if caller.is_operator or tenant == caller.tenant else ANOTHER_TENANT
