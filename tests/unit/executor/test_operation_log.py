"""The log counts as the trace does, forgets the oldest, and tells readers what they missed."""

import random
import threading

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.executor.operation_log import (
    NUM_IDS_PER_OPERATION_MAX,
    NUM_OPERATIONS_PER_CHUNK,
    LastOperation,
    OperationLog,
)
from pageframe.telemetry.ring import RingReader
from pageframe.telemetry.sink import RingTraceSink
from unit.memory.kv_records import RecordingSink
from unit.telemetry.records_of import read_all as read_records

_FROM_HOST = (KvOperation.PROMOTE, KvOperation.SWAP_IN)
_TO_HOST = (KvOperation.DEMOTE, KvOperation.SWAP_OUT)
_WITH_TARGETS = (KvOperation.COPY_ON_WRITE, KvOperation.MOVE, *_FROM_HOST, *_TO_HOST)


def make_log(inner=None, clock=None, **bounds):
    return OperationLog(inner or RecordingSink(), clock or ManualClock(1), **bounds)


def record(log, operation=KvOperation.ALLOCATE, sequence_id=0, block_ids=(1,), target_ids=(), **it):
    log.kv(
        operation,
        it.pop("cause", KvCause.DECODE),
        sequence_id=sequence_id,
        generation=0,
        position=0,
        step=it.pop("step", 1),
        block_ids=list(block_ids),
        target_ids=list(target_ids),
        num_free_after=0,
    )


def record_some(log, rng, num_operations, num_blocks=50):
    """Random operations; most of them short, a few very long."""
    for index in range(num_operations):
        operation = rng.choice(list(KvOperation))
        num_ids = rng.choice([0, 1, 1, 1, 2, 5, 100]) if rng.random() > 0.002 else 5000
        has_targets = operation in _WITH_TARGETS
        record(
            log,
            operation,
            cause=rng.choice(list(KvCause)),
            sequence_id=rng.choice([0, 7, 2**63]),
            step=index,
            block_ids=[rng.randrange(num_blocks) for _ in range(num_ids)],
            target_ids=[rng.randrange(num_blocks) for _ in range(num_ids if has_targets else 0)],
        )


def read_all(log, first_number=1):
    log.publish()
    operations = []
    while batch := log.read(first_number + len(operations)).operations:
        operations += batch
    return operations


def blocks_touched(entry):
    sources = () if entry.operation in _FROM_HOST else entry.block_ids
    targets = () if entry.operation in _TO_HOST else entry.target_ids
    return [*sources, *targets]


def test_operations_are_read_as_they_were_recorded():
    log = make_log()
    record(log, sequence_id=2**64 - 1, block_ids=[3, 1], step=4, cause=KvCause.PREFILL)
    record(log, KvOperation.COPY_ON_WRITE, block_ids=[3], target_ids=[8])
    record(log, KvOperation.RESIZE, block_ids=[], step=0, cause=KvCause.RESIZE)
    first, second, third = read_all(log)
    assert first == (1, KvOperation.ALLOCATE, KvCause.PREFILL, 2**64 - 1, 4, [3, 1], [])
    assert second[0] == 2
    assert second[5:] == ([3], [8])
    assert third == (3, KvOperation.RESIZE, KvCause.RESIZE, 0, 0, [], [])


def test_everything_is_passed_on():
    sink = RecordingSink()
    log = make_log(sink)
    log.sequence_begin(5, trace_id=b"", span_id=b"", request_id="r", tenant="red")
    record(log, KvOperation.MOVE, block_ids=[1], target_ids=[2])
    log.sequence_end(5)
    assert (sink.begun, sink.ended) == ([5], [5])
    (passed,) = sink.records
    assert (passed.operation, passed.block_ids, passed.target_ids) == (KvOperation.MOVE, (1,), (2,))


