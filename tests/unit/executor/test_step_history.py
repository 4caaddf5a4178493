"""Steps for those who watch: counted right, kept in order, told once."""

import asyncio

import pytest

from pageframe.core.plan import Announcement, Entries, StepPlan
from pageframe.core.replica import PoolAccount
from pageframe.core.step import StepResult, StepTiming
from pageframe.executor.step_history import StepHistory
from pageframe.executor.step_thread import Session
from pageframe.wire.kv_memory import batch_from_proto
from pageframe.wire.memory_facts import StepFacts
from unit.executor.memory_house import GREEDY, PATIENCE_S, heard, prompt, run_in_house


def ended(step, **fields):
    timing = StepTiming(start_ns=1000 * step, apply_ns=1, execute_ns=20, sample_ns=300)
    return StepResult(step=step, timing=timing, account=PoolAccount(total=9, free=4), **fields)


def test_a_step_counts_what_was_named_and_what_was_not():
    history = StepHistory()
    # 7 ends its prompt of 5 and samples, 8 computes 3 of its prompt, 9 and 10 decode, 10 with
    # two drafts of which one is kept.
    history.take(
        ended(
            3,
            computed_ids=[7, 8],
            first_positions=[0, 4],
            num_computed=[5, 7],
            sampled_ids=[7, 9, 10, 10],
            drafted_ids=[10],
            num_drafted=[2],
            num_accepted=[1],
        )
    )
    assert history.read(0) == ([StepFacts(3, 3000, 321, 4, 5 + 3 + 1 + 1 + 2, 4)], 1)


@pytest.mark.parametrize("result", [ended(0), ended(4, refusal="MUST_DOES_NOT_FIT")])
def test_what_is_no_step_is_not_counted(result):
    history = StepHistory()
    history.take(result)
    assert history.read(0) == ([], 0)


def test_a_reader_hears_of_each_step_once_and_of_the_oldest_no_more():
    history = StepHistory(num_steps_kept=4)
    for step in range(1, 4):
        history.take(ended(step))
    found, num_told = history.read(1)
    assert ([it.step for it in found], num_told) == ([2, 3], 3)
    assert history.read(num_told) == ([], 3)
    for step in range(4, 10):
        history.take(ended(step))
    found, num_told = history.read(num_told)
    assert ([it.step for it in found], num_told) == ([6, 7, 8, 9], 9)


def test_a_place_that_is_taken_meanwhile_is_not_mistaken_for_another_step():
    history = StepHistory(num_steps_kept=2)
    history.take(ended(1))
    history.take(ended(2))
    history._ring[0] = (2, history._ring[0][1])  # The step thread writes step 3 just now.
    found, num_told = history.read(0)
    assert ([it.step for it in found], num_told) == ([2], 2)


def test_watchers_hear_of_steps_and_nothing_is_kept_without_them(tmp_path):
    async def step(house, number):
        announcement = Announcement(
            sequence_id=number,
            token_ids=prompt(number, 6),
            num_prompt_tokens=6,
            sampling=GREEDY,
            request_id=f"r{number}",
            tenant="default",
            cache_salt=b"s",
        )
        plan = StepPlan(
            step=number,
            builds_on=number - 1,
            announce=[announcement],
            may=Entries([number], [0], [6]),
        )
        done = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        session = Session(lambda result, _: loop.call_soon_threadsafe(done.set_result, result))
        house.steps.post_plan(session, plan)
        return await asyncio.wait_for(done, PATIENCE_S)

    async def scenario(house):
        await step(house, 1)
        call = await house.watching()
        result = await step(house, 2)
        await step(house, 3)
        steps = []
        while not steps:  # A step's operations may be told before it has ended.
            steps += batch_from_proto(await heard(call)).steps
        # The first sequence decodes one token beside the new one's prompt of six.
        assert (steps[0].step, steps[0].num_sequences, steps[0].num_tokens) == (2, 2, 7)
        assert steps[0].num_free == result.account.free
        call.cancel()

    run_in_house(tmp_path, scenario)
