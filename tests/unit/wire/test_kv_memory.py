"""What KV memory tells comes back as it was; what means nothing is refused."""

import dataclasses

import numpy as np
import pytest
from google.protobuf import duration_pb2
from hypothesis import given
from hypothesis import strategies as st

from pageframe.core.errors import InternalError, InvalidRequestError
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.trace import KvCause, KvOperation
from pageframe.v1 import kv_block_pb2
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.wire.kv_memory import (
    batch_from_proto,
    batch_to_proto,
    duration_from_ns,
    duration_to_ns,
    explanation_from_proto,
    explanation_to_proto,
    resize_outcome_from_proto,
    resize_outcome_to_proto,
    retention_facts_from_proto,
    retention_facts_to_proto,
    snapshot_from_proto,
    snapshot_to_proto,
)
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    SEQUENCE_STATE_NAMES,
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

counts = st.integers(0, 2**32 - 1)
numbers = st.integers(0, 2**64 - 1)
times = st.integers(0, 2**62)
names = st.text(max_size=20)
id_lists = st.lists(counts, max_size=5)

tables = st.builds(
    TableFacts,
    sequence_id=numbers,
    request_id=names,
    tenant=names,
    block_ids=id_lists,
    first_block=counts,
    num_computed=counts,
    state=st.integers(0, 3),
    since_ns=times,
)
retentions = st.builds(
    Retention,
    name=names,
    kind=st.sampled_from(RetentionKind),
    tenant=names,
    num_blocks_pinned=counts,
    expire_ns=times,
)
quotas = st.builds(
    TenantUsage,
    quota=st.builds(
        TenantQuota, tenant=names, floor_blocks=counts, ceiling_blocks=st.none() | counts
    ),
    num_blocks_held=counts,
)
hosts = st.just(HostFacts()) | st.builds(
    HostFacts, num_slots=st.integers(1, 2**32 - 1), num_used=counts, num_held=counts
)


@st.composite
def snapshots(draw):
    num_blocks = draw(st.integers(0, 40))

    def column(values, dtype):
        drawn = st.lists(values, min_size=num_blocks, max_size=num_blocks)
        return np.array(draw(drawn), dtype=dtype)

    return MemorySnapshot(
        step=draw(numbers),
        operation=draw(numbers),
        pool_incarnation=draw(numbers),
        block_size=draw(counts),
        account=PoolAccount(total=num_blocks, free=draw(counts), pinned=draw(counts)),
        states=column(st.integers(0, 4), np.uint8),
        ref_counts=column(st.integers(0, 2**31 - 1), np.int32),
        pin_counts=column(st.sampled_from([0, 1, 127, 128, 16383, 16384]), np.int32),
        is_indexed=column(st.booleans(), np.bool_),
        kv_groups=column(st.integers(0, 255), np.uint8)
        if draw(st.booleans())
        else np.empty(0, dtype=np.uint8),
        tables=draw(st.lists(tables, max_size=3)),
        retentions=draw(st.lists(retentions, max_size=3)),
        quotas=draw(st.lists(quotas, max_size=3)),
        host=draw(hosts),
    )


def _plain(snapshot):
    """Fields by name, columns as lists, which compare."""
    fields = {field.name: getattr(snapshot, field.name) for field in dataclasses.fields(snapshot)}
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    }


def _over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@given(snapshots())
def test_snapshots_come_back(snapshot):
    message = _over_the_wire(snapshot_to_proto(snapshot))
    assert _plain(snapshot_from_proto(message)) == _plain(snapshot)


@given(snapshots())
def test_packed_columns_are_what_protobuf_would_have_made_of_lists(snapshot):
    message = pb.KvMemoryServiceSnapshotResponse()
    message.CopyFrom(snapshot_to_proto(snapshot))
    for name in ("block_states", "reference_counts", "pin_counts", "indexed", "kv_groups"):
        message.ClearField(name)
    message.block_states.extend((snapshot.states + 1).tolist())
    message.reference_counts.extend(snapshot.ref_counts.tolist())
    message.pin_counts.extend(snapshot.pin_counts.tolist())
    message.indexed.extend(snapshot.is_indexed.tolist())
    message.kv_groups.extend(snapshot.kv_groups.tolist())
    assert message == snapshot_to_proto(snapshot)


@given(
    st.builds(
        BlockExplanation,
        block_id=st.just(7),
        state=st.integers(0, 4),
        num_references=counts,
        num_pins=counts,
        is_indexed=st.booleans(),
        kv_group=st.integers(0, 255),
        tenant=names,
        sequence_ids=st.lists(numbers, max_size=3),
        retentions=st.lists(retentions, max_size=2),
        operation=st.none() | st.sampled_from(KvOperation),
        operation_number=numbers,
        cause=st.none() | st.sampled_from(KvCause),
        step=numbers,
        time_ns=times,
    )
)
def test_explanations_come_back(explanation):
    message = _over_the_wire(explanation_to_proto(explanation))
    assert explanation_from_proto(7, message) == explanation


