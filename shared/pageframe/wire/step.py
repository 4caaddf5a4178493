"""Step plans and results, between domain types and protobuf. Arrays stay packed arrays.

Decoding checks what the other side may have got wrong (law 13): lengths of parallel arrays,
values of enums, ids that must not be zero. A fault is a ``PreconditionError`` with the reason
MALFORMED_STEP, for it is a peer's bug and not a caller's.
"""

from collections.abc import Sequence, Sized
from typing import cast

from pageframe.core.errors import PreconditionError
from pageframe.core.step import (
    Announcement,
    Entries,
    Fork,
    Recovery,
    SequenceAccount,
    StepPlan,
    StepResult,
    StepTiming,
    Victims,
)
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.v1 import sequence_pb2
from pageframe.wire.replica import pool_from_proto, pool_to_proto
from pageframe.wire.sampling import (
    logprobs_from_proto,
    logprobs_list_from_proto,
    logprobs_list_to_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from pageframe.wire.trace import is_trace_context

# The executor keeps both in arrays of signed words.
_SEQUENCE_ID_MAX = 2**63 - 1
_GENERATION_MAX = 2**31 - 1


def plan_to_proto(plan: StepPlan) -> pb.StepPlan:
    """Encode a plan; empty parts cost nothing on the wire."""
    message = pb.StepPlan(step=plan.step, builds_on=plan.builds_on, finish=plan.finish)
    if plan.announce:
        message.announce.extend(map(announcement_to_proto, plan.announce))
    if plan.must.sequence_ids:
        message.must.CopyFrom(_entries_to_proto(plan.must))
    if plan.may.sequence_ids:
        message.may.CopyFrom(_entries_to_proto(plan.may))
    if plan.victims.sequence_ids:
        message.victims.CopyFrom(_victims_to_proto(plan.victims))
    if plan.forks:
        message.forks.extend(map(_fork_to_proto, plan.forks))
    return message


def plan_from_proto(message: pb.StepPlan) -> StepPlan:
    """Decode a plan.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    if message.step == 0:
        raise _malformed("step is 0; steps count from 1")
    return StepPlan(
        step=message.step,
        builds_on=message.builds_on,
        announce=[announcement_from_proto(entry) for entry in message.announce],
        finish=list(message.finish),
        must=_entries_from_proto("must", message.must),
        victims=_victims_from_proto(message.victims),
        may=_entries_from_proto("may", message.may),
        forks=[_fork_from_proto(entry) for entry in message.forks],
    )


def announcement_to_proto(announcement: Announcement) -> pb.Announcement:
    """Encode a new sequence."""
    return pb.Announcement(
        sequence_id=announcement.sequence_id,
        generation=announcement.generation,
        token_ids=announcement.token_ids,
        num_prompt_tokens=announcement.num_prompt_tokens,
        sampling=sampling_to_proto(announcement.sampling),
        sample_index=announcement.sample_index,
        request_id=announcement.request_id,
        tenant=announcement.tenant,
        cache_salt=announcement.cache_salt,
        session_id=announcement.session_id,
        prefix_handle=announcement.prefix_handle,
        trace_id=announcement.trace_id,
        span_id=announcement.span_id,
    )


def announcement_from_proto(message: pb.Announcement) -> Announcement:
    """Decode a new sequence.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    if not 1 <= message.sequence_id <= _SEQUENCE_ID_MAX:
        raise _malformed(f"an announcement has sequence id {message.sequence_id}")
    if message.generation > _GENERATION_MAX:
        raise _malformed(f"sequence {message.sequence_id} has generation {message.generation}")
    if not 1 <= message.num_prompt_tokens <= len(message.token_ids):
        raise _malformed(
            f"sequence {message.sequence_id} announces {message.num_prompt_tokens} prompt tokens "
            f"among {len(message.token_ids)} tokens"
        )
    if not (message.sampling.HasField("seed") and message.sampling.HasField("max_tokens")):
        raise _malformed(f"sequence {message.sequence_id} comes without seed or max_tokens")
    if not is_trace_context(message.trace_id, message.span_id):
        raise _malformed(f"sequence {message.sequence_id} has a malformed trace context")
    return Announcement(
        sequence_id=message.sequence_id,
        generation=message.generation,
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from_proto(message.sampling, seed=0, max_tokens=1),
        sample_index=message.sample_index,
        request_id=message.request_id,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        session_id=message.session_id,
        prefix_handle=message.prefix_handle,
        trace_id=message.trace_id,
        span_id=message.span_id,
    )


def result_to_proto(result: StepResult) -> pb.StepResult:
    """Encode a result."""
    timing = result.timing
    message = pb.StepResult(
        step=result.step,
        sampled_ids=result.sampled_ids,
        token_ids=result.token_ids,
        finish_reasons=cast("list[sequence_pb2.FinishReason.ValueType]", result.finish_reasons),
        computed_ids=result.computed_ids,
        num_computed=result.num_computed,
        first_positions=result.first_positions,
        refused_ids=result.refused_ids,
        refused_because=cast("list[pb.RefusedBecause.ValueType]", result.refused_because),
        preempted_ids=result.preempted_ids,
        preempted_generations=result.preempted_generations,
        preempted_num_blocks=result.preempted_num_blocks,
        preempted_recoveries=_recoveries_to_proto(result.preempted_recoveries),
        preempted_num_computed=result.preempted_num_computed,
        forked_ids=result.forked_ids,
        unforked_ids=result.unforked_ids,
        stale_ids=result.stale_ids,
        released_ids=result.released,
        announced_ids=result.announced_ids,
        num_cached_tokens=result.num_cached_tokens,
        leader_ids=result.leader_ids,
        num_leader_tokens=result.num_leader_tokens,
        pool=pool_to_proto(result.account),
        timing=pb.StepTiming(
            start_ns=timing.start_ns,
            apply_ns=timing.apply_ns,
            execute_ns=timing.execute_ns,
            sample_ns=timing.sample_ns,
        ),
    )
    for index, logprobs in result.logprobs.items():
        message.logprobs.add(index=index, logprobs=logprobs_to_proto(logprobs))
    for sequence_id, entries in result.prompt_logprobs.items():
        message.prompt_logprobs.add(id=sequence_id, logprobs=logprobs_list_to_proto(entries))
    for sequence_id, reason in result.errors.items():
        message.errors.add(sequence_id=sequence_id, reason=reason)
    for sequence_id, account in result.accounts.items():
        message.accounts.append(_account_to_proto(sequence_id, account))
    return message


def result_from_proto(message: pb.StepResult) -> StepResult:
    """Decode a result.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    _check_parallel("sampled", message.sampled_ids, message.token_ids, message.finish_reasons)
    _check_parallel("computed", message.computed_ids, message.num_computed, message.first_positions)
    _check_parallel("refused", message.refused_ids, message.refused_because)
    _check_parallel(
        "preempted",
        message.preempted_ids,
        message.preempted_generations,
        message.preempted_num_blocks,
        message.preempted_recoveries,
        message.preempted_num_computed,
    )
    _check_parallel(
        "announced",
        message.announced_ids,
        message.num_cached_tokens,
        message.leader_ids,
        message.num_leader_tokens,
    )
    timing = message.timing
    return StepResult(
        step=message.step,
        sampled_ids=list(message.sampled_ids),
        token_ids=list(message.token_ids),
        finish_reasons=list(message.finish_reasons),
        logprobs={entry.index: logprobs_from_proto(entry.logprobs) for entry in message.logprobs},
        prompt_logprobs={
            entry.id: logprobs_list_from_proto(entry.logprobs) for entry in message.prompt_logprobs
        },
        computed_ids=list(message.computed_ids),
        num_computed=list(message.num_computed),
        first_positions=list(message.first_positions),
        refused_ids=list(message.refused_ids),
        refused_because=list(message.refused_because),
        preempted_ids=list(message.preempted_ids),
        preempted_generations=list(message.preempted_generations),
        preempted_num_blocks=list(message.preempted_num_blocks),
        preempted_recoveries=_recoveries_from_proto(message.preempted_recoveries),
        preempted_num_computed=list(message.preempted_num_computed),
        forked_ids=list(message.forked_ids),
        unforked_ids=list(message.unforked_ids),
        stale_ids=list(message.stale_ids),
        released=list(message.released_ids),
        announced_ids=list(message.announced_ids),
        num_cached_tokens=list(message.num_cached_tokens),
        leader_ids=list(message.leader_ids),
        num_leader_tokens=list(message.num_leader_tokens),
        errors={entry.sequence_id: entry.reason for entry in message.errors},
        accounts={entry.sequence_id: _account_from_proto(entry) for entry in message.accounts},
        account=pool_from_proto(message.pool),
        timing=StepTiming(
            start_ns=timing.start_ns,
            apply_ns=timing.apply_ns,
            execute_ns=timing.execute_ns,
            sample_ns=timing.sample_ns,
        ),
    )


def refusal_to_proto(result: StepResult, last_applied_step: int) -> pb.PlanRefusal:
    """Encode the refusal of a whole plan."""
    return pb.PlanRefusal(
        step=result.step,
        reason=result.refusal,
        last_applied_step=last_applied_step,
        pool=pool_to_proto(result.account),
    )


def refusal_from_proto(message: pb.PlanRefusal) -> StepResult:
    """Decode a refusal into a result in which nothing happened."""
    return StepResult(
        step=message.step,
        refusal=message.reason or "UNNAMED",
        account=pool_from_proto(message.pool),
    )


def _entries_to_proto(entries: Entries) -> pb.PlanEntries:
    return pb.PlanEntries(
        sequence_ids=entries.sequence_ids,
        generations=entries.generations,
        num_tokens=entries.num_tokens,
    )


def _entries_from_proto(name: str, message: pb.PlanEntries) -> Entries:
    _check_parallel(name, message.sequence_ids, message.generations, message.num_tokens)
    entries = Entries(
        list(message.sequence_ids), list(message.generations), list(message.num_tokens)
    )
    if 0 in entries.num_tokens:
        raise _malformed(f"an entry of {name} asks for 0 tokens")
    return entries


def _victims_to_proto(victims: Victims) -> pb.PlanVictims:
    return pb.PlanVictims(
        sequence_ids=victims.sequence_ids,
        generations=victims.generations,
        recoveries=_recoveries_to_proto(victims.recoveries),
        num_blocks=victims.num_blocks,
        beneficiary_ids=victims.beneficiary_ids,
    )


def _victims_from_proto(message: pb.PlanVictims) -> Victims:
    _check_parallel(
        "victims",
        message.sequence_ids,
        message.generations,
        message.recoveries,
        message.num_blocks,
        message.beneficiary_ids,
    )
    return Victims(
        list(message.sequence_ids),
        list(message.generations),
        _recoveries_from_proto(message.recoveries),
        list(message.num_blocks),
        list(message.beneficiary_ids),
    )


def _recoveries_to_proto(recoveries: Sequence[Recovery]) -> list[pb.Recovery.ValueType]:
    return [pb.Recovery.ValueType(recovery) for recovery in recoveries]


def _recoveries_from_proto(values: Sequence[pb.Recovery.ValueType]) -> list[Recovery]:
    try:
        return [Recovery(value) for value in values]
    except ValueError:
        raise _malformed(f"unknown recovery among {list(values)}") from None


def _fork_to_proto(fork: Fork) -> pb.PlanFork:
    return pb.PlanFork(
        parent_id=fork.parent_id,
        generation=fork.generation,
        child_ids=fork.child_ids,
        sample_indices=fork.sample_indices,
        span_ids=fork.span_ids,
    )


def _fork_from_proto(message: pb.PlanFork) -> Fork:
    _check_parallel("fork", message.child_ids, message.sample_indices, message.span_ids)
    for child_id in message.child_ids:
        if not 1 <= child_id <= _SEQUENCE_ID_MAX:
            raise _malformed(f"a fork of sequence {message.parent_id} has child id {child_id}")
    return Fork(
        parent_id=message.parent_id,
        generation=message.generation,
        child_ids=list(message.child_ids),
        sample_indices=list(message.sample_indices),
        span_ids=list(message.span_ids),
    )


def _account_to_proto(sequence_id: int, account: SequenceAccount) -> pb.SequenceAccount:
    return pb.SequenceAccount(
        sequence_id=sequence_id,
        num_blocks_peak=account.num_blocks_peak,
        num_blocks_shared=account.num_blocks_shared,
        num_copies_on_write=account.num_copies_on_write,
        num_cached_tokens=account.num_cached_tokens,
        num_preemptions=account.num_preemptions,
    )


def _account_from_proto(message: pb.SequenceAccount) -> SequenceAccount:
    return SequenceAccount(
        num_blocks_peak=message.num_blocks_peak,
        num_blocks_shared=message.num_blocks_shared,
        num_copies_on_write=message.num_copies_on_write,
        num_cached_tokens=message.num_cached_tokens,
        num_preemptions=message.num_preemptions,
    )


def _check_parallel(name: str, first: Sized, *others: Sequence[object]) -> None:
    lengths = [len(first), *map(len, others)]
    if len(set(lengths)) != 1:
        raise _malformed(f"parallel arrays of {name} have lengths {lengths}")


def _malformed(message: str) -> PreconditionError:
    return PreconditionError("MALFORMED_STEP", message)
