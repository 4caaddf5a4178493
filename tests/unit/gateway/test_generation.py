"""The life of a request, against a scheduler that does what the test says."""

import asyncio

import pytest

from pageframe.core.errors import (
    AlreadyExistsError,
    CancelledError,
    NotFoundError,
    OutOfRangeError,
    PageframeError,
    UnavailableError,
)
from pageframe.core.request import Delivery
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.gateway.output import OutputDelta, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.rpc.auth import Authenticator
from pageframe.telemetry.context import TraceContext
from unit.gateway.driving import abandon, collect, encode, make_service, next_output, start
from unit.gateway.fake_link import FakeLink
from unit.gateway.replicas import make_facts


class RecordingSink:
    """Keeps spans."""

    def __init__(self):
        self.spans = []

    def span(self, name, **fields):
        self.spans.append((name, fields))


def test_a_request_becomes_a_submission_without_an_open_field(link, model_folder):
    async def scenario():
        service = make_service(link)
        outputs, header, following = await start(
            service, request_id="r1", tenant="red", priority=3, deadline_ns=77, num_samples=2
        )
        await abandon(outputs, following)
        return header

    header = asyncio.run(scenario())
    (submission,) = link.submissions
    assert submission.request_id == header.request_id == "r1"
    assert submission.prompt_token_ids == encode(model_folder, "the dog")
    assert submission.sampling.seed == header.seed
    assert submission.sampling.max_tokens == 256 - header.num_prompt_tokens
    assert (submission.num_samples, submission.priority, submission.deadline_ns) == (2, 3, 77)
    assert submission.cache_salt == Authenticator({}).cache_salt("red")
    assert submission.arrival_ns == 5
    assert submission.trace_id == b""
    assert header.trace_id == ""


def test_tokens_that_gather_are_one_delta(link, model_folder):
    ids = encode(model_folder, "the fox € runs")

    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service)
        for token_id in ids:
            link.mailboxes[0].put_tokens(0, [token_id])
        delta = await following
        link.end(1, num_cached_tokens=4)
        return delta, await next_output(outputs)

    delta, end = asyncio.run(scenario())
    assert delta == OutputDelta(
        sample_index=0, text="the fox € runs", token_ids=ids, logprobs=[], prompt_logprobs=[]
    )
    assert isinstance(end, SampleEnd)
    assert end.finish_reason is FinishReason.LENGTH
    assert end.completion.num_output_tokens == len(ids)
    assert end.completion.num_cached_tokens == 4


def test_a_stop_string_takes_the_sample_back_and_drops_later_tokens(link, model_folder):
    ids = encode(model_folder, "one fox two")

    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service, stop=["fox"])
        link.mailboxes[0].put_tokens(0, ids)
        delta = await following
        assert link.cancels == [(1, 0)]
        link.mailboxes[0].put_tokens(0, ids)
        link.end(1, reason=FinishReason.CANCELLED)
        return delta, await collect(outputs)

    delta, (end,) = asyncio.run(scenario())
    assert delta.text == "one "
    assert len(delta.token_ids) < len(ids)
    assert (end.finish_reason, end.stop) == (FinishReason.STOP, "fox")
    assert end.completion.num_output_tokens == len(delta.token_ids)


def test_held_back_text_comes_with_the_end(link, model_folder):
    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service, stop=["foxes"])
        link.mailboxes[0].put_tokens(0, encode(model_folder, "a fox"))
        first = await following
        link.end(1)
        return first, await collect(outputs)

    first, (rest, end) = asyncio.run(scenario())
    assert first.text + rest.text == "a fox"
    assert rest.token_ids == []
    assert end.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("delivery", "stop", "sent", "num_tokens"),
    [
        (Delivery.EVERY_TOKEN, (), Delivery.EVERY_TOKEN, 1),
        (Delivery.COALESCED, (), Delivery.COALESCED, 8),
        (Delivery.FINAL, (), Delivery.FINAL, 1),
        (Delivery.FINAL, ("x",), Delivery.COALESCED, 8),
    ],
)
def test_delivery_asks_the_scheduler_for_no_more_messages_than_needed(
    link, delivery, stop, sent, num_tokens
):
    async def scenario():
        outputs, _, following = await start(make_service(link), delivery=delivery, stop=stop)
        await abandon(outputs, following)

    asyncio.run(scenario())
    assert link.submissions[0].delivery is sent
    assert link.submissions[0].num_tokens_per_event_max == num_tokens


