"""Speculative decoding without a second model: drafts are guessed here, and checked by the model.

    apply ─▶ propose ─▶ how many of each ─▶ room for them ─▶ one step computes and samples all
                                                             ─▶ keep what was sampled as guessed

A draft is what followed the last tokens when they stood in the sequence before (``ngrams``). The
executor guesses, and not the scheduler, because it holds the newest token: the scheduler's look-
ahead stays, and a plan only bounds what drafts may take. What is kept is what would have been
sampled anyway, with the same random key, so drafts never change a token (law 11; greedy
verification as in Stern et al., 2018, arXiv 1811.03115, and with drawn tokens because the draw of
each position is fixed beforehand).

How likely a guess is right is learnt by watching: what is proposed for a sequence is compared with
the tokens that it then got, whether or not the drafts were computed. So a sequence that is hard to
guess costs nothing but that comparison, and is drafted for again as soon as it has become easier.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pageframe.core.limits import LIMITS
from pageframe.core.plan import DraftBounds, Fork
from pageframe.core.step import FinishReason
from pageframe.executor.batch import Int32Array, StepBatch, StepOutput
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.finish import FinishRules
from pageframe.executor.memory.apply import AppliedStep
from pageframe.executor.memory.drafts import cover_drafts, give_back
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import SequenceTable
from pageframe.executor.ngrams import NGRAM_SIZES, NgramIndex
from pageframe.executor.reporting import only_samples

_FloatArray = NDArray[np.float64]

# What is known of a sequence nobody has seen guesses for: one of two was right.
_PRIOR_KEPT = 1.0
_PRIOR_TRIED = 2.0
# Older guesses count this much less with each newer one: some ten steps are remembered.
_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Proposals:
    """Guesses for n sequences.

    Attributes:
        token_ids: int32 [n, d], tokens to come.
        acceptance: float64 [n], the chance that a token is right if those before it are; below 1,
            and 0 where nothing is guessed.
    """

    token_ids: Int32Array
    acceptance: _FloatArray


class Drafter(Protocol):
    """Guesses tokens. What it guesses changes how fast tokens come, never which."""

    def propose(self, sequences: SequenceTable, rows: Int32Array, num_tokens: int) -> Proposals:
        """Guess the next ``num_tokens`` tokens of each of ``rows``, which have caught up."""
        ...

    def reset(self) -> None:
        """All rows are empty, and sequence ids may come again."""
        ...


class NgramDrafter:
    """Guesses that what followed the last tokens before follows again.

    Args:
        num_rows: Rows are in ``[0, num_rows)``.
        max_model_len: Most tokens of one sequence.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self._index = NgramIndex(num_rows, max_model_len)
        self._sequence_ids: Int64Array = np.zeros(num_rows, dtype=np.int64)
        shape = (num_rows, len(NGRAM_SIZES))
        self._kept: _FloatArray = np.full(shape, _PRIOR_KEPT)
        self._tried: _FloatArray = np.full(shape, _PRIOR_TRIED)
        # The last guess for each row, for which position it was, and by which n-gram; 0 for none.
        self._guesses: Int32Array = np.zeros(
            (num_rows, LIMITS.num_draft_tokens_max), dtype=np.int32
        )
        self._guess_at: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self._guess_by: Int64Array = np.zeros(num_rows, dtype=np.int64)

    def propose(self, sequences: SequenceTable, rows: Int32Array, num_tokens: int) -> Proposals:
        """Guess; see ``Drafter.propose``."""
        self._meet(sequences, rows)
        self._learn(sequences, rows)
        self._index.enter(sequences, rows)
        found, by = self._index.find(sequences, rows)
        is_found = found > 0
        # Behind the newest token the piece from there on begins again.
        period = np.maximum(sequences.num_tokens[rows] - found, 1)
        places = found[:, np.newaxis] + np.arange(num_tokens) % period[:, np.newaxis]
        token_ids: Int32Array = sequences.tokens[rows[:, np.newaxis], places]
        self._guesses[rows, :num_tokens] = token_ids
        self._guesses[rows, num_tokens:] = -1
        self._guess_at[rows] = np.where(is_found, sequences.num_tokens[rows], 0)
        self._guess_by[rows] = by
        return Proposals(token_ids, is_found * self._kept[rows, by] / self._tried[rows, by])

    def reset(self) -> None:
        """Know no sequence; see ``Drafter.reset``."""
        self._sequence_ids[:] = 0

    def _meet(self, sequences: SequenceTable, rows: Int32Array) -> None:
        """Begin anew with rows in which another sequence stands than the last time."""
        strangers = rows[self._sequence_ids[rows] != sequences.sequence_ids[rows]]
        if strangers.size:
            self._sequence_ids[strangers] = sequences.sequence_ids[strangers]
            self._index.begin(strangers)
            self._kept[strangers] = _PRIOR_KEPT
            self._tried[strangers] = _PRIOR_TRIED
            self._guess_at[strangers] = 0

    def _learn(self, sequences: SequenceTable, rows: Int32Array) -> None:
        """Compare the last guesses with what came."""
        guess_at = self._guess_at[rows]
        num_come = sequences.num_tokens[rows] - guess_at
        is_known = (guess_at > 0) & (num_come > 0)
        rows, guess_at, num_come = rows[is_known], guess_at[is_known], num_come[is_known]
        if not rows.size:
            return
        guesses = self._guesses[rows]
        ahead = np.arange(guesses.shape[1])
        is_come = ahead < num_come[:, np.newaxis]
        # What is beyond the newest token is not looked at, whatever stands there.
        last = sequences.tokens.shape[1] - 1
        places = np.minimum(guess_at[:, np.newaxis] + ahead, last)
        is_right = (sequences.tokens[rows[:, np.newaxis], places] == guesses) & is_come
        num_kept = is_right.cumprod(axis=1).sum(axis=1)
        num_guessed = (guesses >= 0).sum(axis=1)
        num_tried = np.minimum(num_kept + 1, np.minimum(num_come, num_guessed))
        by = self._guess_by[rows]
        self._kept[rows, by] = self._kept[rows, by] * _MEMORY + num_kept
        self._tried[rows, by] = self._tried[rows, by] * _MEMORY + num_tried


