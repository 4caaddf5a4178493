"""Changes to logits ahead of sampling: penalties, bias, and tokens that must not come.

Most changes touch a few tokens of a few rows, so all rows' changes of one kind are laid end to
end and applied by one gather and one scatter. Rows without changes are never looked at. Only
a grammar looks at the whole vocabulary, and comes last: what it forbids, nothing can bring back.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.grammar_masks import (
    GrammarMasks,
    GrammarState,
    follow,
    hold_back,
)
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.executor.model.history import TokenHistory
from pageframe.executor.model.masked_rows import Masked

# A penalty near zero divides a logit into infinity; a finite cap leaves it the best token. Half
# of it would do as well: only the difference of two logits has to stay finite.
_LOGIT_MAX = 1e38
_SMALLEST_PENALTY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowEdits:
    """What one row changes. ``history`` is None without penalties, ``grammar`` without one."""

    history: TokenHistory | None
    repetition: float
    presence: float
    frequency: float
    bias_ids: NDArray[np.int64]
    biases: NDArray[np.float32]
    held_back_ids: NDArray[np.int64]
    grammar: GrammarState | None


class LogitEdits:
    """The edits of all rows.

    Args:
        vocab_size: Number of token ids.
        eos_token_ids: Tokens that ``min_tokens`` holds back unless the row ignores them.
        grammars: Compiled grammars; None where no row can have one.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        grammars: GrammarStore | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._eos_token_ids = frozenset(eos_token_ids)
        self._masks = GrammarMasks(vocab_size, self._eos_token_ids)
        self._failures: dict[int, str] = {}
        self._rows: dict[int, _RowEdits] = {}

    def admit(
        self,
        row: int,
        sampling: SamplingParams,
        token_ids: NDArray[np.int32],
        num_prompt_tokens: int,
    ) -> bool:
        """Remember what ``row`` changes; returns whether it changes logits in every step.

        Raises:
            InvalidRequestError: its grammar cannot be followed, as ``follow`` says.
        """
        has_penalties = sampling.has_penalties
        always = has_penalties or bool(sampling.logit_bias) or sampling.grammar is not None
        if not always and not sampling.min_tokens:
            return False
        highest = int(token_ids.max(initial=0))
        assert highest < self._vocab_size, f"token {highest} of {self._vocab_size} in row {row}"
        grammar = None
        if sampling.grammar is not None:
            assert self._grammars is not None, f"row {row} has a grammar, and none is taken here"
            grammar = follow(self._grammars, sampling.grammar, token_ids, num_prompt_tokens)
        held_back = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            held_back |= self._eos_token_ids
        self._rows[row] = _RowEdits(
            history=TokenHistory(token_ids, num_prompt_tokens) if has_penalties else None,
            repetition=max(sampling.repetition_penalty, _SMALLEST_PENALTY),
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
            bias_ids=np.array(list(sampling.logit_bias.keys()), dtype=np.int64),
            biases=np.array(list(sampling.logit_bias.values()), dtype=np.float32),
            held_back_ids=np.array(
                sorted(token_id for token_id in held_back if token_id < self._vocab_size),
                dtype=np.int64,
            ),
            grammar=grammar,
        )
        return always

    def release(self, row: int) -> None:
        """Forget ``row``, which need not have been admitted with edits."""
        self._rows.pop(row, None)
        self._failures.pop(row, None)

    def masks(self, rows: list[int], is_holding_back: NDArray[np.bool_]) -> Masked:
        """What grammars let through, less what is held back if something else is left.

        Args:
            rows: n admitted rows.
            is_holding_back: bool [n], whether the row has not yet made ``min_tokens``.
        """
        followed = {
            index: grammar
            for index, row in enumerate(rows)
            if (grammar := self._grammar(row)) is not None
        }
        index = np.array(list(followed), dtype=np.int64)
        masks = self._masks.pack(list(followed.values()))
        for mask, (place, grammar) in zip(masks, followed.items(), strict=True):
            if is_holding_back[place]:
                hold_back(mask, self._rows[rows[place]].held_back_ids)
            if grammar.failure:
                self._failures[rows[place]] = grammar.failure
        return Masked(index, masks)

    def has_mask_only(self, row: int) -> bool:
        """Whether a grammar is all that changes the logits of ``row``."""
        edits = self._rows.get(row)
        if edits is None or edits.grammar is None:
            return False
        return edits.history is None and not edits.bias_ids.size

    def apply(
        self,
        logits: torch.Tensor,
        rows: list[int],
        is_holding_back: NDArray[np.bool_],
        masked: Masked | None = None,
    ) -> None:
        """Edit ``logits`` in place: penalties, bias, the tokens held back, then grammars.

        Args:
            logits: float32 [n, V].
            rows: The admitted row behind each of the n.
            is_holding_back: bool [n], whether the row has not yet made ``min_tokens``.
            masked: What ``masks`` said of these rows; None where no row has a grammar.
        """
        edits = [(index, self._rows[row]) for index, row in enumerate(rows)]
        _penalise(logits, [(index, e, e.history) for index, e in edits if e.history is not None])
        biased = [(index, e.bias_ids) for index, e in edits if e.bias_ids.size]
        if biased:
            biases = np.concatenate([e.biases for _, e in edits])
            logits[_places(logits, biased)] += torch.from_numpy(biases).to(logits.device)
        held = {index: e.held_back_ids for index, e in edits if is_holding_back[index]}
        followed = set() if masked is None else set(masked.index.tolist())
        free = [(index, ids) for index, ids in held.items() if index not in followed]
        if free:
            logits[_places(logits, free)] = -torch.inf
        if masked is not None and followed:
            self._masks.forbid(logits, masked.index, masked.masks)

    def _grammar(self, row: int) -> GrammarState | None:
        edits = self._rows.get(row)
        return None if edits is None else edits.grammar

    def failures(self) -> dict[int, str]:
        """Reasons by row, of those whose grammar cannot be followed; they may only end."""
        return dict(self._failures)

    def check_position(self, row: int, position: int) -> None:
        """Assert that the history of ``row`` ends where the next token goes."""
        edits = self._rows.get(row)
        if edits is not None and edits.history is not None:
            num_tokens = edits.history.num_tokens
            assert num_tokens == position, f"row {row} has {num_tokens} tokens, not {position}"
        if edits is not None and edits.grammar is not None:
            num_tokens = edits.grammar.num_tokens
            assert num_tokens == position, f"row {row} was followed to {num_tokens}, not {position}"

    def record(self, row: int, token_id: int) -> None:
        """Count the token that ``row`` has just sampled."""
        edits = self._rows[row]
        if edits.history is not None:
            edits.history.record(token_id)
        if edits.grammar is not None:
            edits.grammar.record(token_id)


