"""A device without arithmetic: slots hold fingerprints, made from what stands in the slot before.

Like attention it reads the past through the block table. So a wrong slot, a wrong table entry, or a
move in the wrong order leaves fingerprints that nobody expects, and tokens that nobody expects.
"""

from collections.abc import Callable

import numpy as np

from bench.soak.fingerprints import NOTHING, extend, root_of, token_after
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import Int32Array, ModelFacts, ModelRunner, StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves

VOCAB_SIZE = 64


class DeviceError(Exception):
    """The device was told to fail."""


class Device(ModelRunner):
    """A ``ModelRunner`` over lists of fingerprints.

    Attributes:
        facts: As any model's; its windows are what the memory gives blocks up by.
        blocks: Fingerprint by block and place in it.
        host: The same by host slot.
        fail_moves: Whether the next move of blocks fails, before anything has moved.
        fail_execution: Whether the next execution fails, after its writes.
        on_execute: Called with each batch before it is computed.
    """

    def __init__(self, window_tokens: int = 0, group_windows: tuple[int, ...] = ()) -> None:
        self.facts = ModelFacts(
            name="fingerprints",
            folder="nowhere",
            vocab_size=VOCAB_SIZE,
            max_model_len=1 << 20,
            eos_token_ids=(),
            kv_bytes_per_token=8,
            device="sim",
            dtype="float32",
            kv_dtype="float32",
            runner="sim",
            window_tokens=window_tokens,
            group_windows=group_windows,
        )
        self.blocks: list[list[int]] = []
        self.host: list[list[int]] = []
        self.fail_moves = False
        self.fail_execution = False
        self.on_execute: Callable[[StepBatch], None] = _do_nothing
        self._block_size = 0
        self._num_blocks = 0
        self._num_groups = self.facts.num_kv_groups
        self._samplers: dict[int, tuple[int, int]] = {}

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return 8 * self._block_size

    def allocate_pool(
        self, num_blocks: int, block_size: int, *, num_blocks_max: int = 0, num_host_slots: int = 0
    ) -> None:
        """See ``ModelRunner``."""
        self._block_size, self._num_blocks = block_size, num_blocks
        self.blocks = [[NOTHING] * block_size for _ in range(max(num_blocks, num_blocks_max))]
        self.host = [[NOTHING] * block_size for _ in range(num_host_slots)]

    def resize_pool(self, num_blocks: int) -> None:
        """See ``ModelRunner``."""
        self._num_blocks = num_blocks
        for block in self.blocks[num_blocks:]:
            block[:] = [NOTHING] * self._block_size

    def take_memory(self, num_blocks: int) -> bool:
        """See ``ModelRunner``; there is none to take."""
        return False

    def move_blocks(self, moves: BlockMoves) -> None:
        """See ``ModelRunner``."""
        moves.check(self._num_blocks, len(self.host))
        if self.fail_moves:
            self.fail_moves = False
            raise DeviceError("no block was moved")
        for block, slot in zip(moves.out_sources.tolist(), moves.out_slots.tolist(), strict=True):
            self.host[slot] = self.blocks[block].copy()
        copied = [self.blocks[block].copy() for block in moves.copy_sources.tolist()]
        for block, content in zip(moves.copy_targets.tolist(), copied, strict=True):
            self.blocks[block] = content
        for slot, block in zip(moves.in_slots.tolist(), moves.in_targets.tolist(), strict=True):
            self.blocks[block] = self.host[slot].copy()

    def read_block(self, block_id: int) -> bytes:
        """See ``ModelRunner``."""
        return np.array(self.blocks[block_id], dtype=np.int64).tobytes()

    def write_block(self, block_id: int, data: bytes) -> None:
        """See ``ModelRunner``."""
        self.blocks[block_id] = np.frombuffer(data, dtype=np.int64).tolist()

    def read_host(self, slot: int) -> bytes:
        """See ``ModelRunner``."""
        return np.array(self.host[slot], dtype=np.int64).tobytes()

    def write_host(self, slot: int, data: bytes) -> None:
        """See ``ModelRunner``."""
        self.host[slot] = np.frombuffer(data, dtype=np.int64).tolist()

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def close(self) -> None:
        """There is nothing to give back."""

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """There are no grammars, and nothing else has to be made."""
        return True

    def admit(
        self,
        row: int,
        *,
        sampling: SamplingParams,
        sample_index: int,
        token_ids: Int32Array,
        num_prompt_tokens: int,
    ) -> None:
        """See ``ModelRunner``. The seed stands for the salt of the tenant."""
        assert row not in self._samplers, f"row {row} is taken"
        self._samplers[row] = sampling.seed, sample_index

    def extend(self, row: int, token_id: int) -> None:
        """No token counts for what is sampled after it but by its fingerprint."""

    def release(self, row: int) -> None:
        """See ``ModelRunner``."""
        del self._samplers[row]

    def execute(self, batch: StepBatch) -> StepOutput:
        """See ``ModelRunner``."""
        batch.on_launch()
        self.on_execute(batch)
        for index, row in enumerate(batch.rows.tolist()):
            for group in range(self._num_groups):
                root = root_of(self._samplers[row][0], group)
                self._write(batch, index, root, group)
        if self.fail_execution:
            self.fail_execution = False
            raise DeviceError("the step has written and sampled nothing")
        tokens = []
        for index, row in zip(batch.samples.tolist(), batch.sample_rows.tolist(), strict=True):
            position = int(batch.context_lens[index]) - 1
            groups = range(self._num_groups)
            lasts = [self._read(batch, index, position, group) for group in groups]
            tokens.append(token_after(lasts, self._samplers[row][1], VOCAB_SIZE))
        return StepOutput(token_ids=np.array(tokens, dtype=np.int32))

    def _write(self, batch: StepBatch, index: int, root: int, group: int) -> None:
        start, end = int(batch.query_start[index]), int(batch.query_start[index + 1])
        position, block_size = int(batch.positions[start]), self._block_size
        value = self._read(batch, index, position - 1, group) if position else root
        tokens, slots = batch.token_ids[start:end], batch.slots.reshape(-1, self._num_groups)
        for token_id, slot in zip(tokens.tolist(), slots[start:end, group].tolist(), strict=True):
            value = extend(value, token_id)
            self.blocks[slot // block_size][slot % block_size] = value

    def _read(self, batch: StepBatch, index: int, position: int, group: int) -> int:
        entry = position // self._block_size * self._num_groups + group
        block = int(batch.block_tables[index, entry])
        return self.blocks[block][position % self._block_size]


def _do_nothing(batch: StepBatch) -> None:
    """Nobody watches."""