@given(
    st.lists(
        st.builds(
            OperationRecord,
            number=numbers,
            operation=st.sampled_from(KvOperation),
            cause=st.sampled_from(KvCause),
            sequence_id=numbers,
            step=numbers,
            block_ids=id_lists,
            target_ids=id_lists,
        ),
        max_size=4,
    ),
    numbers,
    st.lists(
        st.builds(
            StepFacts,
            step=numbers,
            start_ns=numbers,
            duration_ns=numbers,
            num_sequences=counts,
            num_tokens=counts,
            num_free=counts,
        ),
        max_size=3,
    ),
    st.lists(
        st.builds(
            SequenceFacts, sequence_id=numbers, request_id=names, tenant=names, since_ns=times
        ),
        max_size=3,
    ),
)
def test_operations_come_back(operations, num_lost, steps, sequences):
    batch = OperationBatch(operations, num_lost, tuple(steps), tuple(sequences))
    assert batch_from_proto(_over_the_wire(batch_to_proto(batch))) == batch


@given(names, counts, times)
def test_what_was_retained_comes_back(name, num_tokens, expire_ns):
    facts = RetentionFacts(name=name, num_tokens=num_tokens, expire_ns=expire_ns)
    assert retention_facts_from_proto(_over_the_wire(retention_facts_to_proto(facts))) == facts


@given(counts, counts)
def test_a_resize_comes_back(total, num_blocks_moved):
    outcome = ResizeOutcome(
        account=PoolAccount(total=total, free=total), num_blocks_moved=num_blocks_moved
    )
    assert resize_outcome_from_proto(_over_the_wire(resize_outcome_to_proto(outcome))) == outcome


@given(st.integers(-(2**62), 2**62))
def test_durations_come_back_whatever_their_sign(duration_ns):
    assert duration_to_ns(_over_the_wire(duration_from_ns(duration_ns))) == duration_ns


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(1, -1), (-1, 1), (0, 10**9), (0, -(10**9)), (315_576_000_001, 0), (-(2**63), 0)],
)
def test_what_is_no_duration_is_refused(seconds, nanos):
    with pytest.raises(InvalidRequestError) as caught:
        duration_to_ns(duration_pb2.Duration(seconds=seconds, nanos=nanos))
    assert caught.value.reason == "MALFORMED_DURATION"
    assert caught.value.limits == {"seconds": str(seconds), "nanos": str(nanos)}


def _snapshot(**changes):
    message = pb.KvMemoryServiceSnapshotResponse(
        block_states=[1, 2], reference_counts=[0, 1], pin_counts=[0, 0], indexed=[False, True]
    )
    message.pool.total = 2
    for name, values in changes.items():
        message.ClearField(name)
        getattr(message, name).extend(values)
    return message


@pytest.mark.parametrize(
    "message",
    [
        _snapshot(block_states=[1]),
        _snapshot(reference_counts=[0, 1, 2]),
        _snapshot(pin_counts=[]),
        _snapshot(indexed=[True]),
        _snapshot(kv_groups=[1]),
        _snapshot(kv_groups=[0, 256]),
        _snapshot(block_states=[0, 1]),
        _snapshot(block_states=[1, 6]),
        _snapshot(retentions=[pb.Retention(kind=3)]),
        _snapshot(retentions=[pb.Retention()]),
    ],
)
def test_a_snapshot_that_makes_no_sense_is_refused(message):
    assert snapshot_from_proto(_snapshot()).states.tolist() == [0, 1]
    with pytest.raises(InternalError) as caught:
        snapshot_from_proto(message)
    assert caught.value.reason == "MALFORMED_ANSWER"


@pytest.mark.parametrize(
    "record",
    [
        pb.KvOperationRecord(operation=0, cause="decode"),
        pb.KvOperationRecord(operation=19, cause="decode"),
        pb.KvOperationRecord(operation=1, cause="DECODE"),
        pb.KvOperationRecord(operation=1),
    ],
)
def test_an_operation_that_means_nothing_is_refused(record):
    with pytest.raises(InternalError) as caught:
        batch_from_proto(pb.WatchResponse(operations=[record]))
    assert caught.value.reason == "MALFORMED_ANSWER"


@pytest.mark.parametrize("state", [0, 6])
def test_a_block_in_an_unknown_state_is_refused(state):
    with pytest.raises(InternalError) as caught:
        explanation_from_proto(1, pb.ExplainResponse(state=state))
    assert caught.value.reason == "MALFORMED_ANSWER"


def test_states_have_the_names_that_the_wire_gives_them():
    block_states = dict(kv_block_pb2.BlockState.items())
    for number, name in enumerate(BLOCK_STATE_NAMES):
        assert block_states[f"BLOCK_STATE_{name.upper()}"] == number + 1
    sequence_states = dict(pb.SequenceState.items())
    for number, name in enumerate(SEQUENCE_STATE_NAMES):
        assert sequence_states[f"SEQUENCE_STATE_{(name or 'unspecified').upper()}"] == number
    kinds = dict(pb.RetentionKind.items())
    for kind in RetentionKind:
        assert kinds[f"RETENTION_KIND_{kind.name}"] == kind
    assert len(block_states) == len(BLOCK_STATE_NAMES) + 1
    assert len(sequence_states) == len(SEQUENCE_STATE_NAMES)
    assert len(kinds) == len(RetentionKind) + 1
