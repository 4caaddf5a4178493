"""The gateway over real gRPC, between a real client and a scheduler that the test plays."""

import asyncio
import json
import subprocess
import sys

import grpc
import pytest

from pageframe.core.errors import InvalidRequestError, PageframeError
from pageframe.core.request import TokenEvents
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.rpc.status import from_rpc_error
from pageframe.v1 import gateway_service_pb2, sequence_pb2
from unit.gateway import tiny_tokenizers
from unit.gateway.gateway_house import TIMEOUT_S, gateway_house


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("model"))


def _request(**fields):
    return gateway_service_pb2.GenerateRequest(**({"text": "the dog"} | fields))


async def _error(call):
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


def test_one_generation_from_end_to_end(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(
                _request(sampling={"seed": 5, "max_tokens": 4}, request_id="r"), timeout=TIMEOUT_S
            )
            submission = await house.submitted()
            house.scheduler.tokens(submission, [72, 73])
            house.scheduler.tokens(submission, [74])
            house.scheduler.end(submission, sequence_pb2.FINISH_REASON_STOP)
            return submission, [message async for message in call]

    submission, messages = asyncio.run(scenario())
    assert submission.deadline_ns > 0
    assert submission.sampling.seed == 5
    assert messages[0].header.request_id == "r"
    assert messages[0].header.num_prompt_tokens == len(submission.prompt_token_ids)
    ids = [token_id for message in messages for token_id in message.delta.token_ids]
    assert ids == [72, 73, 74]
    completion = messages[-1].completion
    assert completion.finish_reason == sequence_pb2.FINISH_REASON_STOP
    assert completion.account.num_completion_tokens == 3


def test_a_lost_scheduler_stream_is_a_stall(folder):
    """The request is submitted again with the tokens so far, and the caller notices nothing."""

    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(), timeout=TIMEOUT_S)
            first = await house.submitted()
            house.scheduler.tokens(first, [72, 73])
            received = []
            async for message in call:
                received += message.delta.token_ids
                if len(received) == 2:
                    break
            house.scheduler.lose_stream()
            second = await house.submitted()
            house.scheduler.tokens(second, [74])
            house.scheduler.end(second)
            async for message in call:
                received += message.delta.token_ids
            return first, second, received

    first, second, received = asyncio.run(scenario())
    assert not first.resume
    assert [list(sample.token_ids) for sample in second.resume] == [[72, 73]]
    assert second.sampling == first.sampling
    assert received == [72, 73, 74]


def test_samples_that_had_ended_stay_ended_on_a_new_stream(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(num_samples=2), timeout=TIMEOUT_S)
            first = await house.submitted()
            house.scheduler.tokens(first, [72], sample_index=1)
            house.scheduler.end(first, sample_index=1)
            async for message in call:
                if message.HasField("completion"):
                    break
            house.scheduler.lose_stream()
            second = await house.submitted()
            cancel = await house.cancelled()
            house.scheduler.end(second, sample_index=0)
            rest = [message async for message in call]
            return cancel, rest

    cancel, rest = asyncio.run(scenario())
    assert (cancel.HasField("sample_index"), cancel.sample_index) == (True, 1)
    assert [message.completion.sample_index for message in rest] == [0]


def test_a_scheduler_that_stays_away_fails_its_requests(folder):
    async def scenario():
        async with gateway_house(folder, lost_after_s=0.2) as house:
            call = house.stub.Generate(_request(), timeout=TIMEOUT_S)
            await house.submitted()
            house.link._address = "127.0.0.1:9"
            house.scheduler.lose_stream()
            living = await _error(call)
            later = await _error(house.stub.Generate(_request(), timeout=TIMEOUT_S))
            return living, later

    living, later = asyncio.run(scenario())
    assert (living.status, living.reason) == ("UNAVAILABLE", "SCHEDULER_LOST")
    assert (later.status, later.reason) == ("UNAVAILABLE", "SCHEDULER_LOST")


