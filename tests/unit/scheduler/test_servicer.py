"""The scheduler over real gRPC: gateways come, go and come back, and hear of every end."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from pageframe.core.step import FinishReason, StepResult
from pageframe.rpc.status import from_rpc_error
from pageframe.scheduler import servicer as servicer_module
from pageframe.scheduler.policies.registry import GROUPS
from pageframe.v1 import scheduler_service_pb2 as pb
from pageframe.wire.replica import replica_from_proto
from pageframe.wire.request import submission_to_proto
from unit.scheduler.driver import expected_output, make_submission
from unit.scheduler.played_executor import PATIENCE_S
from unit.scheduler.scheduler_house import scheduler_house, serving


@pytest.fixture
def run(tmp_path):
    """Run a scenario, a coroutine function that takes a house and its executor's stream."""

    async def main(scenario):
        async with scheduler_house(tmp_path) as house:
            stream = await house.start()
            await asyncio.wait_for(scenario(house, stream), PATIENCE_S)

    return lambda scenario: asyncio.run(main(scenario))


def test_hello_is_answered_with_what_is_served(run):
    async def scenario(house, stream):
        peer = await house.greet()
        assert replica_from_proto((await peer.hear()).hello.replica) == stream.facts

    run(scenario)


def test_hello_is_said_again_when_the_pool_was_resized(run):
    async def scenario(house, stream):
        peer = await house.connect()
        account = replace(stream.pool, total=9, free=9)
        stream.tell(StepResult(step=0, account=account))
        assert (await peer.hear()).hello.replica.num_blocks == 9
        # Nothing new, nothing said: the next message is about a request.
        stream.tell(StepResult(step=0, account=account))
        async with serving(stream):
            await peer.submit(1, max_tokens=2)
            await peer.hear_completions(1)

    run(scenario)


@pytest.mark.parametrize(
    "first",
    [
        {},
        {"hello": pb.GatewayHello()},
        {"submit": submission_to_proto(make_submission(1))},
    ],
)
def test_the_first_message_has_to_be_a_hello_with_a_name(run, first):
    async def scenario(house, stream):
        peer = house.call()
        await peer.say(**first)
        error = await peer.end()
        assert (error.status, error.reason) == ("FAILED_PRECONDITION", "HELLO_EXPECTED")

    run(scenario)


HELLO = {"hello": pb.GatewayHello(gateway_id="g")}


def together(*orders):
    return {"orders": pb.ConnectOrders(orders=[pb.ConnectRequest(**order) for order in orders])}


@pytest.mark.parametrize("again", [{}, HELLO, together(HELLO), together({})])
def test_after_the_hello_come_submissions_and_cancels_only(run, again):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.say(**again)
        error = await peer.end()
        assert (error.status, error.reason) == ("FAILED_PRECONDITION", "UNEXPECTED_MESSAGE")

    run(scenario)


def test_several_orders_of_one_message_are_carried_out_in_their_order(run):
    async def scenario(house, stream):
        peer = await house.connect()
        requests = [
            make_submission(handle, max_tokens=2, request_id=str(handle)) for handle in (1, 2, 3)
        ]
        one, two, three = ({"submit": submission_to_proto(request)} for request in requests)
        await peer.say(**together(one, two, {"cancel": pb.CancelSubmission(handle=2)}, three))
        async with serving(stream):
            completions = await peer.hear_completions(3)
        reasons = {completion.handle: completion.finish_reason for completion in completions}
        assert reasons == {
            1: FinishReason.LENGTH,
            2: FinishReason.CANCELLED,
            3: FinishReason.LENGTH,
        }

    run(scenario)


def test_gateways_hear_of_their_own_requests_only(run):
    async def scenario(house, stream):
        one, two = await house.connect("g"), await house.connect("h")
        async with serving(stream):
            first = await one.submit(1, request_id="a", max_tokens=4)
            second = await two.submit(1, 6, request_id="b", max_tokens=3)
            for peer, request in ((one, first), (two, second)):
                (completion,) = await peer.hear_completions(1)
                assert (completion.handle, completion.finish_reason) == (1, FinishReason.LENGTH)
                assert completion.num_prompt_tokens == len(request.prompt_token_ids)
                assert peer.tokens == expected_output(request, stream.facts)

    run(scenario)


