"""What KV memory tells about itself, between plain values and protobuf.

A pool may have hundreds of thousands of blocks, and a message is built while steps run. Setting a
repeated field from a list took 28 ms for 100,000 blocks, with the interpreter lock held; so columns
of small numbers go into a message as the bytes of a packed field, which took 0.4 ms.
"""

from typing import Any, Final

import numpy as np
from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.message import Message

from pageframe.core.errors import InternalError, InvalidRequestError
from pageframe.core.trace import KvCause, KvOperation
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.v1 import kv_block_pb2
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    BlockExplanation,
    HostFacts,
    MemorySnapshot,
    OperationBatch,
    OperationRecord,
    ResizeOutcome,
    Retention,
    RetentionFacts,
    RetentionKind,
    SequenceFacts,
    StepFacts,
    TableFacts,
    TenantUsage,
)
from pageframe.wire.replica import pool_from_proto, pool_to_proto, quota_from_proto, quota_to_proto

CAUSE_NAMES: Final = {cause: cause.name.lower() for cause in KvCause}
"""Each cause as it stands on the wire and in spans."""

_CAUSES_BY_NAME: Final = {name: cause for cause, name in CAUSE_NAMES.items()}
_KV_GROUP_MAX: Final = 255
# Wire type of a packed field.
_LENGTH_DELIMITED: Final = 2
# From `google.protobuf.Duration`: beyond it a duration is malformed.
_DURATION_SECONDS_MAX: Final = 315_576_000_000


def snapshot_to_proto(snapshot: MemorySnapshot) -> pb.KvMemoryServiceSnapshotResponse:
    """Encode the pool."""
    message = pb.KvMemoryServiceSnapshotResponse(
        step=snapshot.step,
        operation=snapshot.operation,
        pool_incarnation=snapshot.pool_incarnation,
        block_size=snapshot.block_size,
        pool=pool_to_proto(snapshot.account),
        block_tables=map(_table_to_proto, snapshot.tables),
        retentions=map(_retention_to_proto, snapshot.retentions),
        tenants=[
            pb.TenantUsage(quota=quota_to_proto(it.quota), num_blocks_held=it.num_blocks_held)
            for it in snapshot.quotas
        ],
    )
    if snapshot.host.num_slots:
        message.host_tier.num_slots = snapshot.host.num_slots
        message.host_tier.num_used = snapshot.host.num_used
        message.host_tier.num_held = snapshot.host.num_held
    _set_packed(message, "block_states", snapshot.states + 1)
    _set_packed(message, "reference_counts", snapshot.ref_counts)
    _set_packed(message, "pin_counts", snapshot.pin_counts)
    _set_packed(message, "indexed", snapshot.is_indexed)
    _set_packed(message, "kv_groups", snapshot.kv_groups)
    return message


def snapshot_from_proto(message: pb.KvMemoryServiceSnapshotResponse) -> MemorySnapshot:
    """Decode the pool.

    Raises:
        InternalError: MALFORMED_ANSWER, when the columns are not of one length, for example.
    """
    states = np.array(message.block_states, dtype=np.int32)
    columns = (message.reference_counts, message.pin_counts, message.indexed)
    lengths = {len(states), message.pool.total, *(len(column) for column in columns)}
    groups = np.array(message.kv_groups, dtype=np.int64)
    if len(groups):
        lengths.add(len(groups))
    if len(lengths) != 1:
        raise _malformed(f"columns of {sorted(lengths)} blocks")
    if len(states) and not (states.min() >= 1 and states.max() <= len(BLOCK_STATE_NAMES)):
        raise _malformed(f"block states from {states.min()} to {states.max()}")
    if len(groups) and groups.max() > _KV_GROUP_MAX:
        raise _malformed(f"a block of group {groups.max()}")
    return MemorySnapshot(
        step=message.step,
        operation=message.operation,
        pool_incarnation=message.pool_incarnation,
        block_size=message.block_size,
        account=pool_from_proto(message.pool),
        states=(states - 1).astype(np.uint8),
        ref_counts=np.array(message.reference_counts, dtype=np.int32),
        pin_counts=np.array(message.pin_counts, dtype=np.int32),
        is_indexed=np.array(message.indexed, dtype=np.bool_),
        kv_groups=groups.astype(np.uint8),
        tables=[_table_from_proto(table) for table in message.block_tables],
        retentions=[_retention_from_proto(retention) for retention in message.retentions],
        quotas=[
            TenantUsage(quota=quota_from_proto(it.quota), num_blocks_held=it.num_blocks_held)
            for it in message.tenants
        ],
        host=HostFacts(
            num_slots=message.host_tier.num_slots,
            num_used=message.host_tier.num_used,
            num_held=message.host_tier.num_held,
        ),
    )


