"""The paged runner around a decoder: what is asked of the model, and what comes back."""

import numpy as np
import pytest
import torch

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs
from pageframe.executor.batch import ModelFacts, StepBatch
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model import prompt_logprobs
from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.prompt_logprobs import PromptCollection
from pageframe.executor.model.runner import PagedRunner

_VOCAB_SIZE = 50


class _EchoDecoder:
    """Attends over token ids as values: the logits' peak is the sum of all tokens seen so far."""

    reads_batch = False
    kv_shape = KvShape(num_layers=2, num_kv_heads=1, head_dim=1)

    def __init__(self):
        self.num_logits_rows = []

    def forward(self, kv, token_ids, positions, rows):
        ones = torch.ones(token_ids.shape[0], 1, 1)
        values = token_ids.float()[:, None, None]
        kv.attend(0, ones, ones, -values, scale=0.0, window=None)
        # Equal scores make the mean of all values; times their number, the sum.
        mean = kv.attend(1, ones, ones, values, scale=0.0, window=None)[:, 0, 0]
        return (mean * (positions + 1))[rows]

    def logits(self, outputs):
        self.num_logits_rows.append(outputs.shape[0])
        places = torch.arange(_VOCAB_SIZE)
        return -(places - (outputs.round() % _VOCAB_SIZE)[:, None]).abs()


class _GreedySampler:
    def __init__(self):
        self.asked = []
        self.wishes = set()

    def admit(self, row, *, sampling, sample_index, token_ids, num_prompt_tokens):
        if sampling.num_prompt_logprobs >= 0:
            self.wishes.add(row)

    def release(self, row):
        self.wishes.discard(row)

    def failures(self):
        return {}

    def close(self):
        pass

    def wants_candidates(self, rows):
        return np.zeros(len(rows), dtype=np.bool_)

    def sample(self, logits, rows, positions, drafts=None):
        self.asked.append((rows.tolist(), positions.tolist()))
        return logits.argmax(-1).numpy().astype(np.int32), {}

    def wants_prompt_logprobs(self, row):
        return row in self.wishes

    def prompt_logprobs(self, row, logits, next_token_ids):
        return [
            TokenLogprobs(token_id=int(token_id), logprob=float(best))
            for token_id, best in zip(next_token_ids, logits.argmax(-1), strict=True)
        ]


@pytest.fixture
def parts():
    decoder, sampler = _EchoDecoder(), _GreedySampler()
    facts = ModelFacts(
        name="echo",
        folder="",
        vocab_size=_VOCAB_SIZE,
        max_model_len=512,
        eos_token_ids=(),
        kv_bytes_per_token=16,
        device="cpu",
        dtype="float32",
        kv_dtype="float32",
        runner="native",
    )
    runner = PagedRunner(
        decoder, facts, sampler, torch.device("cpu"), torch.float32, max_step_tokens=64
    )
    runner.allocate_pool(num_blocks=8, block_size=4, num_host_slots=2)
    runner.warm_up()
    decoder.num_logits_rows.clear()
    return runner, decoder, sampler


