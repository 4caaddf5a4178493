"""What one step asks of a model runner, and what it gives back; NumPy arrays, no torch.

A batch is flat: the new tokens of all sequences stand one after the other, decodes first.

    sequence          0    1    2           3
    new tokens      [ a ][ b ][ c c c c ][ d d ]      T tokens in all
    query_start       0    1    2           6    8    S + 1 entries

Keys and values of new token ``t`` are written to slot ``slots[t]`` *before* attention reads; token
``t`` of sequence ``s`` attends to positions ``[0, positions[t]]`` of that sequence through
``block_tables[s]`` (less what a sliding window hides). Whole blocks are moved before all that, by
``ModelRunner.move_blocks``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, TokenLogprobs
from pageframe.executor.block_moves import BlockMoves, Int64Array

Int32Array = NDArray[np.int32]

NEWEST = -1
"""In place of a token id: the token that the step before chooses for the same row."""


def do_nothing() -> None:
    """There is nothing else to do."""


@dataclass(frozen=True, slots=True)
class DraftSamples:
    """Which samples of a step check drafts; parallel to ``StepBatch.samples``.

    A sequence with d draft tokens has d + 1 samples, one behind the other: its next token, and the
    one behind each draft. A sample counts only if all before it are what the drafts say.

        computed    newest   draft 0   draft 1
        sampled          ▼         ▼         ▼
        num_behind       2         1         0
        expected   draft 0   draft 1         -

    Attributes:
        num_behind: int32 [K], samples of the same sequence that follow; 0 without drafts.
        expected: int32 [K], the token that has to be sampled for the next sample to count; -1 where
            none follows.
    """

    num_behind: Int32Array
    expected: Int32Array

    @property
    def is_first(self) -> NDArray[np.bool_]:
        """Which samples are the first of their sequence: bool [K]."""
        is_first = np.ones(len(self.num_behind), dtype=np.bool_)
        is_first[1:] = self.num_behind[:-1] == 0
        return is_first

    def pad(self, num_samples: int) -> "DraftSamples":
        """The same with samples without drafts at the end, ``num_samples`` in all."""
        num_more = num_samples - len(self.num_behind)
        return DraftSamples(
            np.pad(self.num_behind, (0, num_more)),
            np.pad(self.expected, (0, num_more), constant_values=-1),
        )


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """The work of one step. S sequences, T new tokens, K sequences that sample, G layer groups.

    Arrays may be views into persistent buffers: valid until the next step but one is prepared.

    Attributes:
        step: Step number.
        num_decodes: The first ``num_decodes`` sequences have exactly one new token each and
            sample it; the others are catching up.
        rows: [S], row of each sequence in the sequence table; constant while it lives.
        token_ids: int32 [T].
        positions: int32 [T], position of each token in its sequence, from 0.
        slots: int64 [T * G], ``block_id * block_size + offset`` of each token, in each group of
            layers: entry ``t * G + g``.
        query_start: int32 [S + 1].
        context_lens: int32 [S], computed tokens of the sequence after this step.
        block_tables: int32 [S, W * G], physical block of each logical block in each group:
            entry ``logical * G + g``. Those past ``ceil(context_len / block_size)`` are undefined,
            and those of a group with a window that no new token sees.
        samples: int32 [K], indices into S of the sequences that have caught up and sample.
        sample_rows: int32 [K], row whose sampling state picks each of the K tokens. Several
            tokens may come from one index of ``samples``: a fork, or drafts.
        drafts: Which samples check drafts; None when none does.
        on_launch: For the runner to call once, when all is prepared and only the computing is left:
            others may have Python's lock from then on.
        meanwhile: Work that belongs to no step. A runner whose device computes beside Python calls
            it between launching the step and waiting for it; others need not.
        has_moves: Whether ``ModelRunner.move_blocks`` was called for this very step. What that
            moved in is read by later steps only.
    """

    step: int
    num_decodes: int
    rows: NDArray[np.integer]
    token_ids: Int32Array
    positions: Int32Array
    slots: Int64Array
    query_start: Int32Array
    context_lens: Int32Array
    block_tables: Int32Array
    samples: Int32Array
    sample_rows: Int32Array
    drafts: DraftSamples | None = None
    on_launch: Callable[[], None] = do_nothing
    meanwhile: Callable[[], None] = do_nothing
    has_moves: bool = False

    @property
    def sample_positions(self) -> Int32Array:
        """The position that each sampled token takes in its sequence: int32 [K]."""
        ends = self.context_lens[self.samples]
        return ends if self.drafts is None else ends - self.drafts.num_behind

    @property
    def sample_tokens(self) -> Int64Array:
        """Index into T of the token from whose logits each sample is drawn: int64 [K]."""
        last = self.query_start[1:][self.samples].astype(np.int64) - 1
        return last if self.drafts is None else last - self.drafts.num_behind


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """What a step yields. ``token_ids``: int32 [K], in the order of ``StepBatch.samples``.

    A sequence that asks for candidates gets -1 for a token, and an entry in ``candidates``, by
    index into K. ``logprobs`` is keyed by index into K, ``prompt_logprobs`` by row; the runner
    collects a prompt's over its chunks and delivers them with the last one. ``failures`` are
    reasons (UPPER_SNAKE) by row, of sequences that end with an error though they got a token.
    Where one call computes and samples, ``sample_ns`` is 0 and ``execute_ns`` has both. ``over_ns``
    is when the step was over by ``time.monotonic_ns``, however late it is collected; 0 for unknown.
    """

    token_ids: Int32Array = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    candidates: dict[int, Candidates] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    execute_ns: int = 0
    sample_ns: int = 0
    over_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the engine and the pool must know about a loaded model.

    Attributes:
        name: Name to serve it under.
        folder: Hugging Face folder.
        vocab_size: Number of token ids that logits have.
        max_model_len: Most positions the model was made for.
        eos_token_ids: From the generation config, else the config.
        kv_bytes_per_token: Keys and values of one token over all layers, in the pool's dtype, and
            what pads groups of layers to one size. A block has the layers of one group.
        device: As torch spells it, or ``sim``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        kv_dtype: The same for the pool.
        runner: ``native``, ``transformers`` or ``sim``.
        kernels: What computes the native runner's steps on a CPU: ``fused (avx2)``, or ``torch``
            and why; empty for others.
        window_tokens: Positions that a token sees, itself included, in every layer; 0 for all, also
            when some layers see more than others.
        group_windows: The same for each group of layers, where they differ: a block then holds the
            layers of one group. Empty for one group.
        takes_grammars: Whether outputs can be held to a grammar.
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
    kernels: str = ""
    window_tokens: int = 0
    group_windows: tuple[int, ...] = ()
    takes_grammars: bool = False

    @property
    def num_kv_groups(self) -> int:
        """Groups of layers, each with blocks of its own; 1 where all see alike."""
        return max(1, len(self.group_windows))


class Flight(Protocol):
    """A step that a runner has launched."""

    @property
    def takes_cores(self) -> bool:
        """Whether threads of this machine compute it, who go first (``config.cores``)."""
        ...

    @property
    def is_ahead(self) -> bool:
        """Whether the next step may be launched before this one is collected.

        Its tokens are then where that one finds them (``NEWEST``), in the order of launching.
        """
        ...

    def wait(self) -> None:
        """Return when the step is over, well or not. Any thread may wait for it."""
        ...

    def collect(self) -> StepOutput:
        """Wait for the step, and tell what it yields; once, in the order of launching."""
        ...


@dataclass(frozen=True, slots=True)
class Landed:
    """A ``Flight`` that was over when its launch returned."""

    output: StepOutput

    is_ahead = takes_cores = False

    def wait(self) -> None:
        """It is over."""

    def collect(self) -> StepOutput:
        """See ``Flight.collect``."""
        return self.output


class ModelRunner(Protocol):
    """Computes steps over paged KV memory. One thread calls all of it.

    ``admit`` and ``release`` keep per-row sampling state; a row is reused only after ``release``.
    """

    facts: ModelFacts

    @property
    def block_bytes(self) -> int:
        """Bytes of one block as ``read_block`` gives it; known once the pool is allocated."""
        ...

    def allocate_pool(
        self, num_blocks: int, block_size: int, *, num_blocks_max: int = 0, num_host_slots: int = 0
    ) -> None:
        """Reserve the KV arena and the host tier. Called once, before the first step.

        Args:
            num_blocks: Blocks to start with.
            block_size: Tokens per block.
            num_blocks_max: Most blocks that ``resize_pool`` may ask for; 0 for ``num_blocks``.
            num_host_slots: Blocks that the host tier holds.

        Raises:
            ResourceExhaustedError: KV_ARENA_TOO_LARGE or HOST_TIER_TOO_LARGE, with the numbers.
        """
        ...

    def resize_pool(self, num_blocks: int) -> None:
        """Shrink or grow the arena between steps; blocks below ``num_blocks`` keep their content.

        The memory of blocks at and above goes back to the system. Blocks that come (again) have
        undefined content.

        Raises:
            OutOfRangeError: POOL_SIZE_OUT_OF_RANGE; not in [1, num_blocks_max].
            ResourceExhaustedError: KV_ARENA_TOO_LARGE; memory does not suffice for growing.
            UnimplementedError: RESIZE_UNAVAILABLE; arenas on this device do not resize.
        """
        ...

    def take_memory(self, num_blocks: int) -> bool:
        """Take some of the memory that blocks below ``num_blocks`` still lack; whether any do then.

        Called at rest, so that no step waits for it; nothing to do where writing takes none.
        """
        return False

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move whole blocks, ahead of the writes of the next step.

        Raises:
            InternalError: MOVE_INVALID; nothing was moved.
        """
        ...

    def read_block(self, block_id: int) -> bytes:
        """Everything that a block holds, ``block_bytes`` long; means something to this model only.

        Raises:
            OutOfRangeError: BLOCK_OUT_OF_RANGE.
        """
        ...

    def write_block(self, block_id: int, data: bytes) -> None:
        """Make a block hold what ``read_block`` gave.

        Raises:
            OutOfRangeError: BLOCK_OUT_OF_RANGE.
            InvalidRequestError: BLOCK_BYTES_INVALID; not of length ``block_bytes``.
        """
        ...

    def read_host(self, slot: int) -> bytes:
        """The same for a host slot.

        Raises:
            OutOfRangeError: HOST_SLOT_OUT_OF_RANGE.
        """
        ...

    def write_host(self, slot: int, data: bytes) -> None:
        """The same for a host slot.

        Raises:
            OutOfRangeError: HOST_SLOT_OUT_OF_RANGE.
            InvalidRequestError: BLOCK_BYTES_INVALID; not of length ``block_bytes``.
        """
        ...

    def warm_up(self) -> None:
        """Run what the first real step would otherwise have to wait for."""
        ...

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """Start what ``admit`` would wait for; whether it is there within ``wait_s`` seconds.

        Asked only of parameters with a grammar, where ``facts.takes_grammars``.
        """
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

        Raises:
            InvalidRequestError: the parameters do not fit the model or the tokens; ``row`` has to
                be released all the same.
        """
        ...

    def extend(self, row: int, token_id: int) -> None:
        """The sequence in ``row`` was given a token by a branch; it counts for penalties."""
        ...

    def release(self, row: int) -> None:
        """Forget the sampling state of ``row``."""
        ...

    def execute(self, batch: StepBatch) -> StepOutput:
        """Write keys and values, attend, and sample. Returns when tokens are known.

        Calls ``batch.on_launch``.
        """
        ...

    def launch(self, batch: StepBatch) -> Flight:
        """Begin what ``execute`` does. Where no device works beside Python it is over then.

        No more than two steps may be under way.
        """
        return Landed(self.execute(batch))

    def close(self) -> None:
        """Give back weights and arena."""
        ...
