"""Handles: prefixes that are kept by name, until released or expired, each for its tenant alone."""

import pytest
from google.protobuf import duration_pb2

from pageframe.core.replica import PoolAccount
from pageframe.executor import handles
from pageframe.v1 import kv_memory_service_pb2 as pb
from unit.executor.memory_house import (
    KEYS,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    brief,
    prompt,
    retain,
    run_in_house,
    snapshot_of,
)


@pytest.fixture
def run(tmp_path):
    """Run a scenario, a coroutine function that takes a house, to its end."""
    return lambda scenario, **options: run_in_house(tmp_path, scenario, **options)


def test_what_is_retained_stays_when_its_sequence_ends(run):
    async def scenario(house):
        await house.run(1, 10)
        kept = await house.call("Retain", retain(prompt(1, 10)))
        # Two full blocks; what is in the third cannot be kept.
        assert kept.num_tokens == 8
        await house.finish(1)
        snapshot = await snapshot_of(house)
        assert snapshot.pin_counts.tolist() == [1, 1] + [0] * 10
        (retention,) = snapshot.retentions
        assert (retention.name, retention.num_blocks_pinned) == (kept.handle, 2)
        assert retention.kind.name == "HANDLE"
        assert retention.expire_ns == kept.expire_time.ToNanoseconds()
        await house.call("Release", pb.ReleaseRequest(handle=kept.handle))
        snapshot = await snapshot_of(house)
        assert snapshot.account == PoolAccount(total=12, free=10, cached=2)
        assert snapshot.retentions == []

    run(scenario)


def test_a_handle_ends_at_its_time(run):
    async def scenario(house):
        await house.run(1, 8)
        await house.call("Retain", retain(prompt(1, 8), "a"))
        await house.finish(1)
        house.clock.advance_ns(59 * 10**9)
        # The same again, so that its minute begins anew.
        await house.call("Retain", retain(prompt(1, 8), "a"))
        house.clock.advance_ns(59 * 10**9)
        await house.pass_time()
        assert (await snapshot_of(house)).account.pinned == 2
        house.clock.advance_ns(10**9)
        await house.pass_time()
        snapshot = await snapshot_of(house)
        assert (snapshot.account.pinned, snapshot.retentions) == (0, [])

    run(scenario)


def test_a_repeated_retain_gives_the_same_handle_and_no_second_pin(run):
    async def scenario(house):
        await house.run(1, 8)
        first = await house.call("Retain", retain(prompt(1, 8), "a"))
        again = await house.call("Retain", retain(prompt(1, 8), "a"))
        other = await house.call("Retain", retain(prompt(1, 8), "b"))
        nameless = [await house.call("Retain", retain(prompt(1, 8))) for _ in range(2)]
        assert first.handle == again.handle
        assert again.expire_time.ToNanoseconds() >= first.expire_time.ToNanoseconds()
        assert len({it.handle for it in (first, other, *nameless)}) == 4
        assert (await snapshot_of(house)).pin_counts.tolist()[:2] == [4, 4]

    run(scenario)


def test_a_request_id_stands_for_one_prefix(run):
    async def scenario(house):
        await house.run(1, 8)
        kept = await house.call("Retain", retain(prompt(1, 8), "a"))
        error = await house.refusal("Retain", retain(prompt(1, 4), "a"))
        assert brief(error) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
        assert error.limits == {"handle": kept.handle}
        await house.call("Release", pb.ReleaseRequest(handle=kept.handle))
        again = await house.call("Retain", retain(prompt(1, 4), "a"))
        assert (again.handle, again.num_tokens) == (kept.handle, 4)

    run(scenario)


def test_a_request_id_is_free_again_when_its_handle_has_ended(run):
    async def scenario(house):
        await house.call("Retain", retain([1, 2], "a"))
        house.clock.advance_ns(60 * 10**9)
        await house.pass_time()
        await house.call("Retain", retain([3, 4], "a"))
        assert len((await snapshot_of(house)).retentions) == 1

    run(scenario)


