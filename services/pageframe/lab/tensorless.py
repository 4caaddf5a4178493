"""A model runner that holds no blocks and computes nothing; a subclass says what comes out."""

from abc import abstractmethod

from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import Int32Array, ModelRunner, StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves


class TensorlessRunner(ModelRunner):
    """Everything of a runner but ``facts`` and ``execute``."""

    @property
    def block_bytes(self) -> int:
        """Nothing is held."""
        return 0

    def allocate_pool(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_blocks_max: int = 0,
        num_host_slots: int = 0,
    ) -> None:
        """Reserve nothing."""

    def resize_pool(self, num_blocks: int) -> None:
        """Resize nothing."""

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move nothing."""

    def read_block(self, block_id: int) -> bytes:
        """Nothing is in it."""
        return b""

    def write_block(self, block_id: int, data: bytes) -> None:
        """Write nothing."""

    def read_host(self, slot: int) -> bytes:
        """Nothing is in it."""
        return b""

    def write_host(self, slot: int, data: bytes) -> None:
        """Write nothing."""

    def warm_up(self) -> None:
        """Nothing is slower the first time."""

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """Nothing has to be made."""
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
        """Nothing needs to be known of a row."""

    def extend(self, row: int, token_id: int) -> None:
        """Nothing is known of it."""

    def release(self, row: int) -> None:
        """Nothing is known of it."""

    @abstractmethod
    def execute(self, batch: StepBatch) -> StepOutput:
        """Say what comes out of a step."""
        ...

    def close(self) -> None:
        """Nothing is open."""