def explanation_to_proto(explanation: BlockExplanation) -> pb.ExplainResponse:
    """Encode what is known of one block."""
    message = pb.ExplainResponse(
        state=kv_block_pb2.BlockState.ValueType(explanation.state + 1),
        reference_count=explanation.num_references,
        pin_count=explanation.num_pins,
        indexed=explanation.is_indexed,
        kv_group=explanation.kv_group,
        tenant=explanation.tenant,
        sequence_ids=explanation.sequence_ids,
        retentions=map(_retention_to_proto, explanation.retentions),
        operation_number=explanation.operation_number,
        step=explanation.step,
    )
    if explanation.operation is not None:
        message.operation = kv_block_pb2.KvOperation.ValueType(explanation.operation)
    if explanation.cause is not None:
        message.cause = CAUSE_NAMES[explanation.cause]
    if explanation.time_ns:
        message.change_time.CopyFrom(timestamp_from_ns(explanation.time_ns))
    return message


def explanation_from_proto(block_id: int, message: pb.ExplainResponse) -> BlockExplanation:
    """Decode what is known of one block.

    Raises:
        InternalError: MALFORMED_ANSWER.
    """
    if not 1 <= message.state <= len(BLOCK_STATE_NAMES):
        raise _malformed(f"block state {message.state}")
    return BlockExplanation(
        block_id=block_id,
        state=message.state - 1,
        num_references=message.reference_count,
        num_pins=message.pin_count,
        is_indexed=message.indexed,
        kv_group=message.kv_group,
        tenant=message.tenant,
        sequence_ids=list(message.sequence_ids),
        retentions=[_retention_from_proto(retention) for retention in message.retentions],
        operation=_operation_from_proto(message.operation) if message.operation else None,
        operation_number=message.operation_number,
        cause=_cause_from_proto(message.cause) if message.cause else None,
        step=message.step,
        time_ns=timestamp_to_ns(message.change_time),
    )


def batch_to_proto(batch: OperationBatch) -> pb.WatchResponse:
    """Encode operations."""
    message = pb.WatchResponse(num_lost=batch.num_lost)
    add, as_wire = message.operations.add, kv_block_pb2.KvOperation.ValueType
    for number, operation, cause, sequence_id, step, block_ids, target_ids in batch.operations:
        add(
            number=number,
            operation=as_wire(operation),
            cause=CAUSE_NAMES[cause],
            sequence_id=sequence_id,
            step=step,
            block_ids=block_ids,
            target_ids=target_ids,
        )
    for facts in batch.steps:
        message.steps.add(
            step=facts.step,
            start_time_ns=facts.start_ns,
            duration_ns=facts.duration_ns,
            num_sequences=facts.num_sequences,
            num_tokens=facts.num_tokens,
            num_free_blocks=facts.num_free,
        )
    for sequence_id, request_id, tenant, since_ns in batch.sequences:
        named = message.sequences.add(sequence_id=sequence_id, request_id=request_id, tenant=tenant)
        # In place: a timestamp of its own, to be copied, takes half as long again.
        since = named.announce_time
        since.seconds, since.nanos = divmod(since_ns, NANOSECONDS_PER_SECOND)
    return message


def batch_from_proto(message: pb.WatchResponse) -> OperationBatch:
    """Decode operations.

    Raises:
        InternalError: MALFORMED_ANSWER.
    """
    operations = [
        OperationRecord(
            it.number,
            _operation_from_proto(it.operation),
            _cause_from_proto(it.cause),
            it.sequence_id,
            it.step,
            list(it.block_ids),
            list(it.target_ids),
        )
        for it in message.operations
    ]
    steps = tuple(
        StepFacts(
            it.step,
            it.start_time_ns,
            it.duration_ns,
            it.num_sequences,
            it.num_tokens,
            it.num_free_blocks,
        )
        for it in message.steps
    )
    sequences = tuple(
        SequenceFacts(it.sequence_id, it.request_id, it.tenant, timestamp_to_ns(it.announce_time))
        for it in message.sequences
    )
    return OperationBatch(operations, message.num_lost, steps, sequences)


def retention_facts_to_proto(facts: RetentionFacts) -> pb.RetainResponse:
    """Encode what was retained."""
    return pb.RetainResponse(
        handle=facts.name,
        num_tokens=facts.num_tokens,
        expire_time=timestamp_from_ns(facts.expire_ns),
    )


def retention_facts_from_proto(message: pb.RetainResponse) -> RetentionFacts:
    """Decode what was retained."""
    return RetentionFacts(
        name=message.handle,
        num_tokens=message.num_tokens,
        expire_ns=timestamp_to_ns(message.expire_time),
    )


def resize_outcome_to_proto(outcome: ResizeOutcome) -> pb.ResizeResponse:
    """Encode the pool after a resize."""
    return pb.ResizeResponse(
        pool=pool_to_proto(outcome.account), num_blocks_moved=outcome.num_blocks_moved
    )


def resize_outcome_from_proto(message: pb.ResizeResponse) -> ResizeOutcome:
    """Decode the pool after a resize."""
    return ResizeOutcome(
        account=pool_from_proto(message.pool), num_blocks_moved=message.num_blocks_moved
    )


