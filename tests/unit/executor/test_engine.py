import numpy as np

from pageframe.core.clock import ManualClock
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import (
    FinishReason,
    RefusedBecause,
    SequenceAccount,
    StepResult,
    TokenLogprobs,
)
from pageframe.executor.batch import StepOutput
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.integrity import ViolationKind
from pageframe.executor.reporting import NO_TOKEN
from pageframe.executor.step_failure import StepFailedError
from unit.executor.fake_runner import EOS_TOKEN_ID, FakeRunner, reference_output
from unit.memory.kv_records import RecordingSink, ReplayedPool
from unit.memory.memories import announcement, entries, victims

GREEDY = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)


class Bench:
    """An engine over a fake runner, plans in order."""

    def __init__(self, *, num_blocks: int = 8, block_size: int = 4, check: bool = True) -> None:
        self.runner = FakeRunner()
        self.sink = RecordingSink()
        self.clock = ManualClock(1_000)
        self.engine = StepEngine(
            self.runner,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_sequences=4,
            max_step_tokens=32,
            max_model_len=64,
            trace=self.sink,
            has_prefix_cache=False,
            clock=self.clock,
            check_every_step=check,
        )

    def step(self, **changes) -> StepResult:
        memory = self.engine.memory
        step = memory.last_received_step + 1
        plan = StepPlan(step=step, **({"builds_on": memory.last_applied_step} | changes))
        return self.engine.step(plan)

    def start(self, sequence_id: int, num_tokens: int = 4, **changes) -> StepResult:
        """Announce, admit and compute a whole prompt."""
        changes = {"sampling": GREEDY} | changes
        return self.step(
            announce=[announcement(sequence_id, num_tokens, **changes)],
            may=entries((sequence_id, changes.get("generation", 0), num_tokens)),
        )


def expected(num_tokens: int, sequence_id: int, sampling: SamplingParams = GREEDY) -> list[int]:
    tokens = [sequence_id * 10 + index for index in range(num_tokens)]
    return reference_output(tokens, num_tokens, sampling, 64)[0]


def test_a_sequence_is_computed_sampled_and_reported():
    bench = Bench()
    result = bench.start(1)
    assert (result.sampled_ids, result.token_ids) == ([1], expected(4, 1)[:1])
    assert result.finish_reasons == [FinishReason.NONE]
    assert (result.computed_ids, result.num_computed) == ([1], [4])
    assert result.announced_ids == [1]
    assert result.account == PoolAccount(total=8, free=7, held=1)
    result = bench.step()
    assert result.token_ids == expected(4, 1)[1:2]
    assert result.computed_ids == []


def test_decodes_come_before_chunks_and_only_the_caught_up_sample():
    bench = Bench()
    bench.start(1)
    result = bench.step(
        announce=[announcement(2, 9, sampling=GREEDY), announcement(3, 2, sampling=GREEDY)],
        may=entries((2, 0, 5), (3, 0, 2)),
    )
    assert bench.runner.batches[-1] == [1, 5, 2]
    assert result.sampled_ids == [1, 3]
    assert (result.computed_ids, result.num_computed) == ([2, 3], [5, 2])


def test_a_prompt_in_chunks_gives_the_same_tokens_as_a_prompt_at_once():
    bench = Bench()
    bench.step(announce=[announcement(1, 9, sampling=GREEDY)], may=entries((1, 0, 1)))
    tokens = []
    for num_tokens in (3, 2, 2, 7, 7, 7):
        tokens += bench.step(must=entries((1, 0, num_tokens))).token_ids
    assert tokens == expected(9, 1)[: len(tokens)]
    assert len(tokens) == 3


def test_a_finished_sequence_releases_its_blocks_at_once_and_is_forgotten():
    bench = Bench()
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    bench.start(1, sampling=sampling)
    result = bench.step()
    assert result.finish_reasons == [FinishReason.LENGTH]
    assert result.accounts == {1: SequenceAccount(num_blocks_peak=2)}
    assert result.account == PoolAccount(total=8, free=8)
    assert bench.engine.is_idle
    assert bench.runner.rows == {}
    assert bench.sink.ended == [1]
    assert bench.step(must=entries((1, 0, 1))).stale_ids == [1]