def draft_lengths(
    acceptance: _FloatArray, num_tokens_max: Int32Array, bounds: DraftBounds
) -> Int64Array:
    """How many drafts of each sequence are worth their computation.

    If each token is right with chance p when those before it are, the j-th is kept with chance
    p**j. All tokens cost the same, so those with the best chance come first, and none below the
    chance that pays (``bounds.acceptance_min``; the scheduler says how it comes to that).

    Args:
        acceptance: float64 [n], p of each sequence, in [0, 1).
        num_tokens_max: int32 [n], most tokens of each; may be negative.
        bounds: Of the step.

    Returns:
        int64 [n].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.log(bounds.acceptance_min) / np.log(acceptance)
    # Where nothing is guessed, no chance is high enough.
    worth = np.where(acceptance > 0, worth, 0)
    most = np.clip(num_tokens_max, 0, bounds.num_tokens_each)
    # A hair more, for a chance that is just enough.
    lengths: Int64Array = np.minimum(worth + 1e-9, most).astype(np.int64)
    order = np.argsort(-acceptance, kind="stable")
    wanted = lengths[order]
    num_left = bounds.num_tokens - (np.cumsum(wanted) - wanted)
    lengths[order] = np.clip(num_left, 0, wanted)
    return lengths


class Drafting:
    """Adds drafts to steps.

    Args:
        memory: Changed.
        rules: When each row's sequence ends.
        drafter: Guesses; an ``NgramDrafter`` is made with the first drafts where it is absent.
    """

    def __init__(self, memory: KvMemory, rules: FinishRules, drafter: Drafter | None) -> None:
        self._memory = memory
        self._rules = rules
        self._drafter = drafter

    def add(
        self, applied: AppliedStep, bounds: DraftBounds, forks: list[Fork], max_step_tokens: int
    ) -> None:
        """Let some of the sequences that take a token in this step compute drafts behind it."""
        sequences = self._memory.sequences
        num_tokens = min(bounds.num_tokens, max_step_tokens - applied.num_tokens)
        rows = self._candidates(applied, forks)
        if num_tokens < 1 or not rows.size:
            return
        bounds = replace(
            bounds,
            num_tokens=num_tokens,
            num_tokens_each=min(bounds.num_tokens_each, LIMITS.num_draft_tokens_max),
        )
        proposals = self._get_drafter().propose(sequences, rows, bounds.num_tokens_each)
        # The last token of a sequence is never computed, so no draft of it is of use.
        num_useful = self._rules.num_tokens_left(rows, sequences.num_tokens[rows]) - 1
        lengths = draft_lengths(proposals.acceptance, num_useful, bounds)
        num_blocks_left = bounds.num_blocks
        order = np.argsort(-proposals.acceptance, kind="stable")
        for index in order[lengths[order] > 0].tolist():
            row = int(rows[index])
            length, num_blocks = cover_drafts(
                self._memory, row, int(lengths[index]), num_blocks_left
            )
            num_blocks_left -= num_blocks
            if length:
                sequences.put_drafts(row, proposals.token_ids[index, :length])
                applied.drafts[row] = length
        if applied.drafts:
            drafted: Int32Array = np.array(list(applied.drafts), dtype=np.int32)
            is_drafted = np.isin(applied.decode_rows, drafted)
            applied.decode_rows = applied.decode_rows[~is_drafted]
            applied.chunks.update((row, 1 + length) for row, length in applied.drafts.items())

    def settle(self, applied: AppliedStep, batch: StepBatch) -> None:
        """Give back what rejected drafts took, and account for all; ``batch`` is without them."""
        sequences, result = self._memory.sequences, applied.result
        # They were added last.
        rows = batch.rows[-len(applied.drafts) :]
        give_back(self._memory, rows)
        num_accepted = batch.context_lens[-len(rows) :] - sequences.num_tokens[rows]
        for (row, num_drafted), num_kept in zip(
            applied.drafts.items(), num_accepted.tolist(), strict=True
        ):
            sequence = sequences.at_row(row)
            sequence.num_draft_tokens += num_drafted
            sequence.num_accepted_tokens += num_kept
            result.drafted_ids.append(sequence.sequence_id)
            result.num_drafted.append(num_drafted)
            result.num_accepted.append(num_kept)

    def reset(self) -> None:
        """No sequence is known any more."""
        if self._drafter is not None:
            self._drafter.reset()

    def _candidates(self, applied: AppliedStep, forks: list[Fork]) -> Int32Array:
        """Rows that decode by themselves, unless their result is needed as it is planned."""
        memory, rows = self._memory, applied.decode_rows
        parents = [memory.sequences.get(fork.parent_id) for fork in forks]
        busy = applied.named_rows | {parent.row for parent in parents if parent is not None}
        is_free = ~memory.sequences.is_steered[rows]
        if busy:
            is_free &= ~np.isin(rows, list(busy))
        free: Int32Array = rows[is_free].astype(np.int32)
        return free

    def _get_drafter(self) -> Drafter:
        if self._drafter is None:
            sequences = self._memory.sequences
            self._drafter = NgramDrafter(sequences.num_rows, sequences.max_model_len)
        return self._drafter


def without_rejected(
    batch: StepBatch, output: StepOutput, rules: FinishRules
) -> tuple[StepBatch, StepOutput]:
    """The step as if only those drafts had been computed that are kept.

    A draft is kept if the token that was sampled in its place is the same, if all drafts before it
    are kept, and if its sequence has not ended with one of them.
    """
    assert batch.drafts is not None, "nothing was drafted"
    drafts, token_ids = batch.drafts, output.token_ids
    reasons = rules.reasons(batch.sample_rows, batch.sample_positions + 1, token_ids)
    is_led_on = (token_ids == drafts.expected) & (reasons == FinishReason.NONE)
    num_breaks = np.cumsum(~is_led_on) - ~is_led_on
    num_breaks_before_first = np.maximum.accumulate(np.where(drafts.is_first, num_breaks, 0))
    is_kept = num_breaks == num_breaks_before_first
    num_rejected: Int32Array = np.zeros(len(batch.rows), dtype=np.int32)
    np.add.at(num_rejected, batch.samples, (~is_kept).astype(np.int32))
    num_behind = drafts.num_behind - num_rejected[batch.samples]
    batch = replace(
        batch,
        context_lens=batch.context_lens - num_rejected,
        drafts=replace(drafts, num_behind=num_behind),
    )
    return only_samples(batch, output, is_kept)
