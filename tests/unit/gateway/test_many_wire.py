"""Many generations on one stream over real gRPC: what each end hears."""

import asyncio

import grpc
import pytest

from pageframe.core.errors import (
    CancelledError,
    InvalidRequestError,
    ResourceExhaustedError,
)
from pageframe.core.limits import LIMITS
from pageframe.core.request import Completion
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.gateway.convert import output_to_proto, part_of, parts_to_proto
from pageframe.gateway.output import Header, OutputDelta, RatesLeft, SampleEnd
from pageframe.rpc.auth import Caller
from pageframe.rpc.status import from_rpc_error
from pageframe.v1 import gateway_service_pb2 as pb
from unit.gateway import tiny_tokenizers
from unit.gateway.gateway_house import TIMEOUT_S, gateway_house

METHOD = "/pageframe.v1.GatewayService/GenerateMany"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("model"))


def start(handle, *, traceparent="", timeout=None, **fields):
    request = pb.GenerateRequest(**({"text": "the dog"} | fields))
    order = pb.GenerateStart(
        handle=handle, request=request, traceparent=traceparent, timeout=timeout
    )
    return pb.GenerateManyRequest(start=order)


def cancel(handle):
    return pb.GenerateManyRequest(cancel=pb.GenerateCancel(handle=handle))


def together(*orders):
    return pb.GenerateManyRequest(orders=pb.GenerateOrders(orders=orders))


class OneCaller:
    """The caller's end of one stream."""

    def __init__(self, house, **options):
        self.call = house.stub.GenerateMany(timeout=TIMEOUT_S, **options)
        self._parts = []
        self._is_accepted = False

    async def say(self, *orders):
        for order in orders:
            await self.call.write(order)

    async def next_part(self):
        while not self._parts:
            message = await self.call.read()
            assert isinstance(message, pb.GenerateManyResponse), "the stream has ended"
            assert bool(message.parts) is self._is_accepted, "the first one only is empty"
            self._is_accepted = True
            self._parts += message.parts
        return self._parts.pop(0)

    async def last_part(self, handle):
        """Its last part; parts of others are dropped."""
        while True:
            part = await self.next_part()
            if part.handle == handle and part.WhichOneof("message") in ("failure", "completion"):
                return part

    async def error(self):
        with pytest.raises(grpc.RpcError) as caught:
            await self._read_for_ever()
        return from_rpc_error(caught.value)

    async def _read_for_ever(self):
        while True:
            await self.next_part()


def run(folder, scenario, **options):
    async def housed():
        async with gateway_house(folder, **options) as house:
            return await asyncio.wait_for(scenario(house), TIMEOUT_S)

    return asyncio.run(housed())


def test_two_generations_share_a_stream_from_end_to_end(folder):
    async def scenario(house):
        caller = OneCaller(house)
        parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
        await caller.say(
            start(3, request_id="a", traceparent=parent, timeout={"seconds": 60}),
            start(9, request_id="b", sampling={"seed": 5}),
        )
        first, second = await house.submitted(), await house.submitted()
        house.scheduler.tokens(first, [72, 73])
        house.scheduler.tokens(second, [74])
        house.scheduler.end(first)
        house.scheduler.end(second)
        await caller.call.done_writing()
        parts = [part async for message in caller.call for part in message.parts]
        assert await caller.call.code() is grpc.StatusCode.OK
        return first, second, parts

    first, second, parts = run(folder, scenario)
    assert (first.request_id, second.request_id) == ("a", "b")
    assert first.deadline_ns > 0
    assert second.deadline_ns == 0, "each has its own time, and the stream's is nobody's"
    of = {3: [], 9: []}
    for part in parts:
        of[part.handle].append(part)
    for handle, name, token_ids in ((3, "a", [72, 73]), (9, "b", [74])):
        kinds = [part.WhichOneof("message") for part in of[handle]]
        assert (kinds[0], kinds[-1]) == ("header", "completion")
        assert of[handle][0].header.request_id == name
        heard = [token_id for part in of[handle] for token_id in part.delta.token_ids]
        assert heard == token_ids
        assert of[handle][-1].completion.account.num_completion_tokens == len(token_ids)


