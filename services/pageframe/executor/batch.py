"""What one step asks of a model runner, and what it gives back; NumPy arrays, no torch.

A batch is flat: the new tokens of all sequences stand one after the other, decodes first.

    sequence          0    1    2           3
    new tokens      [ a ][ b ][ c c c c ][ d d ]      T tokens in all
    query_start       0    1    2           6    8    S + 1 entries

Keys and values of new token ``t`` are written to slot ``slots[t]`` *before* attention reads; token
``t`` of sequence ``s`` attends to positions ``[0, positions[t]]`` of that sequence through
``block_tables[s]`` (less what a sliding window hides).
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """The work of one step. S sequences, T new tokens, K sequences that sample.

    Arrays may be views into persistent buffers: valid only until the next step is prepared.

    Attributes:
        step: Step number.
        num_decodes: The first ``num_decodes`` sequences have exactly one new token each and
            sample it; the others are catching up.
        rows: int32 [S], row of each sequence in the sequence table; constant while it lives.
        token_ids: int32 [T].
        positions: int32 [T], position of each token in its sequence, from 0.
        slots: int64 [T], ``block_id * block_size + offset`` of each token.
        query_start: int32 [S + 1].
        context_lens: int32 [S], computed tokens of the sequence after this step.
        block_tables: int32 [S, W], physical block of each logical block; entries past
            ``ceil(context_len / block_size)`` are undefined.
        samples: int32 [K], indices into S of the sequences that have caught up and sample.
        copy_sources: int64 [C], blocks to copy before any write of this step.
        copy_targets: int64 [C].
    """

    step: int
    num_decodes: int
    rows: Int32Array
    token_ids: Int32Array
    positions: Int32Array
    slots: Int64Array
    query_start: Int32Array
    context_lens: Int32Array
    block_tables: Int32Array
    samples: Int32Array
    copy_sources: Int64Array
    copy_targets: Int64Array


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """What a step yields. ``token_ids``: int32 [K], in the order of ``StepBatch.samples``.

    ``logprobs`` is keyed by index into K, ``prompt_logprobs`` by row; the runner collects a
    prompt's over its chunks and delivers them with the last one.
    """

    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    execute_ns: int = 0
    sample_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the engine and the pool must know about a loaded model.

    Attributes:
        name: Name to serve it under.
        folder: Hugging Face folder.
        vocab_size: Number of token ids that logits have.
        max_model_len: Most positions the model was made for.
        eos_token_ids: From the generation config, else the config.
        kv_bytes_per_token: Keys and values of one token over all layers, in the pool's dtype.
        device: As torch spells it, or ``sim``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        kv_dtype: The same for the pool.
        runner: ``native``, ``transformers`` or ``sim``.
    """

    name: str
    folder: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    kv_bytes_per_token: int
    device: str
    dtype: str
    kv_dtype: str
    runner: str


class ModelRunner(Protocol):
    """Computes steps over paged KV memory. One thread calls all of it.

    ``admit`` and ``release`` keep per-row sampling state; a row is reused only after ``release``.
    """

    facts: ModelFacts

    def allocate_pool(self, num_blocks: int, block_size: int) -> None:
        """Reserve the KV arena. Called once, before the first step.

        Raises:
            ResourceExhaustedError: the arena does not fit into memory, with the numbers.
        """
        ...

    def warm_up(self) -> None:
        """Run what the first real step would otherwise have to wait for."""
        ...

    def admit(
        self,
        row: int,
        *,
        sampling: SamplingParams,
        sample_index: int,
        token_ids: Int32Array,
        num_prompt_tokens: int,
    ) -> None:
        """Set up sampling of the sequence in ``row``, whose known tokens are ``token_ids``.

        Called at each admission, also after a preemption; then ``token_ids`` holds the output
        made so far too, which counts for penalties, ``min_tokens`` and the random key.
        """
        ...

    def release(self, row: int) -> None:
        """Forget the sampling state of ``row``."""
        ...

    def execute(self, batch: StepBatch) -> StepOutput:
        """Copy blocks, write keys and values, attend, and sample. Returns when tokens are known."""
        ...

    def close(self) -> None:
        """Give back weights and arena."""
        ...
