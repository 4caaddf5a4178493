"""Tokens that are found instead of computed: what the scheduler expects, and what it is told."""

import pytest

from pageframe.core.trace import SpanKind, child_span_id
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_tracing import Spans, submit


def hits(*num_tokens: int):
    """How many tokens are found each time somebody looks; the last one from then on."""
    told = iter(num_tokens)
    return lambda _: next(told, num_tokens[-1])


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("found", [0, 3, 9, 12, 19, 25])
@pytest.mark.parametrize("expected", [0, 8, 12, 25])
def test_more_or_fewer_hits_than_expected_are_put_right(expected, found, lookahead):
    engine = FakeEngine(make_facts(), num_hit_tokens=hits(expected, found))
    driver = Driver(engine=engine, token_budget=6, max_num_running=1, lookahead=lookahead)
    # The first one holds the second back until what is expected of it is known.
    driver.submit(make_submission(1, 3, max_tokens=2))
    submission = make_submission(2, 20, max_tokens=5)
    driver.submit(submission)
    engine.num_hit_tokens = hits(0, expected, 0, found)
    driver.run()
    assert driver.output(2) == expected_output(submission, driver.facts)
    assert max(driver.engine.steps) <= 6
    assert_scheduler_empty(driver)


def test_a_prefill_span_begins_where_the_executor_began():
    engine = FakeEngine(make_facts(), num_hit_tokens=lambda _: 8)
    driver = Driver(engine=engine, token_budget=6, trace=Spans(), lookahead=False)
    submit(driver, 1, 20, 2)
    driver.run()
    (sequence,) = driver.trace.named("sequence")
    prefills = driver.trace.named("prefill")
    assert [span.tokens for span in prefills] == [(8, 14), (14, 20)]
    assert [span.span_id for span in prefills] == [
        child_span_id(sequence.span_id, SpanKind.PREFILL, 0, start) for start in (8, 14)
    ]


def test_an_admission_counts_on_blocks_that_others_hold():
    facts = make_facts(num_blocks=12, block_size=4)
    engine = FakeEngine(facts, shares_prefixes=True)
    driver = Driver(facts=facts, engine=engine, token_budget=64, lookahead=False)
    prompt = list(range(1, 33))
    driver.submit(make_submission(1, prompt, max_tokens=9))
    driver.step()
    # Eight of twelve blocks are held. The second needs nine, of which it shares eight.
    driver.submit(make_submission(2, [*prompt, 500], max_tokens=3))
    driver.submit(make_submission(3, 1, max_tokens=1, priority=1))
    driver.step()
    driver.step()
    assert driver.scheduler.snapshot().num_running == 2
    assert driver.completions.keys() == {(1, 3, 0)}
    driver.run()
    assert driver.completion(2).account.num_blocks_shared == 8
    assert_scheduler_empty(driver)


def test_who_counted_on_the_blocks_of_others_in_vain_waits_for_its_own():
    facts = make_facts(num_blocks=12, block_size=4)
    engine = FakeEngine(facts, num_hit_tokens=lambda _: 16)
    driver = Driver(facts=facts, engine=engine, token_budget=64, lookahead=False)
    driver.submit(make_submission(1, 28, max_tokens=7))
    driver.step()
    # The fake engine holds what it finds in blocks of its own. Seven are taken, six are needed,
    # of which four are expected to be there.
    second = make_submission(2, 24, max_tokens=3)
    driver.submit(second)
    results = [driver.step() for _ in range(4)]
    assert [result.announced_ids for result in results] == [[2], [], [], []]
    assert [result.refused_ids for result in results] == [[], [2], [], []]
    driver.run()
    assert driver.output(2) == expected_output(second, facts)
    assert_scheduler_empty(driver)
