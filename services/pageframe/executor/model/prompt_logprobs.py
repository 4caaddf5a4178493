"""Collects the log-probabilities of a prompt's tokens over its chunks."""

from dataclasses import dataclass, field

import numpy as np

from pageframe.core.step import TokenLogprobs
from pageframe.executor.batch import Int32Array


@dataclass(slots=True)
class PromptCollection:
    """One prompt on its way.

    The logits at position ``p`` speak about the token at ``p + 1``:

        prompt          t0  t1  t2  t3  t4          num_prompt_tokens = 5
        logits of p      0   1   2   3              the last position speaks about output
        entries             t1  t2  t3  t4

    Attributes:
        prompt_token_ids: int32, the whole prompt.
        entries: What is collected so far, from the second prompt token on.
    """

    prompt_token_ids: Int32Array
    entries: list[TokenLogprobs] = field(default_factory=list)

    def wanted(self, start: int, end: int) -> tuple[int, int]:
        """The part of positions ``[start, end)`` that speaks about prompt tokens.

        What was collected of them before is forgotten: a sequence that gave up its tail computes
        those positions again.
        """
        stop = min(end, len(self.prompt_token_ids) - 1)
        assert start >= stop or start <= len(self.entries), (
            f"positions from {start} follow {len(self.entries)} collected entries; "
            "prompt logprobs need every position of the prompt computed"
        )
        if start < stop:
            del self.entries[start:]
        return start, max(start, stop)

    def next_token_ids(self, start: int, end: int) -> Int32Array:
        """The prompt tokens that logits of positions ``[start, end)`` speak about."""
        return np.ascontiguousarray(self.prompt_token_ids[start + 1 : end + 1])

    def is_complete(self, end: int) -> bool:
        """Whether the chunk that ends before position ``end`` is the prompt's last."""
        return end >= len(self.prompt_token_ids)
