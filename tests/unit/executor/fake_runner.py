"""A runner without a model whose tokens depend on every slot that it was told to read and write.

Executing stores each new token in its slot. Sampling reads the whole history back through the block
table and hashes it, so a wrong slot, a wrong table entry or a block that two sequences share by
accident comes out as a wrong token.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, FinishReason
from pageframe.executor.batch import ModelFacts, ModelRunner, StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves

VOCAB_SIZE = 97
EOS_TOKEN_ID = 3


def next_token(history: np.ndarray, sample_index: int = 0) -> int:
    """The token that follows ``history``; it depends on all of it, and on who asks."""
    data = np.ascontiguousarray(history, dtype=np.int32).tobytes()
    return zlib.crc32(data, sample_index) % VOCAB_SIZE


def make_candidates(token_id: int, count: int) -> Candidates:
    """``token_id`` and those after it, each half as likely as the one before."""
    return Candidates(
        token_ids=[(token_id + rank) % VOCAB_SIZE for rank in range(count)],
        logprobs=[-float(rank + 1) for rank in range(count)],
    )


def reference_output(
    token_ids: list[int],
    num_prompt_tokens: int,
    sampling: SamplingParams,
    max_model_len: int,
    sample_index: int = 0,
) -> tuple[list[int], FinishReason]:
    """The output that one sequence alone, never interrupted, would have; with why it ended."""
    tokens = list(token_ids)
    while True:
        token = next_token(np.array(tokens), sample_index)
        tokens.append(token)
        num_output = len(tokens) - num_prompt_tokens
        ending = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ending.add(EOS_TOKEN_ID)
        if token in ending and num_output >= sampling.min_tokens:
            return tokens[num_prompt_tokens:], FinishReason.STOP
        if num_output >= sampling.max_tokens or len(tokens) >= max_model_len:
            return tokens[num_prompt_tokens:], FinishReason.LENGTH


@dataclass
class FakeRunner(ModelRunner):
    """See the module text. ``fail_next`` makes the next execution raise, after its writes."""

    fail_next: bool = False
    fail_next_move: bool = False
    fail_admit_of: set[int] = field(default_factory=set)
    rows: dict[int, list[int]] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    sample_indices: dict[int, int] = field(default_factory=dict)
    num_candidates: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts = ModelFacts(
            name="fake",
            folder="nowhere",
            vocab_size=VOCAB_SIZE,
            max_model_len=4096,
            eos_token_ids=(EOS_TOKEN_ID,),
            kv_bytes_per_token=4,
            device="cpu",
            dtype="float32",
            kv_dtype="float32",
            runner="sim",
        )

    block_bytes = 16

    def allocate_pool(
        self, num_blocks: int, block_size: int, *, num_blocks_max: int = 0, num_host_slots: int = 0
    ) -> None:
        self.block_size = block_size
        self.num_blocks, self.num_host_slots = num_blocks, num_host_slots
        self.num_blocks_taken = 0
        self.arena = np.full(max(num_blocks, num_blocks_max) * block_size, -1, dtype=np.int32)
        self.host = np.full((num_host_slots, block_size), -2, dtype=np.int32)

    def resize_pool(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.arena[num_blocks * self.block_size :] = -1

    def take_memory(self, num_blocks: int) -> bool:
        num_blocks = min(num_blocks, self.num_blocks)
        self.num_blocks_taken = min(self.num_blocks_taken + 1, num_blocks)
        return self.num_blocks_taken < num_blocks

    def move_blocks(self, moves: BlockMoves) -> None:
        moves.check(self.num_blocks, self.num_host_slots)
        if self.fail_next_move:
            self.fail_next_move = False
            raise RuntimeError("the copy engine is on fire")
        blocks = self.arena.reshape(-1, self.block_size)
        self.host[moves.out_slots] = blocks[moves.out_sources]
        blocks[moves.copy_targets] = blocks[moves.copy_sources]
        blocks[moves.in_targets] = self.host[moves.in_slots]

    def read_block(self, block_id: int) -> bytes:
        return self.arena.reshape(-1, self.block_size)[block_id].tobytes()

    def write_block(self, block_id: int, data: bytes) -> None:
        self.arena.reshape(-1, self.block_size)[block_id] = np.frombuffer(data, dtype=np.int32)

    def read_host(self, slot: int) -> bytes:
        return self.host[slot].tobytes()

    def write_host(self, slot: int, data: bytes) -> None:
        self.host[slot] = np.frombuffer(data, dtype=np.int32)

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        return True

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def admit(self, row, *, sampling, sample_index, token_ids, num_prompt_tokens) -> None:
        assert row not in self.rows, f"row {row} is taken"
        self.rows[row] = token_ids.tolist()
        self.sample_indices[row] = sample_index
        self.num_candidates[row] = sampling.num_candidates
        if sample_index in self.fail_admit_of:
            raise ValueError(f"sample {sample_index} is not wanted")

    def extend(self, row: int, token_id: int) -> None:
        self.rows[row].append(token_id)

    def release(self, row: int) -> None:
        del self.rows[row]

    def execute(self, batch: StepBatch) -> StepOutput:
        batch.on_launch()
        self._check(batch)
        self.batches.append(np.diff(batch.query_start).tolist())
        self.arena[batch.slots] = batch.token_ids
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device is on fire")
        sampled = zip(
            batch.samples.tolist(),
            batch.sample_positions.tolist(),
            batch.sample_rows.tolist(),
            strict=True,
        )
        tokens = [
            next_token(self._history(batch, index, position), self.sample_indices[row])
            for index, position, row in sampled
        ]
        output = StepOutput(token_ids=np.array(tokens, dtype=np.int32))
        for index, row in enumerate(batch.sample_rows.tolist()):
            if count := self.num_candidates[row]:
                output.candidates[index] = make_candidates(tokens[index], count)
                output.token_ids[index] = -1
        return output

    def _history(self, batch: StepBatch, index: int, num_tokens: int) -> np.ndarray:
        positions = np.arange(num_tokens)
        blocks = batch.block_tables[index, positions // self.block_size]
        return self.arena[blocks * self.block_size + positions % self.block_size]

    def _check(self, batch: StepBatch) -> None:
        num_new = np.diff(batch.query_start)
        num_sequences, num_tokens = len(batch.rows), len(batch.token_ids)
        assert len(num_new) == len(batch.context_lens) == len(batch.block_tables) == num_sequences
        assert len(batch.positions) == len(batch.slots) == num_tokens == batch.query_start[-1]
        assert (num_new >= 1).all()
        assert (num_new[: batch.num_decodes] == 1).all()
        assert np.isin(np.arange(batch.num_decodes), batch.samples).all()
        assert len(set(batch.rows.tolist())) == num_sequences
        assert set(batch.rows.tolist()) <= self.rows.keys()
        assert set(batch.sample_rows.tolist()) <= self.rows.keys()
        assert len(batch.sample_rows) == len(batch.samples)
        assert batch.slots.max() < self.num_blocks * self.block_size
        assert len(set(batch.slots.tolist())) == num_tokens
        for index in range(num_sequences):
            start, end = batch.query_start[index], batch.query_start[index + 1]
            context = batch.context_lens[index]
            assert batch.positions[start:end].tolist() == list(
                range(context - (end - start), context)
            )