def test_final_delivery_is_one_delta(link, model_folder):
    ids = encode(model_folder, "the fox")

    async def scenario():
        outputs, _, following = await start(make_service(link), delivery=Delivery.FINAL)
        for token_id in ids:
            link.mailboxes[0].put_tokens(0, [token_id])
            await asyncio.sleep(0)
        assert not following.done()
        link.end(1)
        return [await following, *await collect(outputs)]

    delta, end = asyncio.run(scenario())
    assert delta.token_ids == ids
    assert isinstance(end, SampleEnd)


def test_samples_end_one_by_one(link, model_folder):
    ids = encode(model_folder, "fox")

    async def scenario():
        outputs, _, following = await start(make_service(link), num_samples=2)
        link.mailboxes[0].put_tokens(1, ids)
        link.end(1, 1)
        first = [await following, await next_output(outputs)]
        link.mailboxes[0].put_tokens(0, ids)
        link.end(1, 0)
        return first, await collect(outputs)

    first, second = asyncio.run(scenario())
    assert [output.sample_index for output in first] == [1, 1]
    assert [output.sample_index for output in second] == [0, 0]


def test_logprobs_stay_with_their_tokens(link, model_folder):
    ids = encode(model_folder, "one fox two")
    figures = [TokenLogprobs(token_id=token_id, logprob=-1.0) for token_id in ids]
    prompt = [TokenLogprobs(token_id=9, logprob=-2.0)]

    async def scenario():
        outputs, _, following = await start(make_service(link), stop=["fox"])
        link.mailboxes[0].put_prompt_logprobs(prompt[:])
        link.mailboxes[0].put_tokens(0, ids, figures)
        delta = await following
        await outputs.aclose()
        return delta

    delta = asyncio.run(scenario())
    assert [entry.token_id for entry in delta.logprobs] == delta.token_ids
    assert delta.prompt_logprobs == prompt


def test_a_caller_that_goes_away_takes_the_request_back(link):
    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service, request_id="r1")
        await abandon(outputs, following)
        assert link.cancels[-1] == (1, None)
        # Its name is free again, and nothing is left to wait for.
        again, _, following = await start(service, request_id="r1")
        await abandon(again, following)
        await asyncio.wait_for(service.drain(), 10)

    asyncio.run(scenario())


def test_two_living_requests_of_one_name_are_refused_per_tenant(link):
    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service, request_id="r1")
        with pytest.raises(AlreadyExistsError, match="r1"):
            await collect(service.generate(GenerateInput(text="x", request_id="r1")))
        other, _, other_following = await start(service, request_id="r1", tenant="blue")
        for pending, generation in ((following, outputs), (other_following, other)):
            await abandon(generation, pending)

    asyncio.run(scenario())


def test_cancel_ends_the_stream_of_that_tenant_only(link):
    async def scenario():
        service = make_service(link)
        _, _, following = await start(service, request_id="r1", tenant="red")
        with pytest.raises(NotFoundError):
            service.cancel("blue", "r1")
        service.cancel("red", "r1")
        with pytest.raises(CancelledError):
            await following
        assert link.cancels == [(1, None)]
        with pytest.raises(NotFoundError):
            service.cancel("red", "r1")

    asyncio.run(scenario())


def test_an_error_of_the_scheduler_is_the_callers(link):
    async def scenario():
        _, _, following = await start(make_service(link))
        link.mailboxes[0].fail(UnavailableError("SCHEDULER_LOST", "gone"))
        with pytest.raises(UnavailableError, match="gone"):
            await following

    asyncio.run(scenario())


