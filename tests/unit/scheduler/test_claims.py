"""Who waits for the part of its tenant gets it from those who take more than theirs; once."""

import pytest

from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)

LONG = 150


def house(num_blocks=400, **fields):
    facts = make_facts(num_blocks=num_blocks, block_size=4, max_model_len=256)
    return Driver(facts=facts, engine=FakeEngine(facts), token_budget=128, **fields)


def flood(driver, handles, tenant="flood", **fields):
    """Long requests that take all they can get."""
    for handle in handles:
        driver.submit(make_submission(handle, 8, max_tokens=LONG, tenant=tenant, **fields))
    steps(driver, 8)


def steps(driver, num_steps):
    for _ in range(num_steps):
        driver.step()
        assert_scheduler_consistent(driver.scheduler)


def running(driver):
    """How many of each tenant run."""
    shares = driver.scheduler._roster.shares.all
    return {share.tenant: share.num_running for share in shares if share.num_living}


def finish(driver, handles):
    """Run to the end; how often somebody lost its blocks."""
    driver.run()
    assert_scheduler_empty(driver)
    for handle in handles:
        request = make_submission(handle, 8, max_tokens=LONG)
        tokens = driver.output(handle)
        assert tokens == expected_output(request, driver.facts)[: len(tokens)]
    return sum(it.account.num_preemptions for it in driver.completions.values())


def test_who_lacks_a_slot_gets_it_from_the_youngest_of_those_above_their_part():
    driver = house(max_num_running=4)
    flood(driver, range(1, 5))
    driver.submit(make_submission(9, 4, max_tokens=3, tenant="light"))
    steps(driver, 8)
    assert running(driver) == {"flood": 4, "light": 0}, "it is patient first"
    steps(driver, 8)
    assert 9 in {handle for _, handle, _ in driver.completions}
    assert finish(driver, range(1, 5)) == 1
    assert driver.completion(4).account.num_preemptions == 1


def test_a_part_is_all_that_can_be_claimed_and_nothing_is_claimed_back():
    driver = house(max_num_running=4)
    flood(driver, range(1, 9))
    flood(driver, range(11, 19), tenant="other")
    steps(driver, 50)
    assert running(driver) == {"flood": 2, "other": 2}
    num_preempted = sum(len(plan.victims) for plan in driver.sent)
    assert num_preempted == 2
    steps(driver, 60)
    assert sum(len(plan.victims) for plan in driver.sent) == num_preempted
    assert running(driver) == {"flood": 2, "other": 2}
    # All of a tenant end together, and who was served less takes more than its part for a while.
    assert finish(driver, [*range(1, 9), *range(11, 19)]) <= num_preempted + 2


def test_weights_say_how_large_a_part_is():
    driver = house(max_num_running=4, tenant_weights={"heavy": 3.0, "flood": 1.0})
    flood(driver, range(1, 6))
    flood(driver, range(11, 16), tenant="heavy")
    steps(driver, 60)
    assert running(driver) == {"flood": 1, "heavy": 3}
    finish(driver, [*range(1, 6), *range(11, 16)])


def test_who_lacks_blocks_gets_them():
    driver = house(num_blocks=100, max_num_running=8)
    flood(driver, (1, 2, 3))
    steps(driver, 96)
    # Three of about 110 tokens hold 84 blocks; 60 tokens take 15, and one is always left free.
    driver.submit(make_submission(9, 60, max_tokens=2, tenant="light"))
    steps(driver, 14)
    assert 9 in {handle for _, handle, _ in driver.completions}
    assert driver.completion(9).account.num_preemptions == 0
    assert [plan.victims.sequence_ids for plan in driver.sent if plan.victims.num_certain] == [[3]]
    finish(driver, (1, 2, 3))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tenant": "flood"}, "nobody claims from its own tenant"),
        ({"tenant": "light", "priority": -1}, "those that run are more urgent"),
    ],
)
def test_nobody_gives_way_to(fields, why):
    driver = house(max_num_running=4)
    flood(driver, range(1, 5))
    driver.submit(make_submission(9, 4, max_tokens=3, **fields))
    steps(driver, 40)
    assert not any(len(plan.victims) for plan in driver.sent), why
    assert finish(driver, range(1, 5)) == 0


def test_a_place_that_comes_free_soon_is_waited_for():
    driver = house(max_num_running=4)
    flood(driver, range(1, 4))
    driver.submit(make_submission(4, 8, max_tokens=16, tenant="flood"))
    steps(driver, 12)
    driver.submit(make_submission(9, 4, max_tokens=3, tenant="light"))
    assert finish(driver, range(1, 5)) == 0


def test_who_gave_way_comes_back_when_there_is_room():
    driver = house(max_num_running=4)
    flood(driver, range(1, 5))
    driver.submit(make_submission(9, 4, max_tokens=3, tenant="light"))
    steps(driver, 30)
    assert running(driver) == {"flood": 4}
