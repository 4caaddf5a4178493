"""What is made of runs: means, crossings, balances, verdicts."""

import json
import math

import pytest

from bench.paper.claims import Claim, Rule
from bench.paper.occupancy import occupancy_of
from bench.paper.rates import LATENCIES_S, Curve, Point, rate_at, smallest_ratio
from bench.paper.report import claim_line
from bench.paper.run_log import Usage, UsageTable
from bench.paper.sharing import Sharing, sharing_of
from bench.paper.sweeps import balance
from unit.bench.bench_house import make_cost


def make_claim(rule: Rule, paper: float, ours: float) -> Claim:
    return Claim(claim="share of things", source="somewhere", paper=paper, ours=ours, rule=rule)


def test_means_are_over_steps_not_over_records():
    usage = UsageTable.of(
        [
            Usage(start_ns=0, num_steps=3, num_running=2),
            Usage(start_ns=30, num_steps=1, num_running=6, is_waiting=True),
        ]
    )
    assert usage.num_steps == 4
    assert usage.mean("num_running") == 3
    assert usage.under_pressure().mean("num_running") == 6
    assert usage.between(0, 30).mean("num_running") == 2
    assert math.isnan(usage.between(99, 100).mean("num_running"))


def test_shares_of_memory_add_up():
    usage = UsageTable.of(
        [
            Usage(
                start_ns=0,
                num_token_slots=20,
                num_future_slots=10,
                num_unused_slots=5,
                num_held_slots=40,
            )
        ]
    )
    found = occupancy_of("X", usage, 100)
    assert (found.token_share, found.future_share, found.unused_share) == (0.2, 0.1, 0.05)
    assert found.rest_share == pytest.approx(0.65)
    assert found.token_share_of_held == 0.5


def test_a_rate_is_found_between_points_on_a_logarithmic_scale():
    points = [Point(1, 0.01, 0), Point(2, 0.1, 0), Point(3, 10, 0)]
    assert rate_at(points, 0.1) == 2
    assert rate_at(points, 1.0) == pytest.approx(2.5)
    assert math.isnan(rate_at(points, 0.001))
    assert math.isnan(rate_at(points, 10.0))


def test_the_least_favourable_latency_counts():
    def curve(name, *rates):
        latencies = [0.05, *LATENCIES_S, 2.0]
        pairs = zip([0.1, *rates, 9.0], latencies, strict=True)
        return Curve(name, tuple(Point(rate, latency, 0) for rate, latency in pairs))

    curves = {
        "Pageframe": curve("Pageframe", 4.0, 5.0, 6.0),
        "Other": curve("Other", 1.0, 2.0, 2.0),
    }
    assert smallest_ratio(curves, "Other") == 2.5
    short = Curve("Other", curves["Other"].points[:3])
    assert math.isnan(smallest_ratio(curves | {"Other": short}, "Other"))


def test_saved_blocks_are_counted_over_all_steps():
    usage = UsageTable.of(
        [
            Usage(start_ns=0, num_running=1, num_blocks=2, num_blocks_unshared=2),
            Usage(start_ns=1, num_running=2, num_blocks=3, num_blocks_unshared=4, num_copies=1),
            Usage(start_ns=2, num_running=2, num_blocks=3, num_blocks_unshared=6),
        ]
    )
    found = sharing_of("X", 2, usage)
    assert found.saved_share == pytest.approx(4 / 12)
    assert found.num_copies_per_step == pytest.approx(1 / 2.5)
    assert found.num_blocks_per_request == pytest.approx(8 / 2.5)


def make_sharing(num_copies_per_step: float) -> Sharing:
    return Sharing(
        data="X",
        num_sequences=4,
        saved_share=0.5,
        num_copies_per_step=num_copies_per_step,
        num_forks_per_step=0.5,
        num_blocks_per_request=10,
        num_tokens_per_request=300,
    )


def test_sharing_half_of_the_blocks_lets_twice_as_many_groups_in():
    found = balance(make_sharing(0), make_cost(16_000), 16)
    assert found.num_groups_shared == 100
    assert found.num_groups_unshared == 50
    assert found.copy_ns == 0
    # 1,000 ns for the step, 10 for each of its tokens and 2 for each token of context.
    shared_ns, unshared_ns = 1000 + 4000 + 60_000, 1000 + 2000 + 30_000
    assert found.speedup == pytest.approx(2 * unshared_ns / shared_ns)
    assert found.break_even_copy_ns == pytest.approx(2 * unshared_ns - shared_ns)
    # Half a beam of 75 tokens for each of 50 groups, read and written at 2 ns each.
    assert found.history_copy_ns == pytest.approx(50 * 0.5 * 75 * 4)


def test_at_break_even_sharing_gains_nothing():
    cost = make_cost(16_000)
    free = balance(make_sharing(0), cost, 16)
    num_copies_per_step = free.break_even_copy_ns / cost.copy_ns(free.num_groups_shared * 16)
    found = balance(make_sharing(num_copies_per_step), cost, 16)
    assert found.copy_ns == pytest.approx(found.break_even_copy_ns)
    assert found.speedup == pytest.approx(1)


@pytest.mark.parametrize(
    ("rule", "paper", "ours", "has_passed"),
    [
        (Rule.RATIO, 2.2, 2.2, True),
        (Rule.RATIO, 2.2, 2.19, False),
        (Rule.RATIO, 2.2, math.nan, False),
        (Rule.SHARE, 0.50, 0.471, True),
        (Rule.SHARE, 0.50, 0.469, False),
        (Rule.SHARE, 0.50, 0.9, True),
        (Rule.BASELINE_SHARE, 0.30, 0.26, True),
        (Rule.BASELINE_SHARE, 0.30, 0.24, False),
        (Rule.BASELINE_SHARE, 0.30, 0.36, False),
        (Rule.BASELINE_COUNT, 10, 11, True),
        (Rule.BASELINE_COUNT, 10, 12, False),
        (Rule.REMARK, 10, math.nan, None),
    ],
)
def test_how_claims_are_judged(rule, paper, ours, has_passed):
    assert make_claim(rule, paper, ours).has_passed is has_passed


def test_a_claim_in_json_has_no_values_that_json_has_not():
    claim = make_claim(Rule.REMARK, math.nan, 0.25)
    data = json.loads(json.dumps(claim.to_json(), allow_nan=False))
    assert data["paper"] is None
    assert data["ours"] == 0.25
    assert data["pass"] is None


def test_shares_are_printed_in_percent():
    assert claim_line(make_claim(Rule.SHARE, 0.5, 0.25)).split()[-4:] == ["50.0", "%", "25.0", "%"]
    assert claim_line(make_claim(Rule.SHARE, 0.5, 0.25)).startswith("  NO")
