"""The loop around the core: what is sent when, and what outlives an executor."""

import asyncio
from dataclasses import replace

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import (
    AbortedError,
    InternalError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from pageframe.core.replica import TenantQuota
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.terms import TenantRate, TenantTerms
from pageframe.core.trace import NullTraceSink
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.options import SchedulerOptions
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import expected_output, make_submission
from unit.scheduler.played_executor import PATIENCE_S, PlayedExecutor

GATEWAY = 1
LOST = UnavailableError("TRANSPORT", "the socket is closed")


class House:
    """A loop between a played executor and a gateway that keeps what it is told."""

    def __init__(self, *, lookahead=True, token_budget=16, facts=None):
        self.executor = PlayedExecutor(facts or make_facts())
        self.clock = ManualClock(1_000_000)
        self.lookahead = lookahead
        self.token_budget = token_budget
        self.loop = SchedulerLoop(
            self.executor.open, make_scheduler=self._make_scheduler, clock=self.clock
        )
        self.loop.attach(GATEWAY, self._deliver)
        self.tokens = []
        self.on_tokens = None
        self._completions = asyncio.Queue()

    def _make_scheduler(self, facts):
        return Scheduler(
            facts,
            SchedulerOptions(
                token_budget=self.token_budget, max_num_running=8, lookahead=self.lookahead
            ),
            trace=NullTraceSink(),
            clock=self.clock,
        )

    def _deliver(self, events):
        self.tokens += events.token_ids
        if events.token_ids and self.on_tokens is not None:
            on_tokens, self.on_tokens = self.on_tokens, None
            on_tokens()
        for completion in events.completions:
            self._completions.put_nowait(completion)

    @property
    def nothing_ended(self):
        return self._completions.empty()

    async def completion(self):
        return await asyncio.wait_for(self._completions.get(), PATIENCE_S)

    async def start(self):
        """Connect; the stream is the executor's end."""
        await self.loop.start()
        await self.executor.asked()
        return await self.executor.opened()


def run(scenario, **options):
    """Run a scenario, a coroutine function that takes a house, to its end."""

    async def main():
        house = House(**options)
        try:
            await asyncio.wait_for(scenario(house), PATIENCE_S)
        finally:
            await house.loop.stop()

    asyncio.run(main())


def test_a_submission_becomes_plans_and_results_become_events():
    async def scenario(house):
        stream = await house.start()
        request = make_submission(1, max_tokens=3)
        house.loop.submit(GATEWAY, request)
        plan = await stream.take_plan()
        assert [entry.request_id for entry in plan.announce] == ["request-1"]
        stream.answer(plan)
        for _ in range(2):
            stream.answer(await stream.take_plan())
        assert (await house.completion()).finish_reason is FinishReason.LENGTH
        assert house.tokens == expected_output(request, stream.facts)
        await house.loop.wait_idle()

    run(scenario)


def test_a_report_of_the_executor_wakes_who_waited_for_blocks():
    async def scenario(house):
        stream = await house.start()
        full = replace(stream.pool, free=0, held=64)
        house.loop.scheduler.on_result(StepResult(step=0, account=full), 1)
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=3))
        first = await stream.take_plan()
        assert (len(first.announce), len(first.may)) == (1, 0)
        result = stream.engine.step(first)
        result.account = full
        stream.tell(result)
        stream.tell(StepResult(step=0, account=stream.pool))
        plan = await stream.take_plan()
        assert plan.may.sequence_ids == [1]

    run(scenario, lookahead=False)


def test_facts_are_those_of_the_pool_as_it_is():
    async def scenario(house):
        told = []
        house.loop.on_facts = told.append
        stream = await house.start()
        assert told == [stream.facts] == [house.loop.facts]
        reported = asyncio.Event()
        house.loop.on_facts = lambda _: reported.set()
        stream.tell(StepResult(step=0, account=replace(stream.pool, total=9, free=9)))
        await asyncio.wait_for(reported.wait(), PATIENCE_S)
        assert house.loop.facts == replace(stream.facts, num_blocks=9)

    run(scenario)


