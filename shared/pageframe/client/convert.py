"""Between the client's types and protobuf."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from pageframe.client.types import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    MemoryAccount,
    Message,
    Model,
    Started,
)
from pageframe.core.errors import InternalError, InvalidRequestError
from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import sequence_pb2
from pageframe.wire.beams import beams_to_proto
from pageframe.wire.sampling import grammar_to_proto, logprobs_list_from_proto


def request_to_proto(request: GenerationRequest) -> pb.GenerateRequest:
    """Encode a request.

    Raises:
        InvalidRequestError: FIELD_NOT_ENCODABLE for a value that the contract has no room for: a
            negative count, or a text that is no Unicode.
    """
    try:
        message = pb.GenerateRequest(
            model=request.model,
            sampling=_sampling_to_proto(request),
            num_samples=request.num_samples,
            best_of=request.best_of,
            beam_search=(
                None if request.beam_search is None else beams_to_proto(request.beam_search)
            ),
            stop=request.stop,
            include_stop=request.include_stop,
            delivery=(
                None
                if request.delivery is None
                else sequence_pb2.Delivery.ValueType(request.delivery)
            ),
            request_id=request.request_id,
            resume_token_ids=request.resume_token_ids,
            resume_outputs=[pb.ResumedOutput(token_ids=ids) for ids in request.resume_outputs],
            session_id=request.session_id,
            prefix_handle=request.prefix_handle,
            priority=request.priority,
            keep_special_tokens=request.keep_special_tokens,
        )
        if request.prompt is not None:
            message.text = request.prompt
        elif request.messages is not None:
            message.chat.CopyFrom(chat_to_proto(request.messages))
        elif request.token_ids is not None:
            message.token_ids.CopyFrom(pb.TokenIds(ids=request.token_ids))
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(
            "FIELD_NOT_ENCODABLE", f"a field has no encoding: {error}"
        ) from None
    return message


def chat_to_proto(messages: Sequence[Message]) -> pb.Chat:
    """Encode a chat."""
    return pb.Chat(
        messages=[pb.ChatMessage(role=entry.role, content=entry.content) for entry in messages]
    )


def event_from_proto(message: pb.GenerateResponse | pb.GeneratePart) -> Event:
    """Decode one message of a generation, or one part that is no failure.

    Raises:
        InternalError: UNKNOWN_MESSAGE, from a server of a later version.
    """
    kind = message.WhichOneof("message")
    if kind == "delta":
        return _delta_from_proto([message.delta])
    if kind == "header":
        header = message.header
        return Started(
            request_id=header.request_id,
            seed=header.seed,
            trace_id=header.trace_id,
            num_prompt_tokens=header.num_prompt_tokens,
            model=header.model,
        )
    if kind == "completion":
        completion = message.completion
        return Finished(
            sample_index=completion.sample_index,
            finish_reason=FinishReason(completion.finish_reason),
            stop=completion.stop,
            account=_account_from_proto(completion.account),
            score=completion.score if completion.HasField("score") else None,
        )
    raise InternalError("UNKNOWN_MESSAGE", "the server sent a message of no known kind")


def events_from_proto(messages: Iterable[pb.GeneratePart]) -> list[Event]:
    """Decode parts that are taken together; tokens of a sample in a row become one delta.

    Raises:
        InternalError: as ``event_from_proto``.
    """
    events: list[Event] = []
    for sample_index, parts in groupby(messages, _sample_with_tokens):
        if sample_index is None:
            events += map(event_from_proto, parts)
        else:
            events.append(_delta_from_proto([part.delta for part in parts]))
    return events


def model_from_proto(message: pb.Model) -> Model:
    """Decode a model."""
    return Model(
        name=message.name,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        eos_token_ids=tuple(message.eos_token_ids),
        dtype=message.dtype,
        kv_dtype=message.kv_dtype,
    )


def _sample_with_tokens(message: pb.GeneratePart) -> int | None:
    """Whose tokens a part brings.

    None if it brings none: text without tokens is what the end made certain, and stays by itself.
    """
    if message.WhichOneof("message") != "delta":
        return None
    delta = message.delta
    return delta.sample_index if delta.token_ids else None


def _delta_from_proto(deltas: Sequence[pb.OutputDelta]) -> Delta:
    """Decode deltas of one sample, in their order, as one."""
    first = deltas[0]
    # Every token has figures or none has, and those of the prompt come first.
    figures = [entry for delta in deltas for entry in delta.logprobs] if first.logprobs else []
    return Delta(
        sample_index=first.sample_index,
        text="".join([delta.text for delta in deltas]),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs_list_from_proto(figures),
        prompt_logprobs=logprobs_list_from_proto(first.prompt_logprobs),
    )


def _sampling_to_proto(request: GenerationRequest) -> sequence_pb2.SamplingParameters:
    # Fields given as None stay absent.
    return sequence_pb2.SamplingParameters(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=request.seed,
        logit_bias=dict(request.logit_bias),
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        max_tokens=request.max_tokens,
        grammar=None if request.grammar is None else grammar_to_proto(request.grammar),
    )


def _account_from_proto(message: sequence_pb2.MemoryAccount) -> MemoryAccount:
    return MemoryAccount(
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_completion_tokens=message.num_completion_tokens,
        num_blocks_peak=message.num_blocks_peak,
        num_blocks_shared=message.num_blocks_shared,
        num_copies_on_write=message.num_copies_on_write,
        num_preemptions=message.num_preemptions,
        num_blocks_saved=message.num_blocks_saved,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        num_unreturned_tokens=message.num_unreturned_tokens,
        stall_ns={
            StallCause(entry.cause): entry.duration.ToNanoseconds() for entry in message.stalls
        },
        compute_ns=message.compute.ToNanoseconds(),
        elapsed_ns=message.elapsed.ToNanoseconds(),
    )
