"""The mirror of a pool: whatever KV memory does, operation by operation, it knows how it stands."""

import dataclasses

import numpy as np
import pytest

from bench.soak import audited_memory
from bench.soak.audited_memory import AuditedMemory
from bench.soak.driver import Driver
from bench.soak.lives import random_of, shape_of
from bench.soak.records import RecordSink
from pageframe.core.replica import PoolAccount
from pageframe.core.trace import KvCause, KvOperation
from pageframe.gateway.http.pool_mirror import (
    ANOTHER_TENANT,
    KIND_NAMES,
    NOBODY,
    MirrorLostError,
    PoolMirror,
    SequenceName,
)
from pageframe.rpc.auth import Caller
from pageframe.wire.memory_facts import (
    MemorySnapshot,
    OperationBatch,
    OperationRecord,
    SequenceFacts,
    TableFacts,
)

OPERATOR = Caller("ops", is_operator=True)
NOW_NS = 5_000_000_000
NUM_CHANGES = 300
RESHAPING = {KvOperation.MOVE, KvOperation.RESIZE}


def snapshot_of(*tables, num_blocks=6, pins=(), indexed=(), operation=10):
    """A pool in which blocks of tables and pins are held and those left in the index cached."""
    refs, pin_counts = np.zeros(num_blocks, np.int32), np.zeros(num_blocks, np.int32)
    is_indexed = np.zeros(num_blocks, np.bool_)
    for table in tables:
        refs[table.block_ids] += 1
    for block_id in pins:
        refs[block_id] += 1
        pin_counts[block_id] += 1
    is_indexed[list(indexed)] = True
    states = np.where(refs > 0, 1, np.where(is_indexed, 2, 0)).astype(np.uint8)
    return MemorySnapshot(
        step=4,
        operation=operation,
        pool_incarnation=77,
        block_size=16,
        account=PoolAccount(total=num_blocks),
        states=states,
        ref_counts=refs,
        pin_counts=pin_counts,
        is_indexed=is_indexed,
        tables=list(tables),
    )


def table(sequence_id, *block_ids, tenant="red"):
    return TableFacts(
        sequence_id=sequence_id,
        request_id=f"r{sequence_id}",
        tenant=tenant,
        block_ids=list(block_ids),
        since_ns=1_000_000 * sequence_id,
    )


def batch(*operations, first=11, cause=KvCause.DECODE, step=5):
    """Operations as (operation, sequence, blocks) or with targets as a fourth."""
    return OperationBatch(
        [
            OperationRecord(first + index, it[0], cause, it[1], step, it[2], *it[3:])
            for index, it in enumerate(operations)
        ]
    )


def kinds_of(mirror):
    return [KIND_NAMES[kind] for kind in mirror.columns(slice(None))["kind"]]


def holders_of(mirror):
    first = mirror.columns(slice(None))["holder"]
    return [
        mirror.holders().get(block_id, () if it == NOBODY else (int(it),))
        for block_id, it in enumerate(first)
    ]


def test_it_begins_as_the_snapshot_is():
    mirror = PoolMirror(
        OPERATOR, snapshot_of(table(1, 0, 1), table(2, 1), pins=[2], indexed=[1, 3])
    )
    assert kinds_of(mirror) == ["held", "shared", "pinned", "cached", "free", "free"]
    assert holders_of(mirror) == [(1,), (1, 2), (), (), (), ()]
    assert mirror.names[2] == SequenceName("red", "r2", 2_000_000)
    assert mirror.named == {1, 2}
    assert not mirror.changed


