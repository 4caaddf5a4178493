"""A tiny model that decodes on the CPU as on a GPU: kernels interpreted, graphs taped."""

import itertools
import json

import numpy as np
import torch

from exactness import tiny_models
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import ModelFacts, StepBatch
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.device_decoder import DeviceDecoder
from pageframe.executor.model.device_sampler import NEWEST, DeviceSampler
from pageframe.executor.model.device_steps import DeviceSteps, GraphParts
from pageframe.executor.model.layer_groups import group_layers
from pageframe.executor.model.native import NativeDecoder
from pageframe.executor.model.runner import PagedRunner
from pageframe.executor.model.sampler import Sampler
from pageframe.kernels.ops.triton_attention import TritonAttention
from unit.model.tape import TapeRecorder

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 250, 64
MOST = 5
# Tokens that a sequence may still get behind those that it comes with.
_ROOM_TOKENS = 12


class House:
    """A runner with graphs, one of PyTorch alone over the same weights, and sequences of both.

    Args:
        name: Of the tiny model.
        folder: Where to make it.
    """

    def __init__(self, name, folder):
        tiny_models.build(name, folder)
        self.config = parse_decoder_config(json.loads((folder / "config.json").read_text()))
        self.decoder, plain_decoder = (
            kind(folder, self.config, torch.float32, CPU, lambda *_: None)
            for kind in (DeviceDecoder, NativeDecoder)
        )
        self.groups = group_layers(self.decoder.windows)
        self.num_groups = len(self.groups.windows)
        self.told = []
        self.recorder = TapeRecorder()
        self.sampler = DeviceSampler(self.config.vocab_size, MOST, [], CPU)
        self.steps = self.make_steps(self.sampler)
        self.runner = self._runner(self.decoder, self.sampler, self.steps)
        plain_sampler = Sampler(self.config.vocab_size, MOST, [], CPU)
        self.plain = self._runner(plain_decoder, plain_sampler, None)
        for runner in (self.runner, self.plain):
            runner.allocate_pool(NUM_BLOCKS, BLOCK_SIZE)
            # Where nobody has written there is no number.
            runner._pool.arena.blocks.fill_(255)
        self.blocks = self.runner._pool.arena.blocks
        self.runner.warm_up()
        self.tables = np.zeros((MOST, MAX_LEN // BLOCK_SIZE * self.num_groups), np.int32)
        self.tokens = {}
        # Block 0 is where a warm-up writes.
        self._blocks = itertools.count(1)

    def make_steps(self, sampler, has_graphs=True, max_model_len=MAX_LEN):
        """What the device does by itself."""

        def make_attention(layout):
            return TritonAttention(layout, self.config.num_heads, torch.float32, CPU)

        return DeviceSteps(
            self.decoder,
            sampler,
            GraphParts(make_attention, lambda: self.recorder) if has_graphs else None,
            max_num_sequences=MOST,
            max_model_len=max_model_len,
            vocab_size=self.config.vocab_size,
            announce=lambda text, fraction: self.told.append((text, fraction)),
        )

    def _runner(self, decoder, sampler, steps):
        facts = ModelFacts(
            name="tiny",
            folder="",
            vocab_size=self.config.vocab_size,
            max_model_len=MAX_LEN,
            eos_token_ids=(),
            kv_bytes_per_token=1,
            device="cpu",
            dtype="float32",
            kv_dtype="float32",
            runner="native",
        )
        return PagedRunner(
            decoder,
            facts,
            sampler,
            CPU,
            torch.float32,
            max_step_tokens=6,
            groups=self.groups,
            on_device=steps,
        )

    def admit(self, row, tokens, **sampling):
        """A sequence with these tokens; all but the last are computed."""
        sampling.setdefault("temperature", 0.0)
        for runner in (self.runner, self.plain):
            runner.admit(
                row,
                sampling=SamplingParams(max_tokens=99, **sampling),
                sample_index=0,
                token_ids=np.array(tokens, np.int32),
                num_prompt_tokens=len(tokens),
            )
        num_columns = -(-(len(tokens) + _ROOM_TOKENS) // BLOCK_SIZE) * self.num_groups
        self.tables[row, :num_columns] = list(itertools.islice(self._blocks, num_columns))
        self.tokens[row] = list(tokens)
        if len(tokens) > 1:
            self.plain.execute(self.prompt(row, len(tokens) - 1))
            own = self.tables[row, :num_columns]
            self.blocks[own] = self.plain._pool.arena.blocks[own]

    def release(self, row):
        """Forget a sequence."""
        for runner in (self.runner, self.plain):
            runner.release(row)
        del self.tokens[row]

    def prompt(self, row, end):
        """The first ``end`` tokens of a sequence; nothing is sampled."""
        batch = self._batch([row], [np.arange(end)], [self.tokens[row][:end]])
        batch.num_decodes, batch.samples = 0, np.empty(0, np.int32)
        batch.sample_rows = batch.samples
        return batch

    def decodes(self, rows, *, unknown=(), ahead=0):
        """The next token of each of ``rows``; those of ``unknown`` are asked for by ``NEWEST``."""
        ends = [len(self.tokens[row]) + (ahead if row in unknown else 0) for row in rows]
        given = [[NEWEST] if row in unknown else self.tokens[row][-1:] for row in rows]
        return self._batch(rows, [np.array([end - 1]) for end in ends], given)

    def _batch(self, rows, spans, given):
        slots = []
        for row, span in zip(rows, spans, strict=True):
            blocks = self.tables[row].reshape(-1, self.num_groups)[span // BLOCK_SIZE]
            slots.append(blocks.astype(np.int64) * BLOCK_SIZE + (span % BLOCK_SIZE)[:, None])
        return StepBatch(
            step=1,
            num_decodes=len(rows),
            rows=np.array(rows, np.int32),
            token_ids=np.concatenate(given).astype(np.int32),
            positions=np.concatenate(spans).astype(np.int32),
            slots=np.concatenate(slots).ravel(),
            query_start=np.cumsum([0, *map(len, spans)]).astype(np.int32),
            context_lens=np.array([span[-1] + 1 for span in spans], np.int32),
            block_tables=self.tables[rows],
            samples=np.arange(len(rows), dtype=np.int32),
            sample_rows=np.array(rows, np.int32),
        )

    def foresee(self, rows, num_steps):
        """Tokens of the next steps of ``rows``, by the plain runner; the sequences stay."""
        tokens = {row: list(self.tokens[row]) for row in rows}
        found = []
        for _ in range(num_steps):
            found.append(self.plain.execute(self.decodes(rows)).token_ids.tolist())
            for row, token in zip(rows, found[-1], strict=True):
                self.tokens[row].append(token)
        self.tokens.update(tokens)
        return found

    def decode(self, rows):
        """One step of both runners, whose tokens have to be the same; takes and returns them."""
        batch = self.decodes(rows)
        expected = self.plain.execute(batch)
        found = self.runner.execute(batch)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        for row, token in zip(rows, found.token_ids.tolist(), strict=True):
            self.tokens[row].append(token)
        return found
