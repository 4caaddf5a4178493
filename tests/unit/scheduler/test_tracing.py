from dataclasses import dataclass, field

import pytest

from pageframe.core.request import StallCause
from pageframe.core.step import StepResult, StepTiming
from pageframe.core.trace import SpanKind, child_span_id
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.policies.shadow import Disagreement
from pageframe.scheduler.tracing import SchedulerTracer
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import GATEWAY, Driver, assert_scheduler_empty, make_submission

TRACE_ID = bytes(range(16))
MS = 1_000_000


@dataclass
class Span:
    name: str
    trace_id: bytes
    span_id: int
    parent_span_id: int
    start_ns: int
    end_ns: int
    attributes: dict
    links: tuple = ()
    error: str = ""

    @property
    def tokens(self) -> tuple[int, int]:
        return (
            self.attributes["pageframe.tokens.begin"],
            self.attributes["pageframe.tokens.end"],
        )


@dataclass
class Spans:
    """A sink that remembers spans; a scheduler records nothing else."""

    spans: list[Span] = field(default_factory=list)

    def span(self, name, **fields):
        span = Span(name, **fields)
        assert span.end_ns >= span.start_ns > 0
        assert 0 < span.span_id < 2**64
        self.spans.append(span)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def traced(**fields) -> Driver:
    return Driver(trace=Spans(), **fields)


def submit(driver: Driver, handle: int, num_tokens: int, max_tokens: int, **fields) -> None:
    driver.submit(
        make_submission(
            handle,
            num_tokens,
            max_tokens=max_tokens,
            trace_id=TRACE_ID,
            span_id=(6 + handle).to_bytes(8, "big"),
            **fields,
        )
    )


def test_a_sequence_span_hangs_under_generate_with_an_id_that_anybody_can_compute():
    driver = traced()
    submit(driver, 1, 5, 3, num_samples=2)
    driver.run()
    spans = driver.trace.named("sequence")
    assert [span.span_id for span in spans] == [
        child_span_id(7, SpanKind.SEQUENCE, 0, sample_index) for sample_index in (0, 1)
    ]
    assert {(span.trace_id, span.parent_span_id) for span in spans} == {(TRACE_ID, 7)}
    assert spans[0].attributes["gen_ai.usage.input_tokens"] == 5
    assert spans[0].attributes["gen_ai.usage.output_tokens"] == 3
    assert spans[0].attributes["pageframe.finish_reason"] == "length"
    (announced,), (fork,) = driver.sent[0].announce, driver.sent[0].forks
    assert (announced.trace_id, int.from_bytes(announced.span_id)) == (TRACE_ID, spans[0].span_id)
    assert fork.span_ids == [spans[1].span_id]


def test_each_chunk_is_a_prefill_span_named_after_its_first_position():
    driver = traced(token_budget=8)
    submit(driver, 1, 20, 2)
    driver.run()
    (sequence,) = driver.trace.named("sequence")
    prefills = driver.trace.named("prefill")
    assert [span.tokens for span in prefills] == [(0, 8), (8, 16), (16, 20)]
    assert [span.span_id for span in prefills] == [
        child_span_id(sequence.span_id, SpanKind.PREFILL, 0, start) for start in (0, 8, 16)
    ]
    assert {span.parent_span_id for span in prefills} == {sequence.span_id}
    assert [span.end_ns - span.start_ns for span in prefills] == [MS] * 3


def test_a_decode_run_is_cut_where_positions_cross_128():
    driver = traced(facts=make_facts(max_model_len=400, num_blocks=100), token_budget=128)
    submit(driver, 1, 100, 171)
    driver.run()
    (sequence,) = driver.trace.named("sequence")
    decodes = driver.trace.named("decode")
    # The last of 271 tokens is never computed.
    assert [span.tokens for span in decodes] == [(100, 128), (128, 256), (256, 270)]
    assert [span.span_id for span in decodes] == [
        child_span_id(sequence.span_id, SpanKind.DECODE, 0, segment) for segment in (0, 1, 2)
    ]
    assert decodes[0].end_ns == decodes[1].start_ns
    (prefill,) = driver.trace.named("prefill")
    assert prefill.end_ns == decodes[0].start_ns
    assert decodes[-1].end_ns == sequence.end_ns


