"""Drafts in plans: what they may take, what they are worth, and where their sequences then are."""

import random

import pytest

from pageframe.core.plan import NO_DRAFTS
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult, TokenLogprobs
from pageframe.scheduler.speculation import StepPrices
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_tracing import Spans


def drafting(num_right: int = 99, *, facts=None, **fields) -> Driver:
    facts = facts or make_facts()
    engine = FakeEngine(facts, num_right=lambda: num_right)
    return Driver(facts=facts, engine=engine, **{"num_draft_tokens": 4, **fields})


def test_nothing_is_drafted_unless_it_is_wanted():
    driver = drafting(num_draft_tokens=0)
    driver.submit(make_submission(1, 4, max_tokens=9))
    driver.run()
    assert all(plan.drafts == NO_DRAFTS for plan in driver.sent)


def test_tokens_are_the_same_and_steps_are_fewer():
    submission = make_submission(1, 4, max_tokens=21)
    plain, driver = Driver(), drafting()
    for each in (plain, driver):
        each.submit(submission)
        each.run()
    assert driver.output(1) == plain.output(1) == expected_output(submission, driver.facts)
    assert driver.reason(1) is FinishReason.LENGTH
    # A token with the prompt, then five in each step; the last plan went out in vain.
    assert (len(plain.engine.steps), len(driver.engine.steps)) == (21, 6)
    account = driver.completion(1).account
    assert (account.num_draft_tokens, account.num_accepted_tokens) == (16, 16)
    assert_scheduler_empty(driver)


def test_look_ahead_goes_on():
    driver = drafting()
    driver.submit(make_submission(1, 4, max_tokens=40))
    driver.step()
    driver.step()
    # The step that was just answered had a successor in flight all the time.
    assert len(driver.plans) == 1
    assert driver.send_plan() is not None
    driver.run()


def test_drafts_get_what_is_left_of_the_token_budget():
    driver = drafting(token_budget=8)
    driver.submit(make_submission(1, 4, max_tokens=40))
    driver.submit(make_submission(2, 4, max_tokens=40))
    driver.step()
    driver.submit(make_submission(3, 9, max_tokens=1))
    driver.run()
    # Two decodes and six tokens of the prompt fill the step; then three and no more are left.
    six, three = (plan for plan in driver.sent if plan.may.sequence_ids == [3])
    assert (six.may.num_tokens, six.drafts) == ([6], NO_DRAFTS)
    assert (three.may.num_tokens, three.drafts.num_tokens) == ([3], 3)
    assert max(driver.engine.steps) == 8


def test_drafts_get_no_promised_block_and_leave_the_watermark():
    for num_blocks, num_granted in [(3, 0), (4, 1)]:
        driver = drafting(facts=make_facts(num_blocks=num_blocks, block_size=4))
        driver.submit(make_submission(1, 7, max_tokens=4))
        driver.step()
        # Two blocks are held, and one is always left free.
        assert driver.sent[1].drafts.num_blocks == num_granted
        driver.run()


def test_nothing_is_drafted_while_somebody_may_have_to_give_way():
    facts = make_facts(num_blocks=6, block_size=4)
    driver = drafting(facts=facts)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 7, max_tokens=9))
    driver.run()
    assert any(len(plan.victims) for plan in driver.sent)
    assert not any(len(plan.victims) and plan.drafts.num_tokens for plan in driver.sent)
    for handle in (1, 2):
        assert driver.output(handle) == expected_output(
            make_submission(handle, 7, max_tokens=9), facts
        )


