"""OpenAI's own client before real processes."""

import asyncio
import json
import signal
import socket
from collections.abc import Iterator

import openai
import pytest

from integration.system import PATIENCE_S, System, eventually
from pageframe.client import GenerationRequest, Message

PROMPT = "the quick brown fox"
HI = [{"role": "user", "content": "hello"}]


def client_of(system: System, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://{system.http_address}/v1",
        api_key=key,
        max_retries=0,
        timeout=PATIENCE_S,
    )


@pytest.fixture
def client(llama_system: System) -> Iterator[openai.OpenAI]:
    with client_of(llama_system) as client:
        yield client


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_both_doors_say_the_same(llama_system: System, client: openai.OpenAI) -> None:
    by_grpc = llama_system.complete(
        GenerationRequest(messages=[Message("user", "hello")], max_tokens=24, temperature=0.0)
    )
    by_http = client.chat.completions.create(
        model=llama_system.model, messages=HI, max_completion_tokens=24, temperature=0
    )
    assert by_http.choices[0].message.content == by_grpc.samples[0].text
    assert by_http.usage.prompt_tokens == by_grpc.started.num_prompt_tokens
    text = client.completions.create(model="", prompt=PROMPT, max_tokens=24, temperature=0)
    same = llama_system.complete(GenerationRequest(prompt=PROMPT, max_tokens=24, temperature=0.0))
    assert text.choices[0].text == same.samples[0].text


def test_a_stream_put_together_is_the_reply(client: openai.OpenAI) -> None:
    fields = {"model": "", "messages": HI, "max_tokens": 32, "seed": 7, "temperature": 1.0}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    assert text_of(chunks) == whole.choices[0].message.content
    assert len(chunks) > 8, "it came in pieces"
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_samples_differ_and_their_seed_brings_them_back(client: openai.OpenAI) -> None:
    fields = {"model": "", "prompt": PROMPT, "n": 3, "max_tokens": 12, "seed": 42}
    first = [choice.text for choice in client.completions.create(**fields).choices]
    again = [choice.text for choice in client.completions.create(**fields).choices]
    assert first == again
    assert len(set(first)) == 3


def test_log_probabilities_are_the_models(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="", messages=HI, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    for entry in reply.choices[0].logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the best"
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob
    echoed = client.completions.create(
        model="", prompt=PROMPT, max_tokens=2, echo=True, logprobs=1, temperature=0
    ).choices[0]
    assert echoed.text.startswith(PROMPT)
    assert "".join(echoed.logprobs.tokens).startswith(PROMPT)
    assert echoed.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in echoed.logprobs.token_logprobs[1:])


def test_a_prompt_that_was_computed_before_is_told_as_cached(client: openai.OpenAI) -> None:
    prompt = "the dog and the fox " * 8
    counts = [
        client.completions.create(
            model="", prompt=prompt, max_tokens=1
        ).usage.prompt_tokens_details.cached_tokens
        for _ in range(2)
    ]
    assert counts[0] < 16, "less than a block"
    assert counts[1] >= 16


def test_a_stop_string_ends_the_output(client: openai.OpenAI) -> None:
    fields = {"model": "", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**fields).choices[0].text
    stop = whole[5:7]
    cut = client.completions.create(**fields, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_the_model_is_listed_and_another_one_is_not_found(
    llama_system: System, client: openai.OpenAI
) -> None:
    (model,) = client.models.list().data
    assert model.id == llama_system.model
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt=PROMPT)
    assert caught.value.code == "model_not_found"


def test_a_caller_that_hangs_up_leaves_nothing_running(slow_system: System) -> None:
    with client_of(slow_system) as client:
        stream = client.chat.completions.create(
            model="", messages=HI, max_tokens=2000, stream=True,
            extra_headers={"x-request-id": "hang-up"},
        )  # fmt: skip
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        assert slow_system.sequence("hang-up") is not None
        stream.close()
        eventually(lambda: slow_system.sequence("hang-up") is None, "the request is taken back")
    slow_system.settle()


def test_a_whole_reply_that_nobody_waits_for_is_taken_back(slow_system: System) -> None:
    host, _, port = slow_system.http_address.rpartition(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2000}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: gone\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as caller:
        caller.sendall(head.encode() + body)
        eventually(lambda: slow_system.sequence("gone") is not None, "the request runs")
    eventually(lambda: slow_system.sequence("gone") is None, "the request is taken back")
    slow_system.settle()


def test_a_trace_goes_on_from_the_callers(slow_system: System) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with client_of(slow_system) as client:
        raw = client.completions.with_raw_response.create(
            model="", prompt="a", max_tokens=1,
            extra_headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
        )  # fmt: skip
    assert raw.headers["x-pageframe-trace-id"] == trace_id


def test_many_callers_at_once_each_get_their_own(slow_system: System) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"http://{slow_system.http_address}/v1", api_key="x", timeout=PATIENCE_S
        ) as client:
            calls = [
                client.completions.create(
                    model="", prompt=f"prompt {number}", max_tokens=8, seed=number, echo=True
                )
                for number in range(40)
            ]
            replies = await asyncio.gather(*calls)
        return [reply.choices[0].text for reply in replies]

    texts = asyncio.run(run())
    assert all(text.startswith(f"prompt {number}") for number, text in enumerate(texts))
    slow_system.settle()


def test_a_lost_executor_is_a_wait_and_not_an_error(start, sim_model) -> None:
    system = start(sim_model, "--sim-step", "4ms")
    with client_of(system) as client:
        fields = {"model": "", "messages": HI, "max_tokens": 300, "seed": 3, "stream": True}
        whole = text_of(client.chat.completions.create(**fields))
        stream = client.chat.completions.create(**fields)
        first = [next(stream) for _ in range(20)]
        system.kill_service("executor")
        assert text_of([*first, *stream]) == whole
    system.wait_restarted("executor")
    system.settle()
    system.stop()


def test_keys_are_asked_for(start, sim_model, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k1 alice\n")
    keys.chmod(0o600)
    system = start(sim_model, "--api-keys", str(keys))
    with client_of(system, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model="", prompt="a")
    with client_of(system, "k1") as client:
        assert client.completions.create(model="", prompt="a", max_tokens=1).choices
    system.settle()
    system.stop()


def test_a_gateway_that_comes_back_is_where_it_was(start, sim_model) -> None:
    system = start(sim_model)
    system.kill_service("gateway")
    system.wait_restarted("gateway")

    def answers() -> bool:
        with client_of(system) as client:
            try:
                return bool(client.completions.create(model="", prompt="a", max_tokens=1).choices)
            except openai.APIConnectionError:
                return False

    eventually(answers, "the door is open again at the same address")
    system.settle()
    system.stop()


def test_a_stop_lets_a_running_reply_end(start, sim_model) -> None:
    system = start(sim_model, "--sim-step", "4ms")
    with client_of(system) as client:
        stream = client.completions.create(
            model="", prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(stream)
        system.process.send_signal(signal.SIGINT)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert first.id == rest[-1].id
    system.wait_ended()
