"""A runner without a model: paged token ids instead of tensors, and time by a formula.

It stands where a model would, under the real engine and the real memory service, for tests, for
planning on paper and for measuring what everything around the model costs.

*Tokens.* The arena holds the token of every slot. A sampled token is a hash of the random key
and of all tokens of its sequence, *read back through its block table*, so a block that was freed
too early, copied or moved too late or put into the wrong table shows as a wrong token, as with a
model; ``sim_arena`` says how.

*Time.* A step lasts what ``SimCost`` says: one sleep to the deadline, or, with a manual clock,
an advance of that clock.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pageframe.core.clock import ManualClock
from pageframe.core.errors import ResourceExhaustedError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import Int32Array, ModelFacts, ModelRunner, StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model.pool_checks import (
    check_block_data,
    check_block_id,
    check_host_slot,
    check_pool_size,
)
from pageframe.executor.model.sim_arena import TokenArena, UInt64Array
from pageframe.executor.model.sim_candidates import sim_candidates
from pageframe.executor.model.sim_distribution import Distribution

# Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCost:
    """What a step costs; nanoseconds, fractions allowed.

    Attributes:
        step_ns: Every step.
        prefill_token_ns: Each token of a sequence that is catching up, and each draft.
        decode_sequence_ns: Each sequence that decodes.
        context_token_ns: Each token of context that a sequence of the step attends to.
        move_block_ns: Each block moved to the host tier or from there.
    """

    step_ns: float = 0.0
    prefill_token_ns: float = 0.0
    decode_sequence_ns: float = 0.0
    context_token_ns: float = 0.0
    move_block_ns: float = 0.0

    def of(self, batch: StepBatch) -> int:
        """Nanoseconds that ``batch`` lasts."""
        num_decodes = batch.num_decodes
        if batch.drafts is not None:
            num_decodes += int(
                np.count_nonzero(batch.drafts.is_first & (batch.drafts.num_behind > 0))
            )
        cost_ns = self.step_ns
        cost_ns += self.prefill_token_ns * (len(batch.token_ids) - num_decodes)
        cost_ns += self.decode_sequence_ns * num_decodes
        cost_ns += self.context_token_ns * int(batch.context_lens.sum())
        return round(cost_ns)

    def of_moves(self, moves: BlockMoves) -> int:
        """Nanoseconds that ``moves`` last, before the batch; copies on the device are free."""
        return round(self.move_block_ns * (len(moves.out_slots) + len(moves.in_targets)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """The model that is simulated.

    Attributes:
        name: Name to serve it under.
        folder: Folder whose tokeniser the gateway uses; may be empty when none is needed.
        vocab_size: Number of token ids.
        max_model_len: Most tokens of one sequence.
        eos_token_ids: Tokens that end a sequence; there is another token beside them.
        eos_probability: How likely each sampled token is the first of ``eos_token_ids``.
        kv_bytes_per_token: What the simulated model's keys and values would take.
        dtype: What its weights would be.
        max_num_rows: Rows are in ``[0, max_num_rows)``.
        cost: What its steps cost.
    """

    name: str = "sim"
    folder: str = ""
    vocab_size: int = 32_000
    max_model_len: int = 8192
    eos_token_ids: tuple[int, ...] = (0,)
    eos_probability: float = 0.0
    kv_bytes_per_token: int = 23_040
    dtype: str = "float32"
    max_num_rows: int = 1024
    cost: SimCost = field(default_factory=SimCost)


@dataclass(slots=True, kw_only=True)
class _PromptWish:
    """A prompt whose log-probabilities have still to be delivered."""

    token_ids: list[int]
    num_best: int


class SimRunner(ModelRunner):
    """Runs steps of no model at all; see the module text.

    The tokens of a sequence at temperature 0 depend on its history alone; otherwise on seed and
    sample index too. Other sampling parameters change nothing, but that ``min_tokens`` holds back
    end-of-sequence and stop tokens. Log-probabilities are those of the distribution that the
    hash stands for: the same for every token but end-of-sequence.

    Args:
        config: The model.
        clock: Advanced by the cost of each step; None lets real time pass.
    """

    def __init__(self, config: SimConfig, clock: ManualClock | None = None) -> None:
        eos = [token_id for token_id in config.eos_token_ids if token_id < config.vocab_size]
        self._plain_ids = np.setdiff1d(np.arange(config.vocab_size, dtype=np.int32), eos)
        assert self._plain_ids.size, f"all {config.vocab_size} tokens end a sequence"
        assert eos or not config.eos_probability, "no end-of-sequence token to be probable"
        assert 0 <= config.eos_probability <= 1, f"probability {config.eos_probability}"
        self.facts = ModelFacts(
            name=config.name,
            folder=config.folder,
            vocab_size=config.vocab_size,
            max_model_len=config.max_model_len,
            eos_token_ids=config.eos_token_ids,
            kv_bytes_per_token=config.kv_bytes_per_token,
            device="sim",
            dtype=config.dtype,
            kv_dtype=config.dtype,
            runner="sim",
        )
        self._config = config
        self._clock = clock
        self._eos_token_id = eos[0] if eos else -1
        self._distribution = Distribution(self._plain_ids, eos, config.eos_probability)
        # Compared with 32 bits of the hash.
        self._eos_below = np.uint64(round(config.eos_probability * 2**32))
        self._keys = np.zeros(config.max_num_rows, dtype=np.uint64)
        self._num_logprobs: dict[int, int] = {}
        self._num_candidates: dict[int, int] = {}
        # First position where a stop may come, and what is a stop; only rows with min_tokens.
        self._held_back: dict[int, tuple[int, frozenset[int]]] = {}
        self._prompt_wishes: dict[int, _PromptWish] = {}
        self._arena = TokenArena(0, 1, 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block as it is kept here, 8 per token; the model's are in ``facts``."""
        return self._arena.block_bytes

    def allocate_pool(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_blocks_max: int = 0,
        num_host_slots: int = 0,
    ) -> None:
        """Reserve 8 bytes per slot and per block, mapped as they are written.

        Raises:
            ResourceExhaustedError: not even that fits.
        """
        try:
            self._arena = TokenArena(
                num_blocks,
                block_size,
                self._config.max_model_len,
                num_blocks_max=num_blocks_max,
                num_host_slots=num_host_slots,
            )
        except MemoryError as error:
            raise ResourceExhaustedError(
                "KV_ARENA_TOO_LARGE",
                f"{max(num_blocks, num_blocks_max)} blocks and {num_host_slots} host slots of "
                f"{block_size} tokens do not fit into memory",
                num_blocks=num_blocks,
                num_blocks_max=num_blocks_max,
                num_host_slots=num_host_slots,
                block_size=block_size,
            ) from error

    def resize_pool(self, num_blocks: int) -> None:
        """Shrink or grow the arena; see ``ModelRunner.resize_pool``."""
        check_pool_size(num_blocks, self._arena.num_blocks_max)
        self._arena.resize(num_blocks)

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move whole blocks: out, then copies, then in; returns when the time for it has passed."""
        start_ns = time.monotonic_ns()
        self._arena.move(moves)
        self._pass_time(start_ns, self._config.cost.of_moves(moves))

    def read_block(self, block_id: int) -> bytes:
        """The tokens of a block; see ``ModelRunner.read_block``."""
        check_block_id(block_id, self._arena.num_blocks)
        return self._arena.read(block_id)

    def write_block(self, block_id: int, data: bytes) -> None:
        """Make a block hold what ``read_block`` gave; see ``ModelRunner.write_block``."""
        check_block_id(block_id, self._arena.num_blocks)
        check_block_data(data, self._arena.block_bytes)
        self._arena.write_block(block_id, data)

    def read_host(self, slot: int) -> bytes:
        """The tokens of a host slot; see ``ModelRunner.read_host``."""
        check_host_slot(slot, self._arena.num_host_slots)
        return self._arena.read_host(slot)

    def write_host(self, slot: int, data: bytes) -> None:
        """Make a host slot hold what ``read_host`` gave; see ``ModelRunner.write_host``."""
        check_host_slot(slot, self._arena.num_host_slots)
        check_block_data(data, self._arena.block_bytes)
        self._arena.write_host(slot, data)

    def warm_up(self) -> None:
        """Nothing is slower the first time."""

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        """Whether ``admit`` need not wait: it never does, for there are no grammars here."""
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
        """Remember the random key of ``row``, and what it wishes beside tokens."""
        seed = np.array([sampling.seed], dtype=np.uint64)
        key = _mix(_mix(seed) + np.uint64(sample_index + 1))
        self._keys[row] = 0 if sampling.is_greedy else key[0]
        if sampling.num_candidates:
            self._num_candidates[row] = sampling.num_candidates
        if sampling.num_logprobs >= 0:
            self._num_logprobs[row] = sampling.num_logprobs
        if sampling.min_tokens:
            stops = set(sampling.stop_token_ids)
            if not sampling.ignore_eos:
                stops.update(self._config.eos_token_ids)
            first = num_prompt_tokens + sampling.min_tokens
            self._held_back[row] = (first, frozenset(stops))
        if sampling.num_prompt_logprobs >= 0:
            self._prompt_wishes[row] = _PromptWish(
                token_ids=token_ids[:num_prompt_tokens].tolist(),
                num_best=sampling.num_prompt_logprobs,
            )

    def extend(self, row: int, token_id: int) -> None:
        """Nothing counts tokens here."""

    def release(self, row: int) -> None:
        """Forget ``row``."""
        self._num_candidates.pop(row, None)
        self._num_logprobs.pop(row, None)
        self._held_back.pop(row, None)
        self._prompt_wishes.pop(row, None)

    def execute(self, batch: StepBatch) -> StepOutput:
        """Write tokens to their slots, read histories back, and pick tokens."""
        start_ns = time.monotonic_ns()
        batch.on_launch()
        output = self._compute(batch)
        output.execute_ns = self._pass_time(start_ns, self._config.cost.of(batch))
        return output

    def close(self) -> None:
        """Give the arena back."""
        self._arena = TokenArena(0, 1, 0)

    def _compute(self, batch: StepBatch) -> StepOutput:
        """What a step yields, in no time."""
        self._arena.write(batch.slots, batch.token_ids)
        drawn = self._draw(batch)
        output = StepOutput(token_ids=self._sample(batch, drawn))
        self._add_logprobs(batch, output)
        if self._num_candidates:
            self._add_candidates(batch, drawn, output)
        return output

    def _draw(self, batch: StepBatch) -> UInt64Array:
        """64 bits for each sample, by its random key and by all tokens before it."""
        positions = batch.sample_positions
        history = self._arena.hash_histories(batch.block_tables[batch.samples], positions)
        keys = self._keys[batch.sample_rows]
        drawn: UInt64Array = _mix(history + keys + positions.astype(np.uint64))
        return drawn

    def _sample(self, batch: StepBatch, drawn: UInt64Array) -> Int32Array:
        positions = batch.sample_positions
        rows = batch.sample_rows
        # The high half picks among the plain tokens, the low half decides about the end.
        place = ((drawn >> _HALF) * np.uint64(self._plain_ids.size)) >> _HALF
        token_ids: Int32Array = self._plain_ids[place.astype(np.intp)]
        if self._eos_below:
            token_ids[(drawn & _LOW_HALF) < self._eos_below] = self._eos_token_id
        if self._held_back:
            self._hold_back(token_ids, rows, positions)
        return token_ids

    def _hold_back(self, token_ids: Int32Array, rows: Int32Array, positions: Int32Array) -> None:
        """Replace stops that come too early by the next token that is none."""
        for index, row in enumerate(rows.tolist()):
            first, stops = self._held_back.get(row, (0, frozenset()))
            if positions[index] < first:
                token_id = int(token_ids[index])
                for _ in range(self._config.vocab_size):
                    if token_id not in stops:
                        break
                    token_id = (token_id + 1) % self._config.vocab_size
                token_ids[index] = token_id

    def _add_candidates(self, batch: StepBatch, drawn: UInt64Array, output: StepOutput) -> None:
        """What beams could go on with; they get no token."""
        positions = batch.sample_positions.tolist()
        for index, row in enumerate(batch.sample_rows.tolist()):
            count = self._num_candidates.get(row, 0)
            if not count:
                continue
            first, stops = self._held_back.get(row, (0, frozenset()))
            output.token_ids[index] = -1
            output.candidates[index] = sim_candidates(
                int(drawn[index]),
                count,
                self._plain_ids,
                self._eos_token_id if self._eos_below else -1,
                stops if positions[index] < first else frozenset(),
            )

    def _add_logprobs(self, batch: StepBatch, output: StepOutput) -> None:
        if self._num_logprobs:
            for index, row in enumerate(batch.sample_rows.tolist()):
                if row in self._num_logprobs:
                    output.logprobs[index] = self._distribution.describe(
                        int(output.token_ids[index]), self._num_logprobs[row]
                    )
        if not self._prompt_wishes:
            return
        for row, context_len in zip(batch.rows.tolist(), batch.context_lens.tolist(), strict=True):
            wish = self._prompt_wishes.get(row)
            if wish is not None and context_len >= len(wish.token_ids):
                del self._prompt_wishes[row]
                output.prompt_logprobs[row] = [
                    self._distribution.describe(token_id, wish.num_best)
                    for token_id in wish.token_ids[1:]
                ]

    def _pass_time(self, start_ns: int, cost_ns: int) -> int:
        """Let what began at ``start_ns`` last ``cost_ns`` in all; returns how long it lasted."""
        if self._clock is not None:
            self._clock.advance_ns(cost_ns)
            return cost_ns
        remaining_ns = start_ns + cost_ns - time.monotonic_ns()
        if remaining_ns > 0:
            time.sleep(remaining_ns / 1e9)
        return time.monotonic_ns() - start_ns


def _mix(words: UInt64Array) -> UInt64Array:
    """SplitMix64's output function: every bit of the input changes half of the output."""
    mixed: Any = words + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    result: UInt64Array = mixed ^ (mixed >> np.uint64(31))
    return result
