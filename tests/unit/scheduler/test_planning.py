import pytest

from pageframe.core.limits import LIMITS
from pageframe.core.plan import StepPlan
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)


def entries(plan: StepPlan | None) -> list[tuple[int, int]]:
    assert plan is not None
    assert len(plan.must) == 0
    return list(zip(plan.may.sequence_ids, plan.may.num_tokens, strict=True))


def announced(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [announcement.sequence_id for announcement in plan.announce]


def test_there_is_no_plan_without_work():
    driver = Driver()
    assert driver.scheduler.plan(0) is None
    assert driver.scheduler.is_idle


def test_a_new_request_is_announced_and_admitted_in_one_plan_when_idle():
    driver = Driver()
    driver.submit(make_submission(1, [5, 6, 7]))
    plan = driver.send_plan()
    assert (plan.step, plan.builds_on) == (1, 0)
    assert announced(plan) == [1]
    assert entries(plan) == [(1, 3)]
    (announcement,) = plan.announce
    assert (announcement.token_ids, announcement.num_prompt_tokens) == ([5, 6, 7], 3)


def test_decodes_are_not_mentioned():
    driver = Driver(lookahead=False)
    driver.submit(make_submission(1, 4, max_tokens=4))
    for _ in range(4):
        driver.step()
    assert [(entries(plan), announced(plan)) for plan in driver.sent] == [
        ([(1, 4)], [1]),
        ([], []),
        ([], []),
        ([], []),
    ]
    assert_scheduler_empty(driver)


def test_a_long_prompt_is_cut_into_chunks_that_fill_what_decodes_leave():
    driver = Driver(token_budget=8, lookahead=False)
    driver.submit(make_submission(1, 4, max_tokens=10))
    driver.step()
    driver.submit(make_submission(2, 18))
    for _ in range(3):
        driver.step()
    assert [entries(plan) for plan in driver.sent] == [[(1, 4)], [(2, 7)], [(2, 7)], [(2, 4)]]
    assert driver.engine.steps == [4, 8, 8, 5]


def test_two_chunks_are_planned_one_step_ahead_of_the_first_result():
    driver = Driver(token_budget=8)
    driver.submit(make_submission(1, 20, max_tokens=3))
    first, second = driver.send_plan(), driver.send_plan()
    assert [entries(first), entries(second)] == [[(1, 8)], [(1, 8)]]
    assert (second.step, second.builds_on) == (2, 1)
    assert driver.send_plan() is None
    driver.run_engine()
    driver.receive()
    assert entries(driver.send_plan()) == [(1, 4)]


@pytest.mark.parametrize(("lookahead", "num_in_flight"), [(True, 2), (False, 1)])
def test_no_more_plans_fly_than_allowed(lookahead, num_in_flight):
    driver = Driver(lookahead=lookahead)
    driver.submit(make_submission(1, max_tokens=9))
    sent = [driver.send_plan() is not None for _ in range(4)]
    assert sum(sent) == num_in_flight
    assert driver.scheduler.snapshot().num_plans_in_flight == num_in_flight


def test_no_step_is_planned_behind_the_last_token():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=3))
    assert driver.run() > 0
    # One chunk and two decodes; a fourth step would compute nothing.
    assert len(driver.sent) == 3


def test_the_last_prompt_token_alone_is_a_decode_like_any_other():
    driver = Driver(token_budget=3, lookahead=False)
    driver.submit(make_submission(1, 7, max_tokens=2))
    driver.run()
    # 3 + 3 tokens leave one, which the executor takes by itself.
    assert [entries(plan) for plan in driver.sent] == [[(1, 3)], [(1, 3)], [], []]
    assert driver.output(1) == expected_output(make_submission(1, 7, max_tokens=2), driver.facts)


def test_a_budget_of_one_token_runs_one_sequence_at_a_time():
    driver = Driver(token_budget=1)
    for handle in (1, 2, 3):
        driver.submit(make_submission(handle, 3, max_tokens=2))
    driver.run()
    assert set(driver.engine.steps) == {1}
    assert len(driver.engine.steps) == 3 * 4
    assert_scheduler_empty(driver)


def test_new_requests_join_while_others_decode():
    driver = Driver(token_budget=16, lookahead=False)
    for handle in range(1, 7):
        driver.submit(make_submission(handle, 4, max_tokens=6))
        driver.step()
    # In step k, k - 1 sequences decode beside the chunk of a new one.
    assert driver.engine.steps == [4, 5, 6, 7, 8, 9]
    driver.run()
    assert_scheduler_empty(driver)


def test_requests_of_one_priority_are_admitted_as_they_came():
    driver = Driver(token_budget=8, max_num_running=2, lookahead=False)
    for handle in (3, 1, 2):
        driver.submit(make_submission(handle, 4, max_tokens=1))
    assert entries(driver.send_plan()) == [(1, 4), (2, 4)]
    driver.run_engine()
    driver.receive()
    assert entries(driver.send_plan()) == [(3, 4)]


def test_a_higher_priority_overtakes_those_that_wait():
    driver = Driver(token_budget=16, max_num_running=1, lookahead=False)
    for handle, priority in ((1, 0), (2, 0), (3, 5), (4, 5)):
        driver.submit(make_submission(handle, 4, max_tokens=1, priority=priority))
    driver.run()
    admitted = [sequence_id for plan in driver.sent for sequence_id, _ in entries(plan)]
    assert admitted == [3, 4, 1, 2]


def test_prefills_that_run_come_before_new_requests():
    driver = Driver(token_budget=8, lookahead=False)
    driver.submit(make_submission(1, 10))
    driver.step()
    driver.submit(make_submission(2, 10, priority=9))
    assert entries(driver.send_plan()) == [(1, 2), (2, 6)]


