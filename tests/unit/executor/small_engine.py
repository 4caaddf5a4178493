"""An engine over a tiny pool and a fake runner, under plans written out by hand.

After every step full blocks are published, unless the engine may do that when it pleases. Then the
law is recomputed, and every running table is read back: what lies in its blocks must be the tokens
of its sequence, whatever was shared, copied, moved or swapped before.
"""

from collections.abc import Sequence
from dataclasses import replace

from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, Fork, Recovery, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, RefusedBecause, StepResult
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.giving_up import preempt
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW
from unit.executor.fake_runner import FakeRunner, reference_output
from unit.memory.kv_records import RecordingSink, ReplayedPool
from unit.memory.memories import entries

LONG = SamplingParams(max_tokens=40, ignore_eos=True)
ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)
NUM_TOKENS_MAX = 64


def request(
    sequence_id: int, token_ids: Sequence[int], num_prompt_tokens: int = 0, **changes
) -> Announcement:
    changes = {"sampling": LONG} | changes
    tokens = list(token_ids)
    num_prompt_tokens = num_prompt_tokens or len(tokens)
    return Announcement(
        sequence_id=sequence_id, token_ids=tokens, num_prompt_tokens=num_prompt_tokens, **changes
    )


def fork(parent_id: int, *child_ids: int, generation: int = 0) -> Fork:
    """Children with sample indices 1, 2, …"""
    return Fork(
        parent_id=parent_id,
        generation=generation,
        child_ids=list(child_ids),
        sample_indices=list(range(1, len(child_ids) + 1)),
        span_ids=[0] * len(child_ids),
    )


class SmallEngine:
    """See the module text. Blocks of 4 tokens, 4 rows, a prefix cache, no host tier."""

    def __init__(
        self,
        *,
        num_blocks: int = 8,
        block_size: int = 4,
        num_rows: int = 4,
        window_tokens: int = 0,
        is_checked: bool = True,
        is_prompt: bool = True,
        **options,
    ) -> None:
        self.runner = FakeRunner()
        self.runner.facts = replace(self.runner.facts, window_tokens=window_tokens)
        self.sink = RecordingSink()
        self.clock = ManualClock(1_000)
        self.is_checked = is_checked
        self.is_prompt = is_prompt
        self.engine = StepEngine(
            self.runner,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_sequences=num_rows,
            max_step_tokens=NUM_TOKENS_MAX,
            max_model_len=NUM_TOKENS_MAX,
            trace=self.sink,
            clock=self.clock,
            **options,
        )
        self._replayed = ReplayedPool(num_blocks, options.get("num_blocks_max", 0))
        self.sink.records.clear()
        self.results: list[StepResult] = []

    @property
    def memory(self) -> KvMemory:
        return self.engine.memory

    @property
    def desk(self):
        return self.engine.desk

    def step(self, **changes) -> StepResult:
        """The next plan; it builds on the last applied step unless told otherwise."""
        step = changes.pop("step", self.memory.last_received_step + 1)
        builds_on = changes.pop("builds_on", self.memory.last_applied_step)
        result = self.engine.step(StepPlan(step=step, builds_on=builds_on, **changes))
        self.results.append(result)
        if self.is_prompt:
            self.engine.publisher.catch_up()
        if self.is_checked:
            self.check()
        return result

    def start(self, *requests: Announcement) -> StepResult:
        """Announce, admit and compute whole prompts in one step."""
        return self.step(
            announce=list(requests),
            may=entries(*((it.sequence_id, it.generation, NUM_TOKENS_MAX) for it in requests)),
        )

    def cache(self, *prompts: Sequence[int], **changes) -> None:
        """Compute prompts one after the other and let them end: their full blocks are cached."""
        for number, prompt in enumerate(prompts, start=900):
            result = self.start(request(number, prompt, sampling=ONE_TOKEN, **changes))
            if result.refused_because == [RefusedBecause.PROMOTING]:
                result = self.resume(number)
            assert result.finish_reasons[-1] == FinishReason.LENGTH
        self.sink.records.clear()

    def resume(self, sequence_id: int, num_tokens: int = NUM_TOKENS_MAX) -> StepResult:
        sequence = self.memory.sequences.get(sequence_id)
        return self.step(may=entries((sequence_id, sequence.generation, num_tokens)))

    def preempt(
        self, sequence_id: int, recovery: Recovery, num_tail_blocks: int = 0
    ) -> tuple[Recovery, int, int]:
        """Have a sequence give way, as a step would; whatever has to move goes with the next."""
        sequence = self.memory.sequences.get(sequence_id)
        row = sequence.row
        outcome = preempt(self.memory, sequence, recovery, num_tail_blocks)
        if sequence.row == NO_ROW:
            self.runner.release(row)
        return outcome

    def table(self, sequence_id: int) -> list[int]:
        row = self.memory.sequences.get(sequence_id).row
        return self.memory.tables.blocks_of(row).tolist()

    def first_block(self, sequence_id: int) -> int:
        return int(self.memory.tables.first_block[self.memory.sequences.get(sequence_id).row])

    def num_computed(self, sequence_id: int) -> int:
        return int(self.memory.sequences.num_computed[self.memory.sequences.get(sequence_id).row])

    def tokens(self, sequence_id: int) -> list[int]:
        sequence = self.memory.sequences.get(sequence_id)
        return self.memory.sequences.tokens_of_sequence(sequence).tolist()

    def output(self, sequence_id: int) -> list[int]:
        """All tokens that results delivered to one sequence."""
        return [
            token
            for result in self.results
            for known, token in zip(result.sampled_ids, result.token_ids, strict=True)
            if known == sequence_id
        ]

    def free_ids(self) -> list[int]:
        return sorted(self.memory.pool.supply.free_ids().tolist())

    def cached_ids(self) -> list[int]:
        """Cached blocks, the next victim first."""
        return self.memory.pool.supply.evictable_ids()

    def records(self) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
        """Operation, cause, blocks and targets since records were last taken."""
        taken = [
            (r.operation.name, r.cause.name, r.block_ids, r.target_ids) for r in self.sink.records
        ]
        self.sink.records.clear()
        return taken

    def check(self) -> None:
        """Conservation, and the content of every running table."""
        assert self.engine.check_integrity() == []
        assert self.memory.retentions.check() == []
        blocks = self.runner.arena.reshape(-1, self.memory.options.block_size)
        sequences, size = self.memory.sequences, self.memory.options.block_size
        for row in sequences.running_rows().tolist():
            start = int(self.memory.tables.first_block[row]) * size
            end = int(sequences.num_computed[row])
            there = blocks[self.memory.tables.blocks_of(row)].ravel()[: end - start]
            assert there.tolist() == sequences.tokens_of(row)[start:end].tolist(), row


def alone(token_ids: Sequence[int], num_tokens: int, sample_index: int = 0) -> list[int]:
    """The first tokens that a sequence would get that nobody ever disturbs."""
    tokens = list(token_ids)
    output, _ = reference_output(tokens, len(tokens), LONG, NUM_TOKENS_MAX, sample_index)
    return output[:num_tokens]
