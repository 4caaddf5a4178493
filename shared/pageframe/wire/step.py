"""Step results, between domain types and protobuf; ``plan`` has the other direction.

Decoding checks what the other side may have got wrong, as there.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from pageframe.core.step import Candidates, SequenceAccount, StepResult, StepTiming
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.v1 import sequence_pb2
from pageframe.wire.plan import check_parallel, recoveries_from_proto, recoveries_to_proto
from pageframe.wire.replica import pool_from_proto, pool_to_proto
from pageframe.wire.sampling import (
    logprobs_from_proto,
    logprobs_list_from_proto,
    logprobs_list_to_proto,
    logprobs_to_proto,
)

# The executor keeps both in arrays of signed words.
_SEQUENCE_ID_MAX = 2**63 - 1
_GENERATION_MAX = 2**31 - 1
# Shorter columns are not worth an array.
_NUM_COPIED_MIN = 64


def result_to_proto(result: StepResult) -> pb.StepResult:
    """Encode a result."""
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
        preempted_recoveries=recoveries_to_proto(result.preempted_recoveries),
        preempted_num_computed=result.preempted_num_computed,
        forked_ids=result.forked_ids,
        unforked_ids=result.unforked_ids,
        stale_ids=result.stale_ids,
        released_ids=result.released,
        announced_ids=result.announced_ids,
        num_cached_tokens=result.num_cached_tokens,
        leader_ids=result.leader_ids,
        num_leader_tokens=result.num_leader_tokens,
        drafted_ids=result.drafted_ids,
        num_drafted=result.num_drafted,
        num_accepted=result.num_accepted,
        pool=pool_to_proto(result.account),
        timing=_timing_to_proto(result.timing),
    )
    for index, logprobs in result.logprobs.items():
        message.logprobs.add(index=index, logprobs=logprobs_to_proto(logprobs))
    for sequence_id, entries in result.prompt_logprobs.items():
        message.prompt_logprobs.add(id=sequence_id, logprobs=logprobs_list_to_proto(entries))
    for sequence_id, candidates in result.candidates.items():
        message.candidates.add(
            sequence_id=sequence_id,
            token_ids=candidates.token_ids,
            logprobs=candidates.logprobs,
        )
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
    check_parallel("sampled", message.sampled_ids, message.token_ids, message.finish_reasons)
    check_parallel("computed", message.computed_ids, message.num_computed, message.first_positions)
    check_parallel("refused", message.refused_ids, message.refused_because)
    check_parallel("drafted", message.drafted_ids, message.num_drafted, message.num_accepted)
    check_parallel(
        "preempted",
        message.preempted_ids,
        message.preempted_generations,
        message.preempted_num_blocks,
        message.preempted_recoveries,
        message.preempted_num_computed,
    )
    check_parallel(
        "announced",
        message.announced_ids,
        message.num_cached_tokens,
        message.leader_ids,
        message.num_leader_tokens,
    )
    return StepResult(
        step=message.step,
        sampled_ids=_numbers(message.sampled_ids),
        token_ids=_numbers(message.token_ids),
        finish_reasons=_numbers(message.finish_reasons),
        logprobs={entry.index: logprobs_from_proto(entry.logprobs) for entry in message.logprobs},
        prompt_logprobs={
            entry.id: logprobs_list_from_proto(entry.logprobs) for entry in message.prompt_logprobs
        },
        candidates=dict(map(_candidates_from_proto, message.candidates)),
        computed_ids=list(message.computed_ids),
        num_computed=list(message.num_computed),
        first_positions=list(message.first_positions),
        refused_ids=list(message.refused_ids),
        refused_because=list(message.refused_because),
        preempted_ids=list(message.preempted_ids),
        preempted_generations=list(message.preempted_generations),
        preempted_num_blocks=list(message.preempted_num_blocks),
        preempted_recoveries=recoveries_from_proto(message.preempted_recoveries),
        preempted_num_computed=list(message.preempted_num_computed),
        forked_ids=list(message.forked_ids),
        unforked_ids=list(message.unforked_ids),
        stale_ids=list(message.stale_ids),
        released=list(message.released_ids),
        announced_ids=list(message.announced_ids),
        num_cached_tokens=list(message.num_cached_tokens),
        leader_ids=list(message.leader_ids),
        num_leader_tokens=list(message.num_leader_tokens),
        drafted_ids=list(message.drafted_ids),
        num_drafted=list(message.num_drafted),
        num_accepted=list(message.num_accepted),
        errors={entry.sequence_id: entry.reason for entry in message.errors},
        accounts={entry.sequence_id: _account_from_proto(entry) for entry in message.accounts},
        account=pool_from_proto(message.pool),
        timing=_timing_from_proto(message.timing),
    )


def _numbers(column: Sequence[int]) -> list[int]:
    """The elements of a packed column; a long one is copied by NumPy, in half the time."""
    if len(column) < _NUM_COPIED_MIN:
        return list(column)
    numbers: list[int] = np.asarray(column).tolist()
    return numbers


def _candidates_from_proto(message: pb.SequenceCandidates) -> tuple[int, Candidates]:
    check_parallel("candidates", message.token_ids, message.logprobs)
    candidates = Candidates(token_ids=list(message.token_ids), logprobs=list(message.logprobs))
    return message.sequence_id, candidates


def _timing_to_proto(timing: StepTiming) -> pb.StepTiming:
    return pb.StepTiming(
        start_ns=timing.start_ns,
        apply_ns=timing.apply_ns,
        execute_ns=timing.execute_ns,
        sample_ns=timing.sample_ns,
        copy_ns=timing.copy_ns,
        num_blocks_moved=timing.num_blocks_moved,
    )


def _timing_from_proto(timing: pb.StepTiming) -> StepTiming:
    return StepTiming(
        start_ns=timing.start_ns,
        apply_ns=timing.apply_ns,
        execute_ns=timing.execute_ns,
        sample_ns=timing.sample_ns,
        copy_ns=timing.copy_ns,
        num_blocks_moved=timing.num_blocks_moved,
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


def _account_to_proto(sequence_id: int, account: SequenceAccount) -> pb.SequenceAccount:
    return pb.SequenceAccount(
        sequence_id=sequence_id,
        num_blocks_peak=account.num_blocks_peak,
        num_blocks_shared=account.num_blocks_shared,
        num_copies_on_write=account.num_copies_on_write,
        num_cached_tokens=account.num_cached_tokens,
        num_preemptions=account.num_preemptions,
        num_draft_tokens=account.num_draft_tokens,
        num_accepted_tokens=account.num_accepted_tokens,
    )


def _account_from_proto(message: pb.SequenceAccount) -> SequenceAccount:
    return SequenceAccount(
        num_blocks_peak=message.num_blocks_peak,
        num_blocks_shared=message.num_blocks_shared,
        num_copies_on_write=message.num_copies_on_write,
        num_cached_tokens=message.num_cached_tokens,
        num_preemptions=message.num_preemptions,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
    )
