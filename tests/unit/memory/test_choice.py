"""What must run, who gives way for it, and when a plan is refused; nothing is changed."""

import pytest

from pageframe.core.plan import Recovery, StepPlan, Victims
from pageframe.core.replica import TenantQuota
from pageframe.core.step import RefusedBecause
from pageframe.executor.memory.choice import Forecast, choose
from unit.executor.small_engine import SmallEngine, fork, request
from unit.memory.memories import entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))


def offered(*sequence_ids: int, recovery: Recovery = Recovery.RECOMPUTE, num_blocks: int = 0):
    made = Victims()
    for sequence_id in sequence_ids:
        made.add(sequence_id, 0, recovery, 0, num_blocks)
    return made


def bounded(small: SmallEngine, tenant: str, **bounds) -> None:
    small.desk.set_quota(TenantQuota(tenant=tenant, **bounds))


def prompt(sequence_id: int, num_tokens: int) -> list[int]:
    """Tokens that share nothing with those of any other sequence."""
    return [sequence_id] * num_tokens


def running(small: SmallEngine, *rows: tuple[int, str, int]) -> None:
    """Rows of sequence id, tenant, prompt tokens; all are caught up afterwards."""
    small.start(*(request(it, prompt(it, n), tenant=tenant) for it, tenant, n in rows))