@pytest.mark.parametrize(("lookahead", "num_plans"), [(True, 2), (False, 1)])
def test_plans_are_sent_until_the_core_has_no_more(lookahead, num_plans):
    async def scenario(house):
        stream = await house.start()
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=9))
        plans = [await stream.take_plan() for _ in range(num_plans)]
        assert [plan.step for plan in plans] == list(range(1, num_plans + 1))
        assert stream.is_quiet

    run(scenario, lookahead=lookahead)


def test_cancels_are_sent_before_plans():
    async def scenario(house):
        stream = await house.start()

        def change_of_mind():
            house.loop.submit(GATEWAY, make_submission(2))
            house.loop.cancel(GATEWAY, 1, None)

        house.on_tokens = change_of_mind
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=9))
        plan = await stream.take_plan()
        stream.answer(plan)
        assert await stream.take() == [plan.announce[0].sequence_id]
        plan = await stream.take_plan()
        assert [entry.request_id for entry in plan.announce] == ["request-2"]

    run(scenario, lookahead=False)


def test_one_sample_can_be_ended_as_finished():
    async def scenario(house):
        stream = await house.start()
        house.on_tokens = lambda: house.loop.cancel(GATEWAY, 1, 1)
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=9, num_samples=2))
        stream.answer(await stream.take_plan())
        message = await stream.take_cancel()
        assert len(message) == 1
        stream.answer(message)
        completion = await house.completion()
        assert (completion.sample_index, completion.finish_reason) == (1, FinishReason.STOP)

    run(scenario)


def test_a_request_that_was_finished_already_ends_without_a_step():
    async def scenario(house):
        stream = await house.start()
        request = make_submission(1, max_tokens=2, resume_token_ids=[[5, 6]])
        house.loop.submit(GATEWAY, request)
        assert (await house.completion()).finish_reason is FinishReason.LENGTH
        assert stream.is_quiet

    run(scenario)


@pytest.mark.parametrize("ending", [LOST, None])
def test_a_lost_executor_is_followed_by_a_higher_epoch_and_requests_go_on(ending):
    async def scenario(house):
        stream = await house.start()
        request = make_submission(1, max_tokens=4)
        house.loop.submit(GATEWAY, request)
        for _ in range(2):
            stream.answer(await stream.take_plan())
        stream.tell(ending)
        second = await house.executor.opened()
        assert stream.is_closed
        first_epoch, second_epoch = house.executor.epochs
        assert second_epoch > first_epoch, "the clock stood still"
        plan = await second.take_plan()
        assert (plan.step, plan.builds_on) == (1, 0)
        output = expected_output(request, stream.facts)
        (announcement,) = plan.announce
        assert list(announcement.token_ids) == [*request.prompt_token_ids, *output[:2]]
        second.answer(plan)
        second.answer(await second.take_plan())
        await house.completion()
        assert house.tokens == output

    run(scenario)


def test_an_answer_out_of_turn_counts_as_a_lost_executor():
    async def scenario(house):
        stream = await house.start()
        house.loop.submit(GATEWAY, make_submission(1))
        await stream.take_plan()
        stream.tell(StepResult(step=7))
        second = await house.executor.opened()
        assert (await second.take_plan()).step == 1

    run(scenario)


def test_an_executor_that_cannot_be_written_to_counts_as_lost():
    async def scenario(house):
        stream = await house.start()

        async def fail(plan):
            raise LOST

        stream.send_plan = fail
        house.loop.submit(GATEWAY, make_submission(1))
        second = await house.executor.opened()
        assert (await second.take_plan()).step == 1
        assert stream.is_closed

    run(scenario)


def test_while_the_executor_is_away_the_loop_says_so_and_takes_requests():
    async def scenario(house):
        told = []
        house.loop.on_executor = told.append
        stream = await house.start()
        assert house.loop.is_connected
        house.executor.is_away = True
        stream.tell(LOST)
        await house.executor.asked()
        assert not house.loop.is_connected
        assert told == [True, False]
        house.loop.submit(GATEWAY, make_submission(1))
        house.executor.come_back()
        second = await house.executor.opened()
        await second.take_plan()
        assert house.loop.is_connected
        assert told == [True, False, True]

    run(scenario)


