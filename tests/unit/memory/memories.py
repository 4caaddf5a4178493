"""A small memory under plans written out by hand, without an engine or a model."""

import numpy as np

from pageframe.core.plan import Announcement, Entries, Recovery, StepPlan, Victims
from pageframe.core.sampling import SamplingParams
from pageframe.executor.memory.apply import AppliedStep, apply
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.eviction import LruEviction
from pageframe.executor.memory.giving_up import leave_window
from pageframe.executor.memory.integrity import check_integrity
from pageframe.executor.memory.options import MemoryOptions, StepBounds
from pageframe.executor.memory.prefix_index import PrefixIndex
from pageframe.executor.memory.publishing import publish
from pageframe.executor.memory.yielding import build_memory
from unit.memory.kv_records import RecordingSink


def announcement(sequence_id: int, num_tokens: int = 4, **changes) -> Announcement:
    changes = {"num_prompt_tokens": num_tokens, "sampling": SamplingParams()} | changes
    token_ids = [sequence_id * 10 + index for index in range(num_tokens)]
    return Announcement(sequence_id=sequence_id, token_ids=token_ids, **changes)


def entries(*rows: tuple[int, int, int]) -> Entries:
    """Rows of sequence id, generation, number of tokens."""
    made = Entries()
    for row in rows:
        made.add(*row)
    return made


def victims(*rows: tuple[int, int]) -> Victims:
    """Rows of sequence id, generation; all recover by recompute."""
    made = Victims()
    for sequence_id, generation in rows:
        made.add(sequence_id, generation, Recovery.RECOMPUTE)
    return made


def new_pool(num_blocks: int, sink: RecordingSink, num_blocks_max: int = 0) -> BlockPool:
    """A pool of its own, blocks of 4 tokens, evicting what was used longest ago."""
    return BlockPool(
        num_blocks,
        sink,
        index=PrefixIndex(max(num_blocks, num_blocks_max), 4),
        eviction=LruEviction(),
        num_blocks_max=num_blocks_max,
    )


class Harness:
    """Applies plans in order and pretends that each step computed and sampled."""

    def __init__(
        self, *, num_blocks: int = 8, block_size: int = 4, num_rows: int = 4, **options
    ) -> None:
        self.sink = RecordingSink()
        self.memory = build_memory(
            MemoryOptions(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_sequences=num_rows,
                max_model_len=64,
                **{"has_prefix_cache": False, **options},
            ),
            trace=self.sink,
        )
        self.bounds = StepBounds(max_step_tokens=32, max_model_len=64, vocab_size=1000)

    def apply(self, **changes) -> AppliedStep:
        """Apply the next plan; it builds on the last applied step unless told otherwise."""
        step = changes.pop("step", self.memory.last_received_step + 1)
        builds_on = changes.pop("builds_on", self.memory.last_applied_step)
        applied = apply(
            self.memory, StepPlan(step=step, builds_on=builds_on, **changes), self.bounds
        )
        assert check_integrity(self.memory) == []
        return applied

    def run(self, **changes) -> AppliedStep:
        """Apply the next plan and compute what it asks for; every sampled token is 5."""
        applied = self.apply(**changes)
        sequences = self.memory.sequences
        assert applied.result.refusal == ""
        self.memory.transfers.take()
        self.memory.transfers.finish()
        sequences.num_computed[applied.decode_rows] += 1
        for row, num_tokens in applied.chunks.items():
            sequences.num_computed[row] += num_tokens
        for parent, child in applied.forks:
            sequences.num_computed[child.row] = sequences.num_computed[parent.row]
        rows = sequences.running_rows()
        publish(self.memory, rows)
        leave_window(self.memory, rows)
        rows = rows[sequences.num_computed[rows] == sequences.num_tokens[rows]]
        sequences.append_tokens(rows, np.full(len(rows), 5, dtype=np.int32))
        return applied

    def row(self, sequence_id: int) -> int:
        return self.memory.sequences.get(sequence_id).row

    def decode_ids(self, applied: AppliedStep) -> list[int]:
        return self.memory.sequences.sequence_ids[applied.decode_rows].tolist()

    def snapshot(self) -> tuple:
        """Everything that a refused plan must leave alone."""
        memory = self.memory
        sequences = [
            (s.sequence_id, s.generation, s.state, s.row, s.parked_tokens.tolist())
            for s in memory.sequences.all()
        ]
        return (
            memory.pool.columns.states.tolist(),
            memory.pool.columns.ref_counts.tolist(),
            memory.pool.supply.free_ids().tolist(),
            memory.tables.num_blocks.tolist(),
            memory.tables.entries.tolist(),
            memory.sequences.num_tokens.tolist(),
            memory.sequences.num_computed.tolist(),
            memory.sequences.running_rows().tolist(),
            sequences,
            memory.last_applied_step,
            len(self.sink.records),
        )