def test_a_client_that_vanishes_cancels_at_the_scheduler(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(), timeout=TIMEOUT_S)
            submission = await house.submitted()
            call.cancel()
            cancel = await house.cancelled()
            assert (cancel.handle, cancel.HasField("sample_index")) == (submission.handle, False)
            await asyncio.wait_for(house.service.drain(), TIMEOUT_S)
            assert house.link.num_living == 0

    asyncio.run(scenario())


def test_a_deadline_cancels_at_the_scheduler(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(), timeout=0.3)
            submission = await house.submitted()
            error = await _error(call)
            cancel = await house.cancelled()
            return submission, cancel, error

    submission, cancel, error = asyncio.run(scenario())
    assert cancel.handle == submission.handle
    assert error.status == "DEADLINE_EXCEEDED"


def test_cancel_by_name(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(request_id="r"), timeout=TIMEOUT_S)
            submission = await house.submitted()
            await house.stub.Cancel(gateway_service_pb2.CancelRequest(request_id="r"))
            error = await _error(call)
            cancel = await house.cancelled()
            with pytest.raises(grpc.RpcError) as caught:
                await house.stub.Cancel(gateway_service_pb2.CancelRequest(request_id="r"))
            return submission, cancel, error, from_rpc_error(caught.value)

    submission, cancel, error, unknown = asyncio.run(scenario())
    assert cancel.handle == submission.handle
    assert error.status == "CANCELLED"
    assert (unknown.status, unknown.reason) == ("NOT_FOUND", "UNKNOWN_REQUEST")


