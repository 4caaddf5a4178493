import pytest

from pageframe.core.step import StepResult, StepTiming
from pageframe.scheduler.rates import Average, Rates
from pageframe.testing.fake_engine import make_facts

MS = 1_000_000


def step(
    *,
    ms: float,
    entries: tuple[int, ...] = (),
    num_blocks: int = 0,
    copy_ms: float = 0,
    num_drafted: int = 0,
):
    """A step in which some sequences computed so many tokens from position 0 on."""
    return StepResult(
        step=1,
        sampled_ids=[1],
        computed_ids=list(range(len(entries))),
        num_computed=list(entries),
        first_positions=[0] * len(entries),
        drafted_ids=[1] if num_drafted else [],
        num_drafted=[num_drafted] if num_drafted else [],
        num_accepted=[0] if num_drafted else [],
        timing=StepTiming(
            start_ns=MS,
            execute_ns=round((ms + copy_ms) * MS),
            copy_ns=round(copy_ms * MS),
            num_blocks_moved=num_blocks,
        ),
    )


def measured(*steps, times: int = 200) -> Rates:
    rates = Rates(make_facts())
    for _ in range(times):
        for result in steps:
            rates.observe(result)
    return rates


def test_a_mean_forgets_its_prior_and_what_is_old():
    mean = Average(100.0, prior_weight=4, window=10)
    assert mean.value == 100.0
    mean.add(0.0, 4)
    assert 0 < mean.value < 50.0
    for _ in range(20):
        mean.add(30.0, 10)
    assert mean.value == pytest.approx(3.0, rel=1e-4)


def test_a_step_is_its_base_and_what_prefill_adds():
    rates = measured(step(ms=10), step(ms=12, entries=(30, 70)))
    assert rates.base_ns == pytest.approx(10 * MS, rel=0.01)
    assert rates.token_ns == pytest.approx(2 * MS / 100, rel=0.02)
    assert rates.step_ns(200) == pytest.approx(14 * MS, rel=0.02)
    assert rates.num_steps == 400


def test_draft_tokens_cost_what_tokens_of_prefill_do():
    # 10 ms, and 20 us for each token that is computed beside the decodes.
    rates = measured(
        step(ms=10.8, num_drafted=40), step(ms=12, entries=(30, 50), num_drafted=20), times=2000
    )
    assert rates.base_ns == pytest.approx(10 * MS, rel=0.01)
    assert rates.token_ns == pytest.approx(20_000, rel=0.05)


def test_an_entry_of_one_token_is_a_decode():
    rates = measured(step(ms=10, entries=(1, 1)))
    assert rates.base_ns == pytest.approx(10 * MS, rel=0.01)
    assert rates.last_token_ns == 0.0


def test_copies_cost_what_the_step_waited_for_them_and_slow_nothing_else():
    rates = measured(step(ms=10), step(ms=10, num_blocks=8, copy_ms=4))
    assert rates.block_ns == pytest.approx(0.5 * MS, rel=0.02)
    assert rates.last_block_ns == 0.5 * MS
    assert rates.base_ns == pytest.approx(10 * MS, rel=0.01)


def test_a_step_without_prefill_or_copies_has_none_to_divide_by():
    rates = measured(step(ms=10), times=1)
    assert (rates.last_token_ns, rates.last_block_ns) == (0.0, 0.0)


def test_a_machine_that_slows_down_is_believed_within_a_window():
    rates = measured(step(ms=10))
    for _ in range(3 * 64):
        rates.observe(step(ms=30))
    assert rates.base_ns == pytest.approx(30 * MS, rel=0.05)


def test_before_anything_is_measured_costs_are_on_the_dear_side():
    rates = Rates(make_facts())
    assert rates.num_steps == 0
    assert rates.token_ns == 50_000
    # Four tokens of a byte each, at ten bytes a nanosecond.
    assert rates.block_ns == pytest.approx(0.4)


HOST = {"num_host_blocks": 8}


@pytest.mark.parametrize(
    ("facts", "shares_prefixes", "moved_and_gone"),
    [({}, True, (0.0, 1.0)), (HOST, True, (1.0, 0.0)), (HOST, False, (0.0, 1.0))],
)
def test_at_first_the_host_tier_is_expected_to_keep_all_that_can_be_found(
    facts, shares_prefixes, moved_and_gone
):
    rates = Rates(make_facts(**facts), shares_prefixes=shares_prefixes)
    assert (rates.moved_share, rates.gone_share) == moved_and_gone


def test_where_blocks_of_victims_went_is_followed():
    rates = Rates(make_facts(**HOST))
    for _ in range(100):
        rates.observe_return(100, moved_share=0.5, gone_share=0.25)
    rates.observe_return(0, moved_share=9.0, gone_share=9.0)
    assert rates.moved_share == pytest.approx(0.5, rel=0.01)
    assert rates.gone_share == pytest.approx(0.25, rel=0.01)
    rates.restart(make_facts())
    assert (rates.moved_share, rates.gone_share) == (0.0, 1.0)


def test_what_is_not_looked_for_any_more_is_expected_again():
    rates = Rates(make_facts(**HOST))
    # One victim of a million tokens.
    rates.observe_return(62_500, moved_share=0.0, gone_share=1.0)
    assert rates.gone_share > 0.95
    for _ in range(10):
        rates.observe_nothing(100)
    assert rates.gone_share < 0.05
    assert rates.moved_share > 0.95
