"""Chooses the next token of every sequence that asks for one.

A choice is a pure function of (logits, sampling parameters, token history, seed, sample index,
position). Nothing is carried from one random number to the next, so a sequence that lost its
memory and was admitted again, or that runs beside other sequences than before, goes on with the
tokens it would have had.

The order of operations, for rows that ask for them:

    raw logits ── log-probabilities are read here
      1. repetition penalty (prompt and output), then frequency and presence (output)
      2. logit bias
      3. min_tokens: end-of-sequence and stop tokens become impossible; grammar: all tokens that
         would lead out of it
      4. temperature 0, or top-k 1: the best token, the lowest id of equals; else
      5. temperature    6. top-k    7. top-p    8. min-p    9. draw one token

A batch of plain greedy rows costs one pass over the logits and no work per row; a feature costs
only the rows that use it.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, TokenLogprobs
from pageframe.executor.batch import DraftSamples, Int32Array
from pageframe.executor.model import philox
from pageframe.executor.model.candidates import best_candidates
from pageframe.executor.model.draw import Draws, draw
from pageframe.executor.model.edited_choice import Turn, choose_edited
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.executor.model.logit_edits import LogitEdits
from pageframe.executor.model.logprobs import token_logprobs
from pageframe.executor.model.selection import best_token, check_finite
from pageframe.kernels.cpu.draw import Choice, CpuDraw, DrawColumns

_DRAWS = 1
_EDITS = 2
_LOGPROBS = 4
_ADMITTED = 8
# The edits of a beam: they change its candidates, and no token is chosen by itself.
_BEAM_EDITS = 16

# Below this a temperature would be a zero, or a denormal, in float32.
_TEMPERATURE_MIN = float(np.finfo(np.float32).tiny)


class Sampler:
    """Sampling state of all rows, as columns.

    Args:
        vocab_size: Number of token ids that logits have.
        max_num_rows: Rows are in ``[0, max_num_rows)``.
        eos_token_ids: The model's own end-of-sequence tokens.
        device: Where logits will be.
        grammars: Compiled grammars; None where no sequence can have one.
        kernels: Who chooses instead of NumPy and PyTorch, where ``device`` is the CPU; None for
            nobody.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_rows: int,
        eos_token_ids: Iterable[int],
        device: torch.device | str = "cpu",
        grammars: GrammarStore | None = None,
        kernels: CpuDraw | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._grammars = grammars
        self._kernels = kernels
        self._edits = LogitEdits(vocab_size, eos_token_ids, grammars)
        self._flags = np.zeros(max_num_rows, dtype=np.uint8)
        self._seed = np.zeros(max_num_rows, dtype=np.uint64)
        self._sample_index = np.zeros(max_num_rows, dtype=np.uint32)
        self._temperature = np.zeros(max_num_rows, dtype=np.float32)
        self._top_k = np.zeros(max_num_rows, dtype=np.int64)
        self._top_p = np.zeros(max_num_rows, dtype=np.float64)
        self._min_p = np.zeros(max_num_rows, dtype=np.float32)
        self._columns = DrawColumns(
            seeds=self._seed,
            sample_indices=self._sample_index,
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
        )
        # The position from which end-of-sequence and stop tokens may come.
        self._earliest_stop = np.zeros(max_num_rows, dtype=np.int64)
        self._num_logprobs = np.zeros(max_num_rows, dtype=np.int64)
        self._num_prompt_logprobs = np.zeros(max_num_rows, dtype=np.int64)
        self._num_candidates = np.zeros(max_num_rows, dtype=np.int64)
        self._earliest_candidate_stop = np.zeros(max_num_rows, dtype=np.int64)

    def admit(
        self,
        row: int,
        *,
        sampling: SamplingParams,
        sample_index: int,
        token_ids: Int32Array,
        num_prompt_tokens: int,
    ) -> None:
        """Set up ``row`` for a sequence.

        Args:
            row: Not in use.
            sampling: Validated parameters.
            sample_index: Which of its request's samples the sequence is.
            token_ids: int32 [n], all its known tokens, prompt first; after a preemption the
                output made so far too.
            num_prompt_tokens: How many of them are prompt.

        Raises:
            InvalidRequestError: GRAMMAR_INVALID or GRAMMAR_MISMATCH; ``row`` has to be released.
        """
        assert not self._flags[row], f"row {row} is in use"
        assert len(token_ids) >= num_prompt_tokens, f"{len(token_ids)} < {num_prompt_tokens}"
        # From here on the row can be released, also if what follows fails half way.
        self._flags[row] = flags = _ADMITTED
        # One token kept is the best token: no need to draw from a set of one.
        if not (sampling.is_greedy or sampling.top_k == 1 or sampling.num_candidates):
            flags |= _DRAWS
        if sampling.num_logprobs >= 0:
            flags |= _LOGPROBS
        if self._edits.admit(row, sampling, token_ids, num_prompt_tokens):
            flags |= _BEAM_EDITS if sampling.num_candidates else _EDITS
        self._flags[row] = flags
        self._seed[row] = sampling.seed
        self._sample_index[row] = sample_index
        self._temperature[row] = max(sampling.temperature, _TEMPERATURE_MIN)
        self._top_k[row] = min(sampling.top_k or self._vocab_size, self._vocab_size)
        self._top_p[row] = sampling.top_p
        self._min_p[row] = sampling.min_p
        earliest_stop = num_prompt_tokens + sampling.min_tokens
        self._earliest_stop[row] = 0 if sampling.num_candidates else earliest_stop
        self._earliest_candidate_stop[row] = earliest_stop
        self._num_logprobs[row] = sampling.num_logprobs
        self._num_prompt_logprobs[row] = sampling.num_prompt_logprobs
        self._num_candidates[row] = sampling.num_candidates

    def release(self, row: int) -> None:
        """Forget the sequence in ``row``; the row may be admitted again."""
        assert self._flags[row], f"row {row} is not in use"
        self._flags[row] = 0
        self._edits.release(row)

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """Start what an admission would wait for; whether it is there within ``wait_s`` seconds."""
        if self._grammars is None or sampling.grammar is None:
            return True
        return self._grammars.prepare(sampling.grammar, wait_s)

    def failures(self) -> dict[int, str]:
        """Reasons by row, of those that ended in this step because they could not go on."""
        return self._edits.failures()

    def close(self) -> None:
        """Give back what was compiled, and the threads that drew."""
        self._kernels = None
        if self._grammars is not None:
            self._grammars.close()

    def sample(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        drafts: DraftSamples | None = None,
    ) -> tuple[Int32Array, dict[int, TokenLogprobs]]:
        """Choose the next tokens of sequences, and count those that they get in their histories.

        Args:
            logits: float32 [K, V]; left unchanged.
            rows: int32 [K], admitted rows, each at most once unless ``drafts`` are checked.
            positions: int32 [K], the position that each new token will take, which is the
                number of tokens its sequence has by then.
            drafts: Which samples only count if those before them are as expected; what is chosen
                for a sample that does not count means nothing.

        Returns:
            Token ids int32 [K], and log-probabilities by index into K where asked for.

        Raises:
            InternalError: LOGITS_NOT_FINITE when the best logit of a row is NaN or infinite;
                limit ``rows`` names those rows, separated by commas. Nothing was counted.
        """
        assert logits.shape == (len(rows), self._vocab_size), f"logits are {tuple(logits.shape)}"
        assert logits.device.type == self._device.type, f"logits are on {logits.device}"
        flags = self._flags[rows]
        assert flags.all(), f"rows {rows[flags == 0].tolist()} are not in use"
        is_drawn = flags & _DRAWS != 0
        is_holding_back = positions < self._earliest_stop[rows]
        if self.is_plain(rows, positions):
            _, tokens = self._choose(logits, rows, positions, is_drawn)
            return tokens.astype(np.int32), {}

        is_edited = (flags & _EDITS != 0) | is_holding_back
        maxima, tokens = self._choose(logits, rows, positions, is_drawn & ~is_edited)
        edited = np.flatnonzero(is_edited)
        counts = np.ones(len(rows), dtype=np.bool_)
        edits = Turn(
            logits=logits, maxima=maxima, best_ids=tokens, index=edited, rows=rows,
            positions=positions, is_holding_back=is_holding_back, is_drawn=is_drawn,
            best=self._best,
            draw=lambda values, best, index, samples: draw(
                self._draws(values, best, index, rows[samples], positions[samples])
            ),
        )  # fmt: skip
        for turn in _turns(edited, drafts):
            # What an edit does to a logit depends on the tokens before, so on what counted of them.
            counted = turn[counts[turn]]
            if not counted.size:
                break
            tokens[counted] = choose_edited(self._edits, replace(edits, index=counted))
            for index in counted[flags[counted] & _EDITS != 0].tolist():
                self._edits.record(int(rows[index]), int(tokens[index]))
            if drafts is not None:
                led = turn[drafts.num_behind[turn] > 0]
                counts[led + 1] = counts[led] & (tokens[led] == drafts.expected[led])
        return tokens.astype(np.int32), self._logprobs(logits, maxima, tokens, rows, flags)

    def is_plain(self, rows: Int32Array, positions: Int32Array) -> bool:
        """Whether nothing is done to anybody's logits but to choose from them, nor told of them.

        Arguments are those of ``sample``, which counts nothing in histories then.
        """
        is_more = int(np.bitwise_or.reduce(self._flags[rows])) & (_EDITS | _LOGPROBS)
        return not is_more and not (positions < self._earliest_stop[rows]).any()

    def foresee(self, logits: torch.Tensor, rows: Int32Array, positions: Int32Array) -> Choice:
        """How kernels will choose plain tokens, as ``sample``, from logits that are to come."""
        assert self._kernels is not None, "there are no kernels that choose"
        is_drawn = self._flags[rows] & _DRAWS != 0
        return self._kernels.prepare(logits, rows, positions, is_drawn, self._columns)

    def extend(self, row: int, token_id: int) -> None:
        """Count a token that the beam in ``row`` was given."""
        if self._flags[row] & _BEAM_EDITS:
            self._edits.record(row, token_id)

    def wants_candidates(self, rows: Int32Array) -> NDArray[np.bool_]:
        """Which of ``rows`` are beams: bool [n]. What ``sample`` says of them means nothing."""
        wants: NDArray[np.bool_] = self._num_candidates[rows] > 0
        return wants

    def candidates(
        self, logits: torch.Tensor, rows: Int32Array, positions: Int32Array
    ) -> list[Candidates]:
        """The best tokens of n beams; see ``candidates`` for what their figures mean.

        Args:
            logits: float32 [n, V]; left unchanged.
            rows: int32 [n], admitted rows that want candidates.
            positions: int32 [n], the position of the token that each is about to get.

        Raises:
            InternalError: LOGITS_NOT_FINITE, as ``sample``.
        """
        check_finite(self._best(logits)[0], rows)
        logprobs = logits.log_softmax(1)
        is_holding_back = positions < self._earliest_candidate_stop[rows]
        edited = np.flatnonzero((self._flags[rows] & _BEAM_EDITS != 0) | is_holding_back)
        if edited.size:
            for row, position in zip(
                rows[edited].tolist(), positions[edited].tolist(), strict=True
            ):
                self._edits.check_position(row, position)
            index = torch.from_numpy(edited).to(logits.device)
            part = logprobs[index]
            self._edits.apply(part, rows[edited].tolist(), is_holding_back[edited])
            logprobs[index] = part
        return best_candidates(logprobs, self._num_candidates[rows])

    def wants_prompt_logprobs(self, row: int) -> bool:
        """Whether the sequence in ``row`` asked for log-probabilities of its prompt."""
        return bool(self._flags[row]) and bool(self._num_prompt_logprobs[row] >= 0)

    def prompt_logprobs(
        self, row: int, logits: torch.Tensor, next_token_ids: Int32Array
    ) -> list[TokenLogprobs]:
        """Describe n prompt tokens of the sequence in ``row``.

        Args:
            row: An admitted row that wants them.
            logits: float32 [n, V], those *before* each token.
            next_token_ids: int32 [n], the prompt's tokens themselves.

        Raises:
            InternalError: LOGITS_NOT_FINITE, as ``sample``.
        """
        num_tokens = len(next_token_ids)
        maxima, _ = self._best(logits)
        check_finite(maxima, np.full(num_tokens, row, dtype=np.int32))
        return token_logprobs(
            logits,
            maxima,
            np.arange(num_tokens),
            next_token_ids.astype(np.int64),
            np.full(num_tokens, self._num_prompt_logprobs[row]),
            self._kernels,
        )

    def _best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``best_token``."""
        if self._kernels is None:
            return best_token(logits)
        maxima, token_ids = self._kernels.best(logits)
        return torch.from_numpy(maxima), torch.from_numpy(token_ids)

    def _choose(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        is_drawn: NDArray[np.bool_],
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The best logit of each row, and a token: drawn where it says so, else the best.

        Raises:
            InternalError: LOGITS_NOT_FINITE.
        """
        if self._kernels is not None:
            if is_drawn.any():
                found, tokens = self._kernels.choose(
                    logits, rows, positions, is_drawn, self._columns
                )
            else:
                found, tokens = self._kernels.best(logits)
            check_finite(found, rows)
            return torch.from_numpy(found), tokens
        maxima, best_ids = best_token(logits)
        check_finite(maxima, rows)
        tokens = best_ids.cpu().numpy()
        drawn = np.flatnonzero(is_drawn)
        if drawn.size:
            tokens[drawn] = draw(self._draws(logits, maxima, drawn, rows[drawn], positions[drawn]))
        return maxima, tokens

    def _draws(
        self,
        logits: torch.Tensor,
        maxima: torch.Tensor,
        index: NDArray[np.int64],
        rows: Int32Array,
        positions: Int32Array,
    ) -> Draws:
        return Draws(
            logits=logits,
            maxima=maxima,
            index=index,
            temperature=self._temperature[rows],
            top_k=np.minimum(self._top_k[rows], logits.shape[1]),
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            uniforms=philox.uniform(self._seed[rows], self._sample_index[rows], positions),
            kernels=self._kernels,
        )

    def _logprobs(
        self,
        logits: torch.Tensor,
        maxima: torch.Tensor,
        tokens: NDArray[np.int64],
        rows: Int32Array,
        flags: NDArray[np.uint8],
    ) -> dict[int, TokenLogprobs]:
        asking = np.flatnonzero(flags & _LOGPROBS)
        if not asking.size:
            return {}
        num_best = self._num_logprobs[rows[asking]]
        found = token_logprobs(logits, maxima, asking, tokens[asking], num_best, self._kernels)
        return dict(zip(asking.tolist(), found, strict=True))


def _turns(index: NDArray[np.int64], drafts: DraftSamples | None) -> list[NDArray[np.int64]]:
    """Samples in which no sequence stands twice, each turn behind those that come before it."""
    if drafts is None:
        return [index] if index.size else []
    samples = np.arange(len(drafts.num_behind))
    depths = samples - np.maximum.accumulate(np.where(drafts.is_first, samples, 0))
    depths = depths[index]
    return [index[depths == depth] for depth in range(int(depths.max(initial=-1)) + 1)]
