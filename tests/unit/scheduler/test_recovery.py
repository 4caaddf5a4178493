"""How victims give way and come back: recompute, swap, tail."""

import pytest

from pageframe.core.plan import Recovery
from pageframe.core.request import StallCause
from pageframe.core.step import RefusedBecause
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_tracing import Spans, submit


def tight(recovery: Recovery, *, num_host_blocks: int = 0, **fields) -> Driver:
    """Three sequences that come to four blocks each, in a pool of eight."""
    facts = make_facts(num_blocks=8, block_size=4, num_host_blocks=num_host_blocks)
    return Driver(facts=facts, token_budget=64, lookahead=False, recovery=recovery, **fields)


def preempt(driver: Driver):
    """Serve until somebody gives way; returns the plan and the result of that step."""
    while True:
        result = driver.step()
        if result.preempted_ids:
            return driver.sent[-1], result


def serve_three(driver: Driver):
    requests = [make_submission(handle, 7, max_tokens=9) for handle in (1, 2, 3)]
    for request in requests:
        driver.submit(request)
    return requests


def assert_outputs(driver: Driver, requests) -> None:
    for request in requests:
        assert driver.output(request.handle) == expected_output(request, driver.facts)
    assert_scheduler_empty(driver)


def test_a_tail_is_what_is_short_and_the_victim_keeps_running():
    driver = tight(Recovery.TAIL)
    requests = serve_three(driver)
    plan, result = preempt(driver)
    # Three times two blocks; a third one for each is one more than there are.
    assert plan.victims.sequence_ids == [3]
    assert (plan.victims.recoveries, plan.victims.num_blocks) == ([Recovery.TAIL], [1])
    assert (result.preempted_num_computed, result.preempted_num_blocks) == ([4], [1])
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.num_running, snapshot.num_preempted) == (3, 0)
    third = snapshot.sequences[2]
    assert (third.num_computed_tokens, third.generation) == (4, 1)
    assert third.waits_for is StallCause.PREEMPTED
    assert_scheduler_consistent(driver.scheduler)
    driver.run()
    assert driver.completion(3).account.num_preemptions >= 1
    assert not any(3 in (a.sequence_id for a in p.announce) for p in driver.sent[1:])
    assert_outputs(driver, requests)


def test_a_tail_is_not_asked_back_while_those_who_decode_need_it():
    driver = tight(Recovery.TAIL)
    requests = serve_three(driver)
    preempt(driver)
    while 1 not in {handle for _, handle, _ in driver.completions}:
        driver.step()
    asked = [plan.step for plan in driver.sent if 3 in plan.may.sequence_ids]
    assert asked == [1]
    driver.run()
    assert_outputs(driver, requests)


def test_a_victim_that_would_have_to_give_all_is_recomputed():
    driver = tight(Recovery.TAIL)
    # Six blocks and then a seventh; one, which is not enough for the third step.
    driver.submit(make_submission(1, 24, max_tokens=8))
    driver.submit(make_submission(2, 3, max_tokens=12))
    plan, result = preempt(driver)
    assert result.preempted_recoveries == [Recovery.RECOMPUTE]
    assert plan.victims.num_blocks == [0]
    assert driver.scheduler.snapshot().num_preempted == 1
    driver.run()
    assert_scheduler_empty(driver)


def test_a_tail_may_be_cut_again_and_again():
    facts = make_facts(num_blocks=12, block_size=1, max_model_len=40)
    driver = Driver(facts=facts, token_budget=64, recovery=Recovery.TAIL)
    requests = [make_submission(1, 2, max_tokens=11), make_submission(2, 5, max_tokens=6)]
    for request in requests:
        driver.submit(request)
    driver.run()
    cuts = [
        plan.victims.num_blocks[0]
        for plan in driver.sent
        if plan.victims.recoveries[:1] == [Recovery.TAIL]
    ]
    assert len(cuts) > 1
    assert all(1 <= cut < 5 for cut in cuts)
    assert_outputs(driver, requests)