@pytest.mark.parametrize("lookahead", [True, False])
def test_prefills_and_decodes_cover_every_position_once_whatever_is_preempted(lookahead):
    driver = traced(
        facts=make_facts(num_blocks=6, block_size=4), token_budget=5, lookahead=lookahead
    )
    for handle in (1, 2, 3):
        submit(driver, handle, 3, 16)
    driver.run()
    assert driver.trace.named("preempt")
    ids = [span.span_id for span in driver.trace.spans if span.name in ("prefill", "decode")]
    for sequence in driver.trace.named("sequence"):
        by_generation = {}
        for span in driver.trace.spans:
            if span.name in ("prefill", "decode") and span.parent_span_id == sequence.span_id:
                generation = span.attributes["pageframe.generation"]
                by_generation.setdefault(generation, []).append(span.tokens)
        assert len(by_generation) == 1 + sequence.attributes["pageframe.num_preemptions"]
        for runs in by_generation.values():
            runs.sort()
            assert runs[0][0] == 0
            assert [end for _, end in runs[:-1]] == [start for start, _ in runs[1:]]
        # The last token is sampled and never computed.
        assert max(end for runs in by_generation.values() for _, end in runs) == 18
    assert len(ids) == len(set(ids))


def test_the_wait_for_a_place_is_a_stall_from_submission_to_the_plan():
    driver = traced(max_num_running=1, lookahead=False)
    submit(driver, 1, 4, 5)
    submit(driver, 2, 4, 1)
    driver.run()
    stalls = [
        span
        for span in driver.trace.named("stall")
        if span.attributes["pageframe.stall.cause"] == "queue"
    ]
    (stall,) = stalls
    assert stall.end_ns - stall.start_ns == 5 * MS
    assert driver.completion(2).stall_ns == {StallCause.QUEUE: 5 * MS}
    assert driver.completion(1).stall_ns == {}


def test_a_full_pool_and_a_spent_budget_are_told_apart():
    driver = traced(facts=make_facts(num_blocks=8, block_size=4), token_budget=8, lookahead=False)
    submit(driver, 1, 16, 4)
    submit(driver, 2, 16, 1)
    driver.run()
    stall_ns = driver.completion(2).stall_ns
    # Two steps of prefill take the whole budget; then three decodes hold five of eight blocks.
    assert stall_ns == {StallCause.TOKEN_BUDGET: 2 * MS, StallCause.KV_FULL: 3 * MS}


def test_a_prefill_that_the_budget_leaves_out_waits_for_the_budget():
    driver = traced(token_budget=4, lookahead=False)
    submit(driver, 1, 4, 9)
    driver.step()
    submit(driver, 2, 6, 3)
    driver.step()
    submit(driver, 3, 20, 2)
    driver.run()
    assert driver.completion(3).stall_ns.get(StallCause.TOKEN_BUDGET, 0) > 0
    total_ns = sum(driver.completion(3).stall_ns.values())
    (sequence,) = [
        s
        for s in driver.trace.named("sequence")
        if s.attributes["pageframe.request_id"] == "request-3"
    ]
    assert total_ns <= sequence.end_ns - sequence.start_ns


def test_waiting_for_the_step_before_is_the_executors_time():
    driver = traced(token_budget=16)
    submit(driver, 1, 4, 30)
    driver.step()
    driver.send_plan()
    submit(driver, 2, 4, 1)
    # Planned while a step is in flight, which lasts a millisecond.
    driver.run()
    assert driver.completion(2).stall_ns[StallCause.EXECUTOR] == MS


def test_a_preemption_names_both_sides_and_links_to_the_one_it_serves():
    driver = traced(facts=make_facts(num_blocks=4, block_size=4), token_budget=64)
    for handle in (1, 2):
        submit(driver, handle, 3, 10)
    driver.run()
    first, second = driver.trace.named("sequence")
    preempt = driver.trace.named("preempt")[0]
    assert preempt.parent_span_id == second.span_id
    assert preempt.attributes["pageframe.preempt.mode"] == "recompute"
    assert preempt.attributes["pageframe.preempt.victim"] == 2
    assert preempt.attributes["pageframe.preempt.beneficiary"] == 1
    assert preempt.links == ((TRACE_ID, first.span_id),)
    stall = next(
        span
        for span in driver.trace.named("stall")
        if span.attributes["pageframe.stall.cause"] == "preempted"
    )
    assert stall.links == ((TRACE_ID, first.span_id),)
    assert stall.start_ns == preempt.start_ns