def test_a_stop_token_ends_a_sequence_and_is_part_of_its_output():
    bench = Bench()
    output = expected(4, 1)
    bench.start(1, sampling=SamplingParams(stop_token_ids=(output[2],), ignore_eos=True))
    assert bench.step().finish_reasons == [FinishReason.NONE]
    result = bench.step()
    assert (result.token_ids, result.finish_reasons) == ([output[2]], [FinishReason.STOP])


def test_the_model_s_own_end_token_ends_a_sequence():
    bench = Bench()
    bench.runner.execute = lambda batch: StepOutput(
        token_ids=np.full(len(batch.samples), EOS_TOKEN_ID, dtype=np.int32)
    )
    assert bench.start(1, sampling=SamplingParams()).finish_reasons == [FinishReason.STOP]


def test_the_model_s_length_ends_a_sequence():
    bench = Bench(num_blocks=16)
    result = bench.start(1, 30, sampling=SamplingParams(max_tokens=1000, ignore_eos=True))
    num_output = 1
    while result.finish_reasons == [FinishReason.NONE]:
        result = bench.step()
        num_output += 1
    assert (result.finish_reasons, num_output) == ([FinishReason.LENGTH], 34)


def test_a_resumed_announcement_counts_its_output_from_the_prompt():
    output = expected(4, 1)
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    bench = Bench()
    resumed = announcement(1, 4, sampling=sampling)
    resumed.token_ids = [*resumed.token_ids, *output[:4]]
    result = bench.step(announce=[resumed], may=entries((1, 0, 100)))
    assert bench.runner.batches == [[8]]
    assert result.token_ids == output[4:5]
    result = bench.step()
    assert (result.token_ids, result.finish_reasons) == (output[5:6], [FinishReason.LENGTH])


def test_a_preempted_sequence_goes_on_with_the_same_tokens_and_a_full_account():
    bench = Bench(num_blocks=2)
    output = expected(3, 1)
    assert bench.start(1, 3).token_ids == output[:1]
    assert bench.start(2, 3).token_ids[0] == output[1]
    result = bench.step(victims=victims((1, 0)))
    assert (result.preempted_ids, result.preempted_generations) == ([1], [1])
    assert result.preempted_num_blocks == [1]
    assert result.sampled_ids == [2]
    bench.step(finish=[2])
    result = bench.step(may=entries((1, 1, 100)))
    assert (result.token_ids, result.num_computed) == (output[2:3], [5])
    result = bench.engine.cancel([1])
    assert result.accounts == {1: SequenceAccount(num_blocks_peak=2, num_preemptions=1)}


def test_a_refused_plan_reports_the_pool_and_runs_nothing():
    bench = Bench()
    bench.start(1)
    num_batches = len(bench.runner.batches)
    result = bench.step(builds_on=7)
    assert (result.step, result.refusal) == (2, "BUILDS_ON_UNAPPLIED_STEP")
    assert result.account == PoolAccount(total=8, free=7, held=1)
    assert len(bench.runner.batches) == num_batches
    assert bench.engine.last_applied_step == 1
    assert bench.step().token_ids == expected(4, 1)[1:2]


def test_a_step_without_work_does_not_reach_the_runner():
    bench = Bench()
    result = bench.step(announce=[announcement(1)])
    assert (result.step, result.sampled_ids) == (1, [])
    assert bench.runner.batches == []


def test_cancel_reaches_a_sequence_in_every_state():
    bench = Bench(num_blocks=2)
    bench.start(1, 3)
    bench.start(2, 3)
    bench.step()
    bench.step(announce=[announcement(3)], victims=victims((1, 0)))
    bench.sink.records.clear()
    result = bench.engine.cancel([1, 2, 3, 99])
    assert (result.step, result.released) == (0, [1, 2, 3])
    assert result.accounts.keys() == {1, 2, 3}
    assert result.account == PoolAccount(total=2, free=2)
    assert bench.engine.is_idle
    assert {(record.cause.name, record.step) for record in bench.sink.records} == {("CANCELLED", 0)}
    assert bench.runner.rows == {}


