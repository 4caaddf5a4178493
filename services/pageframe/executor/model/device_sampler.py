"""Tokens chosen where the logits are: for most sequences nothing waits for the host.

The best token of logits that nobody edits, or one drawn from them (with or without top-k, top-p and
min-p), is chosen by ``kernels.ops.choose_token``; tokens of edited logits by the sampler, as on a
CPU. Which of the two it is depends on parameters and position alone, never on what else is in the
batch. So a token does not either (law 11), though the two may round an exponential differently at a
border. A sequence is *plain* if its token is chosen here and nothing else is asked of its logits.

    logits ─▶ choose_token ─┬─▶ host, some time later
                            └─▶ newest token of each row, on the device ─▶ input of the next step

A step that was planned before its tokens are known asks for them by ``NEWEST``: they are on the
device in time, whenever the host hears of them.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.step import TokenLogprobs
from pageframe.executor.batch import NEWEST, DraftSamples, Int32Array
from pageframe.executor.model import sampler as host
from pageframe.executor.model.device_inputs import ComingTokens, DeviceInputs, TokenReturn
from pageframe.executor.model.device_steps import check_chosen
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.executor.model.selection import check_finite
from pageframe.kernels.ops.choose_token import choose_token

_MORE_THAN_A_TOKEN = host._EDITS | host._BEAM_EDITS | host._LOGPROBS


class DeviceSampler(host.Sampler):
    """A ``Sampler`` that leaves plain sequences to the device; needs Triton.

    Args:
        vocab_size: Number of token ids that logits have.
        max_num_rows: Rows are in ``[0, max_num_rows)``.
        eos_token_ids: The model's own end-of-sequence tokens.
        device: Where logits will be.
        grammars: Compiled grammars; None where no sequence can have one.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_rows: int,
        eos_token_ids: Iterable[int],
        device: torch.device,
        grammars: GrammarStore | None = None,
    ) -> None:
        super().__init__(vocab_size, max_num_rows, eos_token_ids, device, grammars)
        self._max_num_rows = max_num_rows
        # One more, for rows that pad a batch.
        self._newest = torch.zeros(max_num_rows + 1, dtype=torch.int32, device=device)
        self._inputs = DeviceInputs(self.fields(max_num_rows), 0, device)
        self._tokens = torch.zeros(max_num_rows, dtype=torch.int32, device=device)
        self._returned = TokenReturn(max_num_rows, device)

    @staticmethod
    def fields(capacity: int) -> dict[str, tuple[type[np.generic], int]]:
        """What ``stage`` writes for so many tokens, as fields of ``DeviceInputs``."""
        return {
            "rows": (np.int64, capacity),
            "temperatures": (np.float32, capacity),
            "top_ks": (np.int32, capacity),
            "top_ps": (np.float64, capacity),
            "min_ps": (np.float32, capacity),
            "seeds": (np.int64, capacity),
            "sample_indices": (np.int64, capacity),
            "next_positions": (np.int64, capacity),
        }

    def are_plain(self, rows: Int32Array, positions: Int32Array) -> NDArray[np.bool_]:
        """Which tokens the device chooses alone: bool [K].

        Args:
            rows: int32 [K], admitted rows.
            positions: int32 [K], the position that each token will take.
        """
        asks_for_more = self._flags[rows] & _MORE_THAN_A_TOKEN != 0
        asks_for_more |= self._num_candidates[rows] > 0
        is_plain: NDArray[np.bool_] = ~asks_for_more & (positions >= self._earliest_stop[rows])
        return is_plain

    def stage(
        self, inputs: DeviceInputs, rows: Int32Array, positions: Int32Array, num_padded: int
    ) -> None:
        """Write the parameters of K plain tokens into ``fields``.

        Args:
            inputs: Begun.
            rows: int32 [K], admitted rows.
            positions: int32 [K], the position that each token will take.
            num_padded: Tokens of the batch, those included that pad it: best tokens of nobody.
        """
        is_drawn = self._flags[rows] & host._DRAWS != 0
        self._stage(inputs, rows, positions, is_drawn, num_padded)

    def _stage(
        self,
        inputs: DeviceInputs,
        rows: Int32Array,
        positions: Int32Array,
        is_drawn: NDArray[np.bool_],
        num_padded: int,
    ) -> None:
        columns = {
            "rows": (rows, self._max_num_rows),
            "temperatures": (np.where(is_drawn, self._temperature[rows], 0.0), 0.0),
            "top_ks": (self._top_k[rows], self._vocab_size),
            "top_ps": (self._top_p[rows], 1.0),
            "min_ps": (self._min_p[rows], 0.0),
            "seeds": (self._seed[rows].view(np.int64), 0),
            "sample_indices": (self._sample_index[rows], 0),
            "next_positions": (positions, 0),
        }
        for name, (values, padding) in columns.items():
            field = inputs.host(name)
            field[: len(rows)] = values
            field[len(rows) : num_padded] = padding

    def choose(self, inputs: DeviceInputs, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Choose a token of each row of logits, on the device alone; a CUDA graph may hold it.

        Args:
            inputs: Sent, with the parameters that ``stage`` wrote.
            logits: float32 [K, V], K with what pads the batch.
            tokens: int32 [K], written; -1 where the best logit is not finite.
        """
        count = len(tokens)
        choose_token(
            logits,
            tokens,
            temperatures=inputs.device("temperatures")[:count],
            top_ks=inputs.device("top_ks")[:count],
            top_ps=inputs.device("top_ps")[:count],
            min_ps=inputs.device("min_ps")[:count],
            seeds=inputs.device("seeds")[:count],
            sample_indices=inputs.device("sample_indices")[:count],
            positions=inputs.device("next_positions")[:count],
        )
        self._newest.index_copy_(0, inputs.device("rows")[:count], tokens)

    def resolve(self, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Input tokens, those asked for by ``NEWEST`` looked up; a CUDA graph may hold it.

        Args:
            token_ids: int32 [T]; on the device, as all of this.
            rows: int64 [T], whose they are.

        Returns:
            int32 [T]. A token that could not be chosen is 0: its sequence ends with an error, and
            the step that was launched behind must not read outside the embedding.
        """
        newest = self._newest.index_select(0, rows)
        return torch.where(token_ids == NEWEST, newest, token_ids).clamp_min_(0)

    def launch(self, logits: torch.Tensor, rows: Int32Array, positions: Int32Array) -> ComingTokens:
        """Begin to choose plain tokens; arguments as in ``sample``, at most ``max_num_rows``."""
        return self._launch(logits, rows, positions, self._flags[rows] & host._DRAWS != 0)

    def sample(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        drafts: DraftSamples | None = None,
    ) -> tuple[Int32Array, dict[int, TokenLogprobs]]:
        """Choose the next tokens of sequences; see ``Sampler.sample``."""
        if not self.are_plain(rows, positions).all():
            return super().sample(logits, rows, positions, drafts)
        is_drawn = self._flags[rows] & host._DRAWS != 0
        tokens = self._choose_in_turns(logits, rows, positions, is_drawn)
        check_chosen(tokens, rows)
        return tokens, {}

    def _choose(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        is_drawn: NDArray[np.bool_],
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """See ``Sampler._choose``; tokens as if all of them were plain."""
        maxima, _ = self._best(logits)
        check_finite(maxima, rows)
        tokens = self._choose_in_turns(logits, rows, positions, is_drawn)
        return maxima, tokens.astype(np.int64)

    def _launch(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        is_drawn: NDArray[np.bool_],
    ) -> ComingTokens:
        self._inputs.begin()
        self._stage(self._inputs, rows, positions, is_drawn, len(rows))
        self._inputs.send(0)
        tokens = self._tokens[: len(rows)]
        self.choose(self._inputs, logits, tokens)
        return self._returned.fetch(tokens)

    def _choose_in_turns(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        is_drawn: NDArray[np.bool_],
    ) -> Int32Array:
        """All tokens; drafts make more of them than there are rows."""
        starts = range(0, len(rows), self._max_num_rows)
        parts = [slice(start, start + self._max_num_rows) for start in starts]
        return np.concatenate(
            [
                self._launch(logits[part], rows[part], positions[part], is_drawn[part]).wait()
                for part in parts
            ]
        )
