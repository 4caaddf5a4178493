"""Five workloads that tell engines apart, as token ids with exact output lengths.

    A   64 requests at once, lengths as in chats (log-normal), greedy
    B   48 requests at once that share their first 512 tokens, greedy
    C   16 requests of 32 tokens in and 256 out: decoding alone, greedy
    D   8 prompts of 256 tokens, 8 samples each
    E   one request: how long a first token takes, and each one behind it

Repetitions have other token ids of the same lengths, and so has each attempt at one: nothing kept
from one helps another.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from statistics import NormalDist

_SEED = 20_241_121
_FIRST_PLAIN_TOKEN_ID = 17
NAMES = "ABCDE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; no engine may end it before ``num_output_tokens``."""

    prompt_token_ids: list[int]
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that are handed in at once."""

    name: str
    requests: list[Request]
    temperature: float = 0.0
    num_samples: int = 1

    @property
    def num_output_tokens(self) -> int:
        """Tokens made in all."""
        return self.num_samples * sum(request.num_output_tokens for request in self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens handed in, each request's prompt counted once."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    def to_json(self) -> dict[str, object]:
        """For a worker."""
        return asdict(self)


def attempts(name: str, repetition: int, vocab_size: int) -> Iterator[Workload]:
    """The workload of a repetition for each time that it is tried, without end."""
    return (make_workload(name, repetition, vocab_size, attempt) for attempt in count())


def make_workload(name: str, repetition: int, vocab_size: int, attempt: int = 0) -> Workload:
    """The workload ``name``, one of ``NAMES``, with the ids of an attempt at ``repetition``."""
    ids = random.Random(f"{_SEED} {name} {repetition} {attempt}")

    def tokens(count: int) -> list[int]:
        return [ids.randrange(_FIRST_PLAIN_TOKEN_ID, vocab_size) for _ in range(count)]

    if name == "A":
        prompts = _chat_lengths("prompts", mean=160, spread=1.0, longest=768)
        outputs = _chat_lengths("outputs", mean=100, spread=0.8, longest=256)
        lengths = zip(prompts, outputs, strict=True)
        return _greedy(name, [(tokens(num_in), num_out) for num_in, num_out in lengths])
    if name == "B":
        prefix = tokens(512)
        return _greedy(name, [(prefix + tokens(32), 32) for _ in range(48)])
    if name == "C":
        return _greedy(name, [(tokens(32), 256) for _ in range(16)])
    if name == "D":
        requests = [Request(prompt_token_ids=tokens(256), num_output_tokens=64) for _ in range(8)]
        return Workload(name=name, requests=requests, temperature=0.8, num_samples=8)
    assert name == "E", f"there is no workload {name}"
    return _greedy(name, [(tokens(128), 128)])


def first_token_of(workload: Workload) -> Workload:
    """The same prompts, backwards, with one token of output: what a first token costs."""
    requests = [
        Request(prompt_token_ids=request.prompt_token_ids[::-1], num_output_tokens=1)
        for request in workload.requests
    ]
    return Workload(name=workload.name, requests=requests)


def _greedy(name: str, requests: list[tuple[list[int], int]]) -> Workload:
    return Workload(
        name=name,
        requests=[
            Request(prompt_token_ids=prompt, num_output_tokens=num_output)
            for prompt, num_output in requests
        ],
    )


def _chat_lengths(what: str, *, mean: float, spread: float, longest: int) -> list[int]:
    """64 lengths from 8 to ``longest``, log-normal, in a fixed order drawn by ``what``.

    They are the distribution's quantiles, so that the mean is what was asked for and not chance.
    """
    deviates = [NormalDist().inv_cdf((index + 0.5) / 64) for index in range(64)]

    def lengths(middle: float) -> list[int]:
        return [
            min(longest, max(8, round(math.exp(middle + spread * deviate)))) for deviate in deviates
        ]

    low, high = 0.0, math.log(longest)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) < 64 * mean else (low, middle)
    found = lengths(high)
    random.Random(f"{_SEED} {what}").shuffle(found)
    return found
