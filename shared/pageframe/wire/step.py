"""Step results, between domain types and protobuf; ``plan`` has the other direction.

Decoding checks what the other side may have got wrong, as there.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from pageframe.core.step import Candidates, SequenceAccount, StepResult, StepTiming
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.wire.plan import check_parallel, recoveries_from_proto
from pageframe.wire.replica import pool_from_proto, pool_to_proto
from pageframe.wire.sampling import (
    logprobs_from_proto,
    logprobs_list_from_proto,
    logprobs_list_to_proto,
    logprobs_to_proto,
)

# Shorter columns are not worth an array.
_NUM_COPIED_MIN = 64


def result_to_proto(result: StepResult) -> pb.StepResult:
    """Encode a result."""
    columns: dict[str, Any] = {
        name: value for name in (*_COLUMNS, *_FLAGS) if (value := getattr(result, name))
    }
    message = pb.StepResult(
        step=result.step,
        released_ids=result.released,
        pool=pool_to_proto(result.account),
        timing=_timing_to_proto(result.timing),
        **columns,
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
    # A step fills few of them; to look at each of the others would cost more than to read these.
    fields = {descriptor.name: value for descriptor, value in message.ListFields()}
    for name, columns in _PARALLEL_COLUMNS.items():
        if not fields.keys().isdisjoint(columns):
            check_parallel(name, *(fields.get(column, ()) for column in columns))
    attributes: dict[str, Any] = {"step": 0}
    for name, value in fields.items():
        attributes[_ATTRIBUTES.get(name, name)] = _READERS.get(name, _numbers)(value)
    return StepResult(**attributes)


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


_PARALLEL_COLUMNS: Final = {
    "sampled": ("sampled_ids", "token_ids", "finish_reasons"),
    "computed": ("computed_ids", "num_computed", "first_positions"),
    "refused": ("refused_ids", "refused_because"),
    "drafted": ("drafted_ids", "num_drafted", "num_accepted"),
    "preempted": (
        "preempted_ids",
        "preempted_generations",
        "preempted_num_blocks",
        "preempted_recoveries",
        "preempted_num_computed",
    ),
    "announced": ("announced_ids", "num_cached_tokens", "leader_ids", "num_leader_tokens"),
}

# Columns that both sides call the same.
_COLUMNS: Final = (
    *itertools.chain(*_PARALLEL_COLUMNS.values()),
    *("forked_ids", "unforked_ids", "stale_ids"),
)
# What is no column and still called the same.
_FLAGS: Final = ("is_followed",)

# Fields of pb.StepResult that StepResult calls something else.
_ATTRIBUTES: Final = {"released_ids": "released", "pool": "account"}

# How to read the fields that are no columns of numbers.
_READERS: Final[Mapping[str, Callable[[Any], object]]] = {
    "step": int,
    "is_followed": bool,
    "logprobs": lambda entries: {
        entry.index: logprobs_from_proto(entry.logprobs) for entry in entries
    },
    "prompt_logprobs": lambda entries: {
        entry.id: logprobs_list_from_proto(entry.logprobs) for entry in entries
    },
    "candidates": lambda entries: dict(map(_candidates_from_proto, entries)),
    "preempted_recoveries": recoveries_from_proto,
    "errors": lambda entries: {entry.sequence_id: entry.reason for entry in entries},
    "accounts": lambda entries: {
        entry.sequence_id: _account_from_proto(entry) for entry in entries
    },
    "pool": pool_from_proto,
    "timing": _timing_from_proto,
}
