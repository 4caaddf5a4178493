"""Chat completions through OpenAI's own client, against a scheduler that the test plays."""

import asyncio
import json

import openai
import pytest

from pageframe.core.errors import ResourceExhaustedError, UnavailableError
from pageframe.core.request import Delivery, RateLevel
from pageframe.core.step import FinishReason
from pageframe.rpc.auth import Caller
from unit.gateway.chat_house import HI, WEATHER, ask, refusal, with_house
from unit.gateway.http_house import Says, eventually


def test_a_reply_as_a_whole(tool_folder):
    async def scenario(house):
        raw = await house.client.chat.completions.with_raw_response.create(
            model="tiny", messages=HI, extra_headers={"x-request-id": "r-1"}
        )
        return raw.headers, raw.parse(), house.link.submissions[0], house.prompt()

    said = Says("the fox", account={"num_cached_tokens": 3})
    headers, reply, submission, prompt = with_house(tool_folder, scenario, said)
    assert prompt == "[user]hi"
    assert submission.delivery is Delivery.FINAL
    assert submission.request_id == "r-1"
    assert (headers["x-request-id"], reply.id) == ("r-1", "chatcmpl-r-1")
    assert headers["x-pageframe-seed"] == str(submission.sampling.seed)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "the fox")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    usage = reply.usage
    assert usage.prompt_tokens == len(submission.prompt_token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_a_stream_says_the_same_in_pieces_and_then_what_was_used(tool_folder):
    async def scenario(house):
        stream = await ask(house, n=2, stream=True, stream_options={"include_usage": True})
        return [chunk async for chunk in stream], house.link.submissions[0]

    script = [Says("the fox € runs"), Says("a dog", reason=FinishReason.LENGTH)]
    chunks, submission = with_house(tool_folder, scenario, script)
    assert submission.delivery is Delivery.EVERY_TOKEN
    texts, reasons, roles = ["", ""], ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
        roles[choice.index] += choice.delta.role or ""
        assert chunk.usage is None
    assert texts == ["the fox € runs", "a dog"]
    assert reasons == ["stop", "length"]
    assert roles == ["assistant", "assistant"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == len(submission.prompt_token_ids)
    assert chunks[-1].usage.completion_tokens > 4


def test_log_probabilities_are_told_with_the_bytes_of_their_tokens(tool_folder):
    async def scenario(house):
        whole = await ask(house, logprobs=True, top_logprobs=2)
        stream = await ask(house, logprobs=True, top_logprobs=2, stream=True)
        return whole, [chunk async for chunk in stream], house.link.submissions

    whole, chunks, submissions = with_house(tool_folder, scenario, Says("fox €"), Says("fox €"))
    content = whole.choices[0].logprobs.content
    assert submissions[0].sampling.num_logprobs == 2
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "fox €"
    assert content[0].top_logprobs[0].token == content[0].token
    assert content[0].top_logprobs[1].logprob == -9999.0, "JSON knows no infinity"
    told = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [entry for part in told for entry in part] == content


REFUSED = [
    ({"model": "other"}, 404, "model_not_found", "model"),
    ({"messages": []}, 400, "empty_prompt", "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "field_malformed", "messages[0].content"),
    ({"messages": [{"content": "x"}]}, 400, "field_malformed", "messages[0].role"),
    ({"messages": [{"role": "user", "content": "the fox " * 900}]},
     400, "context_length_exceeded", "messages"),
    ({"temperature": -1}, 400, "sampling_parameter_out_of_range", "temperature"),
    ({"temperature": "hot"}, 400, "field_malformed", "temperature"),
    ({"n": 0}, 400, "num_samples_out_of_range", "n"),
    ({"top_logprobs": 3}, 400, "top_logprobs_without_logprobs", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21},
     400, "sampling_parameter_out_of_range", "top_logprobs"),
    ({"logit_bias": {"fox": 1}}, 400, "field_malformed", "a name in logit_bias"),
    ({"logit_bias": {"511": 101}}, 400, "sampling_parameter_out_of_range", "logit_bias"),
    ({"stop": ["a"] * 65}, 400, "too_many_stop_strings", "stop"),
    ({"stream_options": {"include_usage": True}},
     400, "stream_options_without_stream", "stream_options"),
    ({"response_format": {"type": "grammar"}}, 400, "field_malformed", "response_format.type"),
    ({"response_format": {"type": "json_object"}, "tools": [WEATHER]},
     400, "grammar_with_field", "tools"),
    ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}},
     400, "grammar_with_field", "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}},
     400, "grammar_given_twice", "guided_regex"),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "strict": True, "schema": {"type": "strin"}}}},
     400, "grammar_invalid", "response_format"),
    ({"extra_body": {"guided_regex": "(a"}}, 400, "grammar_invalid", "regex"),
    ({"extra_body": {"guided_regex": "a" * 65537}}, 400, "grammar_size_out_of_range", "regex"),
    ({"tool_choice": "required"}, 400, "tool_choice_without_tools", "tool_choice"),
    ({"tools": [WEATHER] * 129}, 400, "too_many_tools", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
     400, "field_malformed", "tools[0].function.name"),
    ({"extra_body": {"sesion_id": "x"}}, 400, "unknown_field", "sesion_id"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     400, "unimplemented_feature", "messages[0].content[0].type 'image_url'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "code", "word", "param"), REFUSED)
def test_a_bad_field_is_named(tool_folder, fields, code, word, param):
    async def scenario(house):
        return await refusal(house, **fields), house.link.submissions

    error, submissions = with_house(tool_folder, scenario)
    assert (error.status_code, error.body["code"], error.body["param"]) == (code, word, param)
    assert error.body["type"] == "invalid_request_error"
    assert error.request_id
    assert submissions == []


def test_what_openai_takes_without_effect_is_taken(tool_folder):
    async def scenario(house):
        await ask(
            house,
            user="ada",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            response_format={"type": "text"},
            seed=-1,
            modalities=["text"],
            extra_body={"top_k": -1, "min_p": 0.1, "session_id": "s", "stop": None},
        )
        return house.link.submissions[0]

    submission = with_house(tool_folder, scenario, Says("x"))
    assert submission.sampling.seed == 2**64 - 1
    assert (submission.sampling.top_k, submission.sampling.min_p) == (0, 0.1)
    assert submission.session_id == "s"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_a_time_to_come_again(tool_folder, stream):
    async def scenario(house):
        return await refusal(house, stream=stream)

    full = ResourceExhaustedError("QUEUE_FULL", "8 requests are waiting", num_queued=8)
    # As the scheduler answers: only after the request was handed over.
    error = with_house(tool_folder, scenario, [full])
    assert isinstance(error, openai.RateLimitError)
    assert error.response.headers["retry-after"] == "1"
    assert error.body["limits"] == {"num_queued": "8"}
    assert error.body["type"] == "rate_limit_error"


def test_a_lost_scheduler_is_503(tool_folder):
    async def scenario(house):
        return await refusal(house)

    error = with_house(tool_folder, scenario, UnavailableError("SCHEDULER_LOST", "away"))
    assert (error.status_code, error.body["type"]) == (503, "server_error")
    assert error.response.headers["retry-after"] == "1"


def test_an_error_inside_a_stream_ends_it_without_done(tool_folder):
    async def scenario(house):
        stream = await ask(house, stream=True)
        first = await anext(stream)
        house.link.mailboxes[0].fail(UnavailableError("SCHEDULER_LOST", "away for long"))
        with pytest.raises(openai.APIError, match="away for long"):
            async for _ in stream:
                pass
        return first

    async def start(house):
        task = asyncio.ensure_future(scenario(house))
        await eventually(lambda: house.link.mailboxes)
        house.link.mailboxes[0].put_tokens(0, house.link.codec.encode("the"))
        return await task

    assert with_house(tool_folder, start).choices[0].delta.role == "assistant"


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_hangs_up_takes_its_request_back(tool_folder, stream):
    async def scenario(house):
        body = json.dumps({"messages": HI, "stream": stream}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{head}".encode() + body)
        await eventually(lambda: house.link.submissions)
        if stream:
            house.link.mailboxes[0].put_tokens(0, house.link.codec.encode("the"))
            await reader.readuntil(b"data: ")
        writer.close()
        await eventually(lambda: house.link.cancels)
        # Nothing of it lives: this returns at once.
        await asyncio.wait_for(house.service.drain(), 20)
        return house.link.cancels

    assert with_house(tool_folder, scenario) == [(1, None)]


def test_keys_are_asked_for_and_tell_the_tenant(tool_folder):
    async def scenario(house):
        error = await refusal(house)
        async with house.client_with("k1") as client:
            await client.chat.completions.create(model="tiny", messages=HI)
        return error, house.link.submissions[0].tenant

    keys = {"k1": Caller("alice")}
    error, tenant = with_house(tool_folder, scenario, Says("x"), keys=keys)
    assert isinstance(error, openai.AuthenticationError)
    assert (error.body["code"], error.body["type"]) == ("invalid_api_key", "authentication_error")
    assert tenant == "alice"


def test_a_time_limit_becomes_the_deadline(tool_folder):
    async def scenario(house):
        limits = {"0": None, "60000": None, "soon": None}
        for value in limits:
            headers = {"x-pageframe-timeout-ms": value}
            try:
                await ask(house, extra_headers=headers)
            except openai.APIStatusError as error:
                limits[value] = (error.status_code, error.body["reason"])
        return limits, [item.deadline_ns > 0 for item in house.link.submissions]

    limits, has_deadline = with_house(tool_folder, scenario, Says("x"))
    assert limits == {
        "0": (504, "DEADLINE_PASSED"),
        "60000": None,
        "soon": (400, "MALFORMED_HEADER"),
    }
    assert has_deadline == [True]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_left_of_a_rate_is_told_with_the_reply(tool_folder, stream):
    async def scenario(house):
        make = house.client.chat.completions.with_raw_response.create
        return [(await make(model="tiny", messages=HI, stream=stream)).headers for _ in range(2)]

    levels = {"requests": RateLevel(60, 59, 1_000_000_000), "tokens": RateLevel(900, 12, 59_200)}
    told, untold = with_house(tool_folder, scenario, Says("a fox", rates=levels), Says("a dog"))
    assert {name: told[name] for name in told if name.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "900",
        "x-ratelimit-remaining-tokens": "12",
        "x-ratelimit-reset-tokens": "0.000s",
    }
    assert not [name for name in untold if name.startswith("x-ratelimit")]