@pytest.mark.parametrize("reason", ["SCHEDULER_CONNECTED", "QUOTA_TENANT_TWICE"])
def test_a_refusal_for_good_at_the_first_attempt_ends_the_start(reason):
    async def main():
        house = House()
        house.executor.refusals.append(PreconditionError(reason, "b is connected"))
        with pytest.raises(PreconditionError, match="b is connected"):
            await asyncio.wait_for(house.loop.start(), PATIENCE_S)
        assert len(house.executor.epochs) == 1
        await house.loop.stop()

    asyncio.run(main())


def test_an_executor_that_is_starting_is_asked_again_with_a_higher_epoch():
    async def scenario(house):
        house.executor.refusals += [UnavailableError("STARTING", "the model is being loaded")] * 2
        await house.start()
        first, second, third = house.executor.epochs
        assert first < second < third

    run(scenario)


def test_an_executor_that_has_seen_a_later_epoch_is_asked_with_one_above_it():
    """Wall time was set back while the scheduler was away."""

    async def scenario(house):
        seen = house.clock.now_ns() + 3_600 * 10**9
        house.executor.refusals.append(
            PreconditionError("EPOCH_TOO_OLD", "too old", epoch=1, epoch_seen=seen)
        )
        await house.start()
        assert house.executor.epochs[1] == seen + 1

    run(scenario)


def test_a_scheduler_that_took_our_place_is_waited_out_once_there_are_requests():
    async def scenario(house):
        stream = await house.start()
        house.executor.refusals.append(PreconditionError("SCHEDULER_CONNECTED", "b is connected"))
        house.loop.submit(GATEWAY, make_submission(1))
        stream.tell(LOST)
        second = await house.executor.opened()
        assert (await second.take_plan()).step == 1

    run(scenario)


def test_before_the_first_executor_requests_are_refused():
    async def main():
        house = House()
        with pytest.raises(UnavailableError, match="no executor") as caught:
            house.loop.submit(GATEWAY, make_submission(1))
        assert caught.value.reason == "NO_EXECUTOR"
        house.loop.detach(GATEWAY)

    asyncio.run(main())


def test_a_plan_that_is_held_back_is_sent_when_it_is_due():
    async def scenario(house):
        stream = await house.start()
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=1))
        stream.answer(await stream.take_plan())
        await house.completion()
        house.loop.submit(GATEWAY, make_submission(2, 600, max_tokens=5))
        first = await stream.take_plan()
        now_ns = house.clock.now_ns()
        due_ns = house.loop.scheduler.plan_due_ns(now_ns)
        assert due_ns > now_ns
        house.clock.advance_ns(due_ns - now_ns)
        assert (await stream.take_plan()).builds_on == first.step

    facts = make_facts(num_blocks=200, block_size=16, max_model_len=1000, max_step_tokens=1000)
    run(scenario, facts=facts, token_budget=1000)


def test_a_deadline_ends_a_request_at_the_executor():
    async def scenario(house):
        stream = await house.start()
        deadline_ns = house.clock.now_ns() + 1_000
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=50, deadline_ns=deadline_ns))
        plan = await stream.take_plan()
        stream.answer(plan)
        assert house.nothing_ended
        house.clock.advance_ns(1_000)
        cancel = await stream.take_cancel()
        assert cancel == [plan.announce[0].sequence_id]
        stream.answer(cancel)
        assert (await house.completion()).finish_reason is FinishReason.DEADLINE

    run(scenario)


def test_deadlines_pass_also_while_the_executor_is_away():
    async def scenario(house):
        stream = await house.start()
        house.executor.is_away = True
        deadline_ns = house.clock.now_ns() + 1_000
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=50, deadline_ns=deadline_ns))
        house.loop.submit(GATEWAY, make_submission(2, max_tokens=50, deadline_ns=deadline_ns + 1))
        stream.answer(await stream.take_plan())
        stream.tell(LOST)
        await house.executor.asked()
        assert house.nothing_ended
        for handle in (1, 2):
            house.clock.advance_ns(1_000 if handle == 1 else 1)
            completion = await house.completion()
            assert (completion.handle, completion.finish_reason) == (handle, FinishReason.DEADLINE)
            assert house.nothing_ended
        await house.loop.wait_idle()

    run(scenario)


