"""KV memory's own service: what it shows to whom, what it does for whom, and what it refuses."""

import dataclasses

import grpc
import pytest

from pageframe.executor import memory_servicer
from pageframe.rpc.status import from_rpc_error
from pageframe.v1 import executor_service_pb2, kv_block_pb2
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.wire.kv_memory import explanation_from_proto
from pageframe.wire.memory_facts import BLOCK_STATE_NAMES
from unit.executor.memory_house import (
    INCARNATION,
    KEYS,
    PATIENCE_S,
    brief,
    prompt,
    retain,
    run_in_house,
    snapshot_of,
)

SNAPSHOT = pb.KvMemoryServiceSnapshotRequest()


@pytest.fixture
def run(tmp_path):
    """Run a scenario, a coroutine function that takes a house, to its end."""
    return lambda scenario, **options: run_in_house(tmp_path, scenario, **options)


def quota(tenant, floor=0, ceiling=None):
    message = executor_service_pb2.TenantQuota(
        tenant=tenant, floor_blocks=floor, ceiling_blocks=ceiling
    )
    return pb.SetQuotaRequest(quota=message)


_METHODS = {
    "Snapshot": SNAPSHOT,
    "Explain": pb.ExplainRequest(),
    "Watch": pb.WatchRequest(),
    "Retain": retain([1]),
    "Release": pb.ReleaseRequest(handle="x"),
    "SetQuota": quota("red"),
    "Resize": pb.ResizeRequest(num_blocks=1),
}


def test_the_table_of_methods_is_complete():
    service = pb.DESCRIPTOR.services_by_name["KvMemoryService"]
    assert set(_METHODS) == {method.name for method in service.methods}


@pytest.mark.parametrize("method", _METHODS)
def test_before_the_model_is_loaded_everything_is_unavailable(run, method):
    async def scenario(house):
        error = await house.refusal(method, _METHODS[method])
        assert brief(error) == ("UNAVAILABLE", "STARTING")

    run(scenario, is_open=False)


@pytest.mark.parametrize("method", _METHODS)
def test_where_there_are_keys_nobody_gets_in_without(run, method):
    async def scenario(house):
        error = await house.refusal(method, _METHODS[method])
        assert brief(error) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")
        error = await house.refusal(method, _METHODS[method], "k-green")
        assert brief(error) == ("UNAUTHENTICATED", "CREDENTIALS_UNKNOWN")

    run(scenario, keys=KEYS)


@pytest.mark.parametrize("method", ["SetQuota", "Resize"])
def test_what_concerns_all_tenants_is_for_operators(run, method):
    async def scenario(house):
        error = await house.refusal(method, _METHODS[method], "k-red")
        assert brief(error) == ("PERMISSION_DENIED", "OPERATOR_NEEDED")
        assert house.engine.account().total == 12
        assert house.engine.memory.quotas.is_empty

    run(scenario, keys=KEYS)


def test_a_snapshot_shows_every_block_and_every_table(run):
    async def scenario(house):
        await house.run(1, 10)
        await house.run(2, 5)
        await house.finish(1)
        snapshot = await snapshot_of(house)
        assert (snapshot.step, snapshot.block_size) == (3, 4)
        assert snapshot.pool_incarnation == INCARNATION
        assert snapshot.operation == house.log.num_operations
        # The first sequence leaves two full blocks behind; its third is free again.
        names = [BLOCK_STATE_NAMES[state] for state in snapshot.states]
        assert names == ["cached"] * 2 + ["free"] + ["held"] * 2 + ["free"] * 7
        assert snapshot.ref_counts.tolist() == [0] * 3 + [1] * 2 + [0] * 7
        assert snapshot.is_indexed.tolist() == [True] * 2 + [False] + [True] + [False] * 8
        assert snapshot.pin_counts.tolist() == [0] * 12
        assert snapshot.account == house.engine.account()
        (table,) = snapshot.tables
        assert (table.sequence_id, table.request_id, table.tenant) == (2, "r2", "default")
        # Its last step has computed the token that the first one sampled.
        assert (table.block_ids, table.first_block, table.num_computed) == ([3, 4], 0, 6)
        assert table.since_ns == house.log.owners.of(2).since_ns > 0

    run(scenario)


