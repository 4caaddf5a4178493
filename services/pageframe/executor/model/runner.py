"""The paged runner: one step from a batch of tables to sampled tokens, for any ``Decoder``."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, TokenLogprobs
from pageframe.executor.batch import (
    BlockMoves,
    Int32Array,
    ModelFacts,
    StepBatch,
    StepOutput,
)
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.host_arena import HostArena
from pageframe.executor.model.layer_groups import LayerGroups, one_group
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.prompt_logprobs import PromptCollection
from pageframe.executor.model.token_sampler import TokenSampler
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

# Logits of a whole prompt at once would be gigabytes; these many rows stay near the cache.
_PROMPT_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class _Pool:
    """Where keys and values are: device blocks, host slots, and the way of the model to both."""

    arena: KvArena
    host: HostArena
    kv: PagedKv


class PagedRunner:
    """A ``ModelRunner`` over a decoder, arenas and a sampler; conducts them and keeps little.

    Args:
        decoder: The model.
        facts: What the engine must know about it.
        sampler: Picks tokens.
        device: Where weights and arena lie.
        kv_dtype: Of keys and values in the arena.
        max_step_tokens: Most tokens that one step will compute.
        groups: Which layers share a block; all of them where absent.
    """

    def __init__(
        self,
        decoder: Decoder,
        facts: ModelFacts,
        sampler: TokenSampler,
        device: torch.device,
        kv_dtype: torch.dtype,
        *,
        max_step_tokens: int,
        groups: LayerGroups | None = None,
    ) -> None:
        self.facts = facts
        self._groups = groups or one_group(decoder.kv_shape.num_layers)
        self._decoder: Decoder | None = decoder
        self._sampler = sampler
        self._device = device
        self._kv_dtype = kv_dtype
        self._max_step_tokens = max_step_tokens
        self._pool: _Pool | None = None
        self._prompts: dict[int, PromptCollection] = {}

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, scales and padding included."""
        return self._require_pool().arena.layout.block_bytes

    def allocate_pool(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_blocks_max: int = 0,
        num_host_slots: int = 0,
    ) -> None:
        """Reserve the KV arena and the host tier; see ``ModelRunner.allocate_pool``.

        On a GPU ``num_blocks_max`` counts for nothing: its arena does not resize.
        """
        assert self._pool is None, "the pool is allocated already"
        assert self._decoder is not None, "the runner is closed"
        shape = self._decoder.kv_shape
        layout = KvLayout(
            num_layers=self._groups.num_layers_each,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=self._kv_dtype,
            is_quantised=self._kv_dtype in QUANTISED_DTYPES,
        )
        is_shared = self._device.type == "cpu"
        arena = KvArena(
            layout,
            num_blocks,
            self._device,
            num_blocks_max=num_blocks_max,
            # Nothing of either is taken before it is written, so each must know of the other.
            promised_bytes=num_host_slots * layout.block_bytes if is_shared else 0,
        )
        host = HostArena(num_host_slots, layout.block_bytes, self._device)
        self._pool = _Pool(arena, host, PagedKv(arena, self._groups))

    def resize_pool(self, num_blocks: int) -> None:
        """Shrink or grow the arena between steps; see ``ModelRunner.resize_pool``."""
        pool = self._require_pool()
        pool.arena.resize(num_blocks, promised_bytes=pool.host.untouched_bytes)

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move whole blocks: out, then copies, then in; see ``ModelRunner.move_blocks``."""
        arena, host = self._require_pool().arena, self._require_pool().host
        moves.check(arena.num_blocks, host.num_slots)
        with torch.inference_mode():
            if len(moves.out_slots):
                host.store(arena.blocks, moves.out_sources, moves.out_slots)
            if len(moves.copy_targets):
                arena.copy(moves.copy_sources, moves.copy_targets)
            if len(moves.in_targets):
                host.load(arena.blocks, moves.in_slots, moves.in_targets)

    def read_block(self, block_id: int) -> bytes:
        """Everything that a block holds; see ``ModelRunner.read_block``."""
        return self._require_pool().arena.read(block_id)

    def write_block(self, block_id: int, data: bytes) -> None:
        """Make a block hold what ``read_block`` gave; see ``ModelRunner.write_block``."""
        self._require_pool().arena.write(block_id, data)

    def read_host(self, slot: int) -> bytes:
        """Everything that a host slot holds; see ``ModelRunner.read_host``."""
        return self._require_pool().host.read(slot)

    def write_host(self, slot: int, data: bytes) -> None:
        """Make a host slot hold what ``read_host`` gave; see ``ModelRunner.write_host``."""
        self._require_pool().host.write(slot, data)

    def warm_up(self) -> None:
        """Run one token, then a short prompt, so that threads and kernels are there.

        Writes into block 0, which no sequence owns before the first step.
        """
        decoder, kv = self._parts()
        with torch.inference_mode():
            for num_tokens in {1, min(kv.block_size, self._max_step_tokens)}:
                batch = _prompt_in_block_0(num_tokens, len(self._groups.windows))
                decoder.logits(self._forward(decoder, kv, batch, np.zeros(1, np.int64)))

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """Start what ``admit`` would wait for; see ``ModelRunner.prepare``."""
        return self._sampler.prepare(sampling, wait_s)

    def admit(
        self,
        row: int,
        *,
        sampling: SamplingParams,
        sample_index: int,
        token_ids: Int32Array,
        num_prompt_tokens: int,
    ) -> None:
        """Set up sampling of the sequence in ``row``; see ``ModelRunner.admit``."""
        self._sampler.admit(
            row,
            sampling=sampling,
            sample_index=sample_index,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
        )
        # A sequence that comes back with output has had its whole prompt computed, and told.
        is_told = len(token_ids) > num_prompt_tokens
        if self._sampler.wants_prompt_logprobs(row) and not is_told:
            self._prompts[row] = PromptCollection(
                np.array(token_ids[:num_prompt_tokens], dtype=np.int32)
            )

    def extend(self, row: int, token_id: int) -> None:
        """Count a token that ``row`` was given; see ``ModelRunner.extend``."""
        self._sampler.extend(row, token_id)

    def release(self, row: int) -> None:
        """Forget the sampling state of ``row``."""
        self._sampler.release(row)
        self._prompts.pop(row, None)

    def execute(self, batch: StepBatch) -> StepOutput:
        """Write keys and values, attend, and sample. Returns when tokens are known."""
        with torch.inference_mode():
            return self._execute(batch)

    def close(self) -> None:
        """Give back weights, arena and host tier."""
        self._sampler.close()
        self._decoder = None
        self._pool = None
        self._prompts.clear()

    def _parts(self) -> tuple[Decoder, PagedKv]:
        assert self._decoder is not None, "the runner is closed"
        return self._decoder, self._require_pool().kv

    def _require_pool(self) -> _Pool:
        assert self._pool is not None, "allocate_pool comes first, and nothing after close"
        return self._pool

    def _execute(self, batch: StepBatch) -> StepOutput:
        decoder, kv = self._parts()
        started_ns = time.perf_counter_ns()
        sample_tokens = batch.sample_tokens
        spans = self._prompt_spans(batch)
        rows = np.concatenate([sample_tokens, *(np.arange(low, high) for _, low, high in spans)])
        outputs = self._forward(decoder, kv, batch, rows)
        executed_ns = time.perf_counter_ns()
        token_ids = np.empty(0, np.int32)
        logprobs: dict[int, TokenLogprobs] = {}
        candidates: dict[int, Candidates] = {}
        if sample_tokens.size:
            logits = decoder.logits(outputs[: sample_tokens.size])
            executed_ns = time.perf_counter_ns()
            # A GPU is still computing; the sampler is the first to wait for it.
            batch.meanwhile()
            token_ids, logprobs = self._sampler.sample(
                logits, batch.sample_rows, batch.sample_positions, batch.drafts
            )
            candidates = self._candidates(logits, batch, token_ids)
        prompt_logprobs = self._collect(decoder, batch, spans, outputs[sample_tokens.size :])
        return StepOutput(
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            candidates=candidates,
            failures=self._sampler.failures(),
            execute_ns=executed_ns - started_ns,
            sample_ns=time.perf_counter_ns() - executed_ns,
        )

    def _candidates(
        self, logits: torch.Tensor, batch: StepBatch, token_ids: Int32Array
    ) -> dict[int, Candidates]:
        """Candidates of beams by index into K; they get no token, so theirs becomes -1."""
        index = np.flatnonzero(self._sampler.wants_candidates(batch.sample_rows))
        if not index.size:
            return {}
        token_ids[index] = -1
        found = self._sampler.candidates(
            logits[torch.from_numpy(index).to(logits.device)],
            batch.sample_rows[index],
            batch.sample_positions[index],
        )
        return dict(zip(index.tolist(), found, strict=True))

    def _forward(
        self, decoder: Decoder, kv: PagedKv, batch: StepBatch, rows: NDArray[np.int64]
    ) -> torch.Tensor:
        kv.begin_step(batch)
        return decoder.forward(
            kv,
            torch.from_numpy(batch.token_ids.astype(np.int64)).to(self._device),
            torch.from_numpy(batch.positions.astype(np.int64)).to(self._device),
            torch.from_numpy(rows).to(self._device),
        )

    def _prompt_spans(self, batch: StepBatch) -> list[tuple[int, int, int]]:
        """Tokens of the batch whose logits speak about prompt tokens somebody asked about.

        Returns:
            (index into S, first token, end token) each; the span may be empty, and is listed all
            the same, because an empty one can complete a prompt.
        """
        if not self._prompts:
            return []
        spans = []
        for sequence, row in enumerate(batch.rows.tolist()):
            collection = self._prompts.get(row)
            if collection is None:
                continue
            first, end = batch.query_start[sequence : sequence + 2].tolist()
            context_len = int(batch.context_lens[sequence])
            shift = context_len - end
            low, high = collection.wanted(first + shift, context_len)
            spans.append((sequence, low - shift, high - shift))
        return spans

    def _collect(
        self,
        decoder: Decoder,
        batch: StepBatch,
        spans: list[tuple[int, int, int]],
        outputs: torch.Tensor,
    ) -> dict[int, list[TokenLogprobs]]:
        """Add this step's spans to their prompts; returns the prompts that are complete, by row."""
        complete = {}
        taken = 0
        for sequence, first, end in spans:
            row, context_len = int(batch.rows[sequence]), int(batch.context_lens[sequence])
            shift = context_len - int(batch.query_start[sequence + 1])
            collection = self._prompts[row]
            for low in range(first, end, _PROMPT_ROWS_AT_ONCE):
                high = min(end, low + _PROMPT_ROWS_AT_ONCE)
                collection.entries += self._sampler.prompt_logprobs(
                    row,
                    decoder.logits(outputs[taken : taken + high - low]),
                    collection.next_token_ids(low + shift, high + shift),
                )
                taken += high - low
            if collection.is_complete(context_len):
                complete[row] = self._prompts.pop(row).entries
        return complete


def _prompt_in_block_0(num_tokens: int, num_groups: int) -> StepBatch:
    """A batch of one sequence whose ``num_tokens`` tokens fit into block 0, of every group."""
    tokens = np.arange(num_tokens, dtype=np.int32)
    zero = np.zeros(1, np.int32)
    return StepBatch(
        step=0,
        num_decodes=int(num_tokens == 1),
        rows=zero,
        token_ids=np.zeros(num_tokens, np.int32),
        positions=tokens,
        slots=np.repeat(tokens.astype(np.int64), num_groups),
        query_start=np.array([0, num_tokens], np.int32),
        context_lens=np.array([num_tokens], np.int32),
        block_tables=np.zeros((1, num_groups), np.int32),
        samples=zero,
        sample_rows=zero,
    )