def _batch(entries):
    """``entries``: (row, new tokens, context length, block table, samples?) each; blocks of 4."""
    positions = [np.arange(end - len(new), end) for _, new, end, _, _ in entries]
    slots = [
        [table[position // 4] * 4 + position % 4 for position in span]
        for span, (_, _, _, table, _) in zip(positions, entries, strict=True)
    ]
    tables = np.zeros((len(entries), max(len(table) for _, _, _, table, _ in entries)), np.int32)
    for index, (_, _, _, table, _) in enumerate(entries):
        tables[index, : len(table)] = table
    return StepBatch(
        step=1,
        num_decodes=0,
        rows=np.array([row for row, *_ in entries], np.int32),
        token_ids=np.concatenate([new for _, new, *_ in entries]).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slots=np.concatenate(slots).astype(np.int64),
        query_start=np.cumsum([0] + [len(new) for _, new, *_ in entries]).astype(np.int32),
        context_lens=np.array([end for _, _, end, *_ in entries], np.int32),
        block_tables=tables,
        samples=np.array([index for index, entry in enumerate(entries) if entry[4]], np.int32),
        sample_rows=np.array([entry[0] for entry in entries if entry[4]], np.int32),
    )


def _admit(runner, row, prompt, num_output=0, **sampling):
    runner.admit(
        row,
        sampling=SamplingParams(temperature=0.0, **sampling),
        sample_index=0,
        token_ids=np.array([*prompt, *range(num_output)], np.int32),
        num_prompt_tokens=len(prompt),
    )


def test_samples_only_for_sequences_that_caught_up(parts):
    runner, decoder, sampler = parts
    output = runner.execute(
        _batch(
            [
                (5, [3], 1, [6], True),
                (2, [1, 2], 2, [0], False),
                (7, [4, 4, 4, 4, 4], 5, [3, 1], True),
            ]
        )
    )
    assert output.token_ids.tolist() == [3, 20]
    assert decoder.num_logits_rows == [2]
    assert sampler.asked == [([5, 7], [1, 5])]
    assert output.execute_ns > 0


def test_nobody_samples_and_the_head_is_not_computed(parts):
    runner, decoder, sampler = parts
    output = runner.execute(_batch([(2, [1, 2], 2, [0], False)]))
    assert output.token_ids.tolist() == []
    assert output.token_ids.dtype == np.int32
    assert (decoder.num_logits_rows, sampler.asked) == ([], [])


def test_blocks_that_were_moved_are_attended_to(parts):
    runner, _, _ = parts
    runner.execute(_batch([(0, [1, 2, 3], 3, [5], True)]))
    # A child takes a copy of the shared block and writes its own token there, while its parent
    # writes another token into the original.
    runner.move_blocks(BlockMoves(copy_sources=np.array([5]), copy_targets=np.array([2])))
    output = runner.execute(_batch([(0, [10], 4, [5], True), (1, [20], 4, [2], True)]))
    assert output.token_ids.tolist() == [16, 26]
    # The parent leaves, its block is written by somebody else, and it comes back into another.
    runner.move_blocks(BlockMoves(out_sources=np.array([5]), out_slots=np.array([1])))
    runner.execute(_batch([(3, [9, 9, 9, 9], 4, [5], True)]))
    runner.move_blocks(BlockMoves(in_slots=np.array([1]), in_targets=np.array([7])))
    output = runner.execute(_batch([(0, [4], 5, [7, 6], True)]))
    assert output.token_ids.tolist() == [20]


def test_a_pool_that_shrank_and_grew_goes_on(parts):
    runner, _, _ = parts
    runner.execute(_batch([(0, [1, 2, 3], 3, [5], True)]))
    runner.resize_pool(6)
    assert runner.execute(_batch([(0, [4], 4, [5], True)])).token_ids.tolist() == [10]
    runner.resize_pool(8)
    assert runner.execute(_batch([(0, [5], 5, [5, 7], True)])).token_ids.tolist() == [15]


def test_children_of_a_fork_draw_from_one_row_of_logits(parts):
    runner, decoder, sampler = parts
    batch = _batch([(5, [3], 1, [6], True), (7, [4, 4], 2, [3], True)])
    batch.samples = np.array([0, 1, 1, 1], np.int32)
    batch.sample_rows = np.array([5, 7, 2, 9], np.int32)
    assert runner.execute(batch).token_ids.tolist() == [3, 8, 8, 8]
    assert decoder.num_logits_rows == [4]
    assert sampler.asked == [([5, 7, 2, 9], [1, 2, 2, 2])]


def test_prompt_logprobs_are_delivered_once_with_the_last_chunk(parts):
    runner, _, _ = parts
    _admit(runner, 4, [1, 2, 3, 4, 5], num_prompt_logprobs=0, max_tokens=2)
    first = runner.execute(_batch([(4, [1, 2], 2, [0], False)]))
    second = runner.execute(_batch([(4, [3, 4], 4, [0], False)]))
    third = runner.execute(_batch([(4, [5], 5, [0, 1], True)]))
    fourth = runner.execute(_batch([(4, [15], 6, [0, 1], True)]))
    assert (first.prompt_logprobs, second.prompt_logprobs) == ({}, {})
    told = [(entry.token_id, entry.logprob) for entry in third.prompt_logprobs[4]]
    # Each token with the sum of those before it.
    assert told == [(2, 1.0), (3, 3.0), (4, 6.0), (5, 10.0)]
    assert third.token_ids.tolist() == [15]
    assert fourth.prompt_logprobs == {}


def test_long_prompts_never_hold_all_their_logits(parts, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "_ROWS_AT_ONCE", 10)
    runner, decoder, _ = parts
    prompt = [1] * 32
    _admit(runner, 0, prompt, num_prompt_logprobs=0)
    output = runner.execute(_batch([(0, prompt, 32, list(range(8)), True)]))
    assert [entry.logprob for entry in output.prompt_logprobs[0]] == list(range(1, 32))
    assert decoder.num_logits_rows == [1, 10, 10, 10, 1]


def test_prompt_of_one_token_has_no_logprobs_but_says_so(parts):
    runner, _, _ = parts
    _admit(runner, 0, [9], num_prompt_logprobs=0)
    assert runner.execute(_batch([(0, [9], 1, [0], True)])).prompt_logprobs == {0: []}


def test_prompt_logprobs_start_over_after_a_preemption_and_stop_once_told(parts):
    runner, _, _ = parts
    _admit(runner, 0, [1, 2, 3], num_prompt_logprobs=0)
    runner.execute(_batch([(0, [1, 2], 2, [0], False)]))
    runner.release(0)
    _admit(runner, 0, [1, 2, 3], num_prompt_logprobs=0)
    output = runner.execute(_batch([(0, [1, 2, 3], 3, [1], True)]))
    assert [entry.token_id for entry in output.prompt_logprobs[0]] == [2, 3]
    runner.release(0)
    _admit(runner, 0, [1, 2, 3], num_output=1, num_prompt_logprobs=0)
    again = runner.execute(_batch([(0, [1, 2, 3, 0], 4, [1], True)]))
    assert again.prompt_logprobs == {}


def test_prompt_positions_that_were_never_computed_are_our_bug():
    collection = PromptCollection(np.arange(9, dtype=np.int32))
    with pytest.raises(AssertionError, match="positions from 4 follow 0"):
        collection.wanted(4, 6)


def test_steps_before_the_pool_or_after_closing_are_our_bug(parts):
    runner, _, _ = parts
    with pytest.raises(AssertionError, match="allocated already"):
        runner.allocate_pool(1, 1)
    runner.close()
    with pytest.raises(AssertionError, match="closed"):
        runner.execute(_batch([(0, [1], 1, [0], True)]))


@pytest.mark.parametrize("reads_batch", [False, True])
def test_the_launch_is_told_once_when_only_the_model_is_left(parts, reads_batch):
    runner, decoder, sampler = parts
    decoder.reads_batch = reads_batch
    told = []

    def forward(kv, token_ids, positions, rows):
        told.append(("forward", kv.batch.step, token_ids.tolist(), rows.tolist()))
        return torch.zeros(len(rows))

    sample = sampler.sample

    def note_and_sample(*args):
        told.append("sample")
        return sample(*args)

    decoder.forward, sampler.sample = forward, note_and_sample
    batch = _batch([(0, [1, 2, 3], 3, [5], True)])
    batch.on_launch = lambda: told.append("launch")
    runner.execute(batch)
    token_ids = [] if reads_batch else [1, 2, 3]
    assert told == ["launch", ("forward", 1, token_ids, [2]), "sample"]
