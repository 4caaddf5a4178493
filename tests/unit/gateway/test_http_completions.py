"""Completions through OpenAI's own client, against a scheduler that the test plays."""

import asyncio

import openai
import pytest

from pageframe.core.errors import ResourceExhaustedError
from unit.gateway.http_house import Says, eventually, http_house
from unit.gateway.replicas import make_facts


def with_house(folder, scenario, *script):
    async def run():
        facts = make_facts(model_folder=str(folder), max_model_len=1024, num_blocks=128)
        async with asyncio.timeout(60), http_house(folder, facts, *script) as house:
            return await scenario(house)

    return asyncio.run(run())


def ask(house, **fields):
    return house.client.completions.create(**{"model": "tiny", "prompt": "the"} | fields)


def test_prompts_are_text_or_tokens_one_or_several(model_folder):
    async def scenario(house):
        ids = house.link.codec.encode("a dog")
        answers = [
            (await ask(house, prompt=prompt)).choices
            for prompt in ("the fox", ids, ["the", "a fox"], [ids, [5]])
        ]
        texts = [[choice.text for choice in choices] for choices in answers]
        return texts, [house.prompt(number) for number in range(6)]

    texts, prompts = with_house(model_folder, scenario, *(Says(f"t{i}") for i in range(6)))
    assert texts == [["t0"], ["t1"], ["t2", "t3"], ["t4", "t5"]]
    assert prompts[:5] == ["the fox", "a dog", "the", "a fox", "a dog"]


def test_choices_are_numbered_over_prompts_and_samples(model_folder):
    async def scenario(house):
        reply = await ask(house, prompt=["a", "the fox"], n=2)
        ids = [item.request_id for item in house.link.submissions]
        return reply, ids, [len(item.prompt_token_ids) for item in house.link.submissions]

    script = [Says("0"), Says("1")], [Says("2"), Says("3", account={"num_cached_tokens": 2})]
    reply, request_ids, lengths = with_house(model_folder, scenario, *script)
    assert [(choice.index, choice.text) for choice in reply.choices] == list(enumerate("0123"))
    assert len(set(request_ids)) == 2
    assert reply.usage.prompt_tokens == sum(lengths), "a prompt counts once, whatever n is"
    assert reply.usage.prompt_tokens_details.cached_tokens == 2


def test_an_echo_comes_first_and_its_log_probabilities_too(model_folder):
    async def scenario(house):
        whole = await ask(house, prompt="the fox", echo=True, logprobs=1)
        stream = await ask(house, prompt="the fox", echo=True, logprobs=1, stream=True)
        return whole.choices[0], [chunk.choices[0] async for chunk in stream], house.link

    whole, pieces, link = with_house(model_folder, scenario, Says(" runs"), Says(" runs"))
    assert whole.text == "the fox runs"
    told = whole.logprobs
    assert "".join(told.tokens) == whole.text
    assert told.token_logprobs[0] is None, "nothing is before the first token"
    assert None not in told.token_logprobs[1:]
    found = zip(told.text_offset, told.tokens, strict=True)
    assert all(whole.text.startswith(token, offset) for offset, token in found)
    assert told.top_logprobs[1][told.tokens[1]] == told.token_logprobs[1]
    assert link.submissions[0].sampling.num_prompt_logprobs == 1
    assert "".join(piece.text for piece in pieces) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [getattr(piece.logprobs, name) for piece in pieces if piece.logprobs]
        assert [item for part in streamed for item in part] == getattr(told, name)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_no_output_is_the_prompt_and_what_it_was_worth(model_folder, stream):
    async def scenario(house):
        fields = {"prompt": "the fox", "echo": True, "logprobs": 1, "max_tokens": 0}
        reply = await ask(house, **fields, stream=stream)
        choices = [chunk.choices[0] async for chunk in reply] if stream else [reply.choices[0]]
        return choices, house.link.submissions[0]

    choices, submission = with_house(model_folder, scenario, Says(" runs"))
    assert submission.sampling.max_tokens == 1
    assert "".join(choice.text for choice in choices) == "the fox"
    assert [token for choice in choices for token in choice.logprobs.tokens] == ["the", " fox"]
    assert choices[0].logprobs.token_logprobs[0] is None
    assert choices[-1].finish_reason == "length"


