"""What a tenant sees of the others, and that numbers have the names they are shown under."""

import numpy as np

from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.sequence_table import SequenceState
from pageframe.executor.memory_snapshot import (
    BLOCK_STATE_NAMES,
    BlockExplanation,
    MemorySnapshot,
    Retention,
    RetentionKind,
    TableFacts,
    TenantUsage,
    explanation_seen_by,
    snapshot_seen_by,
)
from pageframe.wire.memory_facts import SEQUENCE_STATE_NAMES


def table(sequence_id, tenant):
    return TableFacts(
        sequence_id=sequence_id,
        request_id=f"r{sequence_id}",
        tenant=tenant,
        block_ids=[sequence_id],
        first_block=2,
        num_computed=9,
        state=2,
        since_ns=5,
    )


def retention(tenant):
    return Retention(
        name=f"of {tenant}",
        kind=RetentionKind.SESSION,
        tenant=tenant,
        num_blocks_pinned=3,
        expire_ns=8,
    )


def usage(tenant):
    return TenantUsage(quota=TenantQuota(tenant=tenant, floor_blocks=1), num_blocks_held=2)


def snapshot(*tenants):
    return MemorySnapshot(
        step=1,
        block_size=4,
        account=PoolAccount(total=1, free=1),
        states=np.zeros(1, dtype=np.uint8),
        ref_counts=np.zeros(1, dtype=np.int32),
        pin_counts=np.zeros(1, dtype=np.int32),
        is_indexed=np.zeros(1, dtype=np.bool_),
        tables=[table(index, tenant) for index, tenant in enumerate(tenants)],
        retentions=[retention(tenant) for tenant in tenants],
        quotas=[usage(tenant) for tenant in tenants],
    )


def test_states_are_numbered_as_memory_numbers_them():
    assert [state.name.lower() for state in BlockState] == list(BLOCK_STATE_NAMES)
    assert [state.value for state in BlockState] == list(range(len(BLOCK_STATE_NAMES)))
    for state in SequenceState:
        assert SEQUENCE_STATE_NAMES[state] == state.name.lower()
    assert len(SEQUENCE_STATE_NAMES) == len(SequenceState) + 1


def test_a_tenant_sees_its_own_and_the_shape_of_the_rest():
    everything = snapshot("red", "blue")
    seen = snapshot_seen_by("blue", everything)
    assert seen.tables[0] == TableFacts(
        sequence_id=0,
        request_id="",
        tenant="",
        block_ids=[0],
        first_block=2,
        num_computed=9,
        state=2,
    )
    assert seen.tables[1] == everything.tables[1]
    assert (seen.retentions[0].name, seen.retentions[0].tenant) == ("", "")
    assert seen.retentions[0].num_blocks_pinned == 3
    assert seen.retentions[1] == everything.retentions[1]
    assert seen.quotas == [usage("blue")]
    assert everything.tables[0].request_id == "r0", "the snapshot itself is as it was"


def test_holders_of_a_block_are_told_apart_one_by_one():
    """A block that two tenants share, as an operator may allow, shows each its own side."""
    explanation = BlockExplanation(
        block_id=7,
        state=BlockState.HELD,
        num_references=5,
        tenant="red",
        sequence_ids=[1, 2, 3],
        retentions=[retention("red"), retention("blue")],
    )
    tenant_of = {1: "red", 2: "blue"}.get
    red = explanation_seen_by("red", explanation, tenant_of)
    assert (red.tenant, red.sequence_ids, red.retentions) == ("red", [1], [retention("red")])
    blue = explanation_seen_by("blue", explanation, tenant_of)
    assert (blue.tenant, blue.sequence_ids, blue.retentions) == ("", [2], [retention("blue")])
    green = explanation_seen_by("green", explanation, tenant_of)
    assert (green.tenant, green.sequence_ids, green.retentions) == ("", [], [])
    assert green.num_references == 5