def test_a_request_can_be_cancelled_whole_or_by_sample(run):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1, max_tokens=50, num_samples=2)
        first = await stream.take_plan()
        stream.answer(first)
        assert (await peer.hear()).HasField("events")
        await peer.say(cancel=pb.CancelSubmission(handle=1, sample_index=0))
        cancel = await stream.take_cancel()
        assert cancel == [first.announce[0].sequence_id]
        stream.answer(cancel)
        (ended,) = await peer.hear_completions(1)
        assert (ended.sample_index, ended.finish_reason) == (0, FinishReason.STOP)
        await peer.say(cancel=pb.CancelSubmission(handle=1))
        cancel = await stream.take_cancel()
        assert cancel == first.forks[0].child_ids
        stream.answer(cancel)
        ended = (await peer.hear_completions(2))[1]
        assert (ended.sample_index, ended.finish_reason) == (1, FinishReason.CANCELLED)

    run(scenario)


def test_the_same_gateway_again_aborts_the_older_stream_and_cancels_its_requests(run):
    async def scenario(house, stream):
        older = await house.connect("g")
        await older.submit(1, max_tokens=50, request_id="a")
        plan = await stream.take_plan()
        stream.answer(plan)
        newer = await house.connect("g")
        error = await older.end()
        assert (error.status, error.reason) == ("ABORTED", "TAKEN_OVER")
        cancel = await stream.take_cancel()
        assert cancel == [plan.announce[0].sequence_id]
        # Not released yet, and its name is free already: the gateway submits it again at once.
        request = await newer.submit(1, max_tokens=2, request_id="a")
        stream.answer(cancel)
        async with serving(stream):
            (completion,) = await newer.hear_completions(1)
        assert completion.finish_reason is FinishReason.LENGTH, completion
        assert newer.tokens == expected_output(request, stream.facts)

    run(scenario)


@pytest.mark.parametrize("is_clean", [True, False])
def test_what_a_lost_gateway_asked_for_is_taken_back_at_once(run, is_clean):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1, max_tokens=50)
        plan = await stream.take_plan()
        stream.answer(plan)
        if is_clean:
            await peer.call.done_writing()
        else:
            peer.call.cancel()
        cancel = await stream.take_cancel()
        assert cancel == [plan.announce[0].sequence_id]
        stream.answer(cancel)
        await house.loop.wait_idle()

    run(scenario)


def test_the_end_of_an_older_stream_does_not_touch_the_one_that_replaced_it(run):
    async def scenario(house, stream):
        older = await house.connect("g")
        newer = await house.connect("g")
        assert (await older.end()).reason == "TAKEN_OVER"
        async with serving(stream):
            await newer.submit(1, max_tokens=20)
            (completion,) = await newer.hear_completions(1)
        assert completion.finish_reason is FinishReason.LENGTH
        # It is still known by its name: its own end counts.
        await newer.submit(2, max_tokens=50)
        plan = await stream.take_plan()
        stream.answer(plan)
        newer.call.cancel()
        assert await stream.take_cancel() == [plan.announce[0].sequence_id]

    run(scenario)


def test_the_places_of_a_lost_gateway_are_free_for_others(run):
    async def scenario(house, stream):
        lost = await house.connect("g")
        for handle in range(1, 9):
            await lost.submit(handle, max_tokens=50)
        # All eight that may run at once.
        while (await house.snapshot()).num_running < 8:
            stream.answer(await stream.take_plan())
        lost.call.cancel()
        async with serving(stream):
            other = await house.connect("h")
            await other.submit(9, max_tokens=2)
            (completion,) = await other.hear_completions(1)
        assert completion.finish_reason is FinishReason.LENGTH
        assert (await house.snapshot()).num_running == 0

    run(scenario)


def test_a_refusal_comes_as_one_completion_for_each_sample(run):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1, 200, max_tokens=100, num_samples=3)
        completions = await peer.hear_completions(3)
        assert [completion.sample_index for completion in completions] == [0, 1, 2]
        for completion in completions:
            assert (completion.handle, completion.finish_reason) == (1, FinishReason.ERROR)
            assert completion.error_status == "OUT_OF_RANGE"
            assert completion.error_reason == "CONTEXT_TOO_LONG"
            assert completion.error_limits["max_model_len"] == "256"
            assert "200 prompt tokens" in completion.error_message
            assert completion.num_prompt_tokens == 200
        # The stream goes on, and the name and the handle are free.
        async with serving(stream):
            await peer.submit(1)
            assert (await peer.hear_completions(4))[3].finish_reason is FinishReason.LENGTH

    run(scenario)


