"""Between the public protobuf messages and the gateway's own types; protobuf stops here."""

from collections.abc import Iterator
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from pageframe.core.errors import InvalidRequestError, PageframeError, ResourceExhaustedError
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Delivery
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.chat import ChatMessage
from pageframe.gateway.output import Header, Output, OutputDelta, RatesLeft, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import sequence_pb2
from pageframe.wire.beams import beams_from_proto
from pageframe.wire.request import account_to_proto
from pageframe.wire.sampling import logprobs_list_to_proto, sampling_from_proto

PartFields = dict[str, Any]
"""A ``GeneratePart`` by the names of its fields. Protobuf makes a message of many such parts in a
fifth of the time that it takes to copy messages into one."""

# One message holds the reader up for about as long as this takes to cross; more is divided.
_MANY_BYTES_MAX = 256 * 1024
# What a message takes around its only part: two tags and two lengths, the handle, the oneof.
_AROUND_PART_BYTES = 64


def check_size(message: Message) -> None:
    """Refuse a message that is larger than a request may be.

    Raises:
        InvalidRequestError: reason REQUEST_TOO_LARGE.
    """
    num_bytes = message.ByteSize()
    if num_bytes > LIMITS.request_bytes_max:
        raise InvalidRequestError(
            "REQUEST_TOO_LARGE",
            f"the request has {num_bytes} bytes; at most {LIMITS.request_bytes_max} are allowed",
            num_bytes=num_bytes,
            num_bytes_max=LIMITS.request_bytes_max,
        )


def input_from_proto(
    message: pb.GenerateRequest, *, tenant: str, deadline_ns: int
) -> GenerateInput:
    """Decode a request; ranges are checked afterwards, by ``validation``.

    Raises:
        InvalidRequestError: UNKNOWN_DELIVERY or UNKNOWN_EARLY_STOPPING for a value that is not in
            the contract, RESUME_GIVEN_TWICE.
    """
    kind = message.WhichOneof("input")
    sampling = message.sampling
    return GenerateInput(
        model=message.model,
        text=message.text if kind == "text" else None,
        messages=chat_from_proto(message.chat) if kind == "chat" else None,
        token_ids=list(message.token_ids.ids) if kind == "token_ids" else None,
        sampling=sampling_from_proto(sampling, seed=0, max_tokens=1),
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        num_samples=message.num_samples if message.HasField("num_samples") else 1,
        best_of=message.best_of if message.HasField("best_of") else None,
        beams=beams_from_proto(message.beam_search) if message.HasField("beam_search") else None,
        stop=tuple(message.stop),
        include_stop=message.include_stop,
        delivery=_delivery_from_proto(message),
        request_id=message.request_id,
        resume_token_ids=_resumed_from_proto(message),
        session_id=message.session_id,
        prefix_handle=message.prefix_handle,
        priority=message.priority,
        skip_special_tokens=not message.keep_special_tokens,
        deadline_ns=deadline_ns,
        tenant=tenant,
    )


def chat_from_proto(message: pb.Chat) -> list[ChatMessage]:
    """Decode a chat."""
    return [ChatMessage(entry.role, entry.content) for entry in message.messages]


def output_to_proto(output: Output) -> pb.GenerateResponse | None:
    """Encode one output; None for what is not told over gRPC."""
    match output:
        case OutputDelta():
            return pb.GenerateResponse(delta=_delta_to_proto(output))
        case Header():
            return pb.GenerateResponse(header=_header_to_proto(output))
        case SampleEnd():
            return pb.GenerateResponse(completion=_end_to_proto(output))
        case RatesLeft():
            return None


def part_of(handle: int, news: Output | PageframeError) -> PartFields | None:
    """Encode one piece of news of one of many generations; None for what is not told over gRPC.

    Raises:
        ResourceExhaustedError: reason OUTPUT_TOO_LARGE, for more log-probabilities than a message
            may have bytes.
    """
    match news:
        case OutputDelta(logprobs=[], prompt_logprobs=[]):
            delta: PartFields = {"token_ids": news.token_ids}
            # What is not there costs nothing.
            if news.text:
                delta["text"] = news.text
            if news.sample_index:
                delta["sample_index"] = news.sample_index
            return {"handle": handle, "delta": delta}
        case OutputDelta():
            return {"handle": handle, "delta": _checked(_delta_to_proto(news))}
        case Header():
            return {"handle": handle, "header": _header_to_proto(news)}
        case SampleEnd():
            return {"handle": handle, "completion": _end_to_proto(news)}
        case PageframeError():
            return {"handle": handle, "failure": _failure_to_proto(news)}
        case RatesLeft():
            return None