def test_an_error_completion_is_a_status_with_its_numbers(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(num_samples=2), timeout=TIMEOUT_S)
            submission = await house.submitted()
            house.scheduler.end(
                submission,
                sequence_pb2.FINISH_REASON_ERROR,
                error_status="RESOURCE_EXHAUSTED",
                error_reason="QUEUE_FULL",
                error_message="too many wait",
                error_limits={"num_waiting": "7"},
            )
            error = await _error(call)
            # The other sample would go on for nobody.
            await house.cancelled()
            return error

    error = asyncio.run(scenario())
    assert (error.status, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert dict(error.limits) == {"num_waiting": "7"}


def test_session_and_handle_go_on_and_what_was_saved_comes_back(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            request = _request(session_id="chat-7", prefix_handle="rules")
            call = house.stub.Generate(request, timeout=TIMEOUT_S)
            submission = await house.submitted()
            account = sequence_pb2.MemoryAccount(num_blocks_shared=6, num_copies_on_write=2)
            house.scheduler.end(submission, account=account)
            return submission, [message async for message in call]

    submission, messages = asyncio.run(scenario())
    assert (submission.session_id, submission.prefix_handle) == ("chat-7", "rules")
    assert messages[-1].completion.account.num_blocks_saved == 4


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", "EMPTY_PROMPT"),
        ({"model": "other"}, "NOT_FOUND", "UNKNOWN_MODEL"),
        ({"num_samples": 0}, "INVALID_ARGUMENT", "NUM_SAMPLES_OUT_OF_RANGE"),
        ({"stop": ["x"] * 1_000_000}, "INVALID_ARGUMENT", "TOO_MANY_STOP_STRINGS"),
        ({"text": "x" * (9 << 20)}, "INVALID_ARGUMENT", "REQUEST_TOO_LARGE"),
        ({"text": "the dog " * 100_000}, "OUT_OF_RANGE", "CONTEXT_TOO_LONG"),
        ({"delivery": 9}, "INVALID_ARGUMENT", "UNKNOWN_DELIVERY"),
        ({"delivery": 0}, "INVALID_ARGUMENT", "UNSPECIFIED_FIELD"),
        ({"sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT",
         "SAMPLING_PARAMETER_OUT_OF_RANGE"),
        ({"sampling": {"max_tokens": 0}}, "INVALID_ARGUMENT", "SAMPLING_PARAMETER_OUT_OF_RANGE"),
        ({"session_id": "s" * 257}, "INVALID_ARGUMENT", "SESSION_ID_TOO_LONG"),
        ({"prefix_handle": "h" * 257}, "INVALID_ARGUMENT", "PREFIX_HANDLE_TOO_LONG"),
    ],
)  # fmt: skip
def test_bad_input_is_a_status_and_the_next_request_works(folder, fields, status, reason):
    async def scenario():
        async with gateway_house(folder) as house:
            error = await _error(house.stub.Generate(_request(**fields), timeout=TIMEOUT_S))
            call = house.stub.Generate(_request(), timeout=TIMEOUT_S)
            house.scheduler.end(await house.submitted())
            return error, [message async for message in call]

    error, messages = asyncio.run(scenario())
    assert (error.status, error.reason) == (status, reason)
    assert messages[-1].HasField("completion")


@pytest.mark.parametrize("data", [b"\x12\x02\xff\xfe", b"\xff\xff\xff"])
def test_bytes_that_are_no_message_are_a_status(folder, data):
    """The first is a text that is not UTF-8, the second is no protobuf at all."""

    async def scenario():
        async with gateway_house(folder) as house:
            raw = house.channel.unary_stream("/pageframe.v1.GatewayService/Generate")
            return await _error(raw(data, timeout=TIMEOUT_S))

    error = asyncio.run(scenario())
    assert isinstance(error, InvalidRequestError)
    assert error.reason == "MALFORMED_MESSAGE"


def test_tokenize_detokenize_and_models(folder):
    async def scenario():
        async with gateway_house(folder) as house:
            pb = gateway_service_pb2
            tokens = await house.stub.Tokenize(pb.TokenizeRequest(text="the dog €"))
            text = await house.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
            models = await house.stub.ListModels(pb.ListModelsRequest())
            with pytest.raises(grpc.RpcError) as caught:
                await house.stub.Detokenize(pb.DetokenizeRequest(token_ids=[512]))
            return text.text, models.models, from_rpc_error(caught.value)

    text, models, error = asyncio.run(scenario())
    assert text == "the dog €"
    assert [(model.name, model.block_size) for model in models] == [("tiny", 16)]
    assert error.reason == "TOKEN_ID_OUT_OF_RANGE"


def test_keys_open_the_door_and_name_the_tenant(folder):
    async def scenario():
        async with gateway_house(folder, keys={"k1": Caller("red")}) as house:
            refused = await _error(house.stub.Generate(_request(), timeout=TIMEOUT_S))
            call = house.stub.Generate(
                _request(), timeout=TIMEOUT_S, metadata=(("authorization", "Bearer k1"),)
            )
            submission = await house.submitted()
            call.cancel()
            return refused, submission

    refused, submission = asyncio.run(scenario())
    assert refused.status == "UNAUTHENTICATED"
    assert submission.tenant == "red"
    assert submission.cache_salt == Authenticator({}).cache_salt("red")


def test_tokens_behind_an_unfinished_write_are_merged(folder):
    """What arrives in one turn of the event loop is one message, whatever the number of events."""

    async def scenario():
        async with gateway_house(folder) as house:
            call = house.stub.Generate(_request(), timeout=TIMEOUT_S)
            submission = await house.submitted()
            for token_id in range(2, 130):
                house.link._on_events(
                    TokenEvents(
                        step=token_id,
                        handles=[submission.handle],
                        sample_indices=[0],
                        num_tokens=[1],
                        token_ids=[token_id],
                    )
                )
            house.scheduler.end(submission)
            return [message async for message in call]

    header, delta, *rest = asyncio.run(scenario())
    assert header.HasField("header")
    assert list(delta.delta.token_ids) == list(range(2, 130))
    assert rest[-1].HasField("completion")


def test_the_gateway_imports_no_torch():
    code = (
        "import sys, json, pageframe.gateway.server\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'triton'} & set(sys.modules))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(result.stdout) == []


def test_errors_are_typed_all_the_way(folder):
    """What the caller's side reads back is the class that was raised."""

    async def scenario():
        async with gateway_house(folder) as house:
            return await _error(house.stub.Generate(_request(text=""), timeout=TIMEOUT_S))

    assert isinstance(asyncio.run(scenario()), PageframeError)