def test_a_failing_runner_ends_the_sequences_of_its_step_and_nothing_else():
    bench = Bench()
    bench.start(1)
    bench.step(announce=[announcement(2, 8, sampling=GREEDY), announcement(3, sampling=GREEDY)])
    bench.runner.fail_next = True
    result = bench.step(may=entries((2, 0, 4)))
    assert (result.sampled_ids, result.token_ids) == ([1, 2], [NO_TOKEN, NO_TOKEN])
    assert result.finish_reasons == [FinishReason.ERROR, FinishReason.ERROR]
    assert result.accounts.keys() == {1, 2}
    assert result.account == PoolAccount(total=8, free=8)
    assert isinstance(bench.engine.last_failure, StepFailedError)
    assert bench.engine.last_failure.reason == "STEP_FAILED"
    assert "on fire" in str(bench.engine.last_failure.__cause__)
    assert bench.step(may=entries((3, 0, 4))).token_ids == expected(4, 3)[:1]
    assert set(bench.runner.rows) == {bench.engine.memory.sequences.get(3).row}


def test_a_runner_that_returns_too_few_tokens_has_failed():
    bench = Bench()
    bench.runner.execute = lambda _: StepOutput(token_ids=np.empty(0, dtype=np.int32))
    assert bench.start(1).finish_reasons == [FinishReason.ERROR]
    assert "0 tokens for 1 samples" in str(bench.engine.last_failure)


def test_a_failed_admission_ends_one_sequence_and_the_others_run():
    bench = Bench()
    bench.runner.fail_admit_of.add(5)
    bench.start(3)
    result = bench.step(
        announce=[
            announcement(1, sampling=GREEDY, sample_index=5),
            announcement(2, sampling=GREEDY),
        ],
        may=entries((1, 0, 4), (2, 0, 4)),
    )
    reasons = dict(zip(result.sampled_ids, result.finish_reasons, strict=True))
    assert reasons == {1: FinishReason.ERROR, 3: FinishReason.NONE, 2: FinishReason.NONE}
    assert result.computed_ids == [2]
    assert result.account == PoolAccount(total=8, free=5, held=3)


def test_an_announcement_that_can_never_run_ends_with_an_error_at_once():
    bench = Bench()
    result = bench.step(announce=[announcement(9, 10)], may=entries((9, 0, 10)))
    assert (result.sampled_ids, result.token_ids) == ([9], [NO_TOKEN])
    assert result.finish_reasons == [FinishReason.ERROR]
    assert result.accounts == {9: SequenceAccount()}
    assert result.stale_ids == [9]
    assert bench.engine.is_idle


def test_log_probabilities_are_keyed_by_place_in_the_result():
    bench = Bench()
    chosen = TokenLogprobs(token_id=5, logprob=-0.5)
    bench.runner.fail_admit_of.add(5)
    bench.runner.execute = lambda batch: StepOutput(
        token_ids=np.array([5], dtype=np.int32),
        logprobs={0: chosen},
        prompt_logprobs={int(batch.rows[0]): [chosen]},
    )
    result = bench.step(
        announce=[
            announcement(1, sampling=GREEDY, sample_index=5),
            announcement(2, sampling=GREEDY),
        ],
        may=entries((1, 0, 4), (2, 0, 4)),
    )
    assert result.sampled_ids[1] == 2
    assert result.logprobs == {1: chosen}
    assert result.prompt_logprobs == {2: [chosen]}


