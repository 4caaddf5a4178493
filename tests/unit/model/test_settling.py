"""When a runner lets a device see the blocks that it loaded: not before it has to."""

import numpy as np
import pytest
import torch

from pageframe.executor.batch import ModelFacts, StepBatch
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.host_arena import HostArena
from pageframe.executor.model.runner import PagedRunner


class _Decoder:
    """A model of one token."""

    reads_batch = False
    kv_shape = KvShape(num_layers=1, num_kv_heads=1, head_dim=8)

    def __init__(self, log):
        self._log = log

    def forward(self, kv, token_ids, positions, rows):
        self._log.append("step")
        return torch.zeros(len(rows), 4)

    def logits(self, outputs):
        return outputs


class _Sampler:
    def sample(self, logits, rows, positions, drafts):
        return np.zeros(len(rows), np.int32), {}

    def wants_candidates(self, rows):
        return np.zeros(len(rows), np.bool_)

    def failures(self):
        return {}


@pytest.fixture
def runner_and_log(monkeypatch):
    log = []

    class Played:
        def __getattr__(self, name):
            return lambda *_: log.append(name)

    monkeypatch.setattr(HostArena, "_device_copies", lambda _: Played())
    facts = ModelFacts(
        name="tiny",
        folder="",
        vocab_size=4,
        max_model_len=64,
        eos_token_ids=(),
        kv_bytes_per_token=1,
        device="cpu",
        dtype="float32",
        kv_dtype="float32",
        runner="native",
    )
    runner = PagedRunner(
        _Decoder(log), facts, _Sampler(), torch.device("cpu"), torch.float32, max_step_tokens=8
    )
    runner.allocate_pool(4, 4, num_host_slots=2)
    return runner, log


def _batch(has_moves):
    zero = np.zeros(1, np.int32)
    return StepBatch(
        step=1,
        num_decodes=1,
        rows=zero,
        token_ids=zero,
        positions=zero,
        slots=np.zeros(1, np.int64),
        query_start=np.array([0, 1], np.int32),
        context_lens=np.ones(1, np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        samples=zero,
        sample_rows=zero,
        has_moves=has_moves,
    )


def _moves():
    return BlockMoves(
        in_slots=np.zeros(1, np.int64),
        in_targets=np.ones(1, np.int64),
        copy_sources=np.zeros(1, np.int64),
        copy_targets=np.full(1, 3, np.int64),
    )


def test_the_step_that_loads_runs_beside_it_and_the_next_one_sees_it(runner_and_log):
    runner, log = runner_and_log
    runner.move_blocks(_moves())
    runner.execute(_batch(True))
    runner.execute(_batch(False))
    assert log == ["settle", "load", "step", "settle", "step"]


def test_moves_see_what_earlier_ones_loaded(runner_and_log):
    runner, log = runner_and_log
    runner.move_blocks(_moves())
    runner.move_blocks(_moves())
    assert log == ["settle", "load", "settle", "load"]


def test_blocks_that_are_read_or_written_by_hand_are_settled(runner_and_log):
    runner, log = runner_and_log
    runner.move_blocks(_moves())
    data = runner.read_block(1)
    runner.write_block(2, data)
    assert log == ["settle", "load", "settle", "settle"]