@pytest.mark.parametrize(
    ("operations", "kind", "holders"),
    [
        ([(KvOperation.ALLOCATE, 3, [4])], "held", (3,)),
        ([(KvOperation.ALLOCATE, 3, [4]), (KvOperation.SHARE, 2, [4])], "shared", (3, 2)),
        ([(KvOperation.ALLOCATE, 3, [4]), (KvOperation.PIN, 0, [4])], "pinned", (3,)),
        ([(KvOperation.ALLOCATE, 3, [4]), (KvOperation.RELEASE, 3, [4])], "fenced", ()),
        (
            [
                (KvOperation.ALLOCATE, 3, [4]),
                (KvOperation.INDEX, 3, [4]),
                (KvOperation.RELEASE, 3, [4]),
            ],
            "cached",
            (),
        ),
        (
            [
                (KvOperation.ALLOCATE, 3, [4]),
                (KvOperation.RELEASE, 3, [4]),
                (KvOperation.FENCE_CLEAR, 0, [4]),
                (KvOperation.FREE, 0, [4]),
            ],
            "free",
            (),
        ),
        ([(KvOperation.ALLOCATE, 3, [4]), (KvOperation.QUARANTINE, 0, [4])], "quarantined", ()),
    ],
)
def test_an_operation_changes_a_block(operations, kind, holders):
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0), table(2, 1)))
    mirror.take(batch(*operations), NOW_NS)
    assert (kinds_of(mirror)[4], holders_of(mirror)[4]) == (kind, holders)
    assert mirror.changed == {4}
    columns = mirror.columns(np.array([4]))
    last = [it for it in operations if it[0] is not KvOperation.FENCE_CLEAR][-1]
    assert columns["operation"] == int(last[0])
    assert (columns["cause"], columns["step"], columns["seen"]) == (2, 5, 5_000)


def test_slots_of_the_host_tier_are_not_mistaken_for_blocks():
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    mirror.take(batch((KvOperation.SWAP_IN, 1, [4], [0]), (KvOperation.DEMOTE, 0, [0], [999])), 0)
    assert kinds_of(mirror) == ["held", *["free"] * 5]
    assert not mirror.changed


@pytest.mark.parametrize(
    "operations",
    [
        batch((KvOperation.ALLOCATE, 1, [4]), first=12),
        batch((KvOperation.ALLOCATE, 1, [0])),
        batch((KvOperation.FREE, 0, [0])),
        batch((KvOperation.EVICT, 0, [0])),
        batch((KvOperation.ALLOCATE, 1, [6])),
        batch((KvOperation.MOVE, 0, [0], [5])),
        batch((KvOperation.RESIZE, 0, [5])),
    ],
)
def test_what_does_not_follow_is_not_guessed_at(operations):
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    with pytest.raises(MirrorLostError):
        mirror.take(operations, NOW_NS)


def named(operations, *sequences):
    """A batch that says whose sequences are."""
    return operations._replace(sequences=sequences)


def test_a_new_sequence_is_named_with_its_first_operation():
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    mirror.named.clear()
    gone = (KvOperation.ALLOCATE, 8, [5]), (KvOperation.RELEASE, 8, [5])
    operations = batch((KvOperation.ALLOCATE, 9, [4]), *gone)
    new = SequenceFacts(9, "r9", "blue", 7_000_000)
    mirror.take(named(operations, new, SequenceFacts(8, "r8", "blue", 6)), NOW_NS)
    assert mirror.names[9] == SequenceName("blue", "r9", 7_000_000)
    assert mirror.named == {9}, "what holds nothing has no name to show"
    mirror.named.clear()
    mirror.take(named(batch((KvOperation.ALLOCATE, 9, [3]), first=14), new), NOW_NS)
    assert not mirror.named, "it was told"


def test_a_number_that_comes_again_within_a_batch_has_the_name_of_who_holds_blocks_now():
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    operations = batch((KvOperation.RELEASE, 1, [0]), (KvOperation.ALLOCATE, 1, [4]))
    mirror.take(named(operations, SequenceFacts(1, "new", "blue", 7)), NOW_NS)
    assert mirror.names == {1: SequenceName("blue", "new", 7)}
    # Taken before the number came again, and heard of after.
    mirror.learn(snapshot_of(table(1, 0)))
    assert mirror.names == {1: SequenceName("blue", "new", 7)}


def test_an_executor_that_tells_no_names_is_asked_for_them():
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    mirror.take(batch((KvOperation.ALLOCATE, 9, [4])), NOW_NS)
    mirror.named.clear()
    mirror.learn(snapshot_of(table(1, 0), table(9, 4, tenant="blue"), table(10, 5)))
    assert mirror.names[9].tenant == "blue"
    assert mirror.named == {9}


