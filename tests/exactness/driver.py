"""Drives a runner with paging of its own: scattered blocks, mixed batches, no engine.

It knows the ``ModelRunner`` contract and nothing of pools or schedulers, so that a difference
from Hugging Face is the runner's fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs
from pageframe.core.units import ceil_div
from pageframe.executor.batch import ModelRunner, StepBatch, StepOutput


@dataclass(slots=True)
class Driven:
    """One sequence: its row is its place in the list, its blocks are taken as it grows.

    ``block_ids`` are those of all groups of layers in turns.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    num_tokens_max: int
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def output_ids(self) -> list[int]:
        """Tokens sampled so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_done(self) -> bool:
        """Whether it has all its tokens."""
        return len(self.token_ids) >= self.num_tokens_max


class Driver:
    """Runs sequences to their end, ``chunk_size`` tokens of each prompt per step.

    Sequence ``i`` joins at step ``i * stagger``, so that decodes of some run beside chunks of
    others. Blocks come in random order; those of ended sequences are used again, dirty as they are.
    """

    def __init__(
        self, runner: ModelRunner, *, num_blocks: int, block_size: int, chunk_size: int, seed: int
    ) -> None:
        self._runner = runner
        self._block_size = block_size
        self._num_groups = runner.facts.num_kv_groups
        self._chunk_size = chunk_size
        self._free = np.random.default_rng(seed).permutation(num_blocks).tolist()
        self._random = np.random.default_rng(seed + 1)
        self._step = 0
        runner.allocate_pool(num_blocks, block_size)
        runner.warm_up()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        stagger: int = 1,
    ) -> list[Driven]:
        """Run ``prompts`` to ``max_new_tokens`` each, greedily unless told otherwise."""
        chosen = sampling or SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        sequences = [
            Driven(list(prompt), len(prompt), len(prompt) + max_new_tokens) for prompt in prompts
        ]
        running: list[int] = []
        num_joined = 0
        while num_joined < len(sequences) or running:
            if num_joined < len(sequences) and self._step >= num_joined * stagger:
                self._admit(num_joined, sequences[num_joined], chosen)
                running.append(num_joined)
                num_joined += 1
            if running:
                self._run_step([(row, sequences[row]) for row in running])
            self._step += 1
            for row in [row for row in running if sequences[row].is_done]:
                running.remove(row)
                self._runner.release(row)
                self._free += sequences[row].block_ids
                self._random.shuffle(self._free)
        return sequences

    def _admit(self, row: int, sequence: Driven, sampling: SamplingParams) -> None:
        self._runner.admit(
            row,
            sampling=sampling,
            sample_index=0,
            token_ids=np.array(sequence.token_ids, np.int32),
            num_prompt_tokens=sequence.num_prompt_tokens,
        )

    def _run_step(self, entries: list[tuple[int, Driven]]) -> None:
        def num_missing(sequence: Driven) -> int:
            return len(sequence.token_ids) - sequence.num_computed

        # Decodes stand first in a batch.
        entries = sorted(entries, key=lambda entry: num_missing(entry[1]) != 1)
        counts = [min(num_missing(sequence), self._chunk_size) for _, sequence in entries]
        batch = self._batch(entries, counts)
        output = self._runner.execute(batch)
        self._absorb(entries, counts, batch, output)

    def _batch(self, entries: list[tuple[int, Driven]], counts: list[int]) -> StepBatch:
        tokens, positions, slots, context_lens = [], [], [], []
        for (_, sequence), count in zip(entries, counts, strict=True):
            start, end = sequence.num_computed, sequence.num_computed + count
            num_groups = self._num_groups
            while len(sequence.block_ids) < ceil_div(end, self._block_size) * num_groups:
                sequence.block_ids.append(self._free.pop())
            tokens += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += [
                sequence.block_ids[position // self._block_size * num_groups + group]
                * self._block_size
                + position % self._block_size
                for position in range(start, end)
                for group in range(num_groups)
            ]
            context_lens.append(end)
        # Entries past a sequence's blocks are undefined: make following one fail loudly.
        width = max(len(sequence.block_ids) for _, sequence in entries) + 3 * self._num_groups
        tables = np.full((len(entries), width), 2**31 - 1, np.int32)
        for index, (_, sequence) in enumerate(entries):
            tables[index, : len(sequence.block_ids)] = sequence.block_ids
        samples = [
            index
            for index, (_, sequence) in enumerate(entries)
            if context_lens[index] == len(sequence.token_ids)
        ]
        return StepBatch(
            step=self._step,
            num_decodes=sum(
                len(sequence.token_ids) - sequence.num_computed == 1 for _, sequence in entries
            ),
            rows=np.array([row for row, _ in entries], np.int32),
            token_ids=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            slots=np.array(slots, np.int64),
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            context_lens=np.array(context_lens, np.int32),
            block_tables=tables,
            samples=np.array(samples, np.int32),
            sample_rows=np.array([entries[index][0] for index in samples], np.int32),
        )

    def _absorb(
        self,
        entries: list[tuple[int, Driven]],
        counts: list[int],
        batch: StepBatch,
        output: StepOutput,
    ) -> None:
        for (_, sequence), count in zip(entries, counts, strict=True):
            sequence.num_computed += count
        assert len(output.token_ids) == len(batch.samples)
        for index, sample in enumerate(batch.samples.tolist()):
            sequence = entries[sample][1]
            sequence.token_ids.append(int(output.token_ids[index]))
            if index in output.logprobs:
                sequence.logprobs.append(output.logprobs[index])
        by_row = dict(entries)
        for row, entries_of_prompt in output.prompt_logprobs.items():
            assert by_row[row].prompt_logprobs is None, f"row {row} was told twice"
            by_row[row].prompt_logprobs = entries_of_prompt
