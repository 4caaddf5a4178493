"""What KV memory tells about itself, free of protobuf: plain values that outlive the step.

The executor takes them between two steps, ``wire.kv_memory`` carries them, and a reader on the
other side gets the same types. States of blocks are numbered as in the executor's own columns; on
the wire each is one higher, because 0 means "never sent" there.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.trace import KvCause, KvOperation

BLOCK_STATE_NAMES: Final = ("free", "held", "cached", "fenced", "quarantined")
"""Name of each state of a block; the index is its number."""

SEQUENCE_STATE_NAMES: Final = ("", "announced", "running", "preempted")
"""Name of each state of a sequence; the index is its number, 0 is not known."""


@enum.unique
class RetentionKind(enum.IntEnum):
    """What keeps blocks that no sequence has in its table."""

    HANDLE = 1
    """Kept by ``Retain`` until it is released or expires."""
    SESSION = 2
    """Kept from one turn of a chat to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """One sequence's block table.

    Attributes:
        sequence_id: Which sequence; 0 when that is not for the reader.
        request_id: The caller's name for the request; empty when that is not for the reader.
        tenant: Whose it is; empty when that is not for the reader.
        block_ids: Physical block of each logical block from ``first_block`` on. With several groups
            of layers, those of all groups in turns, without what has left the window of a group.
        first_block: Logical blocks before it have left all sliding windows and are held no more.
        num_computed: Tokens whose keys and values were computed.
        state: Index into ``SEQUENCE_STATE_NAMES``.
        since_ns: When the executor came to know the sequence, nanoseconds since the Unix epoch; 0
            when that is not known, or not for the reader.
    """

    sequence_id: int
    request_id: str
    tenant: str
    block_ids: list[int]
    first_block: int = 0
    num_computed: int = 0
    state: int = 0
    since_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Blocks that are pinned under a name.

    Attributes:
        name: The handle, or the session's name; empty when that is not for the reader.
        kind: What keeps them.
        tenant: Whose it is; empty when that is not for the reader.
        num_blocks_pinned: Blocks in this pool. What has gone to the host tier is not counted.
        expire_ns: When it ends, nanoseconds since the Unix epoch.
    """

    name: str
    kind: RetentionKind
    tenant: str
    num_blocks_pinned: int
    expire_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """The bounds of one tenant, and the held blocks that it is charged for."""

    quota: TenantQuota
    num_blocks_held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Slots of the host tier.

    Attributes:
        num_slots: Blocks that fit; 0 when there is no host tier.
        num_used: Slots that hold a block.
        num_held: Used slots that may not be dropped, because a swapped-out sequence needs them.
    """

    num_slots: int = 0
    num_used: int = 0
    num_held: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemorySnapshot:
    """The pool at one step boundary. Arrays are the snapshot's own, [account.total].

    Attributes:
        step: Last step that was applied; 0 before the first.
        operation: Number of the last operation before the snapshot; 0 before the first.
        pool_incarnation: Which pool; operations count within it.
        block_size: Tokens per block.
        account: Counts by state.
        states: uint8, index into ``BLOCK_STATE_NAMES``.
        ref_counts: int32, table entries and pins.
        pin_counts: int32, pins; part of ``ref_counts``.
        is_indexed: bool, whether the prefix index names the block.
        kv_groups: uint8, whose layers the block holds if it is held or indexed; empty where there
            is one group of layers.
        tables: Block tables of all sequences that hold blocks.
        retentions: What is pinned under a name.
        quotas: Tenants that have a quota or hold blocks.
        host: Slots of the host tier.
    """

    step: int
    operation: int = 0
    pool_incarnation: int = 0
    block_size: int
    account: PoolAccount
    states: NDArray[np.uint8]
    ref_counts: NDArray[np.int32]
    pin_counts: NDArray[np.int32]
    is_indexed: NDArray[np.bool_]
    kv_groups: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    tables: list[TableFacts] = field(default_factory=list)
    retentions: list[Retention] = field(default_factory=list)
    quotas: list[TenantUsage] = field(default_factory=list)
    host: HostFacts = field(default_factory=HostFacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockExplanation:
    """Who holds a block, why, and since when.

    Attributes:
        block_id: Which.
        state: Index into ``BLOCK_STATE_NAMES``.
        num_references: Table entries and pins that name it.
        num_pins: How many of them are pins.
        is_indexed: Whether the prefix index names it.
        kv_group: Whose layers it holds, if it is held or indexed; 0 where there is one group.
        tenant: Who is charged for it, or was last; empty for nobody, or when that is not for the
            reader.
        sequence_ids: Sequences whose tables hold it, as far as they are for the reader.
        retentions: Handles and sessions that pin it, as far as they are for the reader.
        operation: The last operation on it; None when there was none.
        operation_number: Its running number; 0 for none.
        cause: Why that was; None when there was none.
        step: The step in which it was; 0 outside any step.
        time_ns: When it was, to within a step; nanoseconds since the Unix epoch, 0 for none.
    """

    block_id: int
    state: int
    num_references: int
    num_pins: int = 0
    is_indexed: bool = False
    kv_group: int = 0
    tenant: str = ""
    sequence_ids: list[int] = field(default_factory=list)
    retentions: list[Retention] = field(default_factory=list)
    operation: KvOperation | None = None
    operation_number: int = 0
    cause: KvCause | None = None
    step: int = 0
    time_ns: int = 0


class ReplicaPool(NamedTuple):
    """The pool of one of several replicas, in numbers.

    Attributes:
        replica: What the replica is called.
        account: Its blocks by state; None while its executor is away.
        away: Why it is away.
    """

    replica: str
    account: PoolAccount | None
    away: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionFacts:
    """What ``Retain`` did.

    Attributes:
        name: The handle.
        num_tokens: Tokens whose blocks are kept now.
        expire_ns: When the handle ends, nanoseconds since the Unix epoch.
    """

    name: str
    num_tokens: int
    expire_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeOutcome:
    """The pool after a resize, and how many blocks were moved for it."""

    account: PoolAccount
    num_blocks_moved: int


class OperationRecord(NamedTuple):
    """One operation on blocks, as a watcher sees it.

    Attributes:
        number: Running number within the pool incarnation, from 1.
        operation: What.
        cause: Why.
        sequence_id: For which sequence; 0 for none, or when that is not for the reader.
        step: In which step; 0 outside any.
        block_ids: Blocks; for copies and moves the sources.
        target_ids: For copies and moves the targets.
    """

    number: int
    operation: KvOperation
    cause: KvCause
    sequence_id: int
    step: int
    block_ids: Sequence[int]
    target_ids: Sequence[int] = ()


class StepFacts(NamedTuple):
    """One step of the executor as a whole, as a watcher sees it.

    Attributes:
        step: Its number.
        start_ns: When it began, nanoseconds since the Unix epoch.
        duration_ns: From the plan to the tokens.
        num_sequences: Sequences that took part.
        num_tokens: Tokens that it computed, those of drafts included.
        num_free: Free blocks after it.
    """

    step: int
    start_ns: int
    duration_ns: int
    num_sequences: int
    num_tokens: int
    num_free: int


class SequenceFacts(NamedTuple):
    """Whose a sequence is, as a watcher sees it.

    Attributes:
        sequence_id: Its number, as in operations.
        request_id: The caller's name for the request.
        tenant: Whose it is.
        since_ns: When the executor came to know it, nanoseconds since the Unix epoch.
    """

    sequence_id: int
    request_id: str
    tenant: str
    since_ns: int


class OperationBatch(NamedTuple):
    """Some operations as a watcher sees them.

    Attributes:
        operations: In order.
        num_lost: How many were lost just before them.
        steps: Those that ended meanwhile.
        sequences: Whose the sequences of ``operations`` are, each once, as far as that is known
            and for the reader.
    """

    operations: list[OperationRecord]
    num_lost: int = 0
    steps: Sequence[StepFacts] = ()
    sequences: Sequence[SequenceFacts] = ()