class TestForecast:
    def test_it_counts_only_what_nobody_else_refers_to(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
        forecast = Forecast(small.memory)
        assert forecast.num_available == 5
        forecast.give_up(small.memory.sequences.get(1).row)
        assert forecast.num_available == 5
        forecast.give_up(small.memory.sequences.get(2).row)
        assert forecast.num_available == 8

    def test_it_changes_nothing(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        Forecast(small.memory).give_up(0)
        assert small.memory.pool.columns.ref_counts[:3].tolist() == [1, 1, 1]

    def test_of_a_tail_it_counts_the_tail(self):
        small = SmallEngine()
        small.start(request(1, TEN, tenant="t"))
        forecast = Forecast(small.memory)
        forecast.give_up(0, 2)
        assert forecast.num_available == 7
        assert forecast.references[:3].tolist() == [1, 0, 0]
        assert forecast.num_held[small.memory.pool.tenants.id_of("t")] == 1

    def test_what_is_pinned_does_not_come_free(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.desk.retain(tenant="t", cache_salt=b"", name="h", token_ids=TEN, ttl_ns=9, now_ns=0)
        forecast = Forecast(small.memory)
        forecast.give_up(0)
        assert forecast.num_available == 6


class TestVictims:
    def test_those_that_a_plan_is_certain_of_go_though_everything_fits_and_no_others_do(self):
        small = SmallEngine(num_blocks=8)
        running(small, (1, "t", 4), (2, "t", 4), (3, "t", 4))
        victims = offered(3, 2)
        victims.num_certain = 1
        result = small.step(victims=victims)
        assert (result.refusal, result.preempted_ids, result.sampled_ids) == ("", [3], [1, 2])

    def test_a_victim_whose_blocks_are_all_shared_does_not_help_and_the_next_is_taken(self):
        small = SmallEngine(num_blocks=5)
        small.step(
            announce=[request(1, EIGHT), request(2, prompt(2, 8))],
            may=entries((1, 0, 64), (2, 0, 64)),
            forks=[fork(1, 3)],
        )
        # Three decodes lack a block each, and one is free. 3 gives nothing, but wants nothing.
        result = small.step(victims=offered(3, 2))
        assert result.preempted_ids == [3, 2]
        assert result.sampled_ids == [1]

    def test_they_are_taken_in_the_order_of_the_plan(self):
        small = SmallEngine(num_blocks=4)
        running(small, (1, "", 8), (2, "", 8))
        assert small.step(victims=offered(1, 2)).preempted_ids == [1]

    def test_one_that_is_named_twice_counts_once(self):
        small = SmallEngine(num_blocks=4)
        running(small, (1, "", 8), (2, "", 8))
        result = small.step(victims=offered(2, 2, 1))
        assert (result.preempted_ids, result.preempted_generations) == ([2], [1])

    def test_a_tail_as_long_as_the_whole_is_the_whole(self):
        small = SmallEngine(num_blocks=4)
        running(small, (1, "", 8), (2, "", 8))
        result = small.step(victims=offered(2, recovery=Recovery.TAIL, num_blocks=2))
        assert result.preempted_recoveries == [Recovery.RECOMPUTE]
        assert result.preempted_num_blocks == [2]

    def test_choosing_changes_nothing(self):
        small = SmallEngine(num_blocks=4)
        running(small, (1, "", 8), (2, "", 8))
        before = small.engine.account(), small.table(1), small.table(2)
        plan = StepPlan(step=2, builds_on=1, victims=offered(1))
        choice = choose(small.memory, plan, 64)
        assert [victim.sequence.sequence_id for victim in choice.victims] == [1]
        assert (small.engine.account(), small.table(1), small.table(2)) == before


class TestQuotas:
    def test_an_admission_past_the_ceiling_is_refused_for_the_quota(self):
        small = SmallEngine()
        bounded(small, "t", ceiling_blocks=2)
        result = small.start(request(1, TEN, tenant="t"))
        assert (result.refused_because, result.sampled_ids) == ([RefusedBecause.QUOTA], [])
        assert small.step(may=entries((1, 0, 8))).refused_ids == []

    def test_a_quota_stops_its_tenant_and_not_those_behind(self):
        small = SmallEngine()
        bounded(small, "t", ceiling_blocks=1)
        result = small.start(request(1, EIGHT, tenant="t"), request(2, TEN, tenant="u"))
        assert (result.refused_ids, result.sampled_ids) == ([1], [2])

    def test_cached_blocks_that_are_taken_up_count_against_the_ceiling(self):
        small = SmallEngine()
        small.cache(TEN)
        bounded(small, "t", ceiling_blocks=2)
        assert small.start(request(1, TEN, tenant="t")).refused_because == [RefusedBecause.QUOTA]

    def test_blocks_that_another_holds_do_not(self):
        small = SmallEngine()
        small.start(request(1, TEN, tenant="u"))
        bounded(small, "t", ceiling_blocks=1)
        assert small.start(request(2, TEN, tenant="t")).refused_ids == []

    def test_what_a_floor_lacks_is_not_given_to_others(self):
        small = SmallEngine(num_blocks=4)
        bounded(small, "floored", floor_blocks=2)
        assert small.start(request(1, TEN, tenant="u")).refused_because == [
            RefusedBecause.POOL_FULL
        ]
        assert small.step(may=entries((1, 0, 8))).refused_ids == []
        assert small.start(request(2, prompt(2, 8), tenant="floored")).refused_ids == []

    def test_a_floor_that_is_filled_protects_nothing_more(self):
        small = SmallEngine(num_blocks=4)
        bounded(small, "floored", floor_blocks=2)
        running(small, (1, "floored", 6))
        assert small.start(request(2, prompt(2, 8), tenant="u")).refused_ids == []

    def test_growth_past_the_ceiling_takes_a_victim_of_the_same_tenant_only(self):
        small = SmallEngine(num_blocks=12)
        bounded(small, "t", ceiling_blocks=4)
        running(small, (1, "u", 8), (2, "t", 8), (3, "t", 8))
        result = small.step(victims=offered(1, 3))
        assert result.preempted_ids == [3]
        assert result.sampled_ids == [1, 2]

    def test_growth_past_the_ceiling_without_such_a_victim_is_refused(self):
        small = SmallEngine()
        bounded(small, "t", ceiling_blocks=2)
        running(small, (1, "u", 8), (2, "t", 8))
        assert small.step(victims=offered(1)).refusal == "MUST_DOES_NOT_FIT"

    def test_growth_into_the_floor_of_another_takes_a_victim(self):
        small = SmallEngine(num_blocks=6)
        running(small, (1, "u", 8), (2, "u", 8))
        bounded(small, "floored", floor_blocks=1)
        # Two blocks are free and two decodes need one each; the floor leaves one of them.
        result = small.step(victims=offered(2))
        assert (result.preempted_ids, result.sampled_ids) == ([2], [1])

    def test_a_tenant_may_grow_into_its_own_floor(self):
        small = SmallEngine(num_blocks=6)
        running(small, (1, "t", 8), (2, "t", 8))
        bounded(small, "t", floor_blocks=6)
        result = small.step(victims=offered(2))
        assert (result.preempted_ids, result.sampled_ids) == ([], [1, 2])

    def test_a_ceiling_below_what_is_held_takes_nothing_away_and_stops_growth(self):
        small = SmallEngine()
        running(small, (1, "t", 7))
        bounded(small, "t", ceiling_blocks=1)
        assert small.step().sampled_ids == [1]
        assert small.step().refusal == "MUST_DOES_NOT_FIT"

    def test_a_copy_on_write_counts_against_the_ceiling(self):
        small = SmallEngine()
        small.step(
            announce=[request(1, TEN, tenant="t")], may=entries((1, 0, 64)), forks=[fork(1, 2)]
        )
        bounded(small, "t", ceiling_blocks=3)
        assert small.step().refusal == "MUST_DOES_NOT_FIT"
        bounded(small, "t", ceiling_blocks=4)
        assert small.step().refusal == ""

    def test_a_hit_inside_a_block_counts_its_copy_against_the_ceiling(self):
        small = SmallEngine()
        small.start(request(1, EIGHT, tenant="u"))
        bounded(small, "t", ceiling_blocks=0)
        assert small.start(request(2, [*EIGHT[:6], 50], tenant="t")).refused_because == [
            RefusedBecause.QUOTA
        ]
        bounded(small, "t", ceiling_blocks=1)
        assert small.resume(2).refused_ids == []


class TestRefusals:
    @pytest.mark.parametrize("builds_on", [0, 2, 7])
    def test_a_plan_that_builds_on_another_step(self, builds_on):
        small = SmallEngine()
        running(small, (1, "", 8))
        assert small.step(builds_on=builds_on).refusal == "BUILDS_ON_UNAPPLIED_STEP"

    def test_a_refused_plan_leaves_even_its_announcements_unknown(self):
        small = SmallEngine(num_blocks=2)
        running(small, (1, "", 8))
        result = small.step(announce=[request(2, [1])], finish=[99])
        assert (result.refusal, result.announced_ids) == ("MUST_DOES_NOT_FIT", [])
        assert small.memory.sequences.get(2) is None

    def test_the_next_plan_may_say_what_the_refused_one_did_not(self):
        small = SmallEngine(num_blocks=2)
        running(small, (1, "", 8))
        assert small.step().refusal == "MUST_DOES_NOT_FIT"
        assert small.step(finish=[1]).released == [1]

    def test_more_decodes_than_a_step_takes_tokens(self):
        small = SmallEngine()
        running(small, (1, "", 3), (2, "", 3), (3, "", 3))
        choice = choose(small.memory, StepPlan(step=2, builds_on=1), 2)
        assert choice.refusal == "STEP_TOKENS_EXCEEDED"