@pytest.mark.parametrize(
    ("traceparent", "span_id"),
    [(f"00-{'ab' * 16}-{'cd' * 8}-01", int("cd" * 8, 16)), ("", None), ("nonsense", None)],
)
def test_each_start_has_a_trace_context_of_its_own(folder, traceparent, span_id):
    async def scenario(house):
        (order,) = house.servicer._orders(None, start(3, traceparent=traceparent))
        return order.parent

    parent = run(folder, scenario)
    assert (parent and parent.span_id) == span_id


BAD_STARTS = {
    "EMPTY_PROMPT": {"text": ""},
    "UNKNOWN_MODEL": {"model": "other"},
    "NUM_SAMPLES_OUT_OF_RANGE": {"num_samples": 0},
    "TOO_MANY_STOP_STRINGS": {"stop": ["x"] * 1_000_000},
    "REQUEST_TOO_LARGE": {"text": "x" * (9 << 20)},
    "CONTEXT_TOO_LONG": {"text": "the dog " * 100_000},
    "UNKNOWN_DELIVERY": {"delivery": 9},
    "UNSPECIFIED_FIELD": {"delivery": 0},
    "SAMPLING_PARAMETER_OUT_OF_RANGE": {"sampling": {"temperature": float("nan")}},
    "SESSION_ID_TOO_LONG": {"session_id": "s" * 257},
    "DEADLINE_PASSED": {"timeout": {"seconds": -(1 << 40)}},
}


@pytest.mark.parametrize("reason", BAD_STARTS)
def test_a_bad_start_fails_alone_with_its_numbers(folder, reason):
    async def scenario(house):
        caller = OneCaller(house)
        await caller.say(start(1, request_id="good"))
        submission = await house.submitted()
        await caller.say(start(2, **BAD_STARTS[reason]))
        failed = await caller.last_part(2)
        house.scheduler.end(submission)
        await caller.last_part(1)
        caller.call.cancel()
        return failed.failure

    failure = run(folder, scenario)
    assert failure.reason == reason
    assert failure.message
    assert failure.status in {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "OUT_OF_RANGE",
        "DEADLINE_EXCEEDED",
    }


def test_numbers_of_a_failure_come_along(folder):
    async def scenario(house):
        caller = OneCaller(house)
        await caller.say(start(1, num_samples=65))
        part = await caller.last_part(1)
        caller.call.cancel()
        return part.failure

    failure = run(folder, scenario)
    assert failure.status == "INVALID_ARGUMENT"
    assert dict(failure.limits) == {"num_samples": "65", "minimum": "1", "maximum": "64"}


BAD_MESSAGES = {
    "MALFORMED_MESSAGE": [b"\xff\xff\xff"],
    "UNEXPECTED_MESSAGE": [
        pb.GenerateManyRequest().SerializeToString(),
        together(cancel(9), pb.GenerateManyRequest()).SerializeToString(),
    ],
    "HANDLE_MISSING": [
        start(0).SerializeToString(),
        together(start(2), start(0)).SerializeToString(),
    ],
}


@pytest.mark.parametrize(
    ("reason", "message"),
    [(reason, message) for reason, messages in BAD_MESSAGES.items() for message in messages],
)
def test_a_message_that_belongs_to_no_generation_ends_the_stream(folder, reason, message):
    async def scenario(house):
        caller = OneCaller(house)
        caller.call = house.channel.stream_stream(
            METHOD, response_deserializer=pb.GenerateManyResponse.FromString
        )(timeout=TIMEOUT_S)
        await caller.say(start(1).SerializeToString())
        submission = await house.submitted()
        await caller.say(message)
        error = await caller.error()
        assert (await house.cancelled()).handle == submission.handle
        return error

    error = run(folder, scenario)
    assert isinstance(error, InvalidRequestError)
    assert error.reason == reason


