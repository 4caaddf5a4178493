"""What tenants were served, what they hold, and what one can do to another."""

import pytest

from pageframe.core.request import StallCause
from pageframe.scheduler.budget import Capacity
from pageframe.scheduler.shares import Share, Shares
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    make_submission,
)

SECOND_NS = 1_000_000_000
CAPACITY = Capacity.of(
    make_facts(num_blocks=160, block_size=4, max_num_sequences=32),
    token_budget=64,
    max_num_running=32,
    prefill_chunk_tokens=0,
)


def test_tokens_held_follow_joins_outputs_and_leaves():
    share = Share("a")
    share.join(10)
    share.num_output_tokens += 3
    share.join(20)
    share.num_output_tokens += 2
    assert (share.num_running, share.num_tokens_held) == (2, 35)
    share.leave(12)
    assert (share.num_running, share.num_tokens_held) == (1, 23)
    share.leave(23)
    assert (share.num_running, share.num_tokens_held) == (0, 0)
    share.join(7)
    assert share.num_tokens_held == 7


def test_virtual_time_is_tokens_by_weight_and_catches_up_but_never_falls_back():
    share = Share("a", 2.0)
    share.num_prompt_tokens += 10
    share.num_output_tokens += 4
    assert share.virtual_time == 7.0
    share.catch_up(5.0)
    assert share.virtual_time == 7.0
    share.catch_up(9.0)
    assert share.virtual_time == 9.0
    share.num_output_tokens += 2
    assert share.virtual_time == 10.0


def test_who_comes_back_is_ahead_by_the_tokens_of_a_step_at_most():
    shares = Shares({"b": 4.0}, num_tokens_ahead=100)
    a, b = shares.enter("a"), shares.enter("b")
    shares.wait(a, None)
    a.num_output_tokens += 1000
    shares.wait(b, a)
    assert b.virtual_time == 1000 - 100 / 4
    # One more of its sequences waits, and that changes nothing.
    a.num_output_tokens += 1000
    shares.wait(b, a)
    assert b.virtual_time == 975


def test_a_tenant_is_present_for_a_while_after_its_last_sequence():
    shares = Shares({})
    a, b = shares.enter("a"), shares.enter("b")
    assert (shares.part_of(a), shares.part_of(b)) == (0.5, 0.5)
    shares.forget(5 * SECOND_NS)
    shares.exit(b)
    shares.forget(14 * SECOND_NS)
    assert (len(shares), shares.part_of(a)) == (2, 0.5)
    shares.forget(15 * SECOND_NS)
    assert (len(shares), shares.part_of(a)) == (1, 1.0)
    assert shares.enter("b") is not b


def test_a_tenant_that_has_a_weight_is_always_present():
    shares = Shares({"b": 3.0})
    a = shares.enter("a")
    assert (len(shares), shares.part_of(a)) == (2, 0.25)
    b = shares.enter("b")
    shares.exit(b)
    shares.forget(1000 * SECOND_NS)
    assert (shares.enter("b"), shares.part_of(b)) == (b, 0.75)


def test_a_tenant_that_comes_back_in_time_keeps_its_account():
    shares = Shares({})
    a = shares.enter("a")
    shares.exit(a)
    shares.forget(9 * SECOND_NS)
    assert shares.enter("a") is a
    shares.forget(20 * SECOND_NS)
    assert len(shares) == 1


def test_use_is_the_larger_part_of_slots_and_blocks():
    shares = Shares({})
    a = shares.enter("a")
    shares.join(a, 4)
    assert shares.use_of(a, CAPACITY) == 1 / 32
    shares.join(a, 316)
    # 320 tokens are 80 of 160 blocks.
    assert shares.use_of(a, CAPACITY) == 0.5


def test_headroom_is_for_others_who_could_still_claim_it():
    shares = Shares({})
    a = shares.enter("a")
    for _ in range(20):
        shares.join(a, 4)
    assert shares.headroom(a, CAPACITY) == 0.0, "alone"
    b = shares.enter("b")
    assert shares.is_above(a, CAPACITY)
    assert shares.headroom(a, CAPACITY) == 1 / 16
    c = shares.enter("c")
    assert shares.headroom(b, CAPACITY) == 0.0, "below its part"
    shares.exit(c)
    shares.forget(100 * SECOND_NS)
    for _ in range(15):
        shares.join(b, 4)
    # What b has not claimed is one slot of 32.
    assert shares.headroom(a, CAPACITY) == 1 / 32
    shares.join(b, 4)
    assert shares.headroom(a, CAPACITY) == 0.0


