"""What comes out of a real model, served by real processes."""

import math
from collections.abc import Sequence

import pytest

from integration.models import EOS_TOKEN_ID
from integration.system import System
from pageframe.client import Delta, GenerationRequest, GenerationResult, Message, Sample
from pageframe.core.request import Delivery
from pageframe.core.step import FinishReason

PROMPT = "the quick brown fox"
# A random model ends nowhere in particular; nor shall its tests.
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def run(system: System, prompt: str = PROMPT, **fields) -> GenerationResult:
    fields.setdefault("max_tokens", 24)
    return system.complete(GenerationRequest(prompt=prompt, **fields))


def sample(system: System, **fields) -> Sample:
    (only,) = run(system, **fields).samples
    return only


def tokens_of(result: GenerationResult) -> list[list[int]]:
    return [entry.token_ids for entry in result.samples]


def test_greedy_output_is_the_same_alone_and_among_others(llama_system: System) -> None:
    alone = sample(llama_system, **GREEDY)
    assert len(alone.token_ids) == 24
    assert alone.finish_reason is FinishReason.LENGTH
    crowd = run(llama_system, num_samples=9, **GREEDY)
    assert tokens_of(crowd) == [alone.token_ids] * 9


def test_text_chat_and_token_ids_are_doors_to_the_same(llama_system: System) -> None:
    with llama_system.client() as client:
        token_ids = client.tokenize(PROMPT)
        messages = [Message("user", "hello")]
        chat_ids = client.tokenize(messages)
        assert client.detokenize(token_ids) == PROMPT
        assert client.detokenize(chat_ids) == "user: hello\nassistant: "
    by_text = sample(llama_system, **GREEDY)
    by_ids = llama_system.complete(GenerationRequest(token_ids=token_ids, max_tokens=24, **GREEDY))
    assert tokens_of(by_ids) == [by_text.token_ids]
    assert by_ids.started.num_prompt_tokens == len(token_ids)
    by_chat = llama_system.complete(GenerationRequest(messages=messages, max_tokens=24, **GREEDY))
    by_chat_ids = llama_system.complete(
        GenerationRequest(token_ids=chat_ids, max_tokens=24, **GREEDY)
    )
    assert tokens_of(by_chat) == tokens_of(by_chat_ids)


def test_samples_differ_and_their_seed_brings_them_back(llama_system: System) -> None:
    first = run(llama_system, num_samples=3, temperature=1.0, seed=42)
    assert len({tuple(token_ids) for token_ids in tokens_of(first)}) == 3
    again = run(llama_system, num_samples=3, temperature=1.0, seed=42)
    assert tokens_of(again) == tokens_of(first)
    assert [entry.text for entry in again.samples] == [entry.text for entry in first.samples]
    other = run(llama_system, num_samples=3, temperature=1.0, seed=43)
    assert tokens_of(other) != tokens_of(first)


def test_a_seed_that_was_picked_is_told(llama_system: System) -> None:
    drawn = run(llama_system, temperature=1.0)
    again = run(llama_system, temperature=1.0, seed=drawn.started.seed)
    assert tokens_of(again) == tokens_of(drawn)
    assert run(llama_system, temperature=1.0).started.seed != drawn.started.seed


def test_resuming_gives_the_rest(llama_system: System) -> None:
    whole = sample(llama_system, temperature=1.0, seed=7, max_tokens=40)
    rest = sample(
        llama_system,
        temperature=1.0,
        seed=7,
        max_tokens=40,
        resume_token_ids=whole.token_ids[:17],
    )
    assert rest.token_ids == whole.token_ids[17:]
    assert rest.finish_reason is whole.finish_reason


@pytest.mark.parametrize("delivery", [Delivery.COALESCED, Delivery.FINAL])
def test_delivery_changes_messages_and_not_output(llama_system: System, delivery: Delivery) -> None:
    request = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    every = sample(llama_system, delivery=Delivery.EVERY_TOKEN, **request)
    with llama_system.client() as client:
        asked = GenerationRequest(prompt=PROMPT, delivery=delivery, **request)
        deltas = [event for event in client.generate(asked) if isinstance(event, Delta)]
    assert [it for delta in deltas for it in delta.token_ids] == every.token_ids
    assert "".join(delta.text for delta in deltas) == every.text
    if delivery is Delivery.FINAL:
        assert len(deltas) == 1