def test_numbers_are_those_of_the_trace(tmp_path):
    """Long operations are cut into the same parts, so a span can be found by its number."""
    rng = random.Random(8)
    path = tmp_path / "ring"
    log = make_log(RingTraceSink.create(path, "s", TraceMode.AUDIT))
    reader = RingReader(path)
    record_some(log, rng, 3000, num_blocks=100_000)
    record(log, block_ids=range(3 * NUM_IDS_PER_OPERATION_MAX))
    traced = read_records(reader)
    kept = read_all(log)
    assert len(kept) == len(traced) == log.num_operations > 3003
    for entry, span in zip(kept, traced, strict=True):
        assert (entry.number, entry.operation, entry.cause) == (
            span.number,
            span.operation,
            span.cause,
        )
        assert tuple(entry.block_ids) == span.block_ids
        assert tuple(entry.target_ids) == span.target_ids


def test_readers_see_nothing_before_it_is_published():
    log = make_log()
    record(log)
    assert log.read(1).operations == []
    log.publish()
    assert [it.number for it in log.read(1).operations] == [1]
    assert log.read(2).operations == []
    record(log)
    log.publish()
    assert [it.number for it in log.read(2).operations] == [2]


def test_a_reader_from_the_future_waits():
    log = make_log()
    record(log)
    log.publish()
    batch = log.read(2**64 - 1)
    assert (batch.operations, batch.num_lost) == ([], 0)


def test_the_oldest_are_forgotten_and_counted_as_lost():
    log = make_log(num_operations_max=2048)
    for number in range(1, 10_001):
        record(log, block_ids=[number])
    log.publish()
    batch = log.read(1, num_operations_max=10)
    oldest = batch.operations[0].number
    assert 10_000 - 2048 - NUM_OPERATIONS_PER_CHUNK < oldest <= 10_000 - 2048 + 1
    assert batch.num_lost == oldest - 1
    assert [it.block_ids for it in batch.operations] == [[oldest + k] for k in range(10)]
    assert log.read(9_999).num_lost == 0


def test_block_ids_are_bounded_too():
    log = make_log(num_block_ids_max=100_000)
    for _ in range(200):
        record(log, block_ids=range(4000))
    log.publish()
    num_lost = log.read(1).num_lost
    operations = read_all(log, first_number=num_lost + 1)
    assert operations[-1].number == 200
    num_ids = sum(len(it.block_ids) for it in operations)
    # What is not yet in a chunk is bounded by itself.
    assert 30_000 < num_ids <= 100_000 + 70_000


def test_a_batch_has_bounds_and_at_least_one_operation():
    log = make_log()
    for _ in range(3000):
        record(log, block_ids=[1, 2])
    log.publish()
    assert len(log.read(5, num_operations_max=7).operations) == 7
    assert len(log.read(5, num_ids_max=7).operations) == 3
    assert len(log.read(5, num_ids_max=1).operations) == 1
    assert len(log.read(1000, num_operations_max=100).operations) == 100


