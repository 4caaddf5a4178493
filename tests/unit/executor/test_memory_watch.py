"""Watching operations: nothing is missed unseen, and nobody waits for a watcher."""

import asyncio

import grpc
import pytest

from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor import watchers
from pageframe.executor.operation_log import NUM_OPERATIONS_PER_CHUNK
from pageframe.v1 import kv_block_pb2
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.wire.kv_memory import batch_from_proto
from unit.executor.memory_house import (
    INCARNATION,
    KEYS,
    PATIENCE_S,
    brief,
    end_of,
    heard,
    run_in_house,
)


@pytest.fixture
def run(tmp_path):
    """Run a scenario, a coroutine function that takes a house, to its end."""
    return lambda scenario, **options: run_in_house(tmp_path, scenario, **options)


async def heard_up_to(call, number):
    """All operations until this one, and how many were lost in between."""
    operations, num_lost = [], 0
    while not operations or operations[-1].number < number:
        batch = batch_from_proto(await heard(call))
        operations += batch.operations
        num_lost += batch.num_lost
    return operations, num_lost


async def record_many(house, num_operations, num_blocks_each=1):
    """Operations without steps, as fast as they can be recorded."""

    def record():
        for number in range(num_operations):
            house.log.kv(
                KvOperation.SHARE,
                KvCause.FORK,
                sequence_id=9,
                generation=0,
                position=0,
                step=1,
                block_ids=[number % 12] * num_blocks_each,
                num_free_after=0,
            )

    await house.steps.call(record)


def test_what_happens_after_the_call_is_seen_as_it_happens(run):
    async def scenario(house):
        await house.run(1, 8)
        call = await house.watching()
        num_before = house.log.num_operations
        await house.run(2, 5)
        operations, num_lost = await heard_up_to(call, house.log.num_operations)
        assert operations[0].number == num_before + 1
        assert [it.number for it in operations] == list(
            range(num_before + 1, house.log.num_operations + 1)
        )
        assert num_lost == 0
        (allocated,) = [
            it for it in operations if it.operation is KvOperation.ALLOCATE and it.sequence_id == 2
        ]
        # The first sequence took block 2 in the same step.
        assert allocated.block_ids == [3, 4]
        assert (allocated.cause, allocated.step) == (KvCause.PREFILL, 2)

    run(scenario)


def test_a_watch_can_begin_in_the_past_or_in_the_future(run):
    async def scenario(house):
        await house.run(1, 8)
        past = await house.watching(first_operation=1, pool_incarnation=INCARNATION)
        future = await house.watching(first_operation=house.log.num_operations + 2)
        operations, _ = await heard_up_to(past, house.log.num_operations)
        assert [it.number for it in operations] == list(range(1, house.log.num_operations + 1))
        first_wanted = house.log.num_operations + 2
        await record_many(house, 3)
        operations, num_lost = await heard_up_to(future, house.log.num_operations)
        assert ([it.number for it in operations], num_lost) == (
            [first_wanted, first_wanted + 1],
            0,
        )

    run(scenario)


def test_operations_of_another_pool_are_not_mistaken_for_ours(run):
    async def scenario(house):
        request = pb.WatchRequest(first_operation=5, pool_incarnation=INCARNATION - 1)
        error = await house.refusal("Watch", request)
        assert brief(error) == ("FAILED_PRECONDITION", "POOL_REPLACED")
        assert error.limits == {"pool_incarnation": str(INCARNATION)}

    run(scenario)


def test_a_late_watcher_is_told_what_is_gone(run):
    async def scenario(house):
        await record_many(house, 10_000)
        call = await house.watching(first_operation=1)
        operations, num_lost = await heard_up_to(call, 10_000)
        assert num_lost == operations[0].number - 1 >= 10_000 - 2048 - NUM_OPERATIONS_PER_CHUNK
        assert [it.number for it in operations] == list(range(num_lost + 1, 10_001))

    run(scenario, num_operations_max=2048)


def test_a_watcher_that_never_reads_costs_nothing_and_learns_what_it_lost(run):
    """Everything else goes on, and the server reads ahead for it no more than a few messages."""

    async def scenario(house):
        num_read = 0
        read = house.log.read

        def counting_read(*arguments, **options):
            nonlocal num_read
            batch = read(*arguments, **options)
            num_read += len(batch.operations)
            return batch

        house.log.read = counting_read
        call = await house.watching()
        for _ in range(40):
            # About a megabyte: more than the transport takes for a stream nobody reads.
            await record_many(house, 1024, num_blocks_each=1000)
            await house.call("Snapshot", pb.KvMemoryServiceSnapshotRequest())
        num_operations = house.log.num_operations
        assert num_operations == 40 * 1024
        assert num_read < num_operations / 2
        operations, num_lost = await heard_up_to(call, num_operations)
        assert num_lost == num_operations - len(operations) > 0

    run(scenario, num_operations_max=2048)


