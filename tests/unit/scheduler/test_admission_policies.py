"""What an admission leaves free for those who run."""

import pytest

from pageframe.scheduler.policies.admission import ConservativeAdmission, WatermarkAdmission
from pageframe.scheduler.policies.protocols import RoomView, WaitingView
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import Driver, assert_scheduler_empty, make_submission

WAITING = WaitingView(
    sequence_id=1,
    tenant="",
    priority=0,
    submit_ns=0,
    deadline_ns=0,
    num_tokens=10,
    num_output_tokens_max=10,
    num_cached_tokens=0,
    num_preemptions=0,
)


def room(num_blocks_left: int, *, is_cooling: bool = False, num_blocks_growth: int = 0) -> RoomView:
    return RoomView(
        num_blocks_total=400,
        num_blocks_left=num_blocks_left,
        num_blocks_more=6,
        num_blocks_watermark=4,
        num_blocks_growth=num_blocks_growth,
        num_tokens_left=100,
        num_running=3,
        max_num_running=8,
        is_cooling=is_cooling,
    )


@pytest.mark.parametrize(
    ("num_blocks_left", "is_cooling", "admits"),
    [(3, False, False), (4, False, True), (9, True, False), (10, True, True)],
)
def test_the_watermark_is_kept_and_after_a_preemption_the_newcomers_growth_too(
    num_blocks_left, is_cooling, admits
):
    view = room(num_blocks_left, is_cooling=is_cooling, num_blocks_growth=300)
    assert WatermarkAdmission().admits(WAITING, view) is admits


@pytest.mark.parametrize(
    ("num_blocks_left", "num_blocks_growth", "admits"),
    [(5, 0, False), (6, 0, True), (15, 10, False), (16, 10, True)],
)
def test_a_conservative_admission_lets_everybody_grow_to_the_end(
    num_blocks_left, num_blocks_growth, admits
):
    view = room(num_blocks_left, num_blocks_growth=num_blocks_growth)
    assert ConservativeAdmission().admits(WAITING, view) is admits


@pytest.mark.parametrize(
    ("policy", "is_preempting"), [("watermark", True), ("conservative", False)]
)
def test_nobody_is_preempted_under_conservative_admission(policy, is_preempting):
    facts = make_facts(num_blocks=40, block_size=4)
    driver = Driver(
        facts=facts,
        engine=FakeEngine(facts),
        shares_prefixes=False,
        token_budget=64,
        more_policies={"admission": policy},
    )
    for handle in range(1, 13):
        driver.submit(make_submission(handle, 6, max_tokens=30))
    driver.run()
    num_preemptions = sum(
        completion.account.num_preemptions for completion in driver.completions.values()
    )
    assert (num_preemptions > 0) is is_preempting
    assert_scheduler_empty(driver)