def test_a_part_of_a_character_is_named_by_its_bytes(model_folder):
    async def scenario(house):
        return (await ask(house, logprobs=0)).choices[0]

    choice = with_house(model_folder, scenario, Says("a ꙮ"))
    assert choice.text == "a ꙮ"
    assert any(token.startswith("bytes:\\x") for token in choice.logprobs.tokens)
    assert choice.logprobs.text_offset[0] == 0
    assert max(choice.logprobs.text_offset) <= len(choice.text)


def test_the_best_of_several_is_returned_and_all_are_paid_for(model_folder):
    async def scenario(house):
        return await ask(house, best_of=3), house.link.submissions[0]

    script = [Says("ß"), Says("!"), Says("the fox runs")]
    reply, submission = with_house(model_folder, scenario, script)
    assert submission.num_samples == 3
    (choice,) = reply.choices
    assert choice.text == "!", "the smallest token id is the likeliest here"
    assert choice.logprobs is None
    assert reply.usage.completion_tokens > 2


def test_stop_strings_end_the_text_before_them(model_folder):
    async def scenario(house):
        cut = await ask(house, stop="fox", max_tokens=99)
        kept = await ask(house, stop=["x", "q"], extra_body={"include_stop_str_in_output": True})
        return cut.choices[0], kept.choices[0], house.link.cancels

    script = [Says("a fox runs"), Says("a fox runs")]
    cut, kept, cancels = with_house(model_folder, scenario, *script)
    assert (cut.text, cut.finish_reason) == ("a ", "stop")
    assert (kept.text, kept.finish_reason) == ("a fox", "stop")
    assert (1, 0) in cancels


def test_the_default_length_is_openais(model_folder):
    async def scenario(house):
        await ask(house)
        await ask(house, max_tokens=3)
        return [item.sampling.max_tokens for item in house.link.submissions]

    assert with_house(model_folder, scenario, Says("x"), Says("x")) == [16, 3]


@pytest.mark.parametrize(
    ("fields", "word", "param"),
    [
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [[]]}, "field_malformed", "prompt[0]"),
        ({"prompt": ["a", 3]}, "field_malformed", "prompt[1]"),
        ({"prompt": {"a": 1}}, "field_malformed", "prompt"),
        ({"prompt": [512]}, "token_id_out_of_range", "token_ids"),
        ({"prompt": ["a"] * 129}, "too_many_prompts", "prompt"),
        ({"suffix": "end"}, "unimplemented_feature", "suffix"),
        ({"logprobs": 21}, "sampling_parameter_out_of_range", "logprobs"),
        ({"best_of": 2, "n": 3}, "best_of_out_of_range", "best_of"),
        ({"best_of": 2, "stream": True}, "best_of_streamed", "best_of"),
        ({"n": 2, "echo": True, "logprobs": 1, "stream": True}, "unimplemented_feature", "echo"),
        ({"max_tokens": 2000}, "context_length_exceeded", "prompt"),
        ({"max_tokens": 0}, "sampling_parameter_out_of_range", "max_tokens"),
        ({"prompt": None, "extra_body": {"messages": []}}, "empty_prompt", "prompt"),
    ],
)
def test_a_bad_field_is_named(model_folder, fields, word, param):
    async def scenario(house):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(house, **fields)
        return caught.value.body, house.link.submissions

    body, submissions = with_house(model_folder, scenario)
    assert (body["code"], body["param"]) == (word, param)
    assert submissions == []


def test_when_one_prompt_fails_the_others_are_taken_back(model_folder):
    async def scenario(house):
        asking = asyncio.ensure_future(ask(house, prompt=["a", "b"]))
        await eventually(lambda: len(house.link.mailboxes) == 2)
        house.link.mailboxes[1].fail(ResourceExhaustedError("QUEUE_FULL", "no place"))
        with pytest.raises(openai.RateLimitError):
            await asking
        await asyncio.wait_for(house.service.drain(), 20)
        return house.link.cancels

    assert sorted(with_house(model_folder, scenario)) == [(1, None), (2, None)]
