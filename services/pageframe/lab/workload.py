"""Requests to measure with: fixed lengths, random token ids, no end before the last token."""

import random
from dataclasses import dataclass

_FIRST_PLAIN_TOKEN_ID = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One request of a workload."""

    prompt_token_ids: list[int]
    num_output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadShape:
    """Bounds of a workload; lengths are drawn evenly between them, ends included."""

    num_requests: int
    num_prompt_tokens: tuple[int, int]
    num_output_tokens: tuple[int, int]


def make_workload(shape: WorkloadShape, vocab_size: int, seed: int) -> list[Load]:
    """The same requests for the same arguments; other token ids for another seed.

    Lengths depend on the shape alone, so that rounds with other ids do the same work.
    """
    lengths = random.Random(0)
    ids = random.Random(seed)
    return [
        Load(
            prompt_token_ids=[
                ids.randrange(_FIRST_PLAIN_TOKEN_ID, vocab_size)
                for _ in range(lengths.randint(*shape.num_prompt_tokens))
            ],
            num_output_tokens=lengths.randint(*shape.num_output_tokens),
            seed=ids.getrandbits(32),
        )
        for _ in range(shape.num_requests)
    ]