def test_tenants_with_the_same_tokens_and_request_ids_share_nothing(run):
    async def scenario(house):
        await house.run(1, 8, "red")
        red = await house.call("Retain", retain(prompt(1, 8), "a"), "k-red")
        blue = await house.call("Retain", retain(prompt(1, 8), "a"), "k-blue")
        assert red.handle != blue.handle
        assert (red.num_tokens, blue.num_tokens) == (8, 0)

    run(scenario, keys=KEYS)


def test_a_handle_is_released_by_its_tenant_alone_and_as_often_as_it_likes(run):
    async def scenario(house):
        await house.run(1, 8, "red")
        kept = await house.call("Retain", retain(prompt(1, 8), "a"), "k-red")
        request = pb.ReleaseRequest(handle=kept.handle)
        for key in ("k-blue", "k-op"):
            error = await house.refusal("Release", request, key)
            assert brief(error) == ("NOT_FOUND", "HANDLE_UNKNOWN")
        for _ in range(2):
            await house.call("Release", request, "k-red")
        error = await house.refusal("Release", request, "k-blue")
        assert brief(error) == ("NOT_FOUND", "HANDLE_UNKNOWN")

    run(scenario, keys=KEYS)


@pytest.mark.parametrize("handle", ["", "x", "x" * 10_000])
def test_a_handle_that_never_was_cannot_be_released(run, handle):
    async def scenario(house):
        error = await house.refusal("Release", pb.ReleaseRequest(handle=handle))
        assert brief(error) == ("NOT_FOUND", "HANDLE_UNKNOWN")

    run(scenario)


def test_only_so_many_released_handles_are_remembered(run, monkeypatch):
    monkeypatch.setattr(handles, "NUM_REMEMBERED_MAX", 2)

    async def scenario(house):
        names = []
        for index in range(3):
            kept = await house.call("Retain", retain([index]))
            names.append(kept.handle)
            await house.call("Release", pb.ReleaseRequest(handle=kept.handle))
        error = await house.refusal("Release", pb.ReleaseRequest(handle=names[0]))
        assert brief(error) == ("NOT_FOUND", "HANDLE_UNKNOWN")
        for name in names[1:]:
            await house.call("Release", pb.ReleaseRequest(handle=name))

    run(scenario)


_DAYS_400 = duration_pb2.Duration(seconds=400 * 24 * 3600)


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (pb.RetainRequest(token_ids=[1]), "INVALID_ARGUMENT", "HANDLE_TTL_MISSING"),
        (retain([1], ttl=duration_pb2.Duration()), "INVALID_ARGUMENT", "HANDLE_TTL_NOT_POSITIVE"),
        (
            retain([1], ttl=duration_pb2.Duration(seconds=-5)),
            "INVALID_ARGUMENT",
            "HANDLE_TTL_NOT_POSITIVE",
        ),
        (retain([1], ttl=_DAYS_400), "OUT_OF_RANGE", "HANDLE_TTL_ABOVE_MAX"),
        (
            retain([1], ttl=duration_pb2.Duration(seconds=1, nanos=-1)),
            "INVALID_ARGUMENT",
            "MALFORMED_DURATION",
        ),
        (
            retain([1], ttl=duration_pb2.Duration(nanos=1_000_000_000)),
            "INVALID_ARGUMENT",
            "MALFORMED_DURATION",
        ),
        (
            retain([1], ttl=duration_pb2.Duration(seconds=2**63 - 1)),
            "INVALID_ARGUMENT",
            "MALFORMED_DURATION",
        ),
        (retain([]), "INVALID_ARGUMENT", "PREFIX_EMPTY"),
        (retain([1, VOCAB_SIZE, 2]), "INVALID_ARGUMENT", "TOKEN_ID_OUT_OF_RANGE"),
        (retain([2**32 - 1]), "INVALID_ARGUMENT", "TOKEN_ID_OUT_OF_RANGE"),
        (retain([1] * (MAX_MODEL_LEN + 1)), "OUT_OF_RANGE", "PREFIX_TOO_LONG"),
        (retain([1], "é" * 65), "INVALID_ARGUMENT", "REQUEST_ID_TOO_LONG"),
    ],
)
def test_what_cannot_be_retained_is_refused(run, request_, status, reason):
    async def scenario(house):
        assert brief(await house.refusal("Retain", request_)) == (status, reason)
        assert (await snapshot_of(house)).retentions == []

    run(scenario)