def test_a_gateway_that_is_detached_loses_its_requests_and_hears_nothing():
    async def scenario(house):
        stream = await house.start()
        heard = []
        house.loop.attach(2, heard.append)
        house.loop.submit(2, make_submission(1, max_tokens=50))
        house.loop.submit(GATEWAY, make_submission(2, max_tokens=2))
        plan = await stream.take_plan()
        stream.answer(plan)
        house.loop.detach(2)
        first, second = plan.announce
        assert (first.request_id, second.request_id) == ("request-1", "request-2")
        cancel = await stream.take_cancel()
        assert cancel == [first.sequence_id]
        stream.answer(cancel)
        serving = asyncio.create_task(stream.serve())
        assert (await house.completion()).handle == 2
        await house.loop.wait_idle()
        serving.cancel()
        assert heard == []

    run(scenario)


@pytest.mark.parametrize("method", ["on_result", "plan", "take_cancels"])
def test_a_bug_in_the_core_ends_the_loop_instead_of_hanging_it(method):
    async def scenario(house):
        stream = await house.start()
        ended = asyncio.create_task(house.loop.wait_ended())
        house.loop.submit(GATEWAY, make_submission(1))
        plan = await stream.take_plan()

        def fail(*arguments):
            raise AssertionError("a count is -1")

        setattr(house.loop.scheduler, method, fail)
        stream.answer(plan)
        with pytest.raises(AssertionError, match="a count is -1"):
            await ended
        assert stream.is_closed
        assert len(house.executor.epochs) == 1

    run(scenario)


def test_a_bug_in_building_the_core_ends_the_start():
    def fail(facts):
        raise InternalError("BROKEN", "it broke")

    async def main():
        house = House()
        house.loop._make_scheduler = fail
        with pytest.raises(InternalError, match="it broke"):
            await asyncio.wait_for(house.loop.start(), PATIENCE_S)
        await house.loop.stop()

    asyncio.run(main())


def test_stop_lets_go_of_the_executor_and_sends_nothing_more():
    async def scenario(house):
        stream = await house.start()
        house.loop.submit(GATEWAY, make_submission(1, max_tokens=50))
        await stream.take_plan()
        await house.loop.stop()
        assert stream.is_closed
        assert not house.loop.is_connected
        assert len(house.executor.epochs) == 1

    run(scenario)


def test_a_scheduler_that_was_replaced_by_another_one_ends_and_does_not_fight():
    async def scenario(house):
        stream = await house.start()
        house.loop.submit(GATEWAY, make_submission(1))
        stream.tell(AbortedError("TAKEN_OVER", "a higher epoch"))
        with pytest.raises(AbortedError) as caught:
            await asyncio.wait_for(house.loop.wait_ended(), PATIENCE_S)
        assert caught.value.reason == "SCHEDULER_REPLACED"
        assert caught.value.limits == {"epoch": str(house.executor.epochs[0])}
        assert len(house.executor.epochs) == 1
        assert stream.is_closed

    run(scenario)


def test_other_terms_reach_the_core_at_once_and_the_executor_before_the_next_plan():
    async def scenario(house):
        stream = await house.start()
        quotas = (TenantQuota(tenant="a", ceiling_blocks=1),)
        rates = (TenantRate(tenant="a", num_requests_per_minute=1),)
        house.loop.set_terms(TenantTerms(weights={"a": 2.0}, quotas=quotas, rates=rates))
        house.loop.submit(GATEWAY, make_submission(1, 2, max_tokens=2, tenant="a"))
        with pytest.raises(ResourceExhaustedError, match="1 requests in a minute"):
            house.loop.submit(GATEWAY, make_submission(2, 2, max_tokens=2, tenant="a"))
        await stream.take_plan()
        assert stream.quotas == quotas

    run(scenario)


def test_a_request_that_waits_and_can_never_fit_other_quotas_ends():
    async def scenario(house):
        house.loop.set_terms(TenantTerms())
        await house.start()
        house.loop.submit(GATEWAY, make_submission(1, 40, max_tokens=2, tenant="a"))
        house.loop.set_terms(TenantTerms(quotas=(TenantQuota(tenant="a", ceiling_blocks=1),)))
        assert (await house.completion()).error_reason == "OVER_QUOTA"

    run(scenario)