def test_while_draining_nothing_new_is_taken(link):
    async def scenario():
        service = make_service(link)
        outputs, _, following = await start(service)
        draining = asyncio.ensure_future(service.drain())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as caught:
            await collect(service.generate(GenerateInput(text="x")))
        assert caught.value.reason == "DRAINING"
        assert not draining.done()
        link.end(1)
        await following
        await collect(outputs)
        await asyncio.wait_for(draining, 10)

    asyncio.run(scenario())


def test_far_too_long_text_is_refused(link):
    async def scenario():
        with pytest.raises(OutOfRangeError) as caught:
            await collect(make_service(link).generate(GenerateInput(text="the dog " * 500_000)))
        return caught.value

    error = asyncio.run(scenario())
    assert error.reason == "CONTEXT_TOO_LONG"
    assert int(error.limits["num_prompt_tokens_at_least"]) > 256
    assert link.submissions == []


def test_long_text_and_chat_are_encoded_like_short_ones(model_folder):
    link = FakeLink(make_facts(model_folder=str(model_folder), max_model_len=4096, num_blocks=999))
    text = "the quick brown fox " * 300

    async def scenario():
        outputs, _, following = await start(make_service(link), text=text)
        await abandon(outputs, following)

    asyncio.run(scenario())
    assert link.submissions[0].prompt_token_ids == encode(model_folder, text)


def test_spans_hang_under_the_callers_trace(link):
    sink = RecordingSink()
    parent = TraceContext(bytes(range(16)), 77, True)

    async def scenario():
        outputs = make_service(link, sink).generate(GenerateInput(text="the dog"), parent)
        header = await next_output(outputs)
        following = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        link.mailboxes[0].put_tokens(0, [5, 6])
        await following
        link.end(1, reason=FinishReason.STOP)
        await collect(outputs)
        return header

    header = asyncio.run(scenario())
    (tokenize_name, tokenize), (generate_name, generate) = sink.spans
    assert (tokenize_name, generate_name) == ("tokenize", "generate")
    assert header.trace_id == parent.trace_id.hex()
    assert generate["trace_id"] == tokenize["trace_id"] == parent.trace_id
    assert generate["parent_span_id"] == 77
    assert tokenize["parent_span_id"] == generate["span_id"]
    assert link.submissions[0].span_id == generate["span_id"].to_bytes(8, "big")
    assert generate["error"] == ""
    assert generate["attributes"]["gen_ai.usage.output_tokens"] == 2
    assert generate["attributes"]["gen_ai.response.finish_reasons"] == ["stop"]


def test_a_failed_request_has_a_failed_span(link):
    sink = RecordingSink()

    async def scenario():
        with pytest.raises(PageframeError):
            await collect(make_service(link, sink).generate(request))

    request = GenerateInput(text="x", model="other", tenant="acme", request_id="x" * 128)
    asyncio.run(scenario())
    ((name, span),) = sink.spans
    assert name == "generate"
    assert span["error"].startswith("UNKNOWN_MODEL")
    # What is searched for; it is there although nothing was looked at yet.
    attributes = span["attributes"]
    assert attributes["error.type"] == "UNKNOWN_MODEL"
    assert attributes["pageframe.tenant"] == "acme"
    assert attributes["pageframe.request_id"] == "x" * 128


def test_a_name_that_is_refused_for_its_length_is_cut_in_the_span(link):
    sink = RecordingSink()

    async def scenario():
        with pytest.raises(PageframeError):
            await collect(make_service(link, sink).generate(request))

    request = GenerateInput(text="x", request_id="y" * 100_000)
    asyncio.run(scenario())
    ((_, span),) = sink.spans
    assert span["attributes"]["error.type"] == "REQUEST_ID_TOO_LONG"
    assert span["attributes"]["pageframe.request_id"] == "y" * 128
