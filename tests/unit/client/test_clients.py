"""Both clients over real gRPC, against a gateway that plays a script."""

import asyncio

import pytest

from pageframe.client import (
    AsyncPageframeClient,
    Delta,
    Finished,
    GenerationRequest,
    Message,
    PageframeClient,
    Started,
)
from pageframe.client.channel import channel_options
from pageframe.client.convert import request_to_proto
from pageframe.core.errors import InvalidRequestError, PageframeError, UnavailableError
from unit.client.played_gateway import (
    PlayedGateway,
    PlayedManyGateway,
    delta,
    end,
    header,
    playing,
)

GONE = UnavailableError("DRAINING", "gone")


def _run_sync(address, request, **options):
    with PageframeClient(address, **options) as client:
        return list(client.generate(request, timeout_s=20))


def _run_async(address, request, **options):
    async def scenario():
        async with AsyncPageframeClient(address, **options) as client:
            return [event async for event in client.generate(request, timeout_s=20)]

    return asyncio.run(scenario())


def _playing(run, *scripts):
    kind = PlayedManyGateway if run is _run_many else PlayedGateway
    return playing(*scripts, kind=kind)


def _run_many(address, request, **options):
    """As ``_run_async``, against a gateway that has many generations on a stream."""
    return _run_async(address, request, **options)


every_way = pytest.mark.parametrize("run", [_run_sync, _run_async, _run_many])


@every_way
def test_events_come_as_they_are_sent(run):
    with _playing(run, [header(), delta("a", 1), delta("b", 2), end(2)]) as (gateway, address):
        events = run(address, GenerationRequest(prompt="x", seed=1, max_tokens=2), api_key="k")
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished]
    assert gateway.requests[0].text == "x"
    assert gateway.requests[0].sampling.max_tokens == 2
    assert gateway.metadata[0]["authorization"] == "Bearer k"


@every_way
def test_session_and_prefix_handle_are_sent_on_every_attempt(run):
    scripts = [[header(), delta("a", 1), GONE], [header(), delta("b", 2), end(2)]]
    request = GenerationRequest(prompt="x", session_id="chat-7", prefix_handle="rules")
    with _playing(run, *scripts) as (gateway, address):
        run(address, request)
    sent = [(entry.session_id, entry.prefix_handle) for entry in gateway.requests]
    assert sent == [("chat-7", "rules")] * 2


@every_way
def test_a_broken_stream_is_resumed_unnoticed(run):
    scripts = [
        [header(seed=8), delta("a", 1), GONE],
        [GONE],
        [header(seed=8), delta("b", 2), end(2)],
    ]
    with _playing(run, *scripts) as (gateway, address):
        events = run(address, GenerationRequest(prompt="x"))
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished]
    assert [list(out.token_ids) for out in gateway.requests[2].resume_outputs] == [[1]]
    assert gateway.requests[2].sampling.seed == 8


@every_way
def test_typed_errors_reach_the_caller(run):
    error = InvalidRequestError("EMPTY_PROMPT", "the prompt has no tokens", num_prompt_tokens=0)
    with _playing(run, [error]) as (gateway, address), pytest.raises(InvalidRequestError) as caught:
        run(address, GenerationRequest(prompt=""))
    assert caught.value.reason == "EMPTY_PROMPT"
    assert dict(caught.value.limits) == {"num_prompt_tokens": "0"}
    assert len(gateway.requests) == 1


@every_way
def test_nobody_there_is_unavailable(run):
    with pytest.raises(UnavailableError):
        run("127.0.0.1:9", GenerationRequest(prompt="x"), retry_for_s=0.2)


@every_way
def test_a_stream_that_just_stops_is_no_end(run):
    with (
        _playing(run, [header(), delta("a", 1), None]) as (_, address),
        pytest.raises(PageframeError) as caught,
    ):
        run(address, GenerationRequest(prompt="x", best_of=2))
    assert caught.value.reason == "STREAM_ENDED"


@every_way
def test_several_samples_are_resumed_unnoticed(run):
    scripts = [
        [header(seed=8), delta("b", 2, sample_index=1), delta("a", 1), end(1, 0), GONE],
        [header(seed=8), end(1, 0), delta("c", 3, sample_index=1), end(2, 1)],
    ]
    with _playing(run, *scripts) as (gateway, address):
        events = run(address, GenerationRequest(prompt="x", num_samples=2))
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished, Delta, Finished]
    assert [list(out.token_ids) for out in gateway.requests[1].resume_outputs] == [[1], [2]]


def test_a_whole_generation_is_put_together():
    script = [
        header(num_prompt_tokens=4),
        delta("b", 3, sample_index=1),
        delta("a", 1),
        end(1, 1),
        delta("c", 2),
        end(2, 0, num_cached_tokens=2, num_blocks_saved=3),
    ]
    with playing(script) as (_, address), PageframeClient(address) as client:
        result = client.complete(GenerationRequest(prompt="x", num_samples=2))
        assert client.tokenize("four") == [4]
        assert client.tokenize([Message("user", "x")]) == [7]
    assert [(sample.text, sample.token_ids) for sample in result.samples] == [
        ("ac", [1, 2]),
        ("b", [3]),
    ]
    assert result.samples[0].account.num_cached_tokens == 2
    assert result.samples[0].account.num_blocks_saved == 3


@pytest.mark.parametrize(
    "fields", [{"prompt": "\ud800"}, {"top_k": -1}, {"token_ids": [-1]}, {"seed": 2**64}]
)
def test_what_cannot_be_encoded_is_an_invalid_request(fields):
    with pytest.raises(InvalidRequestError) as caught:
        request_to_proto(GenerationRequest(**fields))
    assert caught.value.reason == "FIELD_NOT_ENCODABLE"


@pytest.mark.parametrize(
    ("server", "is_local"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/run/x.sock", True),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
    ],
)
def test_a_proxy_is_not_asked_for_this_machine(server, is_local):
    assert (("grpc.enable_http_proxy", 0) in channel_options(server)) is is_local
