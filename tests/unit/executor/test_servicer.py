"""The executor over real gRPC: who is let in, who has to go, and what plans are answered with."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from pageframe.core.clock import SystemClock
from pageframe.core.plan import Announcement, Entries, StepPlan
from pageframe.core.replica import PoolAccount
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor import servicer
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimRunner
from pageframe.rpc.status import from_rpc_error
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.wire.plan import plan_to_proto
from pageframe.wire.replica import pool_from_proto, replica_from_proto
from pageframe.wire.step import result_from_proto
from unit.executor.executor_house import FACTS, INCARNATION, executor_house
from unit.executor.played_engine import PATIENCE_S


@pytest.fixture
def run(tmp_path):
    """Run a scenario, a coroutine function that takes a house, to its end."""

    def run(scenario, engine=None, **options):
        async def main():
            async with executor_house(tmp_path, engine, **options) as house:
                await asyncio.wait_for(scenario(house), PATIENCE_S)

        asyncio.run(main())

    return run


def _is(error, status, reason):
    assert error is not None, "the stream ended well"
    assert (error.status, error.reason) == (status, reason)
    return True


async def _refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def test_hello_is_answered_with_what_is_served_over_a_pool_taken_over(run):
    async def scenario(house):
        peer = await house.greet()
        hello = (await peer.hear()).hello
        assert replica_from_proto(hello.replica) == FACTS
        assert pool_from_proto(hello.pool).total == 4
        assert hello.pool_incarnation == INCARNATION
        assert house.engine.calls == ["reset"]

    run(scenario)


def test_a_pool_that_changes_while_a_hello_is_answered_is_told_behind_it(run, monkeypatch):
    async def scenario(house):
        take_over = house.steps.take_over

        async def take_over_and_resize(session, quotas):
            pool = await take_over(session, quotas)
            session.deliver(StepResult(step=0, account=PoolAccount(total=3, free=3)), 0)
            await asyncio.sleep(0)
            return pool

        monkeypatch.setattr(house.steps, "take_over", take_over_and_resize)
        peer = await house.greet()
        assert pool_from_proto((await peer.hear()).hello.pool).total == 4
        assert pool_from_proto((await peer.hear()).result.pool).total == 3

    run(scenario)


@pytest.mark.parametrize(
    "first", [{"plan": pb.StepPlan(step=1)}, {"cancel": pb.CancelSequences()}, {}]
)
def test_the_first_message_has_to_be_a_hello(run, first):
    async def scenario(house):
        peer = house.call()
        await peer.say(**first)
        assert _is(await peer.end(), "FAILED_PRECONDITION", "HELLO_EXPECTED")
        assert house.engine.calls == []

    run(scenario)


def test_a_stream_that_ends_before_its_hello_is_told_so(run):
    async def scenario(house):
        peer = house.call()
        await peer.call.done_writing()
        assert _is(await peer.end(), "FAILED_PRECONDITION", "HELLO_EXPECTED")

    run(scenario)


def test_a_hello_has_to_name_its_scheduler(run):
    async def scenario(house):
        peer = await house.greet(scheduler_id="")
        assert _is(await peer.end(), "FAILED_PRECONDITION", "SCHEDULER_ID_MISSING")

    run(scenario)


@pytest.mark.parametrize("again", [{"hello": pb.SchedulerHello(scheduler_id="a", epoch=2)}, {}])
def test_after_the_hello_come_plans_and_cancels_only(run, again):
    async def scenario(house):
        peer = await house.connect()
        await peer.say(**again)
        assert _is(await peer.end(), "FAILED_PRECONDITION", "UNEXPECTED_MESSAGE")

    run(scenario)


def test_plans_and_cancels_are_answered_in_turn(run):
    async def scenario(house):
        peer = await house.connect()
        await peer.plan(1)
        await peer.plan(2)
        assert [(await peer.hear()).result.step for _ in range(2)] == [1, 2]
        await peer.say(cancel=pb.CancelSequences(sequence_ids=[7, 8]))
        result = (await peer.hear()).result
        assert (result.step, list(result.released_ids)) == (0, [7, 8])

    run(scenario)


def test_a_higher_epoch_takes_over_and_the_older_stream_is_aborted(run):
    async def scenario(house):
        older = await house.connect(epoch=1)
        house.engine.hold()
        await older.plan(1)
        await older.plan(2)
        await house.engine.wait_held()
        newer = await house.greet(epoch=2)
        assert _is(await older.end(), "ABORTED", "TAKEN_OVER")
        house.engine.release()
        assert (await newer.hear()).HasField("hello")
        assert house.engine.calls == ["reset", ("step", 1), "reset"]
        await newer.plan(1)
        assert (await newer.hear()).result.step == 1
        # The end of the older stream has not made room for anybody else.
        error = await (await house.greet("b")).end()
        assert _is(error, "FAILED_PRECONDITION", "SCHEDULER_CONNECTED")

    run(scenario)


@pytest.mark.parametrize("epoch", [4, 5])
def test_an_epoch_that_is_not_higher_is_too_old(run, epoch):
    async def scenario(house):
        peer = await house.connect(epoch=5)
        error = await (await house.greet(epoch=epoch)).end()
        assert _is(error, "FAILED_PRECONDITION", "EPOCH_TOO_OLD")
        assert error.limits == {"epoch": str(epoch), "epoch_seen": "5"}
        await peer.plan(1)
        assert (await peer.hear()).result.step == 1

    run(scenario)


def test_epochs_are_remembered_over_a_disconnect_for_each_scheduler(run):
    async def scenario(house):
        await (await house.connect("a", epoch=5)).part()
        error = await (await house.greet("a", epoch=5)).end()
        assert _is(error, "FAILED_PRECONDITION", "EPOCH_TOO_OLD")
        await (await house.connect("b", epoch=1)).part()
        await house.connect("a", epoch=6)

    run(scenario)


def test_another_scheduler_is_refused_while_one_is_connected(run):
    async def scenario(house):
        peer = await house.connect("a")
        error = await (await house.greet("b", epoch=9)).end()
        assert _is(error, "FAILED_PRECONDITION", "SCHEDULER_CONNECTED")
        assert error.limits == {"connected": "a", "refused": "b"}
        await peer.plan(1)
        assert (await peer.hear()).result.step == 1
        await peer.part()
        await house.connect("b")

    run(scenario)


def test_after_a_lost_connection_another_scheduler_is_let_in(run):
    async def scenario(house):
        (await house.connect("a")).call.cancel()
        await house.connect_when_free("b")

    run(scenario)


def test_a_connection_that_is_lost_while_it_takes_over_leaves_no_trace(run):
    async def scenario(house):
        before = await house.connect("a", epoch=1)
        house.engine.hold()
        await before.plan(1)
        await house.engine.wait_held()
        lost = await house.greet("a", epoch=2)
        assert _is(await before.end(), "ABORTED", "TAKEN_OVER")
        lost.call.cancel()
        # An answer over the same connection, so that the executor has heard of the cancel.
        error = await (await house.greet("a", epoch=2)).end()
        assert _is(error, "FAILED_PRECONDITION", "EPOCH_TOO_OLD")
        house.engine.release()
        await house.connect_when_free("b")

    run(scenario)


def _malformed():
    return pb.StepPlan(step=1, may=pb.PlanEntries(sequence_ids=[1, 2], generations=[0]))


def test_a_malformed_plan_ends_its_stream_and_no_other(run):
    async def scenario(house):
        peer = await house.connect(epoch=1)
        await peer.say(plan=_malformed())
        assert _is(await peer.end(), "FAILED_PRECONDITION", "MALFORMED_STEP")
        peer = await house.connect(epoch=2)
        await peer.plan(1)
        assert (await peer.hear()).result.step == 1
        assert house.engine.calls == ["reset", "reset", ("step", 1)]

    run(scenario)


def test_a_bug_in_reading_ends_the_stream_instead_of_leaving_it_silent(run, monkeypatch):
    def fail(message):
        raise TypeError("a bug")

    monkeypatch.setattr(servicer, "plan_from_proto", fail)

    async def scenario(house):
        peer = await house.connect()
        await peer.plan(1)
        assert _is(await peer.end(), "INTERNAL", "INTERNAL")

    run(scenario)


def _sim_engine(**config):
    return StepEngine(
        SimRunner(SimConfig(vocab_size=1000, max_model_len=256, **config)),
        num_blocks=8,
        block_size=4,
        max_num_sequences=4,
        max_step_tokens=16,
        max_model_len=32,
        trace=NullTraceSink(),
        clock=SystemClock(),
    )


def _plan(step, builds_on):
    plan = StepPlan(step=step, builds_on=builds_on)
    if step == 1:
        plan.announce.append(
            Announcement(
                sequence_id=9,
                token_ids=[5, 6, 7, 8, 9],
                num_prompt_tokens=5,
                sampling=SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True),
            )
        )
        plan.may = Entries([9], [0], [5])
    return plan


def test_steps_over_the_wire_are_those_of_the_engine(run):
    plans = [_plan(step, step - 1) for step in (1, 2, 3)]
    direct = _sim_engine()
    expected = [direct.step(plan) for plan in plans]
    assert expected[-1].finish_reasons, "the sequence ends in the last step"

    async def scenario(house):
        peer = await house.connect()
        for plan, result in zip(plans, expected, strict=True):
            await peer.say(plan=plan_to_proto(plan))
            heard = result_from_proto((await peer.hear()).result)
            heard.timing = result.timing
            assert heard == result

    run(scenario, _sim_engine())


def test_a_refused_plan_comes_back_as_a_refusal_with_the_last_step_applied(run):
    async def scenario(house):
        peer = await house.connect()
        await peer.say(plan=plan_to_proto(_plan(1, 0)))
        assert (await peer.hear()).result.step == 1
        await peer.say(plan=plan_to_proto(_plan(2, 9)))
        refusal = (await peer.hear()).refusal
        assert (refusal.step, refusal.last_applied_step) == (2, 1)
        assert refusal.reason == "BUILDS_ON_UNAPPLIED_STEP"
        assert (refusal.pool.total, refusal.pool.held) == (8, 2)

    run(scenario, _sim_engine())


def test_before_the_model_is_loaded_everything_is_unavailable(run):
    async def scenario(house):
        describe = house.stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
        assert _is(await _refusal(describe), "UNAVAILABLE", "STARTING")
        assert _is(await (await house.greet(epoch=5)).end(), "UNAVAILABLE", "STARTING")
        house.servicer.open(FACTS)
        # The refused hello has not used up its epoch.
        await house.connect(epoch=5)

    run(scenario, is_open=False)


def test_describe_says_what_is_served_and_how_full_it_is(run):
    async def scenario(house):
        response = await house.stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
        # The pool may have been resized since the facts were gathered.
        assert replica_from_proto(response.replica) == replace(FACTS, num_blocks=4)
        assert (response.pool.total, response.pool.free) == (4, 4)

    run(scenario)
