"""Collects the log-probabilities of a prompt's tokens over its chunks."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from pageframe.core.step import TokenLogprobs
from pageframe.executor.batch import Int32Array, StepBatch
from pageframe.executor.model.token_sampler import TokenSampler

# Logits of a whole prompt at once would be gigabytes; these many rows stay near the cache.
_ROWS_AT_ONCE = 64


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


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Tokens ``[first, end)`` of a batch, whose logits speak about prompt tokens of ``row``.

    It may be empty, and is listed all the same, because an empty one can complete a prompt.

    Attributes:
        row: Whose prompt.
        first: Index into T.
        end: Index into T.
        shift: From an index into T to a position.
        context_len: Computed tokens of the sequence after the step.
    """

    row: int
    first: int
    end: int
    shift: int
    context_len: int


class Prompts:
    """All prompts on their way, by row."""

    def __init__(self) -> None:
        self._collections: dict[int, PromptCollection] = {}

    def admit(self, row: int, prompt_token_ids: Int32Array) -> None:
        """Begin to collect the prompt in ``row``."""
        self._collections[row] = PromptCollection(np.array(prompt_token_ids, dtype=np.int32))

    def release(self, row: int) -> None:
        """Forget the prompt in ``row``, if there is one."""
        self._collections.pop(row, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._collections.clear()

    def spans(self, batch: StepBatch) -> list[PromptSpan]:
        """Tokens of a batch whose logits speak about prompt tokens somebody asked about."""
        if not self._collections:
            return []
        spans = []
        for sequence, row in enumerate(batch.rows.tolist()):
            collection = self._collections.get(row)
            if collection is None:
                continue
            first, end = batch.query_start[sequence : sequence + 2].tolist()
            context_len = int(batch.context_lens[sequence])
            shift = context_len - end
            low, high = collection.wanted(first + shift, context_len)
            spans.append(PromptSpan(row, low - shift, high - shift, shift, context_len))
        return spans

    def collect(
        self,
        spans: list[PromptSpan],
        outputs: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        sampler: TokenSampler,
    ) -> dict[int, list[TokenLogprobs]]:
        """Add the spans of a step to their prompts.

        Args:
            spans: Of this step.
            outputs: The decoder's, of all tokens of all spans.
            logits_of: Makes logits of some rows of ``outputs``.
            sampler: Reads log-probabilities.

        Returns:
            The prompts that are complete, by row.
        """
        complete = {}
        taken = 0
        for span in spans:
            collection = self._collections[span.row]
            for low in range(span.first, span.end, _ROWS_AT_ONCE):
                high = min(span.end, low + _ROWS_AT_ONCE)
                collection.entries += sampler.prompt_logprobs(
                    span.row,
                    logits_of(outputs[taken : taken + high - low]),
                    collection.next_token_ids(low + span.shift, high + span.shift),
                )
                taken += high - low
            if collection.is_complete(span.context_len):
                complete[span.row] = self._collections.pop(span.row).entries
        return complete
