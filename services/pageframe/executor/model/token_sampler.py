"""What a runner needs of a sampler."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, TokenLogprobs
from pageframe.executor.batch import DraftSamples, Int32Array
from pageframe.kernels.cpu.draw import Choice


class TokenSampler(Protocol):
    """Sampling state by row; ``model.sampler.Sampler`` is the real one."""

    def admit(
        self,
        row: int,
        *,
        sampling: SamplingParams,
        sample_index: int,
        token_ids: Int32Array,
        num_prompt_tokens: int,
    ) -> None:
        """Set up ``row``."""
        ...

    def release(self, row: int) -> None:
        """Forget ``row``."""
        ...

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """Start what ``admit`` would wait for; whether it is there within ``wait_s`` seconds."""
        ...

    def failures(self) -> dict[int, str]:
        """Reasons by row, of those that ended in this step because they could not go on."""
        ...

    def close(self) -> None:
        """Nothing is sampled any more."""
        ...

    def sample(
        self,
        logits: torch.Tensor,
        rows: Int32Array,
        positions: Int32Array,
        drafts: DraftSamples | None = None,
    ) -> tuple[Int32Array, dict[int, TokenLogprobs]]:
        """One token per row of ``logits`` [K, V], to stand at ``positions``."""
        ...

    def is_plain(self, rows: Int32Array, positions: Int32Array) -> bool:
        """Whether nothing is done to anybody's logits but to choose from them, nor told of them."""
        ...

    def foresee(self, logits: torch.Tensor, rows: Int32Array, positions: Int32Array) -> Choice:
        """How compiled kernels will choose plain tokens from logits that are not there yet."""
        ...

    def extend(self, row: int, token_id: int) -> None:
        """Count a token that ``row`` was given."""
        ...

    def wants_candidates(self, rows: Int32Array) -> NDArray[np.bool_]:
        """Which of ``rows`` get candidates instead of a token."""
        ...

    def candidates(
        self, logits: torch.Tensor, rows: Int32Array, positions: Int32Array
    ) -> list[Candidates]:
        """The best tokens of each row of ``logits`` [n, V]."""
        ...

    def wants_prompt_logprobs(self, row: int) -> bool:
        """Whether the request in ``row`` asked for them."""
        ...

    def prompt_logprobs(
        self, row: int, logits: torch.Tensor, next_token_ids: Int32Array
    ) -> list[TokenLogprobs]:
        """What ``logits`` [n, V] say about ``next_token_ids`` [n]."""
        ...
