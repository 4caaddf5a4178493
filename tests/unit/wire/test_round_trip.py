"""What is encoded is decoded; what does not fit together is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.plan import (
    NO_DRAFTS,
    Announcement,
    Branches,
    DraftBounds,
    Entries,
    Fork,
    Recovery,
    StepPlan,
    Victims,
)
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.core.request import (
    Completion,
    Delivery,
    RateLevel,
    StallCause,
    Submission,
    TokenEvents,
)
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import (
    Candidates,
    FinishReason,
    RefusedBecause,
    SequenceAccount,
    StepResult,
    StepTiming,
    TokenLogprobs,
)
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.wire.plan import plan_from_proto, plan_to_proto
from pageframe.wire.replica import (
    quota_from_proto,
    quota_to_proto,
    replica_from_proto,
    replica_to_proto,
)
from pageframe.wire.request import (
    account_to_proto,
    events_from_proto,
    events_to_proto,
    submission_from_proto,
    submission_to_proto,
)
from pageframe.wire.sampling import sampling_from_proto, sampling_to_proto
from pageframe.wire.step import (
    refusal_from_proto,
    refusal_to_proto,
    result_from_proto,
    result_to_proto,
)

ids = st.integers(1, 2**64 - 1)
# The executor keeps those of sequences in arrays of signed words.
sequence_ids = st.integers(1, 2**63 - 1)
counts = st.integers(0, 2**31 - 1)
tokens = st.integers(0, 2**31 - 1)
# Figures that a 32-bit float holds exactly.
floats = st.floats(-100, 0, width=32)

samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=counts,
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.001, 100),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=3),
    num_logprobs=st.integers(-1, 20),
    num_prompt_logprobs=st.integers(-1, 20),
    stop_token_ids=st.lists(tokens, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarForm), st.text()),
    min_tokens=counts,
    max_tokens=st.integers(1, 2**31 - 1),
)
logprobs = st.builds(
    TokenLogprobs,
    token_id=tokens,
    logprob=floats,
    top_token_ids=st.lists(tokens, max_size=2),
    top_logprobs=st.lists(floats, max_size=2),
)
accounts = st.builds(
    SequenceAccount, **{f.name: counts for f in dataclasses.fields(SequenceAccount)}
)
pools = st.builds(PoolAccount, **{f.name: counts for f in dataclasses.fields(PoolAccount)})
trace_ids = st.binary(min_size=16, max_size=16)


def parallel(*columns, max_size=3):
    """Lists of one length."""
    rows = st.lists(st.tuples(*columns), max_size=max_size)
    return rows.map(
        lambda found: [list(column) for column in zip(*found, strict=True)] or [[] for _ in columns]
    )


entries = parallel(ids, counts, st.integers(1, 2**31 - 1)).map(lambda c: Entries(*map(list, c)))
victims = st.builds(
    lambda columns, num_certain: Victims(*map(list, columns), num_certain if columns[0] else 0),
    parallel(ids, counts, st.sampled_from(Recovery), counts, st.integers(0, 2**64 - 1)),
    counts,
)


@st.composite
def announcements(draw):
    token_ids = draw(st.lists(tokens, min_size=1, max_size=5))
    return Announcement(
        sequence_id=draw(sequence_ids),
        token_ids=token_ids,
        num_prompt_tokens=draw(st.integers(1, len(token_ids))),
        sampling=dataclasses.replace(draw(samplings), num_candidates=draw(counts)),
        generation=draw(counts),
        sample_index=draw(counts),
        request_id=draw(st.text(max_size=5)),
        tenant=draw(st.text(max_size=5)),
        cache_salt=draw(st.binary(max_size=4)),
        session_id=draw(st.text(max_size=5)),
        prefix_handle=draw(st.text(max_size=5)),
        trace_id=draw(trace_ids),
        span_id=draw(st.binary(min_size=8, max_size=8)),
        is_steered=draw(st.booleans()),
    )


branches = parallel(ids, counts, sequence_ids, tokens).map(
    lambda c: Branches(*map(list, c)) if len(set(c[2])) == len(c[2]) else Branches()
)
candidates = parallel(tokens, floats).map(
    lambda c: Candidates(token_ids=list(c[0]), logprobs=list(c[1]))
)
searches = st.builds(
    BeamParams,
    num_beams=counts,
    length_penalty=st.floats(-10, 10),
    early_stopping=st.sampled_from(EarlyStopping),
    num_return=counts,
)
forks = parallel(sequence_ids, counts, st.integers(0, 2**64 - 1)).flatmap(
    lambda c: st.builds(
        Fork,
        parent_id=ids,
        generation=counts,
        child_ids=st.just(list(c[0])),
        sample_indices=st.just(list(c[1])),
        span_ids=st.just(list(c[2])),
    )
)
plans = st.builds(
    StepPlan,
    step=ids,
    builds_on=counts,
    announce=st.lists(announcements(), max_size=2),
    finish=st.lists(ids, max_size=3),
    must=entries,
    victims=victims,
    may=entries,
    forks=st.lists(forks, max_size=2),
    branches=branches,
    drafts=st.just(NO_DRAFTS)
    | st.builds(
        DraftBounds,
        num_tokens=st.integers(1, 2**31 - 1),
        num_tokens_each=counts,
        num_blocks=counts,
        acceptance_min=st.floats(0, 1),
    ),
)


@st.composite
def results(draw):
    sampled, token_ids, finish = draw(
        parallel(ids, st.integers(-1, 2**31 - 1), st.sampled_from(FinishReason))
    )
    computed, num_computed, first_positions = draw(parallel(ids, counts, counts))
    refused, because = draw(parallel(ids, st.sampled_from(RefusedBecause)))
    preempted, generations, num_blocks, recoveries, num_kept = draw(
        parallel(ids, counts, counts, st.sampled_from(Recovery), counts)
    )
    announced, cached, leaders, num_leader_tokens = draw(parallel(ids, counts, counts, counts))
    drafted, num_drafted, num_accepted = draw(parallel(ids, counts, counts))
    return StepResult(
        step=draw(counts),
        sampled_ids=sampled,
        token_ids=token_ids,
        finish_reasons=[int(reason) for reason in finish],
        logprobs=draw(st.dictionaries(counts, logprobs, max_size=2)),
        prompt_logprobs=draw(st.dictionaries(ids, st.lists(logprobs, max_size=2), max_size=2)),
        candidates=draw(st.dictionaries(ids, candidates, max_size=2)),
        computed_ids=computed,
        num_computed=num_computed,
        first_positions=first_positions,
        refused_ids=refused,
        refused_because=[int(cause) for cause in because],
        preempted_ids=preempted,
        preempted_generations=generations,
        preempted_num_blocks=num_blocks,
        preempted_recoveries=recoveries,
        preempted_num_computed=num_kept,
        forked_ids=draw(st.lists(ids, max_size=2)),
        unforked_ids=draw(st.lists(ids, max_size=2)),
        stale_ids=draw(st.lists(ids, max_size=2)),
        released=draw(st.lists(ids, max_size=2)),
        announced_ids=announced,
        num_cached_tokens=cached,
        leader_ids=leaders,
        num_leader_tokens=num_leader_tokens,
        drafted_ids=drafted,
        num_drafted=num_drafted,
        num_accepted=num_accepted,
        errors=draw(st.dictionaries(ids, st.text(max_size=5), max_size=2)),
        accounts=draw(st.dictionaries(ids, accounts, max_size=2)),
        account=draw(pools),
        timing=StepTiming(
            start_ns=draw(ids),
            apply_ns=draw(counts),
            execute_ns=draw(counts),
            copy_ns=draw(counts),
            num_blocks_moved=draw(counts),
        ),
    )


@given(plans)
def test_plans(plan):
    wire = pb.StepPlan.FromString(plan_to_proto(plan).SerializeToString())
    assert plan_from_proto(wire) == plan


@given(results())
def test_results(result):
    wire = pb.StepResult.FromString(result_to_proto(result).SerializeToString())
    assert result_from_proto(wire) == result


@given(samplings)
def test_sampling(sampling):
    assert sampling_from_proto(sampling_to_proto(sampling), seed=1, max_tokens=2) == sampling


@given(
    st.builds(
        Submission,
        handle=counts,
        request_id=st.text(max_size=5),
        prompt_token_ids=st.lists(tokens, max_size=4),
        sampling=samplings,
        resume_token_ids=st.lists(st.lists(tokens, max_size=2), max_size=2),
        num_samples=counts,
        delivery=st.sampled_from(Delivery),
        num_tokens_per_event_max=counts,
        deadline_ns=ids,
        priority=st.integers(-(2**31), 2**31 - 1),
        tenant=st.text(max_size=5),
        cache_salt=st.binary(max_size=4),
        beams=st.none() | searches,
        session_id=st.text(max_size=5),
        prefix_handle=st.text(max_size=5),
        trace_id=trace_ids,
        span_id=st.binary(min_size=8, max_size=8),
        arrival_ns=ids,
        is_resubmitted=st.booleans(),
    )
)
def test_submissions(submission):
    assert submission_from_proto(submission_to_proto(submission)) == submission


@st.composite
def token_events(draw):
    handles, samples, pieces = draw(
        parallel(counts, counts, st.lists(tokens, min_size=1, max_size=3))
    )
    completion = st.builds(
        Completion,
        handle=counts,
        sample_index=counts,
        finish_reason=st.sampled_from([*FinishReason][1:]),
        num_prompt_tokens=counts,
        num_cached_tokens=st.just(0),
        num_output_tokens=counts,
        account=accounts.map(lambda a: dataclasses.replace(a, num_cached_tokens=0)),
        stall_ns=st.dictionaries(st.sampled_from(StallCause), counts, max_size=3),
        score=st.none() | st.floats(-1e6, 0),
        num_unreturned_tokens=counts,
        error_status=st.text(max_size=3),
        error_limits=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    )
    rates = st.dictionaries(
        st.sampled_from(["requests", "tokens"]), st.builds(RateLevel, counts, counts, counts)
    )
    return TokenEvents(
        step=draw(counts),
        handles=handles,
        sample_indices=samples,
        num_tokens=[len(piece) for piece in pieces],
        token_ids=[token for piece in pieces for token in piece],
        logprobs=draw(st.dictionaries(counts, logprobs, max_size=2)),
        prompt_logprobs=draw(st.dictionaries(counts, st.lists(logprobs, max_size=2), max_size=2)),
        completions=draw(st.lists(completion, max_size=2)),
        rates=draw(st.dictionaries(counts, rates, max_size=2)),
    )


@given(token_events())
def test_events(events):
    assert events_from_proto(events_to_proto(events)) == events


@given(st.lists(token_events(), min_size=1, max_size=4))
def test_merged_events_say_what_the_parts_say(parts):
    expected = [
        (handle, sample, piece) for part in parts for handle, sample, piece in _pieces(part)
    ]
    num_completions = sum(len(part.completions) for part in parts)
    rates = {handle: levels for part in parts for handle, levels in part.rates.items()}
    merged = TokenEvents.merge(parts)
    assert _pieces(merged) == expected
    assert len(merged.completions) == num_completions
    assert merged.rates == rates


def _pieces(events: TokenEvents) -> list[tuple[int, int, list[int]]]:
    found, start = [], 0
    for handle, sample, count in zip(
        events.handles, events.sample_indices, events.num_tokens, strict=True
    ):
        found.append((handle, sample, events.token_ids[start : start + count]))
        start += count
    return found


def test_facts():
    facts = ReplicaFacts(
        replica_id="r", model="m", model_folder="/f", vocab_size=9, max_model_len=8,
        eos_token_ids=(1, 2), block_size=4, num_blocks=3, kv_bytes_per_token=5,
        max_num_sequences=6, max_step_tokens=7, device="cpu", dtype="float32",
        kv_dtype="float16", runner="native", num_host_blocks=11, kv_group_windows=(0, 5),
        kernels="fused (avx2)",
    )  # fmt: skip
    assert replica_from_proto(replica_to_proto(facts)) == facts


@pytest.mark.parametrize("ceiling_blocks", [None, 0, 7])
def test_a_quota_without_a_ceiling_differs_from_a_ceiling_of_none(ceiling_blocks):
    quota = TenantQuota(tenant="a", floor_blocks=3, ceiling_blocks=ceiling_blocks)
    wire = pb.TenantQuota.FromString(quota_to_proto(quota).SerializeToString())
    assert quota_from_proto(wire) == quota


def test_an_account_tells_how_many_blocks_were_saved():
    account = SequenceAccount(num_blocks_shared=5, num_copies_on_write=2)
    completion = Completion(
        handle=1, sample_index=0, finish_reason=FinishReason.STOP, account=account
    )
    assert account_to_proto(completion).num_blocks_saved == 3


def test_a_refusal_is_a_result_in_which_nothing_happened():
    refused = StepResult(step=4, refusal="MUST_DOES_NOT_FIT", account=PoolAccount(total=2, free=2))
    wire = refusal_to_proto(refused, last_applied_step=3)
    assert wire.last_applied_step == 3
    assert refusal_from_proto(wire) == refused


@pytest.mark.parametrize(
    "plan",
    [
        pb.StepPlan(step=0),
        pb.StepPlan(step=1, must=pb.PlanEntries(sequence_ids=[1], generations=[0])),
        pb.StepPlan(step=1, may=pb.PlanEntries(sequence_ids=[1], generations=[0], num_tokens=[0])),
        pb.StepPlan(
            step=1,
            victims=pb.PlanVictims(
                sequence_ids=[1],
                generations=[0],
                recoveries=[0],
                num_blocks=[0],
                beneficiary_ids=[0],
            ),
        ),
        pb.StepPlan(step=1, forks=[pb.PlanFork(child_ids=[2], sample_indices=[1])]),
        pb.StepPlan(step=1, forks=[pb.PlanFork(child_ids=[0], sample_indices=[1], span_ids=[0])]),
        pb.StepPlan(step=1, branches=pb.PlanBranches(parent_ids=[1], child_ids=[2])),
        pb.StepPlan(
            step=1,
            branches=pb.PlanBranches(parent_ids=[1], generations=[0], child_ids=[0], token_ids=[5]),
        ),
        pb.StepPlan(
            step=1,
            branches=pb.PlanBranches(
                parent_ids=[1, 1], generations=[0, 0], child_ids=[2, 2], token_ids=[5, 6]
            ),
        ),
        pb.StepPlan(step=1, announce=[pb.Announcement(sequence_id=0, token_ids=[1])]),
        pb.StepPlan(
            step=1,
            announce=[pb.Announcement(sequence_id=1, token_ids=[1], num_prompt_tokens=2)],
        ),
        pb.StepPlan(
            step=1,
            announce=[pb.Announcement(sequence_id=1, token_ids=[1], num_prompt_tokens=1)],
        ),
    ],
    ids=[
        "step",
        "arrays",
        "zero",
        "recovery",
        "fork arrays",
        "fork child",
        "branch arrays",
        "branch child",
        "branch twice",
        "id",
        "prompt",
        "sampling",
    ],
)
def test_a_malformed_plan_is_refused(plan):
    with pytest.raises(PreconditionError) as caught:
        plan_from_proto(plan)
    assert caught.value.reason == "MALFORMED_STEP"


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("sampled", pb.StepResult(sampled_ids=[1, 2], token_ids=[3], finish_reasons=[0])),
        ("computed", pb.StepResult(computed_ids=[1], num_computed=[3])),
        ("preempted", pb.StepResult(preempted_ids=[1], preempted_generations=[1])),
        ("candidates", pb.StepResult(candidates=[pb.SequenceCandidates(token_ids=[1])])),
        ("announced", pb.StepResult(announced_ids=[1], num_cached_tokens=[0], leader_ids=[0])),
    ],
)
def test_a_result_with_arrays_of_two_lengths_is_refused(name, result):
    with pytest.raises(PreconditionError, match=name):
        result_from_proto(result)


def test_a_result_with_an_unknown_recovery_is_refused():
    result = pb.StepResult(
        preempted_ids=[1],
        preempted_generations=[1],
        preempted_num_blocks=[1],
        preempted_recoveries=[0],
        preempted_num_computed=[0],
    )
    with pytest.raises(PreconditionError, match="unknown recovery"):
        result_from_proto(result)


def test_events_whose_counts_do_not_add_up_are_refused():
    wire = events_to_proto(
        TokenEvents(step=1, handles=[1], sample_indices=[0], num_tokens=[2], token_ids=[5])
    )
    with pytest.raises(PreconditionError) as caught:
        events_from_proto(wire)
    assert caught.value.reason == "MALFORMED_EVENTS"


def test_a_submission_leaves_nothing_unspecified():
    wire = submission_to_proto(
        Submission(handle=1, request_id="a", prompt_token_ids=[1], sampling=SamplingParams())
    )
    wire.delivery = 0
    with pytest.raises(InvalidRequestError) as caught:
        submission_from_proto(wire)
    assert caught.value.reason == "UNSPECIFIED_FIELD"