def test_those_who_wait_too_need_no_headroom():
    shares = Shares({})
    a, b = shares.enter("a"), shares.enter("b")
    for _ in range(20):
        shares.join(a, 4)
    shares.wait(a, None)
    assert shares.headroom(a, CAPACITY) == 1 / 16
    shares.wait(b, a)
    assert shares.headroom(a, CAPACITY) == 0.0
    shares.stop_waiting(b)
    assert shares.headroom(a, CAPACITY) == 1 / 16


def two_tenants(**fields) -> Driver:
    facts = make_facts(num_blocks=1000, block_size=4, max_num_sequences=32)
    fields = {"token_budget": 64, "max_num_running": 32} | fields
    return Driver(facts=facts, engine=FakeEngine(facts), shares_prefixes=False, **fields)


def submit(driver: Driver, tenant: str, first: int, count: int, **fields) -> None:
    for handle in range(first, first + count):
        driver.submit(make_submission(handle, 4, tenant=tenant, **fields))


def test_a_tenant_that_floods_leaves_slots_to_one_that_is_there():
    driver = two_tenants()
    submit(driver, "light", 1, 1, max_tokens=100)
    submit(driver, "flood", 10, 60, max_tokens=100)
    for _ in range(5):
        driver.step()
    running = driver.scheduler._roster.running.values()
    # A sixteenth of 32 slots stays free, though thirty wait.
    assert len(running) == 30
    submit(driver, "light", 2, 2, max_tokens=100)
    driver.step()
    driver.step()
    assert len(driver.output(2)) >= 1
    assert len(driver.output(3)) >= 1
    assert_scheduler_consistent(driver.scheduler)
    driver.run()
    assert_scheduler_empty(driver)


def test_who_takes_more_than_its_part_gives_way_first_though_others_joined_later():
    facts = make_facts(num_blocks=50, block_size=4)
    driver = Driver(facts=facts, engine=FakeEngine(facts), token_budget=64, max_num_running=30)
    submit(driver, "flood", 10, 6, max_tokens=36)
    driver.step()
    submit(driver, "light", 1, 1, max_tokens=36)
    driver.run()
    preempted = {h: driver.completion(h).account.num_preemptions for h in (1, *range(10, 16))}
    assert preempted[1] == 0
    assert sum(preempted.values()) > 0
    assert_scheduler_empty(driver)


def test_a_tenant_that_is_alone_fills_all_slots():
    driver = two_tenants()
    submit(driver, "flood", 10, 60, max_tokens=100)
    for _ in range(5):
        driver.step()
    assert len(driver.scheduler._roster.running) == 32


@pytest.mark.parametrize(("is_light_there", "num_running"), [(True, 14), (False, 15)])
def test_a_tenant_that_floods_leaves_blocks_to_one_that_is_there(is_light_there, num_running):
    facts = make_facts(num_blocks=158, block_size=4, max_step_tokens=1000)
    driver = Driver(
        facts=facts,
        engine=FakeEngine(facts),
        shares_prefixes=False,
        token_budget=1000,
        max_num_running=64,
    )
    if is_light_there:
        driver.submit(make_submission(1, 2, max_tokens=2, tenant="light"))
        driver.run()
    for handle in range(10, 40):
        driver.submit(make_submission(handle, 40, max_tokens=4, tenant="flood"))
    driver.step()
    # Ten blocks each; a sixteenth of the pool is nine blocks, and two are the watermark.
    assert len(driver.scheduler._roster.running) == num_running
    driver.run()
    assert_scheduler_empty(driver)


def test_found_tokens_are_free_and_recomputed_ones_too():
    facts = make_facts(num_blocks=100, block_size=4)
    driver = Driver(
        facts=facts, engine=FakeEngine(facts, num_hit_tokens=lambda _: 12), lookahead=False
    )
    driver.submit(make_submission(1, 16, max_tokens=5, tenant="a"))
    driver.step()
    (share,) = driver.scheduler._roster.shares.all
    assert (share.num_prompt_tokens, share.num_output_tokens) == (4, 1)
    driver.lose_executor()
    driver.start_executor()
    driver.run()
    assert (share.num_prompt_tokens, share.num_output_tokens) == (4, 5)


def test_a_long_prompt_of_who_was_served_much_keeps_nobody_else_waiting():
    driver = two_tenants(token_budget=16, lookahead=False)
    driver.submit(make_submission(1, 160, max_tokens=2, tenant="flood"))
    driver.submit(make_submission(2, 28, max_tokens=1, tenant="light"))
    for _ in range(3):
        driver.step()
    sent = [(plan.may.sequence_ids, plan.may.num_tokens) for plan in driver.sent]
    # All is charged to flood as it comes in; then light is ahead until it is through.
    assert sent == [([1], [16]), ([2], [16]), ([2, 1], [12, 4])]
    driver.run()
    assert_scheduler_empty(driver)