@pytest.mark.parametrize("seed", range(3))
def test_any_way_of_reading_gives_the_same_operations(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    sink = RecordingSink()
    log = make_log(sink, num_operations_max=1 << 20, num_block_ids_max=1 << 30)
    operations = []
    for _ in range(60):
        record_some(log, rng, rng.randrange(120))
        if rng.random() < 0.7:
            log.publish()
        bounds = {"num_operations_max": rng.randrange(1, 300), "num_ids_max": rng.randrange(1, 900)}
        operations += log.read(len(operations) + 1, **bounds).operations
    operations += read_all(log, len(operations) + 1)
    assert [it.number for it in operations] == list(range(1, log.num_operations + 1))
    for entry, passed in zip(operations, sink.records, strict=True):
        assert (entry.operation, entry.cause) == (passed.operation, passed.cause)
        assert tuple(entry.block_ids) == passed.block_ids
        assert tuple(entry.target_ids) == passed.target_ids


@pytest.mark.parametrize("seed", range(3))
def test_the_last_operation_on_each_block_is_known_however_old(seed):
    """Against a dictionary; blocks above 40 are touched early only, long before what is kept."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    log = make_log(num_operations_max=1000, clock=ManualClock(77))
    last = {}
    num_seen = 0
    for num_blocks in (60, 40, 40, 40):
        record_some(log, rng, 1700, num_blocks)
        log.publish()
        while batch := log.read(num_seen + 1).operations:
            for entry in batch:
                last.update(dict.fromkeys(blocks_touched(entry), entry))
            num_seen = batch[-1].number
        for block_id in range(61):
            entry = last.get(block_id)
            expected = entry and LastOperation(*entry[:5], time_ns=77)
            assert log.last_operation(block_id) == expected
    assert any(last[block_id].number < log.num_operations - 3000 for block_id in range(40, 60))


def test_operations_are_dated_by_the_flush_that_follows_them():
    clock = ManualClock(100)
    log = make_log(clock=clock)
    record(log, block_ids=[1])
    log.flush()
    clock.advance_ns(10)
    record(log, block_ids=[2])
    record(log, block_ids=[3])
    log.flush()
    clock.advance_ns(10)
    record(log, block_ids=[4])
    clock.advance_ns(10)

    def dates():
        return [log.last_operation(block_id).time_ns for block_id in (1, 2, 3)]

    assert dates() == [100, 110, 110]
    assert log.last_operation(4).time_ns == 130
    for _ in range(4000):
        record(log, block_ids=[9])
    assert dates() == [100, 110, 110]


def test_a_flush_wakes_watchers_once_and_only_when_there_is_news():
    log = make_log()
    calls = []
    log.flush()
    record(log)
    log.flush()
    log.on_operations = lambda: calls.append(len(log.read(1).operations))
    log.flush()
    assert calls == []
    record(log)
    record(log)
    log.flush()
    log.flush()
    assert calls == [3]
    log.on_operations = None
    record(log)
    log.flush()
    assert calls == [3]


def test_a_flush_wakes_watchers_also_right_after_a_chunk_was_filled():
    log = make_log()
    calls = []
    log.on_operations = lambda: calls.append(log.num_operations)
    for _ in range(NUM_OPERATIONS_PER_CHUNK):
        record(log)
    log.flush()
    log.flush()
    assert calls == [NUM_OPERATIONS_PER_CHUNK]
    (newest,) = log.read(NUM_OPERATIONS_PER_CHUNK).operations
    assert newest.number == NUM_OPERATIONS_PER_CHUNK


def test_an_owner_is_known_as_long_as_its_operations_are():
    log = make_log(num_operations_max=1024, clock=ManualClock(9))
    log.sequence_begin(5, trace_id=b"", span_id=b"", request_id="r", tenant="red")
    record(log, sequence_id=5)
    log.sequence_end(5)
    assert log.owners.of(5) == ("red", "r", 9, 1)
    for _ in range(4096):
        record(log)
    assert log.owners.of(5) is None


def test_a_sequence_number_that_comes_again_has_its_new_owner():
    log = make_log(num_operations_max=1024)
    for tenant in ("red", "blue"):
        log.sequence_begin(5, trace_id=b"", span_id=b"", request_id="", tenant=tenant)
        record(log, sequence_id=5)
        if tenant == "red":
            log.sequence_end(5)
    assert log.owners.at(5, 1) is None, "that was somebody else's"
    assert log.owners.at(5, 2).tenant == "blue"
    assert log.owners.at(0, 2) is None
    for _ in range(4096):
        record(log)
    assert log.owners.of(5).tenant == "blue"


def test_owners_without_operations_are_forgotten_too():
    log = make_log(num_operations_max=10)
    for sequence_id in range(1, 31):
        log.sequence_begin(sequence_id, trace_id=b"", span_id=b"", request_id="", tenant="red")
        log.sequence_end(sequence_id)
    assert [it for it in range(1, 31) if log.owners.of(it)] == list(range(21, 31))


def test_a_reader_on_another_thread_misses_nothing():
    log = make_log(num_operations_max=1 << 20)
    num_operations = 20_000
    seen = []

    def read():
        while len(seen) < num_operations:
            batch = log.read(len(seen) + 1, num_operations_max=999)
            assert not batch.num_lost
            seen.extend((it.number, it.block_ids) for it in batch.operations)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    log.on_operations = lambda: None
    for number in range(1, num_operations + 1):
        record(log, block_ids=[number % 97] * (number % 4))
        log.flush()
    reader.join(60)
    assert seen == [(n, [n % 97] * (n % 4)) for n in range(1, num_operations + 1)]