def _penalise(logits: torch.Tensor, penalised: list[tuple[int, _RowEdits, TokenHistory]]) -> None:
    if not penalised:
        return
    places = _places(logits, [(index, history.token_ids) for index, _, history in penalised])
    counts = np.concatenate([history.output_counts for _, _, history in penalised])
    lengths = [len(history.token_ids) for _, _, history in penalised]
    # Three rows: repetition, presence, frequency, each repeated for its row's tokens.
    strengths = np.array(
        [(edits.repetition, edits.presence, edits.frequency) for _, edits, _ in penalised],
        dtype=np.float32,
    ).T.repeat(lengths, axis=1)
    offsets = strengths[1] * (counts > 0) + strengths[2] * counts
    repetition = torch.from_numpy(np.ascontiguousarray(strengths[0])).to(logits.device)
    values = logits[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= torch.from_numpy(offsets).to(logits.device)
    logits[places] = values.clamp_(max=_LOGIT_MAX)


def _places(
    logits: torch.Tensor, token_ids: list[tuple[int, NDArray[np.int64]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every (row of ``logits``, token id) pair, rows one after the other."""
    rows = np.repeat([index for index, _ in token_ids], [len(ids) for _, ids in token_ids])
    columns = np.concatenate([ids for _, ids in token_ids])
    return (
        torch.from_numpy(rows.astype(np.int64)).to(logits.device),
        torch.from_numpy(columns).to(logits.device),
    )
