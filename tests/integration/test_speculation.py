"""Drafts through real processes: what reaches a caller is what it would have got without them."""

from collections.abc import Callable, Iterator

import pytest

from integration.system import System
from pageframe.client import GenerationRequest

PROMPT = "the quick brown fox jumps over the lazy dog and the quick brown fox"
# Only these come, so the text repeats itself, and some of it can be guessed.
FEW_TOKENS = dict.fromkeys((5, 6, 9), 60.0)


@pytest.fixture(scope="module")
def drafting_system(start: Callable[..., System], llama_system: System) -> Iterator[System]:
    options = ("--device", "cpu", "--dtype", "fp32", "--num-blocks", "256")
    system = start(
        llama_system.model,
        *options,
        *("--speculation", "ngram", "--num-draft-tokens", "3"),
        runner="native",
    )
    yield system
    system.settle()
    system.stop()


def run(system: System, **fields):
    fields = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True} | fields
    return system.complete(GenerationRequest(**fields))


def test_a_caller_hears_how_many_were_guessed(drafting_system: System) -> None:
    one_token = {"logit_bias": {5: 90.0}, "temperature": 0.0}
    (sample,) = run(drafting_system, **one_token).samples
    account = sample.account
    assert sample.token_ids == [5] * 60
    # How many pay depends on the machine; the first are tried, and all of these are right.
    assert account.num_draft_tokens > 0
    assert account.num_accepted_tokens > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.05},
        {"temperature": 1.0, "seed": 3, "num_samples": 3, "stop_token_ids": (6,), "min_tokens": 9},
    ],
    ids=["greedy", "sampled", "samples that stop"],
)
def test_tokens_are_the_same(llama_system: System, drafting_system: System, fields) -> None:
    fields = {"logit_bias": FEW_TOKENS, "num_logprobs": 2} | fields
    plain, drafted = run(llama_system, **fields), run(drafting_system, **fields)
    for ours, theirs in zip(drafted.samples, plain.samples, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason is theirs.finish_reason
        assert [entry.logprob for entry in ours.logprobs] == pytest.approx(
            [entry.logprob for entry in theirs.logprobs], abs=1e-4
        )
        assert theirs.account.num_draft_tokens == 0
        assert 0 <= ours.account.num_accepted_tokens <= ours.account.num_draft_tokens