def test_a_broken_block_ends_its_sequence_and_the_server_goes_on():
    bench = Bench()
    bench.start(1)
    bench.start(2)
    broken = int(bench.engine.memory.tables.blocks_of(0)[0])
    bench.engine.memory.pool.columns.ref_counts[broken] += 1
    (violation,) = bench.engine.check_integrity()
    assert (violation.kind, violation.sequence_ids) == (ViolationKind.REFERENCES, (1,))
    result = bench.step()
    reasons = dict(zip(result.sampled_ids, result.finish_reasons, strict=True))
    assert reasons == {1: FinishReason.ERROR, 2: FinishReason.NONE}
    assert result.account == PoolAccount(total=8, free=5, held=2, quarantined=1)
    assert bench.engine.cancel([2]).account == PoolAccount(total=8, free=7, quarantined=1)
    assert bench.engine.check_integrity() == []


def test_with_the_debug_switch_a_broken_block_is_found_in_the_step_itself():
    bench = Bench(check=True)
    bench.start(1)
    bench.engine.memory.pool.columns.ref_counts[0] += 1
    result = bench.step()
    assert (result.sampled_ids, result.finish_reasons) == ([1], [FinishReason.ERROR])
    assert result.account == PoolAccount(total=8, free=7, quarantined=1)


def test_without_the_debug_switch_the_check_runs_when_the_pool_is_idle():
    bench = Bench(check=False)
    bench.start(1)
    bench.engine.memory.pool.supply._free.pop(1)
    assert bench.step().account.quarantined == 0
    assert bench.engine.cancel([1]).account.quarantined == 1


def test_a_takeover_starts_from_nothing_and_step_one():
    bench = Bench()
    bench.start(1)
    bench.step(announce=[announcement(2)])
    bench.engine.reset()
    assert bench.engine.is_idle
    assert bench.engine.account() == PoolAccount(total=8, free=8)
    assert bench.engine.last_applied_step == 0
    assert bench.runner.rows == {}
    assert bench.start(1).token_ids == expected(4, 1)[:1]


def test_the_trace_of_a_life_rebuilds_the_pool_at_every_point():
    bench = Bench(num_blocks=2)
    replayed = ReplayedPool(2)
    bench.start(1, 3)
    bench.start(2, 3)
    for plan in ({"victims": victims((1, 0))}, {"finish": [2]}, {"may": entries((1, 1, 9))}):
        bench.step(**plan)
        replayed.replay(bench.sink.records)
        replayed.assert_equals(bench.engine.memory.pool)
    life = [
        (r.operation.name, r.cause.name, r.generation, r.position)
        for r in bench.sink.records
        if r.sequence_id == 1
    ]
    assert life == [
        ("ALLOCATE", "PREFILL", 0, 0),
        ("RELEASE", "PREEMPTED", 0, 4),
        ("FREE", "PREEMPTED", 0, 4),
        ("ALLOCATE", "PREFILL", 1, 0),
    ]


def test_timing_says_where_the_time_went():
    bench = Bench()

    def execute(batch):
        bench.clock.advance_ns(70)
        return StepOutput(token_ids=np.array([5], dtype=np.int32), sample_ns=20)

    bench.runner.execute = execute
    timing = bench.start(1).timing
    assert (timing.start_ns, timing.apply_ns) == (1_000, 0)
    assert (timing.execute_ns, timing.sample_ns, timing.end_ns) == (50, 20, 1_070)


def test_closing_the_engine_closes_its_runner():
    bench = Bench()
    bench.engine.close()
    assert bench.runner.is_closed


def test_the_engine_describes_what_it_serves():
    facts = Bench().engine.describe("replica-a")
    assert (facts.replica_id, facts.model, facts.runner) == ("replica-a", "fake", "sim")
    assert (facts.num_blocks, facts.block_size, facts.max_model_len) == (8, 4, 64)
    assert (facts.max_num_sequences, facts.max_step_tokens) == (4, 32)


def test_a_pool_too_small_for_an_admission_says_so():
    bench = Bench(num_blocks=1)
    result = bench.start(1, 8)
    assert (result.refused_ids, result.refused_because) == ([1], [RefusedBecause.POOL_FULL])
    assert result.sampled_ids == []
