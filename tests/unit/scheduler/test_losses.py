"""What a preemption was expected to cost, and what it did cost."""

import pytest

from pageframe.core.plan import Recovery
from pageframe.core.step import RefusedBecause, StepResult, StepTiming
from pageframe.scheduler.sequence import Loss, Sequence
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import GATEWAY, Driver, assert_scheduler_empty
from unit.scheduler.test_tracing import Spans, submit

MS = 1_000_000
TOKEN_NS = 100_000
BLOCK_NS = 200_000


class TimedEngine(FakeEngine):
    """A step lasts a millisecond, a tenth for each token of prefill, and a fifth for each block
    that goes to the host or comes from there."""

    def step(self, plan):
        host_used = self.num_host_used()
        promoted = {i for i, sequence in self.sequences.items() if sequence.is_promoted}
        result = super().step(plan)
        timing = result.timing
        lengths = [
            end - first
            for end, first in zip(result.num_computed, result.first_positions, strict=True)
        ]
        timing.execute_ns += sum(length for length in lengths if length > 1) * TOKEN_NS
        timing.num_blocks_moved = max(0, self.num_host_used() - host_used) + sum(
            -(-sequence.num_swapped // self.facts.block_size)
            for i, sequence in self.sequences.items()
            if sequence.is_promoted and i not in promoted
        )
        timing.copy_ns = timing.num_blocks_moved * BLOCK_NS
        timing.execute_ns += timing.copy_ns
        self.now_ns += timing.execute_ns - MS
        return result


def tight(
    recovery: Recovery,
    *,
    num_blocks: int = 8,
    num_sequences: int = 3,
    num_host_blocks: int = 8,
    engine_type: type[FakeEngine] = TimedEngine,
) -> Driver:
    """Sequences that come to four blocks each, in a pool for two; rates have been measured.

    So has been that nobody finds again what it gave up.
    """
    facts = make_facts(num_blocks=num_blocks, block_size=4, num_host_blocks=num_host_blocks)
    driver = Driver(
        facts=facts,
        engine=engine_type(facts),
        token_budget=64,
        lookahead=False,
        recovery=recovery,
        trace=Spans(),
    )
    for _ in range(100):
        driver.scheduler._losses._rates._token.add(1000 * TOKEN_NS, 1000)
        driver.scheduler._losses._rates.observe_return(100, moved_share=0.0, gone_share=1.0)
    for handle in range(1, num_sequences + 1):
        submit(driver, handle, 7, 9)
    return driver


def preempt(driver: Driver):
    """Serve until somebody gives way; returns the result of that step."""
    while not (result := driver.step()).preempted_ids:
        pass
    return result


def attributes_of(span) -> dict:
    prefix = "pageframe.preempt."
    return {
        key.removeprefix(prefix): value
        for key, value in span.attributes.items()
        if key.startswith(prefix)
    }


def test_the_span_of_a_loss_lasts_until_all_is_computed_again():
    driver = tight(Recovery.RECOMPUTE)
    result = preempt(driver)
    assert result.preempted_ids == [3]
    assert driver.trace.named("preempt") == []
    while not driver.trace.named("preempt"):
        last = driver.step()
    (span,) = driver.trace.named("preempt")
    assert (span.start_ns, span.end_ns) == (result.timing.start_ns, last.timing.end_ns)
    told = attributes_of(span)
    assert (told["mode"], told["victim"], told["is_back"]) == ("recompute", 3, True)
    # One more had been sampled in the step before: it would have been computed anyway.
    assert span.tokens == (0, 8)
    assert told["actual_ms"] == pytest.approx(8 * 0.1, rel=0.01)
    assert told["estimate_ms"] == pytest.approx(8 * 0.1, rel=0.05)
    driver.run()
    assert_scheduler_empty(driver)


def test_a_swap_costs_its_blocks_both_ways():
    driver = tight(Recovery.SWAP)
    preempt(driver)
    driver.run()
    told = attributes_of(driver.trace.named("preempt")[0])
    assert (told["mode"], told["num_blocks"], told["is_back"]) == ("swap", 2, True)
    assert told["actual_ms"] == pytest.approx(2 * 2 * 0.2)
    # Nothing had been copied before, so this was a guess.
    assert 0 <= told["estimate_ms"] < 0.1


def test_a_tail_costs_its_tokens_only():
    driver = tight(Recovery.TAIL, num_blocks=7, num_sequences=2)
    preempt(driver)
    driver.run()
    (span,) = driver.trace.named("preempt")
    assert span.tokens == (8, 12)
    told = attributes_of(span)
    assert told["actual_ms"] == pytest.approx(4 * 0.1, rel=0.01)
    assert told["estimate_ms"] == pytest.approx(4 * 0.1, rel=0.05)


def test_a_swap_that_became_a_recompute_is_judged_as_one():
    driver = tight(Recovery.SWAP, num_host_blocks=1)
    driver.run()
    told = attributes_of(driver.trace.named("preempt")[0])
    assert told["mode"] == "recompute"
    assert told["estimate_ms"] == pytest.approx(8 * 0.1, rel=0.05)


def test_a_victim_that_is_not_wanted_any_more_is_not_back():
    driver = tight(Recovery.RECOMPUTE)
    preempt(driver)
    driver.take(driver.scheduler.cancel(GATEWAY, 3))
    driver.run()
    spans = [s for s in driver.trace.named("preempt") if attributes_of(s)["victim"] == 3]
    assert [attributes_of(span)["is_back"] for span in spans] == [False]
    assert attributes_of(spans[0])["actual_ms"] == 0.0


def test_what_is_lost_again_has_a_span_of_its_own():
    facts = make_facts(num_blocks=12, block_size=1, max_model_len=40)
    driver = Driver(facts=facts, token_budget=64, recovery=Recovery.TAIL, trace=Spans())
    driver.scheduler._losses._rates._token.add(1e6 * TOKEN_NS, 1e6)
    submit(driver, 1, 2, 11)
    submit(driver, 2, 5, 6)
    driver.run()
    spans = driver.trace.named("preempt")
    assert len(spans) == driver.completion(2).account.num_preemptions > 1
    told = [attributes_of(span) for span in spans]
    first, second = told[:2]
    assert (first["is_back"], first["actual_ms"], told[-1]["is_back"]) == (False, 0.0, True)
    # What the first loss left undone is still to be done after the second.
    tail_ms = second["num_blocks"] * 0.1
    assert second["estimate_ms"] == pytest.approx(first["estimate_ms"] + tail_ms, rel=0.01)


def test_with_the_executor_goes_what_was_to_be_got_back():
    driver = tight(Recovery.RECOMPUTE)
    preempt(driver)
    driver.lose_executor()
    (span,) = driver.trace.named("preempt")
    assert attributes_of(span)["is_back"] is False
    sequences = driver.scheduler._roster.sequences.values()
    assert all(sequence.preempt_tick is None for sequence in sequences)
    driver.start_executor()
    driver.run()
    assert_scheduler_empty(driver)


class Remembering(TimedEngine):
    """Who comes again finds its first block."""

    def find(self, sequence):
        return (0, 4) if sequence.generation else (0, 0)


def test_what_victims_find_again_is_remembered():
    driver = tight(Recovery.RECOMPUTE, engine_type=Remembering)
    rates = driver.scheduler._losses._rates
    preempt(driver)
    assert rates.gone_share == pytest.approx(1.0)
    driver.run()
    assert rates.gone_share < 1.0
    assert rates.moved_share == pytest.approx(0.0)
    told = attributes_of(driver.trace.named("preempt")[0])
    assert told["actual_ms"] == pytest.approx(4 * 0.1, rel=0.01)


def open_loss(driver: Driver, sequence: Sequence, *, num_reached: int) -> Loss:
    loss = Loss(
        start_ns=1,
        recovery=Recovery.RECOMPUTE,
        num_blocks=1,
        num_kept=0,
        num_computed=num_reached,
        num_reached=num_reached,
        num_full_blocks=num_reached // driver.scheduler.facts.block_size,
        generation=0,
        beneficiary=None,
        estimate_ns=0,
    )
    sequence.loss = loss
    return loss


def moved(sequence: Sequence, num_blocks: int) -> StepResult:
    """A step that brought blocks from the host, while ``sequence`` waited for some of them."""
    return StepResult(
        step=1,
        refused_ids=[sequence.sequence_id],
        refused_because=[RefusedBecause.PROMOTING],
        timing=StepTiming(
            start_ns=1,
            execute_ns=num_blocks * BLOCK_NS,
            copy_ns=num_blocks * BLOCK_NS,
            num_blocks_moved=num_blocks,
        ),
    )


def test_a_block_that_is_waited_for_twice_comes_once():
    driver = tight(Recovery.RECOMPUTE)
    sequence = driver.scheduler._roster.sequences[1]
    losses = driver.scheduler._losses
    # Three blocks of four tokens each, and the last one begun only.
    loss = open_loss(driver, sequence, num_reached=10)
    by_id = {sequence.sequence_id: sequence}
    losses.observe(moved(sequence, 2), by_id)
    assert (loss.num_moved_blocks, loss.spent_ns) == (2, 2 * BLOCK_NS)
    # Somebody else moved as well: at most what it had lost was for it.
    losses.observe(moved(sequence, 5), by_id)
    losses.observe(moved(sequence, 5), by_id)
    assert (loss.num_moved_blocks, loss.spent_ns) == (3, 3 * BLOCK_NS)


def test_the_host_tier_has_what_came_from_it():
    driver = tight(Recovery.RECOMPUTE)
    sequence = driver.scheduler._roster.sequences[1]
    open_loss(driver, sequence, num_reached=10).num_moved_blocks = 2
    driver.scheduler._losses.end(sequence, 9)
    assert (sequence.loss, sequence.num_host_blocks) == (None, 2)
    driver.scheduler._losses.forget(sequence, 9)
    assert sequence.num_host_blocks == 0