def timestamp_from_ns(time_ns: int) -> timestamp_pb2.Timestamp:
    """Nanoseconds since the Unix epoch as a timestamp."""
    seconds, nanos = divmod(time_ns, NANOSECONDS_PER_SECOND)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def timestamp_to_ns(message: timestamp_pb2.Timestamp) -> int:
    """Inverse of ``timestamp_from_ns``; 0 for one that is absent."""
    return message.seconds * NANOSECONDS_PER_SECOND + message.nanos


def duration_from_ns(duration_ns: int) -> duration_pb2.Duration:
    """Nanoseconds, also less than none, as a duration; both parts get the sign."""
    seconds, nanos = divmod(abs(duration_ns), NANOSECONDS_PER_SECOND)
    sign = -1 if duration_ns < 0 else 1
    return duration_pb2.Duration(seconds=sign * seconds, nanos=sign * nanos)


def duration_to_ns(message: duration_pb2.Duration) -> int:
    """Inverse of ``duration_from_ns``.

    Raises:
        InvalidRequestError: MALFORMED_DURATION, when the parts are out of range or of two signs.
    """
    seconds, nanos = message.seconds, message.nanos
    is_sound = abs(seconds) <= _DURATION_SECONDS_MAX and abs(nanos) < NANOSECONDS_PER_SECOND
    if not is_sound or seconds * nanos < 0:
        raise InvalidRequestError(
            "MALFORMED_DURATION",
            f"{seconds} seconds and {nanos} nanoseconds are no duration",
            seconds=seconds,
            nanos=nanos,
        )
    return seconds * NANOSECONDS_PER_SECOND + nanos


def _set_packed(message: Message, name: str, values: "np.ndarray[Any, Any]") -> None:
    """Set an empty repeated field of whole numbers from a column."""
    if not len(values):
        return
    number = message.DESCRIPTOR.fields_by_name[name].number
    content = _varints(values)
    tag_and_length = _varints(np.array([number << 3 | _LENGTH_DELIMITED, len(content)]))
    message.MergeFromString(tag_and_length + content)


def _varints(values: "np.ndarray[Any, Any]") -> bytes:
    """Whole numbers as protobuf writes them: seven bits a byte, the low ones first.

    The high bit of a byte says that more follow (https://protobuf.dev/programming-guides/encoding).
    """
    rest = values.astype(np.uint32)
    has_byte = np.ones(len(rest), dtype=np.bool_)
    columns, presences = [], []
    while has_byte.any():
        has_more = rest > 0x7F
        columns.append(((rest & 0x7F) | has_more.astype(np.uint32) << 7).astype(np.uint8))
        presences.append(has_byte)
        rest >>= 7
        has_byte = has_more
    return np.stack(columns, axis=1)[np.stack(presences, axis=1)].tobytes()


def _malformed(what: str) -> InternalError:
    return InternalError("MALFORMED_ANSWER", f"the server sent {what}, which means nothing here")


def _operation_from_proto(number: int) -> KvOperation:
    try:
        return KvOperation(number)
    except ValueError:
        raise _malformed(f"operation {number}") from None


def _cause_from_proto(name: str) -> KvCause:
    try:
        return _CAUSES_BY_NAME[name]
    except KeyError:
        raise _malformed(f"cause {name[:100]!r}") from None


def _table_to_proto(table: TableFacts) -> pb.BlockTable:
    message = pb.BlockTable(
        sequence_id=table.sequence_id,
        request_id=table.request_id,
        tenant=table.tenant,
        block_ids=table.block_ids,
        num_computed_tokens=table.num_computed,
        first_block_index=table.first_block,
        state=pb.SequenceState.ValueType(table.state),
    )
    if table.since_ns:
        message.announce_time.CopyFrom(timestamp_from_ns(table.since_ns))
    return message


def _table_from_proto(message: pb.BlockTable) -> TableFacts:
    return TableFacts(
        sequence_id=message.sequence_id,
        request_id=message.request_id,
        tenant=message.tenant,
        block_ids=list(message.block_ids),
        first_block=message.first_block_index,
        num_computed=message.num_computed_tokens,
        state=message.state,
        since_ns=timestamp_to_ns(message.announce_time),
    )


def _retention_to_proto(retention: Retention) -> pb.Retention:
    return pb.Retention(
        name=retention.name,
        kind=pb.RetentionKind.ValueType(retention.kind),
        tenant=retention.tenant,
        num_blocks_pinned=retention.num_blocks_pinned,
        expire_time=timestamp_from_ns(retention.expire_ns),
    )


def _retention_from_proto(message: pb.Retention) -> Retention:
    try:
        kind = RetentionKind(message.kind)
    except ValueError:
        raise _malformed(f"retention kind {message.kind}") from None
    return Retention(
        name=message.name,
        kind=kind,
        tenant=message.tenant,
        num_blocks_pinned=message.num_blocks_pinned,
        expire_ns=timestamp_to_ns(message.expire_time),
    )