def test_several_orders_of_one_message_are_carried_out_in_their_order(folder):
    async def scenario(house):
        caller = OneCaller(house)
        # The cancel is of the first start, and the last one has its handle again.
        await caller.say(together(start(1), start(2), together(cancel(1), cancel(77)), start(3)))
        assert (await caller.last_part(1)).failure.reason == "CANCELLED"
        await caller.say(together(start(1)))
        submissions = [await house.submitted() for _ in range(3)]
        for submission in submissions:
            house.scheduler.end(submission)
        ended = []
        while len(ended) < 3:
            part = await caller.next_part()
            if part.HasField("completion"):
                ended.append(part.handle)
        caller.call.cancel()
        return ended

    assert sorted(run(folder, scenario)) == [1, 2, 3]


def test_requests_that_come_at_once_go_on_together(folder):
    async def scenario(house):
        caller = OneCaller(house)
        await caller.say(*[start(handle) for handle in range(1, 4)])
        for _ in range(3):
            await house.submitted()
        house.scheduler.messages.clear()
        await caller.say(together(*[start(handle) for handle in range(4, 12)]))
        for _ in range(8):
            await house.submitted()
        caller.call.cancel()
        return [message.WhichOneof("message") for message in house.scheduler.messages]

    assert run(folder, scenario) == ["orders"]


def test_a_handle_in_use_ends_both(folder):
    async def scenario(house):
        caller = OneCaller(house)
        await caller.say(start(1))
        submission = await house.submitted()
        await caller.say(start(1))
        part = await caller.last_part(1)
        assert (await house.cancelled()).handle == submission.handle
        caller.call.cancel()
        return part.failure

    failure = run(folder, scenario)
    assert (failure.status, failure.reason) == ("ALREADY_EXISTS", "HANDLE_IN_USE")


def test_a_cancel_is_heard_and_its_end_told(folder):
    async def scenario(house):
        caller = OneCaller(house)
        await caller.say(start(1))
        submission = await house.submitted()
        await caller.say(cancel(1), cancel(2))
        part = await caller.last_part(1)
        assert (await house.cancelled()).handle == submission.handle
        caller.call.cancel()
        return part.failure

    failure = run(folder, scenario)
    assert (failure.status, failure.reason) == ("CANCELLED", "CANCELLED")


def test_a_caller_that_vanishes_takes_back_all_that_lives(folder):
    async def scenario(house):
        caller = OneCaller(house)
        await caller.say(start(1), start(2))
        submitted = {(await house.submitted()).handle for _ in range(2)}
        caller.call.cancel()
        assert {(await house.cancelled()).handle for _ in range(2)} == submitted
        await house.service.drain()
        assert house.link.num_living == 0

    run(folder, scenario)


def test_keys_open_the_stream_and_are_looked_at_again_for_each_start(folder):
    async def scenario(house):
        refused = await OneCaller(house).error()
        metadata = (("authorization", "Bearer k1"),)
        caller = OneCaller(house, metadata=metadata)
        await caller.say(start(1))
        submission = await house.submitted()
        house.authenticator.adopt({"k2": Caller("blue")})
        await caller.say(start(2))
        part = await caller.last_part(2)
        caller.call.cancel()
        return refused, submission, part.failure

    refused, submission, failure = run(folder, scenario, keys={"k1": Caller("red")})
    assert (refused.status, refused.reason) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")
    assert submission.tenant == "red"
    assert (failure.status, failure.reason) == ("UNAUTHENTICATED", "CREDENTIALS_UNKNOWN")