def test_samples_of_one_request_are_sequences_of_their_own():
    driver = Driver()
    driver.submit(make_submission(1, 4, num_samples=3))
    driver.run()
    assert [driver.output(1, sample_index) for sample_index in range(3)] == [driver.output(1)] * 3
    indices = [(a.sequence_id, a.sample_index) for a in driver.sent[0].announce]
    assert indices == [(1, 0)]
    (fork,) = driver.sent[0].forks
    assert (fork.parent_id, fork.child_ids, fork.sample_indices) == (1, [2, 3], [1, 2])
    assert_scheduler_empty(driver)


def test_blocks_are_not_promised_twice():
    driver = Driver(facts=make_facts(num_blocks=10, block_size=4), token_budget=16)
    driver.submit(make_submission(1, 24, max_tokens=1))
    driver.submit(make_submission(2, 16, max_tokens=1))
    # The first needs six of ten blocks; four are in flight, two are owed, and one is kept.
    assert entries(driver.send_plan()) == [(1, 16)]
    assert entries(driver.send_plan()) == [(1, 8)]
    driver.run()
    assert driver.engine.steps == [16, 8, 16]
    assert_scheduler_empty(driver)


@pytest.mark.parametrize(("num_tokens", "is_admitted"), [(12, True), (13, False)])
def test_a_block_is_kept_for_those_who_run_already(num_tokens, is_admitted):
    driver = Driver(facts=make_facts(num_blocks=10, block_size=4), token_budget=64)
    driver.submit(make_submission(1, 24, max_tokens=1))
    driver.submit(make_submission(2, num_tokens, max_tokens=1))
    assert entries(driver.send_plan()) == [(1, 24), (2, num_tokens)][: 1 + is_admitted]
    driver.run()
    assert_scheduler_empty(driver)


def test_the_next_few_requests_are_announced_ahead_of_admission():
    driver = Driver(token_budget=8, max_num_running=1, lookahead=False)
    for handle in range(1, 7):
        driver.submit(make_submission(handle, 10))
    # Four budgets of tokens ahead: 10 + 10 + 10 and the one that crosses 32.
    assert announced(driver.send_plan()) == [1, 2, 3, 4, 5]
    driver.run_engine()
    driver.receive()
    assert announced(driver.send_plan()) == []
    driver.run()
    assert sorted(i for plan in driver.sent for i in announced(plan)) == [1, 2, 3, 4, 5, 6]


def test_announcements_stay_small_and_a_huge_prompt_goes_alone():
    huge = LIMITS.announced_bytes_per_plan_max // 4 + 1
    facts = make_facts(
        num_blocks=100_000, block_size=16, max_model_len=10**6, max_step_tokens=10**6
    )
    driver = Driver(facts=facts, token_budget=10**6, max_queued_tokens=10**7)
    for handle, num_tokens in ((1, 10), (2, huge), (3, 10), (4, huge - 11), (5, 10)):
        driver.submit(make_submission(handle, [7] * num_tokens, max_tokens=50))
    plans = [driver.send_plan()]
    for _ in range(3):
        driver.wait_until_due()
        plans.append(driver.send_plan())
        driver.run_engine()
        driver.receive()
    assert [announced(plan) for plan in plans] == [[1], [2], [3, 4], [5]]


def test_tokens_that_are_cached_cost_no_budget():
    engine = FakeEngine(make_facts(), num_hit_tokens=lambda _: 12)
    driver = Driver(engine=engine, token_budget=8, max_num_running=1, lookahead=False)
    driver.submit(make_submission(1, 3, max_tokens=1))
    driver.submit(make_submission(2, 16, max_tokens=2))
    driver.engine.num_hit_tokens = lambda announcement: min(12, len(announcement.token_ids) - 1)
    driver.run()
    # Twelve of sixteen are cached, so one chunk of four is enough.
    assert [entries(plan) for plan in driver.sent] == [[(1, 3)], [(2, 4)], []]
    assert_scheduler_empty(driver)


def test_a_chunk_that_jumps_ahead_by_an_unforeseen_hit_is_no_harm():
    engine = FakeEngine(make_facts(), num_hit_tokens=lambda _: 12)
    driver = Driver(engine=engine, token_budget=4)
    submission = make_submission(1, 20, max_tokens=5)
    driver.submit(submission)
    driver.run()
    assert driver.output(1) == expected_output(submission, driver.facts)
    assert max(driver.engine.steps) <= 4
    assert_scheduler_empty(driver)


def test_the_budget_obeys_what_the_executor_can_do():
    facts = make_facts(max_step_tokens=6, max_num_sequences=2)
    driver = Driver(facts=facts, token_budget=100, max_num_running=50)
    for handle in range(1, 5):
        driver.submit(make_submission(handle, 9, max_tokens=4))
    driver.run()
    assert max(driver.engine.steps) <= 6
    assert_scheduler_empty(driver)


def test_a_snapshot_shows_who_stands_where():
    driver = Driver(token_budget=8, max_num_running=2, lookahead=False)
    for handle, num_tokens in ((1, 4), (2, 10), (3, 5)):
        driver.submit(make_submission(handle, num_tokens, max_tokens=9))
    driver.step()
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.step, snapshot.num_running, snapshot.num_waiting) == (1, 2, 1)
    assert (snapshot.num_queued_requests, snapshot.num_queued_tokens) == (1, 5)
    assert snapshot.account == driver.engine.account()
    rows = [
        (s.request_id, s.state.value, s.num_computed_tokens, s.num_output_tokens, s.num_blocks)
        for s in snapshot.sequences
    ]
    assert rows == [
        ("request-1", "running", 4, 1, 1),
        ("request-2", "running", 4, 0, 1),
        ("request-3", "waiting", 0, 0, 0),
    ]
