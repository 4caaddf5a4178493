"""Which tokens a grammar allows next, for the rows that have one.

The state of a grammar is a function of the output's tokens: an admission goes through them again,
whether they were sampled here, before a preemption, or by another process. So it is never saved.
Drafts need no going back either: only tokens that count are recorded.

    mask    a bit for each token, 32 in a word      1 0 0 1 1 0 …
    logits                                          . -∞ -∞ . . -∞ …
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.grammar.library import failure_of

# Below so many rows, handing the work to other threads takes longer than doing it.
_NUM_ROWS_IN_PARALLEL_MIN = 8
_WORD_BITS = 32
_WORD_BYTES = 4
_BYTE_BITS = 8
_ALL_BYTES: NDArray[np.uint8] = np.arange(256, dtype=np.uint8)


@dataclass(slots=True)
class GrammarState:
    """Where one output stands in its grammar.

    Attributes:
        matcher: Behind the newest token.
        num_tokens: Of the sequence, its prompt included.
        failure: Why it can no longer be followed; empty while it can.
    """

    matcher: LLMatcher
    num_tokens: int
    failure: str = ""

    def record(self, token_id: int) -> None:
        """Go on behind a token that was just sampled."""
        self.num_tokens += 1
        # One that cannot go on stays so, and is found out when its next mask is wanted.
        self.matcher.consume_token(token_id)


def follow(
    store: GrammarStore, grammar: Grammar, token_ids: NDArray[np.int32], num_prompt_tokens: int
) -> GrammarState:
    """Where a sequence of ``token_ids``, prompt and output, stands in ``grammar``.

    Raises:
        InvalidRequestError: GRAMMAR_INVALID; GRAMMAR_MISMATCH when the output so far is none of
            the grammar.
    """
    matcher = store.matcher(grammar)
    output = token_ids[num_prompt_tokens:].tolist()
    num_followed = matcher.try_consume_tokens(output) if output else 0
    if num_followed < len(output):
        raise InvalidRequestError(
            "GRAMMAR_MISMATCH",
            f"token {num_followed} of {len(output)} of the output does not follow the "
            f"{grammar.form.value}",
            num_followed=num_followed,
            num_tokens=len(output),
        )
    return GrammarState(matcher, len(token_ids))


class GrammarMasks:
    """Makes masks, packed: bit ``t % 8`` of byte ``t // 8`` says whether token ``t`` may come.

    Args:
        vocab_size: Number of token ids that logits have.
        eos_token_ids: Tokens that end an output.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        num_words = (vocab_size + _WORD_BITS - 1) // _WORD_BITS
        self._only_end = np.zeros(num_words * _WORD_BYTES, dtype=np.uint8)
        ends = np.array([i for i in eos_token_ids if i < vocab_size], dtype=np.int64)
        np.bitwise_or.at(self._only_end, ends // _BYTE_BITS, _bit_of(ends))
        self._threads: LLExecutor | None = None
        bits = np.unpackbits(_ALL_BYTES[:, None], axis=1, bitorder="little")
        self._addends = torch.from_numpy(np.where(bits, 0.0, -np.inf).astype(np.float32))

    def pack(self, states: Sequence[GrammarState]) -> NDArray[np.uint8]:
        """Which tokens may come next; a state that cannot be followed fails, and may only end.

        Returns:
            uint8 [n, ceil(V / 32) * 4], at least one bit of each row set.
        """
        masks = np.zeros((len(states), len(self._only_end)), dtype=np.uint8)
        if len(states) < _NUM_ROWS_IN_PARALLEL_MIN:
            for state, mask in zip(states, masks, strict=True):
                state.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        else:
            self._threads = self._threads or LLExecutor()
            places = [(state.matcher, index) for index, state in enumerate(states)]
            self._threads.unsafe_compute_mask_ptr(
                places, masks.ctypes.data, masks.shape[1], len(states)
            )
        for state, mask in zip(states, masks, strict=True):
            if state.matcher.is_error() or not mask.any():
                state.failure = failure_of(state.matcher)
                mask[:] = self._only_end
        return masks

    def forbid(
        self, logits: torch.Tensor, index: NDArray[np.int64], masks: NDArray[np.uint8]
    ) -> None:
        """Make tokens impossible in place whose bits are not set.

        A byte of a mask stands for eight numbers that are added to logits, 0 or minus infinity. So
        a bit for each token goes to a device, and looking eight up at once takes a
        quarter of the time of unpacking bits.

        Args:
            logits: float32 [n, V], finite or minus infinity.
            index: int64 [m], which of the n, each once.
            masks: uint8 [m, B], as ``pack`` makes them.
        """
        self._addends = self._addends.to(logits.device)
        packed = torch.from_numpy(masks).to(logits.device).int()
        addends = self._addends.index_select(0, packed.flatten()).view(len(masks), -1)
        rows = torch.from_numpy(index).to(logits.device)
        logits.index_add_(0, rows, addends[:, : logits.shape[1]])


def hold_back(mask: NDArray[np.uint8], token_ids: NDArray[np.int64]) -> None:
    """Take tokens out of a packed mask in place, unless nothing else is left: uint8 [B]."""
    rest = mask.copy()
    np.bitwise_and.at(rest, token_ids // _BYTE_BITS, ~_bit_of(token_ids))
    if rest.any():
        mask[:] = rest


def _bit_of(token_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.left_shift(1, token_ids % _BYTE_BITS).astype(np.uint8)