def test_other_tenants_are_shown_without_their_names(run):
    async def scenario(house):
        await house.call("SetQuota", quota("blue", floor=1), "k-op")
        await house.call("SetQuota", quota("red", ceiling=9), "k-op")
        await house.run(1, 8, "red")
        await house.run(2, 8, "blue")
        await house.call("Retain", retain(prompt(1, 8), "a"), "k-red")
        await house.call("Retain", retain(prompt(2, 4), "b"), "k-blue")
        everything = await snapshot_of(house, "k-op")
        assert [it.request_id for it in everything.tables] == ["r1", "r2"]
        assert {it.tenant for it in everything.retentions} == {"red", "blue"}
        assert {it.quota.tenant for it in everything.quotas} == {"red", "blue"}

        seen = await snapshot_of(house, "k-blue")
        red, blue = seen.tables
        assert (red.sequence_id, red.request_id, red.tenant, red.since_ns) == (0, "", "", 0)
        assert red.block_ids == everything.tables[0].block_ids
        assert blue == everything.tables[1]
        assert [(it.name != "", it.tenant, it.num_blocks_pinned) for it in seen.retentions] == [
            (False, "", 2),
            (True, "blue", 1),
        ]
        assert [it.quota.tenant for it in seen.quotas] == ["blue"]
        assert seen.states.tolist() == everything.states.tolist()

    run(scenario, keys=KEYS)


def test_a_snapshot_that_fits_into_no_message_is_refused(run, monkeypatch):
    limits = dataclasses.replace(memory_servicer.LIMITS, message_bytes_max=20)
    monkeypatch.setattr(memory_servicer, "LIMITS", limits)

    async def scenario(house):
        error = await house.refusal("Snapshot", SNAPSHOT)
        assert brief(error) == ("RESOURCE_EXHAUSTED", "SNAPSHOT_TOO_LARGE")
        assert error.limits["num_bytes_max"] == "20"

    run(scenario)


def test_a_block_is_explained_by_its_holders_and_its_last_operation(run):
    async def scenario(house):
        await house.run(1, 8)
        await house.run(2, 3)
        await house.call("Retain", retain(prompt(1, 8), "a"))
        message = await house.call("Explain", pb.ExplainRequest(block_id=1))
        block = explanation_from_proto(1, message)
        assert BLOCK_STATE_NAMES[block.state] == "held"
        assert (block.num_references, block.num_pins, block.is_indexed) == (2, 1, True)
        assert (block.sequence_ids, block.tenant) == ([1], "default")
        assert [it.num_blocks_pinned for it in block.retentions] == [2]
        assert (block.operation.name, block.cause.name, block.step) == ("PIN", "RETAIN", 0)
        assert block.operation_number == house.log.num_operations
        assert block.time_ns > 0
        message = await house.call("Explain", pb.ExplainRequest(block_id=11))
        assert message.state == kv_block_pb2.BLOCK_STATE_FREE
        assert not message.operation
        assert not message.HasField("change_time")

    run(scenario)


def test_a_block_of_another_tenant_is_explained_without_names(run):
    async def scenario(house):
        await house.run(1, 8, "red")
        await house.call("Retain", retain(prompt(1, 8)), "k-red")
        message = await house.call("Explain", pb.ExplainRequest(block_id=0), "k-blue")
        assert (message.tenant, list(message.sequence_ids), list(message.retentions)) == (
            "",
            [],
            [],
        )
        assert (message.reference_count, message.pin_count) == (2, 1)
        message = await house.call("Explain", pb.ExplainRequest(block_id=0), "k-red")
        assert (message.tenant, list(message.sequence_ids)) == ("red", [1])
        assert [it.tenant for it in message.retentions] == ["red"]

    run(scenario, keys=KEYS)


@pytest.mark.parametrize("block_id", [12, 2**32 - 1])
def test_a_block_that_is_not_there_cannot_be_explained(run, block_id):
    async def scenario(house):
        error = await house.refusal("Explain", pb.ExplainRequest(block_id=block_id))
        assert brief(error) == ("OUT_OF_RANGE", "BLOCK_UNKNOWN")
        assert error.limits == {"block_id": str(block_id), "num_blocks": "12"}

    run(scenario)