def test_log_probabilities_come_for_output_and_prompt(llama_system: System) -> None:
    result = run(llama_system, num_logprobs=5, num_prompt_logprobs=2, max_tokens=8, **GREEDY)
    (only,) = result.samples
    assert [entry.token_id for entry in only.logprobs] == only.token_ids
    for entry in only.logprobs:
        assert len(entry.top_token_ids) == 5
        assert list(entry.top_logprobs) == sorted(entry.top_logprobs, reverse=True)
        assert entry.top_token_ids[0] == entry.token_id, "greedy takes the best"
        assert entry.logprob == pytest.approx(entry.top_logprobs[0])
        assert sum(map(math.exp, entry.top_logprobs)) < 1.0
    with llama_system.client() as client:
        prompt_ids = client.tokenize(PROMPT)
    # Nothing is known before the first token.
    assert [entry.token_id for entry in result.prompt_logprobs] == prompt_ids[1:]
    assert all(len(entry.top_token_ids) == 2 for entry in result.prompt_logprobs)
    assert all(math.isfinite(entry.logprob) for entry in result.prompt_logprobs)


def pieces(llama_system: System, token_ids: Sequence[int]) -> list[str]:
    with llama_system.client() as client:
        return [client.detokenize([token_id]) for token_id in token_ids]


def test_stop_strings_are_found_across_tokens(llama_system: System) -> None:
    """Every string of three characters that spans tokens, of the text that comes without it."""
    free = sample(llama_system, temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)
    ends, position = [], 0
    for piece in pieces(llama_system, free.token_ids):
        position += len(piece)
        ends.append(position)
    # Characters that are made of several tokens' bytes come only when all of them are there.
    starts = [end - 1 for end in ends if "\ufffd" not in free.text[end - 2 : end + 2]][1:-1]
    assert len(starts) > 3
    for start in starts[:6]:
        stop = free.text[start : start + 3]
        stopped = sample(
            llama_system,
            temperature=1.0,
            seed=5,
            max_tokens=60,
            ignore_eos=True,
            stop=["never in there", stop],
        )
        assert stopped.text == free.text[: free.text.index(stop)]
        assert (stopped.finish_reason, stopped.stop) == (FinishReason.STOP, stop)
        kept = sample(
            llama_system,
            temperature=1.0,
            seed=5,
            max_tokens=60,
            ignore_eos=True,
            stop=[stop],
            include_stop=True,
            delivery=Delivery.FINAL,
        )
        assert kept.text == stopped.text + stop


def test_output_ends_where_it_is_told(llama_system: System) -> None:
    free = sample(llama_system, **GREEDY)
    stop_id = free.token_ids[5]
    first = free.token_ids.index(stop_id)
    stopped = sample(llama_system, stop_token_ids=[stop_id], **GREEDY)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason is FinishReason.STOP
    held = sample(llama_system, stop_token_ids=[stop_id], min_tokens=first + 4, **GREEDY)
    assert len(held.token_ids) >= first + 4
    always_eos = {EOS_TOKEN_ID: 100.0}
    ended = sample(llama_system, temperature=0.0, logit_bias=always_eos)
    assert (len(ended.token_ids), ended.finish_reason) == (1, FinishReason.STOP)
    went_on = sample(llama_system, logit_bias=always_eos, **GREEDY)
    assert went_on.token_ids == [EOS_TOKEN_ID] * 24


def test_special_tokens_are_text_only_when_asked_for(llama_system: System) -> None:
    biased = {"temperature": 0.0, "logit_bias": {EOS_TOKEN_ID: 100.0}}
    assert sample(llama_system, **biased).text == ""
    assert sample(llama_system, keep_special_tokens=True, **biased).text == "<|end|>"


def test_usage_counts_what_was_there(llama_system: System) -> None:
    result = run(llama_system, num_samples=2, **GREEDY)
    for entry in result.samples:
        assert entry.account.num_prompt_tokens == result.started.num_prompt_tokens
        assert entry.account.num_completion_tokens == 24
        num_positions = result.started.num_prompt_tokens + 23
        assert entry.account.num_blocks_peak == -(-num_positions // 16)
