"""What engines are given to do, and what is read from the times of their tokens.

    request 0   ├──── first token ────┤─┤─┤─┤──┤─┤
    request 1   ├─ first token ─┤─┤─┤─┤──┤─┤
                                      └─ steady ─┘  from the last first token to the first end:
                                                    there a step gives each request one token

Whatever an engine is, a step is the time between two tokens of one request while all are decoding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bench.gpu.lab import Sizes

_FIRST_PLAIN_TOKEN_ID = 2
_NUM_OUT_MIN = 3
# In a dry run every token goes through all layers in the interpreter.
_DRY_DIVISOR = 16


@dataclass(frozen=True)
class Request:
    """One request; greedy, and nothing ends it before ``num_out`` tokens."""

    prompt_token_ids: list[int]
    num_out: int


@dataclass(frozen=True)
class Load:
    """Requests of one size that are handed in at once.

    Attributes:
        name: In figures and goals.
        num_requests: How many.
        num_in: Tokens of each prompt.
        num_out: Tokens that each gets.
        is_for_all: Whether peers are given it, too; else it is there for our steps alone.
    """

    name: str
    num_requests: int
    num_in: int
    num_out: int
    is_for_all: bool = True

    def scaled(self, sizes: Sizes) -> "Load":
        """As small as a dry run has to be."""
        return Load(
            self.name,
            sizes.batch(self.num_requests),
            sizes.scaled(self.num_in // _DRY_DIVISOR, 2),
            sizes.scaled(self.num_out, _NUM_OUT_MIN),
            self.is_for_all,
        )

    @property
    def mean_context(self) -> float:
        """Tokens that a sequence has, on average over its decode steps."""
        return self.num_in + self.num_out / 2

    @property
    def num_tokens(self) -> int:
        """Most tokens of keys and values that are held at once."""
        return self.num_requests * (self.num_in + self.num_out)

    def requests(self, sizes: Sizes, repetition: int) -> list[Request]:
        """The same lengths each time, and other tokens: nothing that is kept helps."""
        numbers = random.Random(f"{self.name} {repetition}")
        return [
            Request(
                [
                    numbers.randrange(_FIRST_PLAIN_TOKEN_ID, sizes.vocab_size)
                    for _ in range(self.num_in)
                ],
                self.num_out,
            )
            for _ in range(self.num_requests)
        ]


LOADS = (
    Load("64 x 1024", 64, 1024, 256),
    Load("8 x 4096", 8, 4096, 256),
    Load("1 x 1024", 1, 1024, 256),
    # Around 4,096 tokens of context each: the step that the goals speak of.
    Load("64 x 4096", 64, 4064, 64, is_for_all=False),
)


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        token_ids: In order.
        times_s: When each was there, seconds since all requests were handed in.
    """

    token_ids: list[int]
    times_s: list[float]


class Engine(Protocol):
    """Whatever serves requests."""

    name: str

    def facts(self) -> dict[str, object]:
        """Versions and choices, for the record."""
        ...

    def serve(self, requests: Sequence[Request]) -> list[Answer]:
        """Do all requests at once; one answer for each, in their order.

        Raises:
            EngineError: it cannot; the message is one sentence.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class EngineError(Exception):
    """An engine cannot do what is asked; one sentence that a person can act on."""


@dataclass(frozen=True)
class Figures:
    """What one load was to one engine; seconds.

    Attributes:
        tokens_per_second: Of output, from the first request to the last token.
        first_token_s: Median until a request's first token.
        gap_p50_s: Between two tokens of a request, all gaps; the median.
        gap_p99_s: The same; 99 of 100 are no longer.
        step_s: Median gap while all requests decode; None where they never do at once.
    """

    tokens_per_second: float
    first_token_s: float
    gap_p50_s: float
    gap_p99_s: float
    step_s: float | None


def check_answers(requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    """Make sure that every request got all of its tokens.

    Raises:
        EngineError: one did not.
    """
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        found = len(answer.times_s)
        if found != request.num_out:
            raise EngineError(f"request {index} got {found} of {request.num_out} tokens")


def figures_of(answers: Sequence[Answer]) -> Figures:
    """Read the figures from times."""
    times = [np.array(answer.times_s) for answer in answers]
    gaps = np.concatenate([np.diff(each) for each in times])
    firsts = np.array([each[0] for each in times])
    ends = np.array([each[-1] for each in times])
    steady_start, steady_end = firsts.max(), ends.min()
    steady = np.concatenate(
        [np.diff(each[(each >= steady_start) & (each <= steady_end)]) for each in times]
    )
    return Figures(
        tokens_per_second=sum(len(each) for each in times) / float(ends.max()),
        first_token_s=float(np.median(firsts)),
        gap_p50_s=float(np.percentile(gaps, 50)),
        gap_p99_s=float(np.percentile(gaps, 99)),
        step_s=float(np.median(steady)) if len(steady) else None,
    )