def test_watchers_read_each_for_itself(run):
    async def scenario(house):
        calls = [await house.watching() for _ in range(3)]
        await record_many(house, 5)
        calls[1].cancel()
        await record_many(house, 5)
        for call in (calls[0], calls[2]):
            operations, num_lost = await heard_up_to(call, 10)
            assert ([it.number for it in operations], num_lost) == (list(range(1, 11)), 0)

    run(scenario)


def test_a_message_has_bounds(run):
    async def scenario(house):
        await record_many(house, 10_000)
        call = await house.watching(first_operation=1)
        sizes = []
        while sum(sizes) < 10_000:
            sizes.append(len((await heard(call)).operations))
        assert max(sizes) == 4096
        await record_many(house, 1000, num_blocks_each=1000)
        num_ids = []
        while sum(num_ids) < 1_000_000:
            message = await heard(call)
            num_ids.append(sum(len(it.block_ids) for it in message.operations))
        assert max(num_ids) <= 262_144 + 1000

    run(scenario)


def test_sequences_of_other_tenants_have_no_number(run):
    async def scenario(house):
        calls = {key: await house.watching(key) for key in ("k-red", "k-op")}
        await house.run(1, 4, "red")
        await house.run(2, 4, "blue")
        await house.finish(1, 2)
        seen = {}
        for key, call in calls.items():
            operations, _ = await heard_up_to(call, house.log.num_operations)
            seen[key] = operations
        assert {it.sequence_id for it in seen["k-op"]} >= {1, 2}
        assert {it.sequence_id for it in seen["k-red"]} <= {0, 1}
        for red, everything in zip(seen["k-red"], seen["k-op"], strict=True):
            assert red.block_ids == everything.block_ids
            assert red.sequence_id == (1 if everything.sequence_id == 1 else 0)

    run(scenario, keys=KEYS)


async def named_up_to(call, number):
    """Whose the sequences of all operations until this one are, as each message says."""
    named, last = [], 0
    while last < number:
        batch = batch_from_proto(await heard(call))
        named.append({it.sequence_id: it for it in batch.sequences})
        assert len(named[-1]) == len(batch.sequences), "each once"
        assert set(named[-1]) <= {it.sequence_id for it in batch.operations}
        last = batch.operations[-1].number
    return named


def test_operations_come_with_the_names_of_their_sequences(run):
    async def scenario(house):
        calls = {key: await house.watching(key) for key in ("k-red", "k-op")}
        await house.run(1, 4, "red")
        await house.run(2, 4, "blue")
        now_ns = house.clock.now_ns()
        seen = {
            key: {
                number: facts
                for it in await named_up_to(call, house.log.num_operations)
                for number, facts in it.items()
            }
            for key, call in calls.items()
        }
        red, blue = (1, "r1", "red", now_ns), (2, "r2", "blue", now_ns)
        assert seen == {"k-red": {1: red}, "k-op": {1: red, 2: blue}}
        # Who begins late hears names of what has ended, as long as its operations are kept.
        await house.finish(1, 2)
        late = await house.watching("k-op", first_operation=1)
        (told,) = await named_up_to(late, house.log.num_operations)
        assert told == {1: red, 2: blue}

    run(scenario, keys=KEYS)


def test_only_so_many_may_watch(run, monkeypatch):
    monkeypatch.setattr(watchers, "NUM_WATCHERS_MAX", 2)

    async def scenario(house):
        calls = [await house.watching() for _ in range(2)]
        error = await end_of(house.watch())
        assert brief(error) == ("RESOURCE_EXHAUSTED", "WATCHERS_FULL")
        assert error.limits == {"num_watchers": "2", "num_watchers_max": "2"}
        calls[0].cancel()
        # The place is free once the server has heard that the watcher left.
        while not await is_admitted(house):
            pass

    async def is_admitted(house):
        call = house.watch()
        await call.initial_metadata()
        await record_many(house, 1)
        try:
            return bool((await heard(call)).operations)
        except grpc.RpcError:
            return False

    run(scenario)


def test_the_step_thread_has_nobody_to_wake_when_nobody_watches(run):
    async def scenario(house):
        assert house.log.on_operations is None
        calls = [await house.watching() for _ in range(2)]
        assert house.log.on_operations is not None
        for call in calls:
            call.cancel()
        await house.until(lambda: house.log.on_operations is None)

    run(scenario)


def test_a_drain_ends_all_watches(run):
    async def scenario(house):
        call = await house.watching()
        await record_many(house, 1)
        assert (await heard(call)).operations[0].operation == kv_block_pb2.KV_OPERATION_SHARE
        await house.servicer.drain()
        assert brief(await end_of(call)) == ("UNAVAILABLE", "DRAINING")
        assert brief(await end_of(house.watch())) == ("UNAVAILABLE", "DRAINING")

    run(scenario)


def test_a_deadline_ends_a_watch(run):
    async def scenario(house):
        call = house.stub.Watch(pb.WatchRequest(), timeout=0.2)
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.wait_for(call.read(), PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(scenario)