def test_sequences_that_may_be_ahead_have_a_block_set_aside():
    driver = drafting(facts=make_facts(num_blocks=40, block_size=4))
    driver.submit(make_submission(1, 4, max_tokens=40))
    driver.step()
    driver.send_plan()
    driver.send_plan()
    first, second = driver.scheduler._flights
    # The first may leap into another block, and take that; the second may then need one more.
    assert (first.drafts.num_blocks, second.drafts.num_blocks) == (1, 1)
    assert second.num_blocks - second.drafts.num_blocks >= 1
    decodes = driver.scheduler._roster.decodes
    assert (decodes.num_tokens_ahead, decodes.num_sequences_ahead) == (4, 1)
    driver.run()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_plan_that_fits_without_drafts_fits_with_them(seed, block_size):
    rng = random.Random(seed)
    facts = make_facts(num_blocks=120 // block_size, block_size=block_size)
    engine = FakeEngine(facts, num_right=lambda: rng.randint(0, 5))
    driver = Driver(facts=facts, engine=engine, num_draft_tokens=5, token_budget=32)
    refusals = []
    for handle in range(1, 25):
        driver.submit(make_submission(handle, rng.randint(1, 20), max_tokens=rng.randint(1, 40)))
    while not driver.scheduler.is_idle:
        result = driver.step()
        refusals.append(result.refusal)
        assert_scheduler_consistent(driver.scheduler)
    assert set(refusals) == {""}
    assert sum(c.account.num_accepted_tokens for c in driver.completions.values()) > 50
    assert any(c.account.num_preemptions for c in driver.completions.values()) or block_size == 1
    assert_scheduler_empty(driver)


def test_a_stop_token_among_kept_drafts_ends_the_request():
    expected = expected_output(make_submission(1, 4, max_tokens=9), make_facts())
    sampling = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(expected[3],))
    driver = drafting()
    driver.submit(make_submission(1, 4, sampling=sampling))
    driver.run()
    assert (driver.output(1), driver.reason(1)) == (expected[:4], FinishReason.STOP)
    account = driver.completion(1).account
    assert (account.num_draft_tokens, account.num_accepted_tokens) == (4, 2)
    assert_scheduler_empty(driver)


def test_a_cancel_that_crosses_a_result_with_drafts():
    driver = drafting()
    driver.submit(make_submission(1, 4, max_tokens=40))
    driver.step()
    driver.send_plan()
    driver.run_engine()
    driver.take(driver.scheduler.finish_sample(1, 1, 0))
    driver.run()
    assert driver.reason(1) is FinishReason.STOP
    assert_scheduler_empty(driver)


def test_offers_rest_when_nobody_takes_them():
    driver = drafting()
    driver.engine.num_right = None
    driver.submit(make_submission(1, 4, max_tokens=80))
    driver.run()
    offered = [bool(plan.drafts.num_tokens) for plan in driver.sent]
    assert offered[1:9] == [True] * 8
    # Then in one of sixteen.
    assert sum(offered[10:]) == 5
    # Once they are taken they are made in every step again.
    driver.engine.num_right = lambda: 0
    driver.submit(make_submission(2, 4, max_tokens=60))
    driver.run()
    assert all(plan.drafts.num_tokens for plan in driver.sent[-20:-2])