def test_a_swapped_victim_comes_back_by_a_promotion_and_computes_nothing_twice():
    driver = tight(Recovery.SWAP, num_host_blocks=8)
    requests = serve_three(driver)
    plan, result = preempt(driver)
    assert plan.victims.recoveries == [Recovery.SWAP]
    assert result.preempted_recoveries == [Recovery.SWAP]
    assert result.account.host_used == 2
    num_sent = len(driver.sent)
    driver.run()
    tries = [
        plan.may.num_tokens[plan.may.sequence_ids.index(3)]
        for plan in driver.sent[num_sent:]
        if 3 in plan.may.sequence_ids
    ]
    # Refused once, on the way from the host; then only the newest token is left to compute.
    assert tries == [1, 1]
    stalls = driver.completion(3).stall_ns
    assert stalls[StallCause.PREEMPTED] > 0
    assert stalls[StallCause.SWAP_IN] == 1_000_000
    assert_outputs(driver, requests)


def test_a_full_host_tier_makes_it_a_recompute():
    driver = tight(Recovery.SWAP, num_host_blocks=1)
    requests = serve_three(driver)
    plan, result = preempt(driver)
    assert plan.victims.recoveries == [Recovery.SWAP]
    assert result.preempted_recoveries == [Recovery.RECOMPUTE]
    driver.run()
    assert StallCause.SWAP_IN not in driver.completion(3).stall_ns
    assert_outputs(driver, requests)


def test_without_a_host_tier_nothing_is_swapped():
    driver = tight(Recovery.SWAP)
    requests = serve_three(driver)
    plan, _ = preempt(driver)
    assert plan.victims.recoveries == [Recovery.RECOMPUTE]
    driver.run()
    assert_outputs(driver, requests)


class SlowHost(FakeEngine):
    """The first tries find the blocks of a sequence still on their way from the host."""

    num_tries_left = 3

    def _try(self, sequence_id, sequence, num_tokens, chunks):
        if self.num_tries_left and sequence_id == 1:
            self.num_tries_left -= 1
            return RefusedBecause.PROMOTING, 0
        return super()._try(sequence_id, sequence, num_tokens, chunks)


@pytest.mark.parametrize("lookahead", [True, False])
def test_a_promotion_is_asked_for_again_in_every_plan_though_nothing_else_runs(lookahead):
    engine = SlowHost(make_facts())
    driver = Driver(engine=engine, lookahead=lookahead)
    request = make_submission(1, 5, max_tokens=3)
    driver.submit(request)
    driver.run()
    assert [1 in plan.may.sequence_ids for plan in driver.sent][:4] == [True] * 4 or lookahead
    assert engine.num_tries_left == 0
    assert driver.completion(1).stall_ns[StallCause.SWAP_IN] > 0
    assert_outputs(driver, [request])


def test_who_is_being_promoted_holds_nobody_back():
    driver = Driver(engine=SlowHost(make_facts()), lookahead=False)
    requests = [make_submission(handle, 5, max_tokens=3) for handle in (1, 2)]
    for request in requests:
        driver.submit(request)
    result = driver.step()
    assert (result.refused_ids, result.computed_ids) == ([1], [2])
    driver.run()
    assert_outputs(driver, requests)


@pytest.mark.parametrize(
    ("recovery", "mode", "tokens"),
    [
        (Recovery.RECOMPUTE, "recompute", (0, 8)),
        (Recovery.SWAP, "swap", (0, 8)),
        (Recovery.TAIL, "tail", (4, 8)),
    ],
)
def test_the_span_tells_how_and_which_tokens_were_lost(recovery, mode, tokens):
    driver = tight(recovery, num_host_blocks=8, trace=Spans())
    for handle in (1, 2, 3):
        submit(driver, handle, 7, 9)
    driver.run()
    span = driver.trace.named("preempt")[0]
    assert span.attributes["pageframe.preempt.mode"] == mode
    assert span.attributes["pageframe.preempt.victim"] == 3
    assert span.attributes["pageframe.preempt.beneficiary"] == 1
    assert span.tokens == tokens
    # After the last one every position up to the end is computed in the new generation.
    last = driver.trace.named("preempt")[-1]
    runs = sorted(
        other.tokens
        for other in driver.trace.spans
        if other.name in ("prefill", "decode")
        and other.attributes["pageframe.sequence_id"] == last.attributes["pageframe.sequence_id"]
        and other.attributes["pageframe.generation"] > last.attributes["pageframe.generation"]
    )
    is_swap = last.attributes["pageframe.preempt.mode"] == "swap"
    assert runs[0][0] == last.tokens[is_swap]
    assert runs[-1][1] == 15
    assert [end for _, end in runs[:-1]] == [start for start, _ in runs[1:]]