def test_who_comes_later_is_ahead_of_a_long_prompt_with_its_first_step():
    driver = two_tenants(token_budget=16, lookahead=False)
    submit(driver, "light", 1, 1, max_tokens=1)
    driver.submit(make_submission(10, 160, max_tokens=2, tenant="flood"))
    driver.step()
    driver.step()
    driver.submit(make_submission(2, 12, max_tokens=1, tenant="light"))
    driver.step()
    entries = driver.sent[-1].may
    assert (entries.sequence_ids, entries.num_tokens) == ([3, 2], [12, 4])
    driver.run()
    assert StallCause.TOKEN_BUDGET not in driver.completion(2).stall_ns
    assert_scheduler_empty(driver)


def test_what_was_never_computed_is_not_charged():
    driver = two_tenants(token_budget=16, lookahead=False)
    driver.submit(make_submission(1, 12, max_tokens=3, tenant="a"))
    driver.send_plan()
    (share,) = driver.scheduler._roster.shares.all
    assert share.num_tokens_served == 12
    driver.run_engine(refuse=True)
    driver.receive()
    assert share.num_tokens_served == 0
    driver.run()
    assert share.num_tokens_served == 15


def test_prefills_of_one_tenant_stay_in_the_order_of_joining():
    driver = two_tenants(token_budget=16, prefill_chunk_tokens=8, lookahead=False)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 40, max_tokens=1, tenant="a"))
    driver.step()
    driver.submit(make_submission(3, 8, max_tokens=1, tenant="a", priority=5))
    driver.step()
    assert driver.sent[-1].may.sequence_ids == [1, 2]


def test_two_tenants_that_flood_get_tokens_by_their_weights():
    driver = two_tenants(tenant_weights={"b": 3.0}, max_num_running=4, token_budget=16)
    submit(driver, "a", 1000, 150, max_tokens=12)
    submit(driver, "b", 2000, 150, max_tokens=12)
    for _ in range(300):
        driver.step()
    shares = {share.tenant: share for share in driver.scheduler._roster.shares.all}
    served = {tenant: share.num_tokens_served for tenant, share in shares.items()}
    assert shares["a"].num_waiting > 0
    assert shares["b"].num_waiting > 0
    # Both are backlogged throughout, so they differ by two requests at most.
    assert served["b"] / 3 == pytest.approx(served["a"], abs=2 * 16)
    assert served["a"] > 200
    driver.run()
    assert_scheduler_empty(driver)


def test_ten_thousand_requests_at_once_are_bounded_and_do_not_touch_who_is_there():
    driver = two_tenants(max_queued_requests=100)
    submit(driver, "light", 1, 3, max_tokens=50)
    for _ in range(5):
        driver.step()
    num_refused = 0
    for handle in range(100, 10_100):
        try:
            driver.submit(make_submission(handle, 4, max_tokens=5, tenant="flood"))
        except Exception as error:
            num_refused += error.reason == "QUEUE_FULL"
    assert num_refused == 9_900
    assert driver.scheduler.snapshot().num_queued_requests == 100
    # What was refused left nothing behind.
    assert len(driver.scheduler._roster.requests) == 103
    submit(driver, "light", 4, 1, max_tokens=5)
    before = [len(driver.output(handle)) for handle in (1, 2, 3)]
    for _ in range(10):
        driver.step()
    # A token in each step, and the newcomer did not wait behind the hundred.
    assert [len(driver.output(handle)) for handle in (1, 2, 3)] == [n + 10 for n in before]
    assert len(driver.output(4)) == 5
    driver.run()
    assert_scheduler_empty(driver)


def test_weights_that_change_hold_for_what_is_served_from_then_on():
    shares = Shares({"a": 1.0, "b": 1.0})
    a, b = shares.enter("a"), shares.enter("b")
    a.num_output_tokens += 100
    shares.wait(a, None)
    shares.set_weights({"a": 3.0})
    assert (a.virtual_time, shares.part_of(a), shares.part_of(b)) == (100.0, 0.75, 0.25)
    a.num_output_tokens += 30
    assert a.virtual_time == 110.0
    shares.stop_waiting(a)
    assert shares._weight_waiting == 0.0


def test_who_is_named_no_more_leaves_like_others_and_who_is_named_stays():
    shares = Shares({"a": 2.0, "b": 4.0})
    c = shares.enter("c")
    shares.exit(c)
    shares.set_weights({"b": 1.0, "c": 2.0, "d": 5.0})
    shares.forget(20 * SECOND_NS)
    assert {share.tenant: share.weight for share in shares.all} == {"b": 1.0, "c": 2.0, "d": 5.0}
    assert shares.part_of(c) == 0.25