def test_a_sequence_that_holds_nothing_any_more_is_forgotten():
    """Another scheduler may give its number to somebody else."""
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0, 1)))
    mirror.take(batch((KvOperation.RELEASE, 1, [0])), NOW_NS)
    assert 1 in mirror.names
    mirror.take(batch((KvOperation.RELEASE, 1, [1]), first=12), NOW_NS)
    assert mirror.names == {}
    mirror.take(batch((KvOperation.ALLOCATE, 1, [2]), first=13), NOW_NS)
    assert mirror.names == {}


def test_who_is_no_operator_sees_names_of_its_own_tenant_only():
    snapshot = snapshot_of(table(1, 0, 1), table(2, 1, 2, tenant="blue"))
    mirror = PoolMirror(Caller("blue"), snapshot)
    assert holders_of(mirror)[:3] == [(ANOTHER_TENANT,), (ANOTHER_TENANT, 2), (2,)]
    assert set(mirror.names) == {2}
    # The executor says the same of what happens: sequence 0.
    mirror.take(batch((KvOperation.RELEASE, 0, [0, 1]), (KvOperation.ALLOCATE, 0, [4])), NOW_NS)
    assert holders_of(mirror)[:5] == [(), (2,), (2,), (), (ANOTHER_TENANT,)]
    # Another executor than this gateway is configured for might tell more.
    stranger = SequenceFacts(7, "r7", "red", 1)
    mirror.take(named(batch((KvOperation.ALLOCATE, 7, [5]), first=13), stranger), NOW_NS)
    assert set(mirror.names) == {2}


class NumberingSink(RecordSink):
    """Numbers what it keeps, as a watcher would hear of it."""

    current: "NumberingSink"

    def __init__(self):
        super().__init__()
        NumberingSink.current = self
        self.heard = []
        self.num_heard = 0

    def kv(self, operation, cause, **fields):
        super().kv(operation, cause, **fields)
        self.num_heard += 1
        self.heard.append(
            OperationRecord(
                self.num_heard,
                operation,
                cause,
                fields["sequence_id"],
                fields["step"],
                list(fields["block_ids"]),
                list(fields.get("target_ids", ())),
            )
        )

    def take_heard(self):
        heard, self.heard = self.heard, []
        return OperationBatch(heard)


def stands_as(mirror, snapshot):
    """Whether the mirror is what a new one would be."""
    fresh, everything = PoolMirror(OPERATOR, snapshot), slice(None)
    one, other = mirror.columns(everything), fresh.columns(everything)
    assert one["kind"].tolist() == other["kind"].tolist()
    assert one["references"].tolist() == other["references"].tolist()
    assert [sorted(it) for it in holders_of(mirror)] == [sorted(it) for it in holders_of(fresh)]


@pytest.mark.parametrize("life", [10, 17, 25, 32, 77, 130])
def test_whatever_memory_does_it_stands_as_a_new_snapshot_would(life, monkeypatch):
    """Forks, swaps, tails, windows, pins, expiry, eviction, takeovers, failures, resizes."""
    print(f"seed 3, life {life}")
    monkeypatch.setattr(audited_memory, "RecordSink", NumberingSink)
    source = random_of(3, life)
    memory = AuditedMemory(shape_of(life, source))
    driver, sink = Driver(memory, source), NumberingSink.current

    def look():
        # Without publishing what a step has filled: the auditor expects that later.
        desk = memory._engine.desk
        with monkeypatch.context() as patched:
            patched.setattr(desk, "_catch_up", lambda: None)
            snapshot = desk.snapshot()
        heard = sink.take_heard()
        return dataclasses.replace(snapshot, operation=sink.num_heard), heard

    snapshot, _ = look()
    mirror, num_followed = PoolMirror(OPERATOR, snapshot), 0
    for _ in range(NUM_CHANGES):
        driver.act()
        snapshot, heard = look()
        try:
            mirror.take(heard, NOW_NS)
        except MirrorLostError:
            assert {it.operation for it in heard.operations} & RESHAPING, heard
            mirror = PoolMirror(OPERATOR, snapshot)
        num_followed += len(heard.operations)
        stands_as(mirror, snapshot)
    assert num_followed > NUM_CHANGES / 4
