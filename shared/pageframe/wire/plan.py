"""Step plans, between domain types and protobuf. Arrays stay packed arrays.

Decoding checks what the other side may have got wrong (law 13): lengths of parallel arrays,
values of enums, ids that must not be zero. A fault is a ``PreconditionError`` with the reason
MALFORMED_STEP, for it is a peer's bug and not a caller's.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, Final

from pageframe.core.errors import PreconditionError
from pageframe.core.plan import (
    Announcement,
    Branches,
    DraftBounds,
    Entries,
    Fork,
    Recovery,
    StepPlan,
    Victims,
)
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.wire.sampling import (
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
    if plan.branches:
        message.branches.CopyFrom(_branches_to_proto(plan.branches))
    if plan.drafts.num_tokens:
        message.drafts.CopyFrom(_drafts_to_proto(plan.drafts))
    return message


def plan_from_proto(message: pb.StepPlan) -> StepPlan:
    """Decode a plan.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    if message.step == 0:
        raise malformed("step is 0; steps count from 1")
    return StepPlan(
        step=message.step,
        builds_on=message.builds_on,
        **{
            descriptor.name: _PARTS[descriptor.name](part)
            for descriptor, part in message.ListFields()
            if descriptor.name in _PARTS
        },
    )


# The parts of a plan. Most plans have few, and to look into one that is not there has its price.
_PARTS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "announce": lambda messages: list(map(announcement_from_proto, messages)),
    "finish": list,
    "forks": lambda messages: list(map(_fork_from_proto, messages)),
    "must": lambda message: _entries_from_proto("must", message),
    "victims": lambda message: _victims_from_proto(message),
    "may": lambda message: _entries_from_proto("may", message),
    "branches": lambda message: _branches_from_proto(message),
    "drafts": lambda message: _drafts_from_proto(message),
}


def _branches_to_proto(branches: Branches) -> pb.PlanBranches:
    return pb.PlanBranches(
        parent_ids=branches.parent_ids,
        generations=branches.generations,
        child_ids=branches.child_ids,
        token_ids=branches.token_ids,
    )


def _branches_from_proto(message: pb.PlanBranches) -> Branches:
    check_parallel(
        "branches", message.parent_ids, message.generations, message.child_ids, message.token_ids
    )
    for child_id in message.child_ids:
        if not 1 <= child_id <= _SEQUENCE_ID_MAX:
            raise malformed(f"a branch has child id {child_id}")
    if len(set(message.child_ids)) != len(message.child_ids):
        raise malformed("a child branches off twice")
    return Branches(
        list(message.parent_ids),
        list(message.generations),
        list(message.child_ids),
        list(message.token_ids),
    )


def _drafts_to_proto(drafts: DraftBounds) -> pb.PlanDrafts:
    return pb.PlanDrafts(
        num_tokens=drafts.num_tokens,
        num_tokens_each=drafts.num_tokens_each,
        num_blocks=drafts.num_blocks,
        acceptance_min=drafts.acceptance_min,
    )


def _drafts_from_proto(message: pb.PlanDrafts) -> DraftBounds:
    if not 0 <= message.acceptance_min <= 1:
        raise malformed(f"drafts with an acceptance of at least {message.acceptance_min}")
    return DraftBounds(
        num_tokens=message.num_tokens,
        num_tokens_each=message.num_tokens_each,
        num_blocks=message.num_blocks,
        acceptance_min=message.acceptance_min,
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
        is_steered=announcement.is_steered,
        num_candidates=announcement.sampling.num_candidates,
    )


