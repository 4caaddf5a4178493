"""Submissions and token events, between domain types and protobuf."""

from google.protobuf.duration_pb2 import Duration

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.request import (
    Completion,
    Delivery,
    RateLevel,
    RateLevels,
    StallCause,
    Submission,
    TokenEvents,
)
from pageframe.core.step import FinishReason, SequenceAccount
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.v1 import scheduler_service_pb2 as pb
from pageframe.v1 import sequence_pb2
from pageframe.wire.beams import beams_from_proto, beams_to_proto
from pageframe.wire.sampling import (
    logprobs_from_proto,
    logprobs_list_from_proto,
    logprobs_list_to_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from pageframe.wire.trace import is_trace_context


def submission_to_proto(submission: Submission) -> pb.Submission:
    """Encode a request."""
    return pb.Submission(
        handle=submission.handle,
        request_id=submission.request_id,
        prompt_token_ids=submission.prompt_token_ids,
        resume=[pb.ResumedSample(token_ids=ids) for ids in submission.resume_token_ids],
        num_samples=submission.num_samples,
        sampling=sampling_to_proto(submission.sampling),
        delivery=sequence_pb2.Delivery.ValueType(submission.delivery),
        num_tokens_per_event_max=submission.num_tokens_per_event_max,
        deadline_ns=submission.deadline_ns,
        priority=submission.priority,
        tenant=submission.tenant,
        cache_salt=submission.cache_salt,
        beam_search=None if submission.beams is None else beams_to_proto(submission.beams),
        session_id=submission.session_id,
        prefix_handle=submission.prefix_handle,
        trace_id=submission.trace_id,
        span_id=submission.span_id,
        arrival_ns=submission.arrival_ns,
        is_resubmitted=submission.is_resubmitted,
    )


def submission_from_proto(message: pb.Submission) -> Submission:
    """Decode a request; ranges are checked by the scheduler.

    Raises:
        InvalidRequestError: UNSPECIFIED_FIELD for a delivery, seed or max_tokens left open, or
            MALFORMED_TRACE_CONTEXT.
    """
    sampling = message.sampling
    if not (sampling.HasField("seed") and sampling.HasField("max_tokens")):
        raise _unspecified("sampling.seed or sampling.max_tokens")
    try:
        delivery = Delivery(message.delivery)
    except ValueError:
        raise _unspecified("delivery") from None
    if not is_trace_context(message.trace_id, message.span_id):
        raise InvalidRequestError(
            "MALFORMED_TRACE_CONTEXT",
            f"trace id and span id have {len(message.trace_id)} and {len(message.span_id)} bytes; "
            "they must have 16 and 8, or none",
            trace_id_bytes=len(message.trace_id),
            span_id_bytes=len(message.span_id),
        )
    return Submission(
        handle=message.handle,
        request_id=message.request_id,
        prompt_token_ids=list(message.prompt_token_ids),
        resume_token_ids=[list(sample.token_ids) for sample in message.resume],
        num_samples=message.num_samples,
        sampling=sampling_from_proto(sampling, seed=0, max_tokens=1),
        delivery=delivery,
        num_tokens_per_event_max=message.num_tokens_per_event_max,
        deadline_ns=message.deadline_ns,
        priority=message.priority,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        beams=beams_from_proto(message.beam_search) if message.HasField("beam_search") else None,
        session_id=message.session_id,
        prefix_handle=message.prefix_handle,
        trace_id=message.trace_id,
        span_id=message.span_id,
        arrival_ns=message.arrival_ns,
        is_resubmitted=message.is_resubmitted,
    )


def events_to_proto(events: TokenEvents) -> pb.TokenEvents:
    """Encode what happened to a gateway's requests in one step."""
    message = pb.TokenEvents(
        step=events.step,
        handles=events.handles,
        sample_indices=events.sample_indices,
        num_tokens=events.num_tokens,
        token_ids=events.token_ids,
    )
    for index, logprobs in events.logprobs.items():
        message.logprobs.add(index=index, logprobs=logprobs_to_proto(logprobs))
    for handle, entries in events.prompt_logprobs.items():
        message.prompt_logprobs.add(id=handle, logprobs=logprobs_list_to_proto(entries))
    if events.completions:
        message.completions.extend(map(_completion_to_proto, events.completions))
    for handle, levels in events.rates.items():
        account = message.rates.add(handle=handle)
        for what, level in levels.items():
            getattr(account, what).CopyFrom(_level_to_proto(level))
    return message


def _level_to_proto(level: RateLevel) -> pb.RateLevel:
    message = pb.RateLevel(num_per_minute=level.num_per_minute, num_left=level.num_left)
    message.full_after.FromNanoseconds(level.full_after_ns)
    return message


def _levels_from_proto(account: pb.RateAccount) -> RateLevels:
    levels = {}
    if account.HasField("requests"):
        levels["requests"] = _level_from_proto(account.requests)
    if account.HasField("tokens"):
        levels["tokens"] = _level_from_proto(account.tokens)
    return levels


def _level_from_proto(level: pb.RateLevel) -> RateLevel:
    return RateLevel(level.num_per_minute, level.num_left, level.full_after.ToNanoseconds())


def events_from_proto(message: pb.TokenEvents) -> TokenEvents:
    """Decode what happened to a gateway's requests in one step.

    Raises:
        PreconditionError: MALFORMED_EVENTS for arrays that do not fit together.
    """
    events = TokenEvents(
        step=message.step,
        handles=list(message.handles),
        sample_indices=list(message.sample_indices),
        num_tokens=list(message.num_tokens),
        token_ids=list(message.token_ids),
        logprobs={entry.index: logprobs_from_proto(entry.logprobs) for entry in message.logprobs},
        prompt_logprobs={
            entry.id: logprobs_list_from_proto(entry.logprobs) for entry in message.prompt_logprobs
        },
        completions=[_completion_from_proto(entry) for entry in message.completions],
        rates={account.handle: _levels_from_proto(account) for account in message.rates},
    )
    num_entries = len(events.handles)
    arrays_fit = num_entries == len(events.sample_indices) == len(events.num_tokens)
    if not arrays_fit or sum(events.num_tokens) != len(events.token_ids):
        raise PreconditionError("MALFORMED_EVENTS", "parallel arrays do not fit together")
    return events


def account_to_proto(completion: Completion) -> sequence_pb2.MemoryAccount:
    """Encode the memory account of a completion."""
    account = completion.account
    message = sequence_pb2.MemoryAccount(
        num_prompt_tokens=completion.num_prompt_tokens,
        num_cached_tokens=completion.num_cached_tokens,
        num_completion_tokens=completion.num_output_tokens,
        num_blocks_peak=account.num_blocks_peak,
        num_blocks_shared=account.num_blocks_shared,
        num_copies_on_write=account.num_copies_on_write,
        num_preemptions=account.num_preemptions,
        num_blocks_saved=account.num_blocks_saved,
        num_unreturned_tokens=completion.num_unreturned_tokens,
        num_draft_tokens=account.num_draft_tokens,
        num_accepted_tokens=account.num_accepted_tokens,
    )
    for cause, waited_ns in completion.stall_ns.items():
        stall = message.stalls.add(cause=sequence_pb2.StallCause.ValueType(cause))
        _set_duration(stall.duration, waited_ns)
    _set_duration(message.compute, completion.compute_ns)
    if completion.elapsed_ns:
        _set_duration(message.elapsed, completion.elapsed_ns)
    return message


def _set_duration(message: Duration, duration_ns: int) -> None:
    """Set a duration that is not negative; a quarter of what ``FromNanoseconds`` costs."""
    message.seconds, message.nanos = divmod(duration_ns, NANOSECONDS_PER_SECOND)


def _completion_to_proto(completion: Completion) -> pb.SampleCompletion:
    return pb.SampleCompletion(
        handle=completion.handle,
        sample_index=completion.sample_index,
        finish_reason=sequence_pb2.FinishReason.ValueType(completion.finish_reason),
        account=account_to_proto(completion),
        error_status=completion.error_status,
        error_reason=completion.error_reason,
        error_message=completion.error_message,
        error_limits=completion.error_limits,
        score=completion.score,
        submit_time_ns=completion.submit_ns,
        end_time_ns=completion.end_ns,
    )


def _completion_from_proto(message: pb.SampleCompletion) -> Completion:
    account = message.account
    return Completion(
        handle=message.handle,
        sample_index=message.sample_index,
        finish_reason=FinishReason(message.finish_reason),
        num_prompt_tokens=account.num_prompt_tokens,
        num_cached_tokens=account.num_cached_tokens,
        num_output_tokens=account.num_completion_tokens,
        account=SequenceAccount(
            num_blocks_peak=account.num_blocks_peak,
            num_blocks_shared=account.num_blocks_shared,
            num_copies_on_write=account.num_copies_on_write,
            num_cached_tokens=account.num_cached_tokens,
            num_preemptions=account.num_preemptions,
            num_draft_tokens=account.num_draft_tokens,
            num_accepted_tokens=account.num_accepted_tokens,
        ),
        stall_ns={
            StallCause(entry.cause): entry.duration.ToNanoseconds() for entry in account.stalls
        },
        compute_ns=account.compute.ToNanoseconds(),
        submit_ns=message.submit_time_ns,
        end_ns=message.end_time_ns,
        error_status=message.error_status,
        error_reason=message.error_reason,
        error_message=message.error_message,
        error_limits=dict(message.error_limits),
        score=message.score if message.HasField("score") else None,
        num_unreturned_tokens=account.num_unreturned_tokens,
    )


def _unspecified(field_name: str) -> InvalidRequestError:
    return InvalidRequestError(
        "UNSPECIFIED_FIELD", f"{field_name} is left unspecified", field=field_name
    )