@pytest.mark.parametrize(("num_samples", "num_completions"), [(0, 1), (65, 64), (1 << 31, 64)])
def test_a_refused_number_of_samples_is_not_the_number_of_completions(
    run, num_samples, num_completions
):
    async def scenario(house, stream):
        peer = await house.connect()
        message = submission_to_proto(make_submission(1))
        message.num_samples = num_samples
        await peer.say(submit=message)
        completions = await peer.hear_completions(num_completions)
        reasons = {completion.error_reason for completion in completions}
        assert reasons == {"NUM_SAMPLES_OUT_OF_RANGE"}

    run(scenario)


def test_a_submission_that_cannot_be_read_is_refused_like_any_other(run):
    async def scenario(house, stream):
        peer = await house.connect()
        message = submission_to_proto(make_submission(1))
        message.sampling.ClearField("seed")
        await peer.say(submit=message)
        (completion,) = await peer.hear_completions(1)
        assert completion.error_reason == "UNSPECIFIED_FIELD"

    run(scenario)


def test_a_bug_in_reading_ends_the_stream_instead_of_leaving_it_silent(run, monkeypatch):
    def fail(message):
        raise TypeError("a bug")

    monkeypatch.setattr(servicer_module, "submission_from_proto", fail)

    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1)
        error = await peer.end()
        assert (error.status, error.reason) == ("INTERNAL", "INTERNAL")

    run(scenario)


def test_a_gateway_that_comes_before_the_executor_waits_for_it(tmp_path):
    async def main():
        async with scheduler_house(tmp_path) as house:
            house.executor.is_away = True
            starting = asyncio.create_task(house.loop.start())
            await house.executor.asked()
            peer = await house.greet()
            with pytest.raises(grpc.RpcError) as caught:
                await house.snapshot()
            assert from_rpc_error(caught.value).reason == "NO_EXECUTOR"
            house.executor.come_back()
            assert (await peer.hear()).HasField("hello")
            await starting

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_snapshot_shows_who_runs_and_who_waits(run):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1, 6, max_tokens=9, request_id="a", tenant="t")
        stream.answer(await stream.take_plan())
        assert (await peer.hear()).HasField("events")
        await stream.take_plan()
        await peer.submit(2, 5, request_id="b")
        # A refusal, so that the submission ahead of it has arrived.
        await peer.submit(2, request_id="c")
        await peer.hear_completions(1)
        house.clock.advance_ns(2_000_000_000)
        snapshot = await house.snapshot()
        assert (snapshot.num_running, snapshot.num_waiting, snapshot.num_preempted) == (1, 1, 0)
        assert (snapshot.num_steps_in_flight, snapshot.last_step) == (1, 1)
        assert (snapshot.pool.total, snapshot.pool.held) == (64, 2)
        assert snapshot.executor_connected
        deciding = {policy.group: policy.name for policy in snapshot.policies}
        assert deciding == {name: group.default for name, group in GROUPS.items()}
        first, second = sorted(snapshot.sequences, key=lambda entry: entry.sequence_id)
        assert (first.request_id, first.tenant, first.state) == ("a", "t", "running")
        assert (first.num_computed_tokens, first.num_tokens) == (6, 7)
        assert (second.request_id, second.state, second.num_tokens) == ("b", "waiting", 5)
        assert first.age.ToNanoseconds() == 2_000_000_000

    run(scenario)


def test_drain_refuses_what_is_new_and_waits_for_what_lives(run):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1, max_tokens=2, request_id="a")
        stream.answer(await stream.take_plan())
        plan = await stream.take_plan()
        drain = house.stub.Drain(pb.DrainRequest(), timeout=PATIENCE_S)
        # Until the drain has arrived, submissions are accepted; each has a name of its own.
        handle = 1
        refused = []
        while not refused:
            handle += 1
            await peer.submit(handle, request_id=f"request-{handle}", max_tokens=500)
            refused = await peer.hear_completions(len(peer.completions) + 1)
            refused = [entry for entry in refused if entry.error_reason == "DRAINING"]
        assert refused[0].error_status == "UNAVAILABLE"
        assert not drain.done()
        stream.answer(plan)
        response = await drain
        assert response.num_requests_left == 0

    run(scenario)


def test_a_drain_ends_at_its_deadline_whoever_still_lives(run):
    async def scenario(house, stream):
        peer = await house.connect()
        await peer.submit(1, max_tokens=50)
        await stream.take_plan()
        await house.servicer.drain(0.0)
        snapshot = await house.snapshot()
        assert (snapshot.num_running, len(snapshot.sequences)) == (1, 1)

    run(scenario)