def test_spans_say_what_was_drafted_and_are_cut_where_drafts_leap_over_their_ends():
    spans = Spans()
    facts = make_facts(num_blocks=100, max_model_len=400)
    driver = drafting(2, facts=facts, trace=spans)
    sampling = SamplingParams(temperature=0.0, max_tokens=300)
    driver.submit(make_submission(1, 4, sampling=sampling, trace_id=b"t" * 16, span_id=b"s" * 8))
    driver.run()
    runs = spans.named("decode")
    begins = [span.attributes["pageframe.tokens.begin"] for span in runs]
    ends = [span.attributes["pageframe.tokens.end"] for span in runs]
    assert begins[1:] == ends[:-1]
    # Each ends with the step that went past a multiple of 128.
    assert [begin // 128 for begin in begins] == [0, 1, 2]
    assert all(0 <= end % 128 < 3 for end in ends[:-1])
    drafted = [span.attributes["pageframe.num_draft_tokens"] for span in runs]
    accepted = [span.attributes["pageframe.num_accepted_tokens"] for span in runs]
    (whole,) = spans.named("sequence")
    assert sum(drafted) == whole.attributes["pageframe.num_draft_tokens"]
    assert sum(accepted) == whole.attributes["pageframe.num_accepted_tokens"]
    account = driver.completion(1).account
    assert (sum(drafted), sum(accepted)) == (account.num_draft_tokens, account.num_accepted_tokens)
    assert 150 < sum(accepted) < 300


def test_log_probabilities_stay_with_their_tokens():
    driver = drafting()
    driver.submit(make_submission(1, 4, max_tokens=9))
    driver.submit(make_submission(2, 4, max_tokens=9))
    driver.step()
    entries = {
        index: TokenLogprobs(token_id=token, logprob=0.0) for index, token in enumerate((7, 8, 9))
    }
    result = StepResult(
        step=2,
        sampled_ids=[1, 2, 1, 1],
        token_ids=[7, 1, 8, 9],
        finish_reasons=[0, 0, 0, 0],
        logprobs={0: entries[0], 2: entries[1], 3: entries[2]},
    )
    sequences = driver.scheduler._roster.sequences
    events = sequences[1].outbox.events
    driver.scheduler._roster.lockstep.take(result, sequences)
    assert events.token_ids[-4:] == [7, 1, 8, 9]
    found = {index: entry.token_id for index, entry in events.logprobs.items()}
    assert {events.token_ids[index]: token_id for index, token_id in found.items()} == {
        7: 7,
        8: 8,
        9: 9,
    }


class TestPrices:
    @staticmethod
    def taught(base_ns: float, token_ns: float, *sizes: tuple[int, int, int]) -> StepPrices:
        prices = StepPrices()
        for num_decodes, num_drafted, num_accepted in sizes:
            measured = base_ns + token_ns * (num_decodes + num_drafted)
            prices.learn(num_decodes, num_drafted, num_accepted, round(measured))
        return prices

    def test_what_is_not_known_is_tried(self):
        assert StepPrices().price(1, 0) == 0.3
        assert self.taught(1e6, 1e5, *[(4, 0, 0)] * 50).price(4, 0) == 0.3

    def test_alone_on_a_wide_machine_any_guess_pays(self):
        prices = self.taught(5e6, 5e3, *[(1, 0, 0), (1, 4, 0)] * 20)
        assert prices.price(1, 0) == pytest.approx(5e3 / (5e6 + 3 * 5e3), rel=0.05)

    def test_the_more_share_a_step_the_higher_the_price(self):
        prices = self.taught(1e6, 1e5, *[(1, 0, 0), (9, 0, 0), (5, 0, 0)] * 20)
        asked = [prices.price(num_decodes, 0) for num_decodes in (1, 4, 16, 64)]
        assert asked == sorted(asked)
        # c * N / (a + c * N)
        assert asked == pytest.approx([1 / 11, 4 / 14, 16 / 26, 64 / 74], rel=1e-3)

    def test_prefill_beside_them_makes_drafts_cheaper(self):
        prices = self.taught(1e6, 1e5, *[(1, 0, 0), (9, 0, 0)] * 20)
        assert prices.price(4, 10) == pytest.approx(4 / 24, rel=1e-3)

    def test_what_drafts_bring_already_makes_more_of_them_dearer(self):
        brings = self.taught(1e6, 1e5, *[(1, 4, 4)] * 99, *[(1, 3, 3)] * 99)
        nothing = self.taught(1e6, 1e5, *[(1, 4, 0)] * 99, *[(1, 3, 0)] * 99)
        assert brings.price(1, 0) > 3 * nothing.price(1, 0)

    def test_what_is_uncertain_is_taken_to_be_cheap(self):
        rng = random.Random(3)
        sizes = [(1, 0, 0), (5, 0, 0)] * 20
        noisy = StepPrices()
        for num_decodes, _, _ in sizes:
            measured_ns = 1e6 + 1e5 * num_decodes + rng.gauss(0, 4e5)
            noisy.learn(num_decodes, 0, 0, round(measured_ns))
        assert noisy.price(4, 0) < self.taught(1e6, 1e5, *sizes).price(4, 0)

    def test_a_price_is_a_chance(self):
        # Times that fall with the tokens, or that grow faster than they can.
        assert self.taught(1e7, -1e5, *[(1, 0, 0), (9, 0, 0)] * 20).price(4, 0) == 0.0
        assert 0 <= self.taught(-1e6, 1e6, *[(3, 0, 0), (9, 0, 0)] * 20).price(4, 0) <= 1.0

    def test_another_machine_is_learnt_anew(self):
        driver = drafting()
        driver.submit(make_submission(1, 4, max_tokens=40))
        for _ in range(4):
            driver.step()
        speculation = driver.scheduler._speculation
        before = speculation._prices
        driver.lose_executor()
        driver.start_executor()
        assert speculation._prices is not before
        driver.run()
        assert_scheduler_empty(driver)
