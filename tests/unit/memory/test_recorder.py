"""Operations are recorded with the step they happen in and with what is free after them."""

from pageframe.core.plan import Recovery
from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.recorder import OperationRecorder
from unit.executor.small_engine import SmallEngine, fork, request
from unit.memory.kv_records import KvRecord, RecordingSink, ReplayedPool
from unit.memory.memories import entries

TEN = list(range(10, 20))


def test_a_record_says_what_for_whom_why_when_and_what_is_free_then():
    sink, num_free = RecordingSink(), 7
    recorder = OperationRecorder(sink, lambda: num_free)
    purpose = Purpose(KvCause.SWAP, sequence_id=3, generation=2, position=40, tenant_id=5)
    recorder.record(KvOperation.SHARE, purpose, [4, 5])
    recorder.step, num_free = 9, 6
    recorder.record(KvOperation.SWAP_OUT, purpose, [4], [1])
    assert sink.records == [
        KvRecord(KvOperation.SHARE, KvCause.SWAP, 3, 2, 40, 0, (4, 5), 7),
        KvRecord(KvOperation.SWAP_OUT, KvCause.SWAP, 3, 2, 40, 9, (4,), 6, (1,)),
    ]


def test_records_of_a_step_carry_its_number_and_those_between_steps_none():
    small = SmallEngine()
    small.start(request(1, TEN))
    small.step()
    small.desk.retain(tenant="t", cache_salt=b"", name="h", token_ids=TEN, ttl_ns=9, now_ns=0)
    small.engine.cancel([1])
    steps = [(record.operation.name, record.step) for record in small.sink.records]
    assert steps == [
        ("ALLOCATE", 1),
        ("INDEX", 1),
        ("PIN", 0),
        ("RELEASE", 0),
        ("FREE", 0),
    ]


def test_an_eviction_names_the_sequence_that_needed_the_room():
    small = SmallEngine(num_blocks=3)
    small.cache(TEN)
    small.start(request(7, range(40, 51)))
    evictions = [it for it in small.sink.records if it.operation is KvOperation.EVICT]
    assert [(it.sequence_id, it.cause.name) for it in evictions] == [(7, "POOL_PRESSURE")]


def test_blocks_taken_for_several_decodes_are_counted_down_one_by_one():
    small = SmallEngine()
    small.start(*(request(it, range(10 * it, 10 * it + 4)) for it in (1, 2, 3)))
    small.sink.records.clear()
    small.step()
    records = [it for it in small.sink.records if it.operation is KvOperation.ALLOCATE]
    assert [(it.sequence_id, it.block_ids, it.num_free_after) for it in records] == [
        (1, (3,), 4),
        (2, (4,), 3),
        (3, (5,), 2),
    ]


def test_the_records_of_a_busy_life_rebuild_the_pool():
    small = SmallEngine(num_blocks=6, num_host_slots=4, num_blocks_max=8)
    replayed = ReplayedPool(6, 8)

    def replay() -> None:
        replayed.replay(small.sink.records)
        replayed.assert_equals(small.memory.pool)

    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    replay()
    small.step()
    replay()
    small.preempt(1, Recovery.SWAP)
    small.step()
    replay()
    small.preempt(2, Recovery.TAIL, 1)
    replay()
    small.engine.cancel([2])
    small.desk.retain(
        tenant="t", cache_salt=b"", name="h", token_ids=TEN, ttl_ns=9, now_ns=small.clock.now_ns()
    )
    replay()
    small.start(request(3, range(40, 55)))
    replay()
    small.engine.cancel([3])
    while small.memory.sequences.get(1).row < 0:
        small.resume(1)
        replay()
    small.clock.advance_ns(10)
    small.desk.pass_time()
    small.engine.reset()
    replay()
    names = {record.operation.name for record in small.sink.records}
    assert {"SHARE", "COPY_ON_WRITE", "SWAP_OUT", "PIN", "UNPIN", "EVICT", "DEMOTE"} <= names
