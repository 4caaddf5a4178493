"""Two steps in flight: what the books say meanwhile, and who is left out of the second one."""

import numpy as np
import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.plan import StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import NEWEST, StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig
from pageframe.executor.model.sim_device import SimDevice
from unit.executor.small_engine import request
from unit.memory.memories import entries

LONG = SamplingParams(max_tokens=40, ignore_eos=True)


class Device(SimDevice):
    """Notes batches; the token of each step and row may be set, and a step may fail."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config)
        self.batches: list[tuple[int, list[int], list[int]]] = []
        self.tokens: dict[tuple[int, int], int] = {}
        self.fails_in = 0

    def _compute(self, batch: StepBatch) -> StepOutput:
        output = super()._compute(batch)
        for index, row in enumerate(batch.sample_rows.tolist()):
            token_id = self.tokens.get((batch.step, row))
            if token_id is not None:
                output.token_ids[index] = token_id
        return output

    def launch(self, batch):
        self.batches.append((batch.step, batch.rows.tolist(), batch.token_ids.tolist()))
        flight = super().launch(batch)
        return Failing(flight) if batch.step == self.fails_in else flight


class Failing:
    """A flight that ends badly."""

    is_ahead = True

    def __init__(self, flight) -> None:
        self.wait = flight.wait

    def collect(self) -> StepOutput:
        raise RuntimeError("the device is on fire")


class House:
    """An engine over such a device. Blocks of 4 tokens, 4 rows."""

    def __init__(self, *, num_blocks=16, eos=(0,), **options):
        self.device = Device(
            SimConfig(vocab_size=100, max_model_len=64, max_num_rows=4, eos_token_ids=eos)
        )
        self.engine = StepEngine(
            self.device,
            num_blocks=num_blocks,
            block_size=4,
            max_num_sequences=4,
            max_step_tokens=64,
            max_model_len=64,
            trace=NullTraceSink(),
            clock=ManualClock(1_000),
            check_every_step=True,
            **options,
        )
        self.step_number = 0

    def plan(self, **fields):
        self.step_number += 1
        return StepPlan(step=self.step_number, builds_on=self.step_number - 1, **fields)

    def begin(self, *requests):
        """A step in which all of them run; collected."""
        self.engine.step(self.plan(announce=list(requests)))
        may = entries(*((each.sequence_id, 0, len(each.token_ids)) for each in requests))
        return self.engine.step(self.plan(may=may))

    def launch(self):
        """The next step, in which whoever runs goes on."""
        plan = self.plan()
        assert not self.engine.launching.num_in_flight or self.engine.launching.may_follow(plan)
        self.engine.launch(plan)

    def row_of(self, sequence_id):
        return self.engine.memory.sequences.by_id(sequence_id).row


def test_the_second_step_is_launched_with_tokens_that_are_coming():
    house, alone = House(), House()
    for each in (house, alone):
        each.begin(request(1, [5, 6, 7]), request(2, [8, 9]))
    house.launch()
    house.launch()
    assert house.device.batches[-1][2] == [NEWEST, NEWEST]
    first = house.engine.collect()
    second = house.engine.collect()
    assert (first.is_followed, second.is_followed) == (True, False)
    expected = [alone.engine.step(alone.plan()) for _ in range(2)]
    assert [first.token_ids, second.token_ids] == [each.token_ids for each in expected]
    assert [first.sampled_ids, second.sampled_ids] == [[1, 2], [1, 2]]
    known = [each.engine.memory.sequences.tokens_of(each.row_of(1)) for each in (house, alone)]
    assert known[0].tolist() == known[1].tolist()


def test_steps_may_follow_each_other_for_as_long_as_they_please():
    house, alone = House(), House()
    for each in (house, alone):
        each.begin(request(1, [5, 6, 7]))
    house.launch()
    tokens = []
    for _ in range(20):
        house.launch()
        tokens += house.engine.collect().token_ids
    tokens += house.engine.collect().token_ids
    assert tokens == [alone.engine.step(alone.plan()).token_ids[0] for _ in range(21)]


def test_who_ended_by_a_token_is_dropped_from_the_step_behind():
    house = House()
    house.begin(request(1, [5, 6, 7], sampling=SamplingParams(max_tokens=40)), request(2, [8, 9]))
    house.device.tokens[3, house.row_of(1)] = 0
    house.launch()
    house.launch()
    assert house.device.batches[-1][1] == [house.row_of(1), house.row_of(2)]
    first = house.engine.collect()
    assert first.finish_reasons == [FinishReason.STOP, FinishReason.NONE]
    assert first.accounts.keys() == {1}
    second = house.engine.collect()
    assert (second.sampled_ids, second.accounts) == ([2], {})
    assert second.account.held == 1, "the block that 1 got for a token that it never had is free"
    assert house.engine.memory.sequences.get(1) is None


def test_who_ends_by_its_length_is_not_in_the_step_behind():
    house = House()
    two_tokens = SamplingParams(max_tokens=2, ignore_eos=True)
    house.begin(request(1, [5, 6, 7], sampling=two_tokens), request(2, [8, 9]))
    house.launch()
    house.launch()
    assert house.device.batches[-1][1] == [house.row_of(2)]
    assert house.engine.collect().finish_reasons == [FinishReason.LENGTH, FinishReason.NONE]
    assert house.engine.collect().sampled_ids == [2]


def test_a_step_behind_one_in_which_all_end_has_nobody_in_it():
    house = House()
    house.begin(request(1, [5, 6, 7], sampling=SamplingParams(max_tokens=2, ignore_eos=True)))
    house.launch()
    house.launch()
    assert house.engine.launching.flight_under_way() is None
    assert house.engine.collect().finish_reasons == [FinishReason.LENGTH]
    second = house.engine.collect()
    assert (second.sampled_ids, second.account.held) == ([], 0)


def test_a_failure_ends_its_sequences_and_the_step_behind_has_nobody_left():
    house = House()
    house.begin(request(1, [5, 6, 7]), request(2, [8, 9]))
    house.device.fails_in = 3
    house.launch()
    house.launch()
    first, second = house.engine.collect(), house.engine.collect()
    assert first.sampled_ids == [1, 2]
    assert first.finish_reasons == [FinishReason.ERROR] * 2
    assert (second.sampled_ids, second.refusal) == ([], "")
    assert house.engine.is_idle
    assert second.account.free == 16
    house.begin(request(3, [1, 2]))


def test_a_failure_of_the_step_behind_ends_those_who_are_left():
    house = House()
    house.begin(request(1, [5, 6, 7], sampling=SamplingParams(max_tokens=40)), request(2, [8, 9]))
    house.device.tokens[3, house.row_of(1)] = 0
    house.device.fails_in = 4
    house.launch()
    house.launch()
    assert house.engine.collect().finish_reasons == [FinishReason.STOP, FinishReason.NONE]
    second = house.engine.collect()
    assert (second.sampled_ids, second.finish_reasons) == ([2], [FinishReason.ERROR])
    assert house.engine.is_idle


def test_a_block_is_published_when_the_step_that_filled_it_is_collected():
    house = House()
    house.begin(request(1, [5, 6]))
    house.launch()  # Computes position 2.
    house.launch()  # Computes position 3: the block is full.
    house.engine.collect()
    assert house.engine.account().cached == 0
    row = house.row_of(1)
    assert house.engine.memory.sequences.num_published[row] == 0
    house.launch()
    assert house.engine.memory.sequences.num_published[row] == 0, "step 4 is still in flight"
    house.engine.collect()
    assert house.engine.memory.sequences.num_published[row] == 1
    house.engine.collect()


@pytest.mark.parametrize(
    "fields",
    [
        {"announce": [request(3, [1])]},
        {"finish": [1]},
        {"may": entries((1, 0, 1))},
        {"must": entries((1, 0, 1))},
    ],
)
def test_a_plan_that_does_more_than_go_on_does_not_follow(fields):
    house = House()
    house.begin(request(1, [5, 6, 7]))
    house.launch()
    assert house.engine.launching.may_follow(StepPlan(step=4, builds_on=3))
    assert not house.engine.launching.may_follow(StepPlan(step=4, builds_on=3, **fields))


@pytest.mark.parametrize(("step", "builds_on"), [(5, 3), (4, 2)])
def test_a_plan_that_would_be_refused_does_not_follow(step, builds_on):
    house = House()
    house.begin(request(1, [5, 6, 7]))
    house.launch()
    assert not house.engine.launching.may_follow(StepPlan(step=step, builds_on=builds_on))


@pytest.mark.parametrize("num_tokens", [4, 8], ids=["a chunk", "the whole prompt"])
def test_a_step_follows_one_that_computes_prompts(num_tokens):
    house, alone = House(), House()
    first, prompt = request(1, [5, 6, 7]), request(2, list(range(1, 9)))
    for each in (house, alone):
        each.begin(first)
        each.engine.step(each.plan(announce=[prompt]))
    house.engine.launch(house.plan(may=entries((2, 0, num_tokens))))
    house.launch()
    results = [house.engine.collect() for _ in range(2)]
    expected = [
        alone.engine.step(alone.plan(may=entries((2, 0, num_tokens)))),
        alone.engine.step(alone.plan()),
    ]
    assert [each.is_followed for each in results] == [True, False]
    for result, other in zip(results, expected, strict=True):
        assert result.sampled_ids == other.sampled_ids
        assert result.token_ids == other.token_ids
        computed = (result.computed_ids, result.first_positions, result.num_computed)
        assert computed == (other.computed_ids, other.first_positions, other.num_computed)
    assert results[0].first_positions == [0]
    assert results[0].num_computed == [num_tokens]


def test_nothing_follows_a_step_in_which_somebody_is_steered():
    house = House()
    house.begin(request(1, [5, 6, 7]))
    house.engine.step(house.plan(announce=[request(2, [8, 9], is_steered=True)]))
    house.engine.launch(house.plan(may=entries((2, 0, 2))))
    assert not house.engine.launching.may_follow(StepPlan(step=5, builds_on=4))


def test_nothing_follows_without_room_or_with_a_host_tier():
    plan = StepPlan(step=4, builds_on=3)
    for options in ({"num_blocks": 3}, {"num_host_slots": 4}):
        house = House(**options)
        house.begin(request(1, [5, 6, 7]), request(2, [8, 9]))
        house.launch()
        assert not house.engine.launching.may_follow(plan), options


@pytest.mark.parametrize(
    ("quotas", "may_follow"),
    [
        ([TenantQuota(tenant="a", ceiling_blocks=3)], True),
        ([TenantQuota(tenant="a", ceiling_blocks=2)], False),
        ([TenantQuota(tenant="b", floor_blocks=10)], True),
        ([TenantQuota(tenant="b", floor_blocks=14)], False),
        # What a floor lacks is what its own tenant would take of it.
        ([TenantQuota(tenant="a", floor_blocks=14)], False),
        ([TenantQuota(tenant="a", floor_blocks=13)], True),
    ],
)
def test_a_step_follows_where_every_tenant_has_room(quotas, may_follow):
    # Each of two tenants has one block of 16, and may want two more.
    house = House()
    house.engine.desk.replace_quotas(quotas)
    house.begin(request(1, [5, 6, 7], tenant="a"), request(2, [8, 9], tenant="b"))
    house.launch()
    assert house.engine.launching.may_follow(StepPlan(step=4, builds_on=3)) is may_follow


def test_no_more_than_two_are_in_flight():
    house = House()
    house.begin(request(1, [5, 6, 7]))
    house.launch()
    house.launch()
    assert not house.engine.launching.may_follow(StepPlan(step=5, builds_on=4))


def test_what_uses_a_block_again_may_do_so_behind_the_step_in_flight():
    # Law 4: the device keeps the order, so nothing waits at the fence.
    house = House()
    house.begin(request(1, [5, 6, 7], sampling=SamplingParams(max_tokens=40)), request(2, [8, 9]))
    house.device.tokens[3, house.row_of(1)] = 0
    house.launch()
    house.launch()
    result = house.engine.collect()
    assert result.account.fenced == 0
    assert result.account.total == 16


def test_blocks_are_moved_when_the_step_in_flight_is_over(monkeypatch):
    # Nobody who goes on writes into a block that others have, so a plan that follows moves nothing;
    # if it did, it would have to wait.
    house = House()
    house.begin(request(1, [5, 6, 7]))
    house.launch()
    events = []
    flight = house.engine.launching.newest.flight
    house.engine.launching.newest.flight = Noted(flight, events)
    moves = BlockMoves(copy_sources=np.array([0]), copy_targets=np.array([9]))
    monkeypatch.setattr(house.engine.memory.transfers, "take", lambda: moves)
    monkeypatch.setattr(house.device, "move_blocks", lambda _: events.append("moved"))
    house.launch()
    assert events == ["waited", "moved"]
    assert house.device.batches[-1][2] == [NEWEST], "it was launched, not executed"
    assert not house.engine.launching.may_follow(StepPlan(step=5, builds_on=4))
    first, second = house.engine.collect(), house.engine.collect()
    assert len(first.token_ids) == len(second.token_ids) == 1


class Noted:
    """A flight that notes who waits for it."""

    is_ahead = True

    def __init__(self, flight, events) -> None:
        self.collect = flight.collect
        self.wait = lambda: events.append("waited")


def test_time_beside_the_step_before_is_not_counted(monkeypatch):
    monkeypatch.setattr("time.monotonic_ns", lambda: 0)  # Steps are collected when they are over.
    house = House()
    clock = house.engine._clock
    house.begin(request(1, [5, 6, 7]))
    house.launch()
    house.launch()
    clock.advance_ns(5_000)
    first = house.engine.collect().timing
    clock.advance_ns(7_000)
    second = house.engine.collect().timing
    assert (first.execute_ns, first.end_ns) == (5_000, 6_000)
    assert (second.start_ns, second.apply_ns, second.execute_ns) == (6_000, 0, 7_000)


def test_a_step_that_was_collected_late_did_not_last_longer(monkeypatch):
    house = House()
    clock = house.engine._clock
    house.begin(request(1, [5, 6, 7]))
    house.launch()
    flight = house.engine.launching.newest.flight
    clock.advance_ns(5_000)
    monkeypatch.setattr("time.monotonic_ns", lambda: flight.output.over_ns + 2_000)
    timing = house.engine.collect().timing
    assert (timing.execute_ns, timing.end_ns) == (3_000, 4_000)


def test_coming_tokens_of_repeated_rows_are_looked_up_by_row():
    device = SimDevice(SimConfig(vocab_size=100, max_num_rows=4))
    device._newest[:] = [10, 11, 12, 13]
    batch = StepBatch(
        step=1,
        num_decodes=2,
        rows=np.array([2, 0]),
        token_ids=np.array([NEWEST, 7, NEWEST], np.int32),
        positions=np.zeros(3, np.int32),
        slots=np.zeros(3, np.int64),
        query_start=np.array([0, 1, 3], np.int32),
        context_lens=np.ones(2, np.int32),
        block_tables=np.zeros((2, 1), np.int32),
        samples=np.array([0, 1], np.int32),
        sample_rows=np.array([2, 0], np.int32),
    )
    assert device._resolve(batch).tolist() == [12, 7, 10]