def test_a_quota_holds_and_tells_what_the_tenant_has(run):
    async def scenario(house):
        await house.run(1, 8, "red")
        answer = await house.call("SetQuota", quota("red", floor=3, ceiling=5), "k-op")
        assert answer.num_blocks_held == 2
        answer = await house.call("SetQuota", quota("blue"), "k-op")
        assert answer.num_blocks_held == 0
        set_now = house.engine.memory.quotas.quota_of("red")
        assert (set_now.floor_blocks, set_now.ceiling_blocks) == (3, 5)

    run(scenario, keys=KEYS)


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (pb.SetQuotaRequest(), "INVALID_ARGUMENT", "QUOTA_MISSING"),
        (quota(""), "INVALID_ARGUMENT", "TENANT_MISSING"),
        (quota("x" * 257), "INVALID_ARGUMENT", "TENANT_TOO_LONG"),
        (quota("red", floor=5, ceiling=4), "INVALID_ARGUMENT", "QUOTA_FLOOR_ABOVE_CEILING"),
        (quota("red", floor=13), "FAILED_PRECONDITION", "QUOTA_FLOORS_EXCEED_POOL"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(run, request_, status, reason):
    async def scenario(house):
        assert brief(await house.refusal("SetQuota", request_)) == (status, reason)
        assert house.engine.memory.quotas.is_empty

    run(scenario)


def test_the_pool_shrinks_and_grows_around_what_it_holds(run):
    async def table_of(house, sequence_id):
        tables = (await snapshot_of(house)).tables
        return next(it.block_ids for it in tables if it.sequence_id == sequence_id)

    async def scenario(house):
        await house.run(1, 26)
        await house.run(2, 7)
        await house.finish(1)
        assert await table_of(house, 2) == [7, 8]
        outcome = await house.call("Resize", pb.ResizeRequest(num_blocks=8))
        assert (outcome.pool.total, outcome.num_blocks_moved) == (8, 1)
        block_ids = await table_of(house, 2)
        assert block_ids[0] == 7
        assert max(block_ids) < 8
        outcome = await house.call("Resize", pb.ResizeRequest(num_blocks=24))
        assert (outcome.pool.total, outcome.num_blocks_moved) == (24, 0)
        assert len((await snapshot_of(house)).states) == 24
        assert (await house.step()).sampled_ids == [2]

    run(scenario)


@pytest.mark.parametrize(
    ("num_blocks", "status", "reason"),
    [
        (0, "INVALID_ARGUMENT", "RESIZE_TOO_SMALL"),
        (25, "OUT_OF_RANGE", "RESIZE_ABOVE_RESERVED"),
        (2**32 - 1, "OUT_OF_RANGE", "RESIZE_ABOVE_RESERVED"),
        (1, "FAILED_PRECONDITION", "RESIZE_BELOW_PINNED"),
    ],
)
def test_a_size_that_the_pool_cannot_have_is_refused(run, num_blocks, status, reason):
    async def scenario(house):
        await house.run(1, 8)
        await house.call("Retain", retain(prompt(1, 8)))
        error = await house.refusal("Resize", pb.ResizeRequest(num_blocks=num_blocks))
        assert brief(error) == (status, reason)
        assert error.limits["num_blocks"] == str(num_blocks)
        assert house.engine.account().total == 12

    run(scenario)


def test_what_comes_after_its_deadline_is_not_done(run):
    async def scenario(house):
        async with house.busy():
            num_calls = house.steps.num_calls
            call = house.stub.Resize(pb.ResizeRequest(num_blocks=20), timeout=1.0)
            await house.until(lambda: house.steps.num_calls > num_calls)
            await house.until(lambda: house.steps.num_given_up == 1)
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await house.settle()
        assert house.engine.account().total == 12

    run(scenario)


def test_what_was_waited_for_too_long_is_not_done(run):
    async def scenario(house):
        async with house.busy():
            num_calls = house.steps.num_calls
            call = house.stub.Resize(pb.ResizeRequest(num_blocks=20), timeout=PATIENCE_S)
            await house.until(lambda: house.steps.num_calls > num_calls)
            house.clock.advance_ns(2 * PATIENCE_S * 10**9)
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert brief(from_rpc_error(caught.value)) == ("DEADLINE_EXCEEDED", "DEADLINE_PASSED")
        assert house.engine.account().total == 12

    run(scenario)


def test_what_its_caller_has_given_up_is_not_done(run):
    async def scenario(house):
        async with house.busy():
            num_calls = house.steps.num_calls
            call = house.stub.Resize(pb.ResizeRequest(num_blocks=20), timeout=PATIENCE_S)
            await house.until(lambda: house.steps.num_calls > num_calls)
            call.cancel()
            await house.until(lambda: house.steps.num_given_up == 1)
        await house.settle()
        assert house.engine.account().total == 12

    run(scenario)
