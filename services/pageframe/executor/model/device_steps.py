"""What a GPU does by itself in a step: launch decodes as graphs, and choose plain tokens.

    batch ─▶ takes? ─ yes ─▶ step_graphs: one launch, logits and tokens        ─▶ coming tokens
                    └ no ──▶ the runner's way, layer by layer ─▶ choose if plain ─▶ coming tokens
                                                                 else the sampler

The runner asks; which device, and whether there are graphs at all, is decided here. Triton is
needed only by what is handed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.units import ceil_div
from pageframe.executor.batch import Int32Array, StepBatch
from pageframe.executor.model.announcing import Announce
from pageframe.executor.model.device_inputs import ComingTokens
from pageframe.executor.model.graph_recorder import Recorder
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.selection import check_finite
from pageframe.executor.model.step_graphs import GraphDecoder, StepGraphs, bucket_sizes
from pageframe.kernels.layouts import KvLayout

if TYPE_CHECKING:
    # Both need Triton, which is there only where there is a GPU.
    from pageframe.executor.model.device_sampler import DeviceSampler
    from pageframe.kernels.ops.triton_attention import TritonAttention

_FLOAT_BYTES, _TABLE_BYTES = 4, 4
# Of the driver's memory, for a graph of some hundred kernels. Not measured.
_GRAPH_BYTES = 16 << 20
# Scratch memory grows in powers of two.
_ROUNDING = 2


@dataclass(frozen=True, slots=True)
class GraphParts:
    """What graphs are made with, once the memory of the pool is taken.

    Attributes:
        make_attention: For a pool of a layout; what it makes belongs to the graphs alone. None
            where Triton does not attend over such a pool, and nothing is recorded.
        make_recorder: Records.
    """

    make_attention: "Callable[[KvLayout], TritonAttention | None]"
    make_recorder: Callable[[], Recorder]


class DeviceSteps:
    """Graphs and device sampling of one runner.

    Args:
        decoder: The model.
        sampler: Chooses plain tokens.
        graph_parts: For graphs; None for none.
        max_num_sequences: Most sequences of a step.
        max_model_len: Most tokens of a sequence.
        vocab_size: Number of token ids that logits have.
        announce: Told how far recording is.
    """

    def __init__(
        self,
        decoder: GraphDecoder,
        sampler: "DeviceSampler",
        graph_parts: GraphParts | None,
        *,
        max_num_sequences: int,
        max_model_len: int,
        vocab_size: int,
        announce: Announce,
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._graph_parts = graph_parts
        self._max_num_sequences = max_num_sequences
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._announce = announce
        self._graphs: StepGraphs | None = None

    def step_bytes(self, layout: KvLayout, max_step_tokens: int) -> int:
        """Memory that steps take beside weights and blocks; an estimate from above.

        Args:
            layout: Of the pool's blocks.
            max_step_tokens: Most tokens of a step.
        """
        decoder, most = self._decoder, self._max_num_sequences
        # In the activations' type, as float32, and once more where a sampler edits them.
        logits_bytes = most * self._vocab_size * (int(decoder.dtype.itemsize) + 2 * _FLOAT_BYTES)
        step_bytes = decoder.activation_bytes(max_step_tokens) * _ROUNDING + logits_bytes
        parts = self._graph_parts
        attention = None if parts is None else parts.make_attention(layout)
        if attention is None:
            return step_bytes
        width = ceil_div(self._max_model_len, layout.block_size)
        room = attention.decode_room(most, width, window=None)
        num_partials = room.num_partials * decoder.num_heads * (layout.head_dim + 1)
        partial_bytes = _ROUNDING * num_partials * _FLOAT_BYTES
        # Graphs have memory of their own for all of it, and for block tables twice.
        graph_bytes = decoder.activation_bytes(most) * _ROUNDING + logits_bytes + partial_bytes
        graph_bytes += 2 * most * width * len(set(decoder.windows)) * _TABLE_BYTES
        graph_bytes += len(bucket_sizes(most)) * _GRAPH_BYTES
        return step_bytes + partial_bytes + graph_bytes

    def warm_up(self, kv: PagedKv, max_step_tokens: int) -> None:
        """Run the largest step there can be, which writes nothing, then record graphs.

        Whatever memory a step needs is taken now, or found missing now.
        """
        decoder, num_groups = self._decoder, len(kv.groups.windows)
        batch = _prompts_of_nobody(max_step_tokens, self._max_model_len, kv.block_size, num_groups)
        device = kv.arena.device
        kv.begin_step(batch)
        outputs = decoder.forward(
            kv,
            torch.from_numpy(batch.token_ids).to(device),
            torch.from_numpy(batch.positions).to(device),
            torch.arange(min(max_step_tokens, self._max_num_sequences), device=device),
        )
        decoder.logits(outputs)
        parts = self._graph_parts
        attention = None if parts is None else parts.make_attention(kv.arena.layout)
        if parts is None or attention is None:
            return
        self._graphs = StepGraphs(
            decoder,
            kv.arena,
            kv.groups,
            attention,
            self._sampler,
            parts.make_recorder(),
            max_num_sequences=self._max_num_sequences,
            # A sequence is never longer than the pool.
            max_model_len=min(self._max_model_len, kv.arena.num_blocks_max * kv.block_size),
            vocab_size=self._vocab_size,
        )
        self._graphs.record(self._announce)

    def takes(self, batch: StepBatch) -> bool:
        """Whether ``launch`` has recorded such a step."""
        return self._graphs is not None and self._graphs.takes(batch)

    def launch(self, batch: StepBatch) -> tuple[torch.Tensor, ComingTokens | None]:
        """Launch a step that ``takes`` has taken.

        Returns:
            Logits float32 [S, V], valid until the next launch, and the tokens; None where somebody
            is not plain, and all are the sampler's.
        """
        assert self._graphs is not None, "nothing has been recorded"
        step = self._graphs.launch(batch)
        return step.logits, step.coming if self._are_plain(batch) else None

    def choose(self, logits: torch.Tensor, batch: StepBatch) -> ComingTokens | None:
        """Begin to choose the tokens of a step; None where somebody is not plain."""
        if batch.drafts is not None or not self._are_plain(batch):
            return None
        return self._sampler.launch(logits, batch.sample_rows, batch.sample_positions)

    def resolve(self, token_ids: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """The input tokens of a batch, int64 [T], those that are not known looked up."""
        if not (batch.token_ids < 0).any():
            return token_ids
        rows: NDArray[np.int64] = np.repeat(batch.rows, np.diff(batch.query_start)).astype(np.int64)
        return self._sampler.resolve(token_ids, torch.from_numpy(rows).to(token_ids.device))

    def _are_plain(self, batch: StepBatch) -> bool:
        return bool(self._sampler.are_plain(batch.sample_rows, batch.sample_positions).all())


def check_chosen(tokens: Int32Array, rows: Int32Array) -> None:
    """Refuse tokens that a device could not choose.

    Args:
        tokens: int32 [K]; -1 where the best logit was not finite.
        rows: int32 [K], whose they are.

    Raises:
        InternalError: LOGITS_NOT_FINITE, as ``Sampler.sample``.
    """
    if (tokens < 0).any():
        check_finite(np.where(tokens < 0, np.float32(np.nan), np.float32(0.0)), rows)


def _prompts_of_nobody(
    num_tokens: int, longest: int, block_size: int, num_groups: int
) -> StepBatch:
    """A batch of ``num_tokens`` new tokens that go to no slot, in prompts of ``longest`` at most.

    What they attend to is block 0, again and again.
    """
    starts = np.arange(0, num_tokens, longest, dtype=np.int32)
    query_start = np.append(starts, np.int32(num_tokens))
    num_columns = ceil_div(min(num_tokens, longest), block_size) * num_groups
    nobody = np.empty(0, np.int32)
    return StepBatch(
        step=0,
        num_decodes=0,
        rows=np.zeros(len(starts), np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.arange(num_tokens, dtype=np.int32) % longest,
        slots=np.full(num_tokens * num_groups, -1, np.int64),
        query_start=query_start,
        context_lens=np.diff(query_start),
        block_tables=np.zeros((len(starts), num_columns), np.int32),
        samples=nobody,
        sample_rows=nobody,
    )