def parts_to_proto(
    parts: list[PartFields], num_bytes_max: int = _MANY_BYTES_MAX
) -> Iterator[pb.GenerateManyResponse]:
    """Encode parts in their order: one message, or as many as keep each within ``num_bytes_max``.

    A part that is larger has a message of its own.
    """
    message = pb.GenerateManyResponse(parts=parts)  # type: ignore[arg-type]
    if len(parts) == 1 or message.ByteSize() <= num_bytes_max:
        yield message
        return
    middle = len(parts) // 2
    yield from parts_to_proto(parts[:middle], num_bytes_max)
    yield from parts_to_proto(parts[middle:], num_bytes_max)


def seconds_of(duration: Duration) -> float:
    """A duration in seconds; negative ones stay so."""
    return duration.seconds + duration.nanos / NANOSECONDS_PER_SECOND


def model_to_proto(facts: ReplicaFacts) -> pb.Model:
    """Encode what is served."""
    return pb.Model(
        name=facts.model,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        block_size=facts.block_size,
        num_blocks=facts.num_blocks,
        eos_token_ids=facts.eos_token_ids,
        dtype=facts.dtype,
        kv_dtype=facts.kv_dtype,
    )


def _resumed_from_proto(message: pb.GenerateRequest) -> list[list[int]]:
    """Output that the caller has, by sample; empty when it has none."""
    outputs = [list(output.token_ids) for output in message.resume_outputs]
    if message.resume_token_ids:
        if outputs:
            raise InvalidRequestError(
                "RESUME_GIVEN_TWICE",
                f"{len(message.resume_token_ids)} resume_token_ids and {len(outputs)} "
                "resume_outputs are given; leave one of them out",
                num_resume_token_ids=len(message.resume_token_ids),
                num_resume_outputs=len(outputs),
            )
        outputs = [list(message.resume_token_ids)]
    return outputs if any(outputs) else []


def _delivery_from_proto(message: pb.GenerateRequest) -> Delivery:
    if not message.HasField("delivery"):
        num_samples = message.num_samples if message.HasField("num_samples") else 1
        is_ranked = message.HasField("beam_search") or message.best_of > num_samples
        return Delivery.FINAL if is_ranked else Delivery.EVERY_TOKEN
    value = message.delivery
    if value == sequence_pb2.DELIVERY_UNSPECIFIED:
        raise InvalidRequestError(
            "UNSPECIFIED_FIELD", "delivery is UNSPECIFIED; leave it out or choose", field="delivery"
        )
    try:
        return Delivery(value)
    except ValueError:
        raise InvalidRequestError(
            "UNKNOWN_DELIVERY", f"delivery {value} is not in the contract", delivery=value
        ) from None


def _header_to_proto(header: Header) -> pb.GenerateHeader:
    return pb.GenerateHeader(
        request_id=header.request_id,
        seed=header.seed,
        trace_id=header.trace_id,
        num_prompt_tokens=header.num_prompt_tokens,
        model=header.model,
    )


def _delta_to_proto(delta: OutputDelta) -> pb.OutputDelta:
    return pb.OutputDelta(
        sample_index=delta.sample_index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=logprobs_list_to_proto(delta.logprobs),
        prompt_logprobs=logprobs_list_to_proto(delta.prompt_logprobs),
    )


def _checked(delta: pb.OutputDelta) -> pb.OutputDelta:
    num_bytes = delta.ByteSize() + _AROUND_PART_BYTES
    if num_bytes > LIMITS.message_bytes_max:
        raise ResourceExhaustedError(
            "OUTPUT_TOO_LARGE",
            f"an output of {num_bytes} bytes is more than the {LIMITS.message_bytes_max} of a "
            "message; ask for fewer log-probabilities",
            num_bytes=num_bytes,
            num_bytes_max=LIMITS.message_bytes_max,
        )
    return delta


def _failure_to_proto(error: PageframeError) -> pb.GenerateFailure:
    return pb.GenerateFailure(
        status=error.status,
        reason=error.reason,
        message=error.message,
        limits=error.limits,
    )


def _end_to_proto(end: SampleEnd) -> pb.Completion:
    return pb.Completion(
        sample_index=end.sample_index,
        finish_reason=sequence_pb2.FinishReason.ValueType(end.finish_reason),
        stop=end.stop,
        account=account_to_proto(end.completion),
        score=end.completion.score,
    )