def test_the_sum_of_stalls_is_the_sum_of_their_spans_and_of_what_is_computed_again():
    driver = traced(facts=make_facts(num_blocks=7, block_size=4), token_budget=6)
    for handle in range(1, 7):
        submit(driver, handle, 5 + handle, 7)
    driver.step()
    driver.step()
    driver.lose_executor()
    driver.clock.advance_ns(MS)
    driver.start_executor()
    driver.run()
    for sequence in driver.trace.named("sequence"):
        spans_ns = {}
        for span in [*driver.trace.named("stall"), *driver.trace.named("prefill")]:
            is_own = span.parent_span_id == sequence.span_id
            if is_own and "pageframe.stall.cause" in span.attributes:
                cause = StallCause[span.attributes["pageframe.stall.cause"].upper()]
                spans_ns[cause] = spans_ns.get(cause, 0) + span.end_ns - span.start_ns
        handle = int(sequence.attributes["pageframe.request_id"].split("-")[1])
        assert driver.completion(handle).stall_ns == spans_ns


def test_prefill_decode_and_stalls_leave_no_time_of_a_sequence_unexplained():
    driver = traced(facts=make_facts(num_blocks=8, block_size=4), token_budget=6, lookahead=False)
    for handle in range(1, 6):
        submit(driver, handle, 6, 9)
    driver.run()
    children = [s for s in driver.trace.spans if s.name in ("prefill", "decode", "stall")]
    for sequence in driver.trace.named("sequence"):
        spent_ns = sum(
            span.end_ns - span.start_ns
            for span in children
            if span.parent_span_id == sequence.span_id
        )
        assert spent_ns == sequence.end_ns - sequence.start_ns


def test_steps_have_traces_of_their_own():
    driver = traced(lookahead=False)
    submit(driver, 1, 4, 3)
    driver.run()
    steps = driver.trace.named("step")
    assert [span.attributes["pageframe.step"] for span in steps] == [1, 2, 3]
    assert [span.attributes["pageframe.step.num_tokens"] for span in steps] == [4, 1, 1]
    assert [span.attributes["pageframe.step.num_decodes"] for span in steps] == [0, 1, 1]
    assert len({span.trace_id for span in steps}) == 1
    assert steps[0].trace_id != TRACE_ID
    assert steps[0].attributes["pageframe.step.execute_ms"] == 1.0


def test_a_step_and_the_chunks_that_it_computed_lead_to_each_other():
    driver = traced(token_budget=8, lookahead=False)
    submit(driver, 1, 20, 3)
    driver.run()
    (sequence,) = driver.trace.named("sequence")
    steps = driver.trace.named("step")
    by_chunk = [((step.trace_id, step.span_id),) for step in steps if step.links]
    assert [span.links for span in driver.trace.named("prefill")] == by_chunk
    assert len(by_chunk) == 3
    linked = {step.links for step in steps}
    assert linked == {((TRACE_ID, sequence.span_id),), ()}, "a step that only decodes has no link"


def test_steps_of_two_executors_are_told_apart_though_both_count_from_one():
    driver = traced(lookahead=False)
    submit(driver, 1, 4, 30)
    for _ in range(3):
        driver.step()
    driver.lose_executor()
    driver.start_executor()
    driver.run()
    steps = driver.trace.named("step")
    numbers = [span.attributes["pageframe.step"] for span in steps]
    assert numbers.count(1) == 2
    assert len({span.span_id for span in steps}) == len(steps)


def test_a_thousand_steps_are_a_trace():
    driver = traced(facts=make_facts(max_model_len=2_000, num_blocks=600), lookahead=False)
    submit(driver, 1, 4, 1_500)
    driver.run()
    counts = {}
    for span in driver.trace.named("step"):
        counts[span.trace_id] = counts.get(span.trace_id, 0) + 1
    assert list(counts.values()) == [1_000, 500]


