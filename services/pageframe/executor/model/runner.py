"""The paged runner: one step from a batch of tables to sampled tokens, for any ``Decoder``."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.config.cores import go_first
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, TokenLogprobs
from pageframe.executor.batch import (
    Flight,
    Int32Array,
    Landed,
    ModelFacts,
    StepBatch,
    StepOutput,
)
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.device_steps import DeviceSteps, check_chosen
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.host_arena import HostArena
from pageframe.executor.model.lane import Lane
from pageframe.executor.model.layer_groups import LayerGroups, one_group
from pageframe.executor.model.out_of_memory import told_of_memory
from pageframe.executor.model.paged_flight import PagedFlight
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.prepared_step import prepare_work
from pageframe.executor.model.prompt_logprobs import Prompts
from pageframe.executor.model.swap_copies import staging_bytes
from pageframe.executor.model.token_sampler import TokenSampler
from pageframe.executor.model.warm_up import prompt_in_block_0
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Where keys and values are: device blocks, host slots, and the way of the model to both."""

    arena: KvArena
    host: HostArena
    kv: PagedKv


class PagedRunner:
    """A ``ModelRunner`` over a decoder, arenas and a sampler; conducts them and keeps little.

    Where a GPU chooses tokens, a step may be launched before the tokens of the one before it are
    collected; ``execute`` does both.

    Args:
        decoder: The model.
        facts: What the engine must know about it.
        sampler: Picks tokens.
        device: Where weights and arena lie.
        kv_dtype: Of keys and values in the arena.
        max_step_tokens: Most tokens that one step will compute.
        groups: Which layers share a block; all of them where absent.
        on_device: What a GPU does by itself; None where it does not.
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
        on_device: DeviceSteps | None = None,
    ) -> None:
        self.facts = facts
        self._groups = groups or one_group(decoder.kv_shape.num_layers)
        self._decoder: Decoder | None = decoder
        self._sampler = sampler
        self._device = device
        self._kv_dtype = kv_dtype
        self._max_step_tokens = max_step_tokens
        self._on_device = on_device
        self._pool: _Pool | None = None
        self._prompts = Prompts()
        # Only compiled kernels leave Python's lock alone for whole steps.
        self._lane = Lane() if decoder.reads_batch else None

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
        promised_bytes = 0
        if self._device.type == "cpu":
            # Nothing of either is taken before it is written, so each must know of the other.
            promised_bytes = num_host_slots * layout.block_bytes
        elif self._on_device is not None:
            promised_bytes = self._on_device.step_bytes(layout, self._max_step_tokens)
            promised_bytes += staging_bytes(num_host_slots, layout.block_bytes)
        arena = KvArena(
            layout,
            num_blocks,
            self._device,
            num_blocks_max=num_blocks_max,
            promised_bytes=promised_bytes,
        )
        host = HostArena(num_host_slots, layout.block_bytes, self._device)
        self._pool = _Pool(arena, host, PagedKv(arena, self._groups))

    def resize_pool(self, num_blocks: int) -> None:
        """Shrink or grow the arena between steps; see ``ModelRunner.resize_pool``."""
        pool = self._require_pool()
        pool.arena.resize(num_blocks, promised_bytes=pool.host.untouched_bytes)

    def take_memory(self, num_blocks: int) -> bool:
        """Take memory that blocks will need; see ``ModelRunner.take_memory``."""
        return self._require_pool().arena.take_memory(num_blocks)

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move whole blocks: out, then copies, then in; see ``ModelRunner.move_blocks``."""
        arena, host = self._require_pool().arena, self._require_pool().host
        moves.check(arena.num_blocks, host.num_slots)
        with torch.inference_mode():
            host.settle()
            if len(moves.out_slots):
                host.store(arena.blocks, moves.out_sources, moves.out_slots)
            if len(moves.copy_targets):
                arena.copy(moves.copy_sources, moves.copy_targets)
            if len(moves.in_targets):
                # Nobody reads those before this step has ended; see ``memory.transfers``.
                host.load(arena.blocks, moves.in_slots, moves.in_targets, settles=False)

    def read_block(self, block_id: int) -> bytes:
        """Everything that a block holds; see ``ModelRunner.read_block``."""
        return self._settled_arena().read(block_id)

    def write_block(self, block_id: int, data: bytes) -> None:
        """Make a block hold what ``read_block`` gave; see ``ModelRunner.write_block``."""
        self._settled_arena().write(block_id, data)

    def read_host(self, slot: int) -> bytes:
        """Everything that a host slot holds; see ``ModelRunner.read_host``."""
        return self._require_pool().host.read(slot)

    def write_host(self, slot: int, data: bytes) -> None:
        """Make a host slot hold what ``read_host`` gave; see ``ModelRunner.write_host``."""
        self._require_pool().host.write(slot, data)

    def warm_up(self) -> None:
        """Run one token, then a short prompt, so that threads and kernels are there.

        Writes into block 0, which no sequence owns before the first step. A GPU runs its largest
        step, too, which takes all the memory that a step can need, and records its graphs.

        Raises:
            ResourceExhaustedError: DEVICE_OUT_OF_MEMORY.
        """
        with self._told_of_memory("warm-up"):
            self._warm_up()

    def _warm_up(self) -> None:
        decoder, kv = self._parts()
        with torch.inference_mode():
            for num_tokens in {1, min(kv.block_size, self._max_step_tokens)}:
                batch = prompt_in_block_0(num_tokens, len(self._groups.windows))
                decoder.logits(self._forward(decoder, kv, batch, np.zeros(1, np.int64)))
            if self._on_device is not None:
                self._on_device.warm_up(kv, self._max_step_tokens)

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
            self._prompts.admit(row, token_ids[:num_prompt_tokens])

    def extend(self, row: int, token_id: int) -> None:
        """Count a token that ``row`` was given; see ``ModelRunner.extend``."""
        self._sampler.extend(row, token_id)

    def release(self, row: int) -> None:
        """Forget the sampling state of ``row``."""
        self._sampler.release(row)
        self._prompts.release(row)

    def execute(self, batch: StepBatch) -> StepOutput:
        """Write keys and values, attend, and sample. Returns when tokens are known."""
        if self._lane is not None:
            go_first()
        with torch.inference_mode(), self._told_of_memory("a step"):
            flight = self._launch(batch)
            if flight.logits is not None:
                # A GPU is still computing; collecting is the first to wait for it.
                batch.meanwhile()
            return self._collect(flight)

    def launch(self, batch: StepBatch) -> Flight:
        """Begin a step. With a GPU or compiled CPU kernels this returns long before it is done.

        The next one may be launched before this one is collected if nobody asked about a prompt,
        and on a GPU all who sample are plain (``DeviceSampler``), on a CPU all get a token.

        Raises:
            ResourceExhaustedError: DEVICE_OUT_OF_MEMORY; nothing of the step counts.
        """
        if self._lane is not None and self._only_samples(batch):
            return self._lane.launch(batch, self._work_of(batch))
        if self._on_device is None:
            return Landed(self.execute(batch))
        with torch.inference_mode(), self._told_of_memory("a step"):
            return self._launch(batch)

    def close(self) -> None:
        """Give back weights, arena and host tier."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        self._sampler.close()
        self._decoder = None
        self._on_device = None
        self._pool = None
        self._prompts.clear()

    def _parts(self) -> tuple[Decoder, PagedKv]:
        assert self._decoder is not None, "the runner is closed"
        return self._decoder, self._require_pool().kv

    def _told_of_memory(self, what: str) -> AbstractContextManager[None]:
        """Say in our own words that the memory of a device ran out."""
        return told_of_memory(self._device, what, self._max_step_tokens)

    def _require_pool(self) -> _Pool:
        assert self._pool is not None, "allocate_pool comes first, and nothing after close"
        return self._pool

    def _settled_arena(self) -> KvArena:
        pool = self._require_pool()
        pool.host.settle()
        return pool.arena

    def _only_samples(self, batch: StepBatch) -> bool:
        """Whether nobody wants anything of a step but a token that is theirs."""
        wants_more = batch.drafts is not None or bool(self._prompts.spans(batch))
        return not wants_more and not self._sampler.wants_candidates(batch.sample_rows).any()

    def _work_of(self, batch: StepBatch) -> Callable[[], StepOutput]:
        decoder, kv = self._parts()
        if isinstance(decoder, FusedDecoder):
            work = prepare_work(decoder, kv, self._sampler, batch)
            if work is not None:
                return work
        return lambda: self.execute(batch)

    def _finish(self, flight: PagedFlight) -> StepOutput:
        with torch.inference_mode(), self._told_of_memory("a step"):
            return self._collect(flight)

    def _launch(self, batch: StepBatch) -> PagedFlight:
        decoder, kv = self._parts()
        if not batch.has_moves:
            self._require_pool().host.settle()
        started_ns = time.perf_counter_ns()
        spans = self._prompts.spans(batch)
        device = self._on_device
        if device is not None and not spans and device.takes(batch):
            batch.on_launch()
            logits, coming = device.launch(batch)
            ended_ns = time.perf_counter_ns()
            return PagedFlight(
                batch, [], None, logits, coming, started_ns, ended_ns, finish=self._finish
            )
        rows, outputs_of_spans = batch.sample_tokens, None
        num_samples = rows.size
        if spans:
            asked = (np.arange(span.first, span.end) for span in spans)
            rows = np.concatenate([rows, *asked])
        outputs = self._forward(decoder, kv, batch, rows)
        if spans:
            outputs, outputs_of_spans = outputs[:num_samples], outputs[num_samples:]
        logits, coming = None, None
        if num_samples:
            logits = decoder.logits(outputs)
            coming = None if device is None else device.choose(logits, batch)
        ended_ns = time.perf_counter_ns()
        return PagedFlight(
            batch, spans, outputs_of_spans, logits, coming, started_ns, ended_ns, self._finish
        )

    def _collect(self, flight: PagedFlight) -> StepOutput:
        (decoder, _), batch, logits = self._parts(), flight.batch, flight.logits
        token_ids = np.empty(0, np.int32)
        logprobs: dict[int, TokenLogprobs] = {}
        candidates: dict[int, Candidates] = {}
        executed_ns = flight.launched_ns
        if flight.coming is not None:
            token_ids = flight.coming.wait()
            # What was waited for is the model; choosing is the last and least of it.
            executed_ns = time.perf_counter_ns()
            check_chosen(token_ids, batch.sample_rows)
        elif logits is not None:
            token_ids, logprobs = self._sampler.sample(
                logits, batch.sample_rows, batch.sample_positions, batch.drafts
            )
            candidates = self._candidates(logits, batch, token_ids)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        if flight.outputs is not None:
            prompt_logprobs = self._prompts.collect(
                flight.spans, flight.outputs, decoder.logits, self._sampler
            )
        return StepOutput(
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            candidates=candidates,
            failures=self._sampler.failures(),
            execute_ns=executed_ns - flight.started_ns,
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
        wanted = torch.from_numpy(rows).to(self._device)
        token_ids = positions = _NOTHING
        if not decoder.reads_batch:
            token_ids = torch.from_numpy(batch.token_ids.astype(np.int64)).to(self._device)
            positions = torch.from_numpy(batch.positions.astype(np.int64)).to(self._device)
        if self._on_device is not None:
            token_ids = self._on_device.resolve(token_ids, batch)
        batch.on_launch()
        return decoder.forward(kv, token_ids, positions, wanted)