def announcement_from_proto(message: pb.Announcement) -> Announcement:
    """Decode a new sequence.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    if not 1 <= message.sequence_id <= _SEQUENCE_ID_MAX:
        raise malformed(f"an announcement has sequence id {message.sequence_id}")
    if message.generation > _GENERATION_MAX:
        raise malformed(f"sequence {message.sequence_id} has generation {message.generation}")
    if not 1 <= message.num_prompt_tokens <= len(message.token_ids):
        raise malformed(
            f"sequence {message.sequence_id} announces {message.num_prompt_tokens} prompt tokens "
            f"among {len(message.token_ids)} tokens"
        )
    if not (message.sampling.HasField("seed") and message.sampling.HasField("max_tokens")):
        raise malformed(f"sequence {message.sequence_id} comes without seed or max_tokens")
    if not is_trace_context(message.trace_id, message.span_id):
        raise malformed(f"sequence {message.sequence_id} has a malformed trace context")
    return Announcement(
        sequence_id=message.sequence_id,
        generation=message.generation,
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=replace(
            sampling_from_proto(message.sampling, seed=0, max_tokens=1),
            num_candidates=message.num_candidates,
        ),
        sample_index=message.sample_index,
        request_id=message.request_id,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        session_id=message.session_id,
        prefix_handle=message.prefix_handle,
        trace_id=message.trace_id,
        span_id=message.span_id,
        is_steered=message.is_steered,
    )


def _entries_to_proto(entries: Entries) -> pb.PlanEntries:
    return pb.PlanEntries(
        sequence_ids=entries.sequence_ids,
        generations=entries.generations,
        num_tokens=entries.num_tokens,
    )


def _entries_from_proto(name: str, message: pb.PlanEntries) -> Entries:
    check_parallel(name, message.sequence_ids, message.generations, message.num_tokens)
    entries = Entries(
        list(message.sequence_ids), list(message.generations), list(message.num_tokens)
    )
    if 0 in entries.num_tokens:
        raise malformed(f"an entry of {name} asks for 0 tokens")
    return entries


def _victims_to_proto(victims: Victims) -> pb.PlanVictims:
    return pb.PlanVictims(
        sequence_ids=victims.sequence_ids,
        generations=victims.generations,
        recoveries=recoveries_to_proto(victims.recoveries),
        num_blocks=victims.num_blocks,
        beneficiary_ids=victims.beneficiary_ids,
        num_certain=victims.num_certain,
    )


def _victims_from_proto(message: pb.PlanVictims) -> Victims:
    check_parallel(
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
        recoveries_from_proto(message.recoveries),
        list(message.num_blocks),
        list(message.beneficiary_ids),
        message.num_certain,
    )


def recoveries_to_proto(recoveries: Sequence[Recovery]) -> list[pb.Recovery.ValueType]:
    """Encode how victims recover."""
    return [pb.Recovery.ValueType(recovery) for recovery in recoveries]


def recoveries_from_proto(values: Sequence[pb.Recovery.ValueType]) -> list[Recovery]:
    """Decode how victims recover.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    try:
        return [Recovery(value) for value in values]
    except ValueError:
        raise malformed(f"unknown recovery among {list(values)}") from None


def _fork_to_proto(fork: Fork) -> pb.PlanFork:
    return pb.PlanFork(
        parent_id=fork.parent_id,
        generation=fork.generation,
        child_ids=fork.child_ids,
        sample_indices=fork.sample_indices,
        span_ids=fork.span_ids,
    )


def _fork_from_proto(message: pb.PlanFork) -> Fork:
    check_parallel("fork", message.child_ids, message.sample_indices, message.span_ids)
    for child_id in message.child_ids:
        if not 1 <= child_id <= _SEQUENCE_ID_MAX:
            raise malformed(f"a fork of sequence {message.parent_id} has child id {child_id}")
    return Fork(
        parent_id=message.parent_id,
        generation=message.generation,
        child_ids=list(message.child_ids),
        sample_indices=list(message.sample_indices),
        span_ids=list(message.span_ids),
    )


def check_parallel(name: str, first: Sized, *others: Sequence[object]) -> None:
    """Refuse arrays that belong together and differ in length.

    Raises:
        PreconditionError: MALFORMED_STEP.
    """
    lengths = [len(first), *map(len, others)]
    if len(set(lengths)) != 1:
        raise malformed(f"parallel arrays of {name} have lengths {lengths}")


def malformed(message: str) -> PreconditionError:
    """What to raise for a fault of the other side."""
    return PreconditionError("MALFORMED_STEP", message)
