"""What cannot be served is refused with a reason and the numbers, and disturbs nobody else."""

import queue
from collections.abc import Iterator

import grpc
import pytest

from integration.system import ANSWER_S, PATIENCE_S, ClientProcess, System, refusal
from pageframe.client import GenerationRequest
from pageframe.v1 import executor_service_pb2, scheduler_service_pb2
from pageframe.v1.gateway_service_pb2 import (
    Chat,
    ChatMessage,
    DetokenizeRequest,
    GenerateRequest,
    TokenIds,
    TokenizeRequest,
)
from pageframe.v1.sequence_pb2 import (
    DELIVERY_FINAL,
    DELIVERY_UNSPECIFIED,
    FINISH_REASON_LENGTH,
    SamplingParameters,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE
GENERATE = "/pageframe.v1.GatewayService/Generate"


def ask(*token_ids: int, **fields) -> GenerateRequest:
    fields.setdefault("sampling", SamplingParameters(max_tokens=4))
    return GenerateRequest(token_ids=TokenIds(ids=token_ids or (3, 4, 5)), **fields)


def sampled(**fields) -> GenerateRequest:
    fields.setdefault("max_tokens", 4)
    return ask(sampling=SamplingParameters(**fields))


@pytest.fixture(autouse=True)
def _the_next_request_works(slow_system: System) -> Iterator[None]:
    yield
    result = slow_system.complete(GenerationRequest(token_ids=[3, 4, 5], max_tokens=3))
    assert len(result.samples[0].token_ids) == 3
    slow_system.settle()


NAN = float("nan")
REFUSED = {
    "no prompt": (GenerateRequest(), INVALID, "EMPTY_PROMPT", {"num_inputs": "0"}),
    "empty text": (GenerateRequest(text=""), INVALID, "EMPTY_PROMPT", {"num_prompt_tokens": "0"}),
    "empty token ids": (
        GenerateRequest(token_ids=TokenIds()),
        INVALID,
        "EMPTY_PROMPT",
        {"num_prompt_tokens": "0"},
    ),
    "empty chat": (
        GenerateRequest(chat=Chat()),
        INVALID,
        "EMPTY_PROMPT",
        {"num_prompt_tokens": "0"},
    ),
    "longer than the context": (
        ask(*[3] * 4096),
        OUT_OF_RANGE,
        "CONTEXT_TOO_LONG",
        {"num_prompt_tokens": "4096", "max_model_len": "4096"},
    ),
    "text longer than the context": (
        GenerateRequest(text="zq" * 5000),
        OUT_OF_RANGE,
        "CONTEXT_TOO_LONG",
        {"max_model_len": "4096"},
    ),
    "longer than the pool": (
        ask(*[3] * 2500),
        OUT_OF_RANGE,
        "EXCEEDS_POOL",
        {"num_prompt_tokens": "2500", "num_blocks": "150", "block_size": "16"},
    ),
    "output longer than the pool": (
        sampled(max_tokens=2400),
        OUT_OF_RANGE,
        "EXCEEDS_POOL",
        {"max_tokens": "2400", "pool_num_tokens": "2400"},
    ),
    "unknown model": (
        ask(model="gpt-17"),
        grpc.StatusCode.NOT_FOUND,
        "UNKNOWN_MODEL",
        {"model": "gpt-17"},
    ),
    "temperature that is no number": (
        sampled(temperature=NAN),
        INVALID,
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
        {"field": "temperature", "value": "nan"},
    ),
    "negative temperature": (
        sampled(temperature=-0.5),
        INVALID,
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
        {"field": "temperature", "value": "-0.5", "minimum": "0.0"},
    ),
    "no tokens wanted": (
        sampled(max_tokens=0),
        INVALID,
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
        {"field": "max_tokens"},
    ),
    "logit bias that is no number": (
        sampled(logit_bias={3: NAN}),
        INVALID,
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
        {"field": "logit_bias"},
    ),
    "no samples": (
        ask(num_samples=0),
        INVALID,
        "NUM_SAMPLES_OUT_OF_RANGE",
        {"num_samples": "0", "minimum": "1", "maximum": "64"},
    ),
    "a million stop strings": (
        ask(stop=["never"] * 1_000_000),
        INVALID,
        "TOO_MANY_STOP_STRINGS",
        {"num_stop_strings": "1000000", "num_stop_strings_max": "64"},
    ),
    "empty stop string": (
        ask(stop=[""]),
        INVALID,
        "STOP_STRING_LENGTH_OUT_OF_RANGE",
        {"num_bytes": "0"},
    ),
    "token id out of range": (
        ask(3, 4_000_000_000),
        INVALID,
        "TOKEN_ID_OUT_OF_RANGE",
        {"field": "token_ids", "token_id": "4000000000", "vocab_size": "401"},
    ),
    "stop token id out of range": (
        sampled(stop_token_ids=[401]),
        INVALID,
        "TOKEN_ID_OUT_OF_RANGE",
        {"field": "stop_token_ids", "token_id": "401"},
    ),
    "unknown delivery": (ask(delivery=99), INVALID, "UNKNOWN_DELIVERY", {"delivery": "99"}),
    "delivery unspecified": (
        ask(delivery=DELIVERY_UNSPECIFIED),
        INVALID,
        "UNSPECIFIED_FIELD",
        {"field": "delivery"},
    ),
    "resume without a seed": (ask(resume_token_ids=[3]), INVALID, "RESUME_NEEDS_SEED", {}),
    "request id too long": (
        ask(request_id="x" * 129),
        INVALID,
        "REQUEST_ID_TOO_LONG",
        {"num_bytes": "129", "num_bytes_max": "128"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_with_the_numbers(slow_system: System, name: str) -> None:
    request, code, reason, numbers = REFUSED[name]
    found_code, found_reason, limits = refusal(lambda: slow_system.generate(request, ANSWER_S))
    assert (found_code, found_reason) == (code, reason)
    assert limits.items() >= numbers.items(), limits


RAW = {
    "text that is no UTF-8": b"\x12\x02\xff\xfe",
    "stop string that is no UTF-8": b"\x12\x01a" + b"\x3a\x02\xc3\x28",
    "bytes that are no message": b"\xff" * 64,
    "message that is cut off": ask(*range(3, 40)).SerializeToString()[:-3],
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_request_are_refused(slow_system: System, name: str) -> None:
    generate = slow_system.gateway_channel.unary_stream(GENERATE)
    code, reason, _ = refusal(lambda: list(generate(RAW[name], timeout=ANSWER_S)))
    assert (code, reason) == (INVALID, "MALFORMED_MESSAGE")


def test_the_tokenizer_refuses_what_it_cannot_take(slow_system: System) -> None:
    gateway = slow_system.gateway
    long_chat = Chat(messages=[ChatMessage(role="user", content="hello")] * 4000)
    for call, request, code, reason in (
        (gateway.Tokenize, TokenizeRequest(), INVALID, "EMPTY_PROMPT"),
        (gateway.Tokenize, TokenizeRequest(chat=long_chat), OUT_OF_RANGE, "CONTEXT_TOO_LONG"),
        (gateway.Detokenize, DetokenizeRequest(token_ids=[401]), INVALID, "TOKEN_ID_OUT_OF_RANGE"),
    ):
        found = refusal(lambda call=call, request=request: call(request, timeout=ANSWER_S))
        assert found[:2] == (code, reason)
        assert found[2], "the numbers"


def test_a_name_that_lives_is_not_given_twice(slow_system: System) -> None:
    request = sampled(max_tokens=500)
    request.request_id = "mine"
    with slow_system.stream(request) as living:
        next(living)
        code, reason, _ = refusal(lambda: slow_system.generate(request, ANSWER_S))
        assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS")
        assert next(living).HasField("delta"), "the one that lives is not disturbed"
    slow_system.settle()


def test_a_deadline_that_has_passed_ends_at_once(slow_system: System) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(slow_system.gateway.Generate(sampled(max_tokens=500), timeout=0.0))
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    slow_system.settle()


def test_a_client_that_dies_mid_stream_leaves_nothing(slow_system: System) -> None:
    """Nobody said goodbye: the kernel closed its socket."""
    with ClientProcess(slow_system.address, sampled(max_tokens=500)) as client:
        client.read_until("delta")
        client.kill()
        slow_system.settle()


def test_a_second_scheduler_is_refused_and_disturbs_nobody(slow_system: System) -> None:
    hello = executor_service_pb2.SchedulerHello(scheduler_id="usurper", epoch=2**63)
    with slow_system.stream(sampled(max_tokens=30, seed=5)) as undisturbed:
        assert next(undisturbed).HasField("header")
        assert next(undisturbed).HasField("delta")
        code, reason, limits = refusal(
            lambda: list(
                slow_system.executor.Run(
                    iter([executor_service_pb2.RunRequest(hello=hello)]), timeout=ANSWER_S
                )
            )
        )
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SCHEDULER_CONNECTED")
        assert limits == {"connected": slow_system.model, "refused": "usurper"}
        messages = list(undisturbed)
    assert messages[-1].HasField("completion")
    num_tokens = sum(len(message.delta.token_ids) for message in messages)
    assert num_tokens == 29, "the running request went on"
    # The same scheduler would have counted this as a restart of its executor.
    assert messages[-1].completion.account.num_preemptions == 0


MALFORMED_INSIDE = {
    "delivery left open": ({"delivery": DELIVERY_UNSPECIFIED}, "UNSPECIFIED_FIELD"),
    "unknown delivery": ({"delivery": 17}, "UNSPECIFIED_FIELD"),
    "seed left open": ({"sampling": SamplingParameters(max_tokens=3)}, "UNSPECIFIED_FIELD"),
    "max_tokens left open": ({"sampling": SamplingParameters(seed=3)}, "UNSPECIFIED_FIELD"),
    "sampling left open": ({"sampling": None}, "UNSPECIFIED_FIELD"),
    "no samples": ({"num_samples": 0}, "NUM_SAMPLES_OUT_OF_RANGE"),
    "no prompt": ({"prompt_token_ids": []}, "PROMPT_EMPTY"),
    "temperature that is no number": (
        {"sampling": SamplingParameters(seed=3, max_tokens=3, temperature=NAN)},
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
    ),
    "span id of nine bytes": (
        {"trace_id": b"t" * 16, "span_id": b"s" * 9},
        "MALFORMED_TRACE_CONTEXT",
    ),
    "span id without a trace": ({"span_id": b"s" * 8}, "MALFORMED_TRACE_CONTEXT"),
}


@pytest.mark.parametrize("name", MALFORMED_INSIDE)
def test_a_gateway_that_is_mistaken_is_told(slow_system: System, name: str) -> None:
    """Only the door has defaults; the scheduler checks again what it acts on."""
    whole = {
        "handle": 7,
        "request_id": "direct",
        "prompt_token_ids": [3],
        "num_samples": 1,
        "sampling": SamplingParameters(seed=3, max_tokens=3),
        "delivery": DELIVERY_FINAL,
    }
    fields, reason = MALFORMED_INSIDE[name]
    submission = scheduler_service_pb2.Submission(**whole | fields)
    completion = submit_directly(slow_system, submission)
    assert completion.error_status == "INVALID_ARGUMENT"
    assert completion.error_reason == reason
    # The whole one, so that it is known what was refused.
    completion = submit_directly(slow_system, scheduler_service_pb2.Submission(**whole))
    assert completion.finish_reason == FINISH_REASON_LENGTH


def submit_directly(
    system: System, submission: scheduler_service_pb2.Submission
) -> scheduler_service_pb2.SampleCompletion:
    """Be a gateway of one request; how its only sample ended."""
    hello = scheduler_service_pb2.GatewayHello(gateway_id="a test")
    requests = queue.SimpleQueue()
    requests.put(scheduler_service_pb2.ConnectRequest(hello=hello))
    requests.put(scheduler_service_pb2.ConnectRequest(submit=submission))
    stream = system.scheduler.Connect(iter(requests.get, None), timeout=PATIENCE_S)
    completions = (entry for response in stream for entry in response.events.completions)
    try:
        return next(completions)
    finally:
        requests.put(None)
        stream.cancel()