def test_a_trace_of_steps_ends_early_where_shadows_disagree_much():
    sink = Spans()
    tracer = SchedulerTracer(sink, seed=1)
    flight = Flight(step=1, builds_on=0, tick=0, planned_ns=1)
    result = StepResult(step=1, timing=StepTiming(start_ns=1, sample_ns=1))
    for _ in range(3):
        for _ in range(2_000):
            tracer.disagreement(Disagreement("order", "a", "b", "x", "y"), step=1, at_ns=1)
        tracer.step(flight, result)
    tracer.step(flight, result)
    counts = {}
    for span in sink.spans:
        counts[span.trace_id] = counts.get(span.trace_id, 0) + 1
    assert list(counts.values()) == [6_003, 1]


def test_every_span_of_a_sequence_can_be_searched_by_tenant():
    driver = traced(facts=make_facts(num_blocks=6, block_size=4), token_budget=5)
    for handle in (1, 2, 3):
        submit(driver, handle, 3, 16, tenant="acme")
    driver.run()
    spans = [span for span in driver.trace.spans if span.name != "step"]
    assert {span.name for span in spans} == {"sequence", "stall", "prefill", "decode", "preempt"}
    assert {span.attributes["pageframe.tenant"] for span in spans} == {"acme"}


def waits(driver: Driver, handle: int, cause: str) -> list[Span]:
    """The stalls of a request's only sequence for a cause."""
    (sequence,) = [
        span for span in driver.trace.named("sequence") if span.parent_span_id == 6 + handle
    ]
    return [
        span
        for span in driver.trace.named("stall")
        if span.parent_span_id == sequence.span_id
        and span.attributes["pageframe.stall.cause"] == cause
    ]


def link_to(driver: Driver, handle: int) -> tuple[bytes, int]:
    (sequence,) = [
        span for span in driver.trace.named("sequence") if span.parent_span_id == 6 + handle
    ]
    return (TRACE_ID, sequence.span_id)


def test_who_cannot_come_in_for_want_of_blocks_is_led_to_whoever_runs_longest():
    driver = traced(facts=make_facts(num_blocks=8, block_size=4))
    submit(driver, 1, 16, 9)
    driver.step()
    submit(driver, 2, 20, 2)
    driver.run()
    (stall,) = waits(driver, 2, "kv_full")
    assert stall.links == (link_to(driver, 1),)


def test_who_cannot_come_in_for_want_of_tokens_is_led_to_the_largest_chunk():
    driver = traced(facts=make_facts(num_blocks=40, block_size=4), token_budget=8)
    submit(driver, 1, 60, 2)
    driver.step()
    submit(driver, 2, 4, 2)
    driver.run()
    stalls = waits(driver, 2, "token_budget")
    assert stalls
    assert {stall.links for stall in stalls} == {(link_to(driver, 1),)}


def test_who_waits_for_its_turn_is_led_to_nobody():
    driver = traced(max_num_running=1)
    submit(driver, 1, 4, 9)
    driver.step()
    submit(driver, 2, 4, 2)
    driver.run()
    assert {stall.links for stall in waits(driver, 2, "queue")} == {()}


def test_an_untraced_request_leaves_no_spans_but_its_stalls_are_counted():
    driver = traced(max_num_running=1)
    driver.submit(make_submission(1, max_tokens=3))
    driver.submit(make_submission(2))
    driver.run()
    assert {span.name for span in driver.trace.spans} == {"step"}
    assert driver.completion(2).stall_ns[StallCause.QUEUE] > 0
    assert driver.sent[0].announce[0].span_id == b""


def test_a_cancelled_sequence_closes_its_spans():
    driver = traced()
    submit(driver, 1, 4, 50)
    for _ in range(4):
        driver.step()
    driver.take(driver.scheduler.cancel(GATEWAY, 1))
    driver.run()
    (decode,) = driver.trace.named("decode")
    (sequence,) = driver.trace.named("sequence")
    assert decode.tokens[0] == 4
    assert sequence.attributes["pageframe.finish_reason"] == "cancelled"
    assert_scheduler_empty(driver)


def test_a_deadline_is_an_error_of_the_span():
    driver = traced()
    submit(driver, 1, 4, 50, deadline_ns=3 * MS)
    driver.run()
    (sequence,) = driver.trace.named("sequence")
    assert sequence.error == "DEADLINE"