def test_a_drain_lets_run_what_runs_and_ends_the_streams_behind_it(folder):
    async def scenario(house):
        idle, caller = OneCaller(house), OneCaller(house)
        await caller.say(start(1))
        submission = await house.submitted()
        draining = asyncio.create_task(house.service.drain())
        await asyncio.sleep(0)
        await caller.say(start(2))
        refused = await caller.last_part(2)
        late = await OneCaller(house).error()
        house.scheduler.end(submission)
        await draining
        house.servicer.end_streams()
        # What had ended is told first.
        await caller.last_part(1)
        return refused.failure, late, await caller.error(), await idle.error()

    failure, *errors = run(folder, scenario)
    assert (failure.status, failure.reason) == ("UNAVAILABLE", "DRAINING")
    assert {(error.status, error.reason) for error in errors} == {("UNAVAILABLE", "DRAINING")}


def parts_of(*sizes):
    return [part_of(size, OutputDelta(sample_index=0, text="x" * size)) for size in sizes]


def sizes_of(messages):
    return [[len(part.delta.text) for part in message.parts] for message in messages]


def test_parts_are_one_message_unless_it_would_be_too_large():
    assert sizes_of(parts_to_proto(parts_of(10, 20, 30), 1000)) == [[10, 20, 30]]
    divided = list(parts_to_proto(parts_of(400, 500, 10, 600), 1000))
    assert sizes_of(divided) == [[400, 500], [10, 600]]
    assert all(message.ByteSize() <= 1000 for message in divided)
    # What is too large by itself goes by itself.
    assert sizes_of(parts_to_proto(parts_of(5, 5000), 1000)) == [[5], [5000]]


def logprobs(num_tops):
    return TokenLogprobs(
        token_id=3, logprob=-0.5, top_token_ids=[7] * num_tops, top_logprobs=[-1.0] * num_tops
    )


def completion():
    return Completion(handle=1, sample_index=2, finish_reason=FinishReason.STOP)


@pytest.mark.parametrize(
    ("news", "kind"),
    [
        (OutputDelta(sample_index=0, token_ids=[5]), "delta"),
        (OutputDelta(sample_index=3, text="é", token_ids=[5, 6]), "delta"),
        (OutputDelta(sample_index=1, text="a", token_ids=[5], logprobs=[logprobs(2)]), "delta"),
        (OutputDelta(sample_index=0, token_ids=[5], prompt_logprobs=[logprobs(1)]), "delta"),
        (Header(request_id="r", seed=2**63, trace_id="", num_prompt_tokens=2, model="m"), "header"),
        (
            SampleEnd(sample_index=2, finish_reason=FinishReason.STOP, completion=completion()),
            "completion",
        ),
    ],
)
def test_a_part_says_what_a_message_of_its_own_would_say(news, kind):
    (message,) = parts_to_proto([part_of(2**64 - 1, news)])
    (part,) = message.parts
    assert part.handle == 2**64 - 1
    assert getattr(part, kind) == getattr(output_to_proto(news), kind)
    assert part.WhichOneof("message") == kind


def test_a_failure_is_told_whole_and_rates_are_not_told():
    error = CancelledError("WHY", "because", num_things=3)
    (message,) = parts_to_proto([part_of(1, error)])
    failure = message.parts[0].failure
    assert (failure.status, failure.reason, failure.message) == ("CANCELLED", "WHY", "because")
    assert dict(failure.limits) == {"num_things": "3"}
    assert part_of(1, RatesLeft({})) is None


def test_more_logprobs_than_a_message_may_have_bytes_are_refused():
    many = [logprobs(20)] * (LIMITS.message_bytes_max // 100)
    with pytest.raises(ResourceExhaustedError) as caught:
        part_of(1, OutputDelta(sample_index=0, token_ids=[5], prompt_logprobs=many))
    assert caught.value.reason == "OUTPUT_TOO_LARGE"
    assert int(caught.value.limits["num_bytes"]) > LIMITS.message_bytes_max
