"""Blocks of the simulated runner that move: the tokens stay those of an undisturbed sequence."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import ResourceExhaustedError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import StepBatch
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner

_NUM_BLOCKS = 24
_NUM_SLOTS = 48
_NUM_OUTPUT = 12


def _make_runner(num_blocks=16, block_size=4, **kwargs):
    clock = kwargs.pop("clock", None) or ManualClock()
    cost = kwargs.pop("cost", SimCost())
    runner = SimRunner(SimConfig(vocab_size=1000, max_model_len=512, cost=cost), clock)
    runner.allocate_pool(num_blocks, block_size, **kwargs)
    return runner


def _admit(runner, row, *, seed=0, sample_index=0, num_logprobs=-1):
    runner.admit(
        row,
        sampling=SamplingParams(seed=seed, num_logprobs=num_logprobs),
        sample_index=sample_index,
        token_ids=np.array([1], np.int32),
        num_prompt_tokens=1,
    )


def _execute(runner, entries, block_size=4, forks=()):
    """Rows that sample, and the output of one step.

    ``entries``: (row, all tokens, from, to, table) each.

    Who has caught up samples once; ``forks``: (index of an entry, row) each, one more token from
    that entry's context.
    """
    positions = [np.arange(start, stop) for _, _, start, stop, _ in entries]
    width = max(len(table) for *_, table in entries)
    tables = np.full((len(entries), width), 2**30, np.int32)
    slots = []
    for index, (span, (*_, table)) in enumerate(zip(positions, entries, strict=True)):
        tables[index, : len(table)] = table
        slots.append(tables[index, span // block_size] * block_size + span % block_size)
    sampling = [
        (index, row)
        for index, (row, tokens, _, stop, _) in enumerate(entries)
        if stop == len(tokens)
    ]
    sampling += forks
    batch = StepBatch(
        step=1,
        num_decodes=0,
        rows=np.array([row for row, *_ in entries], np.int32),
        token_ids=np.concatenate([tokens[a:b] for _, tokens, a, b, _ in entries]).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slots=np.concatenate(slots).astype(np.int64),
        query_start=np.cumsum([0, *map(len, positions)]).astype(np.int32),
        context_lens=np.array([stop for *_, stop, _ in entries], np.int32),
        block_tables=tables,
        samples=np.array([index for index, _ in sampling], np.int32),
        sample_rows=np.array([row for _, row in sampling], np.int32),
    )
    return batch.sample_rows, runner.execute(batch)


def _step(runner, entries, block_size=4, forks=()):
    """(row, token) of each token that one step samples."""
    rows, output = _execute(runner, entries, block_size, forks)
    return list(zip(rows.tolist(), output.token_ids.tolist(), strict=True))


def _alone(prompt, num_tokens, **key):
    """What a sequence gets that nobody disturbs, by rows: one block holds it all."""
    runner = _make_runner(num_blocks=1, block_size=256)
    _admit(runner, 0, **key)
    tokens, computed = list(prompt), 0
    for _ in range(num_tokens):
        entry = (0, tokens, computed, len(tokens), [0])
        computed = len(tokens)
        tokens = [*tokens, _step(runner, [entry], 256)[0][1]]
    return tokens[len(prompt) :]


def _ids(*values):
    return np.array(values, np.int64)


_PROMPT = [5, 6, 7, 8, 9, 10, 11]


def test_a_copied_block_is_the_copiers_own():
    runner = _make_runner()
    _admit(runner, 0)
    _admit(runner, 1, sample_index=1)
    # Block 9 has been used before.
    _step(runner, [(0, [30, 31, 32, 33], 0, 4, [9])])
    _step(runner, [(0, _PROMPT, 0, 7, [3, 4])])
    left, right = [*_PROMPT, 50], [*_PROMPT, 60]
    runner.move_blocks(BlockMoves(copy_sources=_ids(4), copy_targets=_ids(9)))
    # Until the copied block is full, and on.
    for stop in range(8, 12):
        sampled = _step(
            runner,
            [(0, left, stop - 1, stop, [3, 4, 5]), (1, right, stop - 1, stop, [3, 9, 10])],
        )
        assert sampled == [
            (0, _alone(left, 1)[0]),
            (1, _alone(right, 1, sample_index=1)[0]),
        ]
        left, right = [*left, sampled[0][1]], [*right, sampled[1][1]]


def test_without_the_copy_the_tokens_are_others():
    runner = _make_runner()
    _admit(runner, 0)
    _step(runner, [(0, [30, 31, 32, 33], 0, 4, [9])])
    _step(runner, [(0, _PROMPT, 0, 7, [3, 4])])
    tokens = [*_PROMPT, 60]
    assert _step(runner, [(0, tokens, 7, 8, [3, 9])]) != [(0, _alone(tokens, 1)[0])]


def test_children_of_a_fork_draw_from_one_context_with_keys_of_their_own():
    runner = _make_runner()
    for row in range(3):
        _admit(runner, row, seed=9, sample_index=row)
    sampled = _step(runner, [(0, _PROMPT, 0, 7, [3, 4])], forks=[(0, 1), (0, 2)])
    expected = [(row, _alone(_PROMPT, 1, seed=9, sample_index=row)[0]) for row in range(3)]
    assert sampled == expected
    assert len({token for _, token in sampled}) == 3


def test_log_probabilities_of_a_fork_go_to_those_who_asked():
    runner = _make_runner()
    for row in range(3):
        _admit(runner, row, sample_index=row, num_logprobs=1 if row == 2 else -1)
    _, output = _execute(runner, [(0, _PROMPT, 0, 7, [3, 4])], forks=[(0, 2), (0, 1)])
    assert list(output.logprobs) == [1]
    assert output.logprobs[1].token_id == output.token_ids[1]


def test_what_shrinks_away_is_gone():
    runner = _make_runner(num_blocks=2000, block_size=4, num_blocks_max=4000)
    _admit(runner, 0)
    tables = {
        "stays": [998, 999],
        "full_one_goes": [1600, 999],
        "last_one_goes": [999, 1600],
        "last_one_goes_from_a_page_that_stays": [999, 1000],
    }
    expected = [(0, _alone(_PROMPT, 2)[1])]
    tokens = [*_PROMPT, _alone(_PROMPT, 1)[0]]
    found = {}
    for name, table in tables.items():
        runner.resize_pool(2000)
        _step(runner, [(0, _PROMPT, 0, 7, table)])
        runner.resize_pool(1000)
        runner.resize_pool(4000)
        found[name] = _step(runner, [(0, tokens, 7, 8, table)]) == expected
    assert [name for name, is_same in found.items() if is_same] == ["stays"]


def test_slots_of_blocks_that_shrank_away_are_not_written():
    runner = _make_runner(num_blocks=4)
    _admit(runner, 0)
    runner.resize_pool(3)
    with pytest.raises(AssertionError, match="block 3 of 3"):
        _step(runner, [(0, _PROMPT, 0, 7, [1, 3])])


def test_moving_out_and_in_costs_time_and_copies_do_not():
    clock = ManualClock(start_ns=5)
    runner = _make_runner(clock=clock, num_host_slots=4, cost=SimCost(move_block_ns=100.5))
    runner.move_blocks(
        BlockMoves(
            out_sources=_ids(0, 1, 2),
            out_slots=_ids(0, 1, 2),
            copy_sources=_ids(4, 5),
            copy_targets=_ids(0, 1),
            in_slots=_ids(1),
            in_targets=_ids(3),
        )
    )
    assert clock.now_ns() == 5 + 402
    runner.move_blocks(BlockMoves(copy_sources=_ids(4), copy_targets=_ids(0)))
    assert clock.now_ns() == 5 + 402


def test_host_slots_too_many_are_refused_with_their_numbers():
    with pytest.raises(ResourceExhaustedError) as caught:
        _make_runner(num_host_slots=2**50)
    assert caught.value.reason == "KV_ARENA_TOO_LARGE"
    assert caught.value.limits["num_host_slots"] == str(2**50)


@dataclass
class _Sequence:
    """A sequence whose blocks are here, or all of them in host slots."""

    row: int
    prompt: list
    tokens: list
    computed: int = 0
    table: list = field(default_factory=list)
    slots: list = field(default_factory=list)

    @property
    def is_done(self):
        return len(self.tokens) >= len(self.prompt) + _NUM_OUTPUT


class _Shuffler:
    """Swaps, compacts and resizes at random; within a step, blocks that leave are used again."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.block_size = int(self.rng.choice([1, 2, 4, 8]))
        self.num_blocks = _NUM_BLOCKS * 8 // self.block_size
        self.runner = _make_runner(self.num_blocks, self.block_size, num_host_slots=_NUM_SLOTS * 8)
        self.free = list(range(self.num_blocks))
        self.free_slots = list(range(_NUM_SLOTS * 8))
        self.sequences = []
        for row in range(6):
            prompt = self.rng.integers(0, 1000, self.rng.integers(1, 20)).tolist()
            _admit(self.runner, row, seed=seed)
            self.sequences.append(_Sequence(row=row, prompt=prompt, tokens=list(prompt)))

    def _take(self, pool):
        return pool.pop(int(self.rng.integers(len(pool))))

    def move(self):
        """Some sequences leave, blocks of others are relocated into what is free, some return."""
        out, copy, into = [], [], []
        present = [s for s in self.sequences if s.table]
        absent = [s for s in self.sequences if s.slots]
        for sequence in present:
            if self.rng.random() < 0.2:
                sequence.slots = [self._take(self.free_slots) for _ in sequence.table]
                out += zip(sequence.table, sequence.slots, strict=True)
                self.free += sequence.table
                sequence.table = []
        freed = []
        for sequence in present:
            for place, block_id in enumerate(sequence.table):
                if self.free and self.rng.random() < 0.2:
                    sequence.table[place] = self._take(self.free)
                    copy.append((block_id, sequence.table[place]))
                    freed.append(block_id)
        # A block that a copy has left can be moved into, in this very step.
        self.free += freed
        for sequence in absent:
            if len(sequence.slots) <= len(self.free) and self.rng.random() < 0.5:
                sequence.table = [self._take(self.free) for _ in sequence.slots]
                into += zip(sequence.slots, sequence.table, strict=True)
                self.free_slots += sequence.slots
                sequence.slots = []
        arrays = [np.array(ids, np.int64) for pairs in (out, copy, into) for ids in _split(pairs)]
        names = BlockMoves.__dataclass_fields__
        self.runner.move_blocks(BlockMoves(**dict(zip(names, arrays, strict=True))))

    def step(self):
        """Those that are here compute some of what they miss."""
        entries, going = [], []
        for sequence in self.sequences:
            if sequence.slots or sequence.is_done or self.rng.random() < 0.2:
                continue
            stop = min(len(sequence.tokens), sequence.computed + int(self.rng.integers(1, 9)))
            num_missing = -(-stop // self.block_size) - len(sequence.table)
            if num_missing > len(self.free):
                continue
            sequence.table += [self._take(self.free) for _ in range(num_missing)]
            going.append(sequence)
            entry = (sequence.row, sequence.tokens, sequence.computed, stop, sequence.table)
            entries.append(entry)
            sequence.computed = stop
        if entries:
            for row, token_id in _step(self.runner, entries, self.block_size):
                self.sequences[row].tokens = [*self.sequences[row].tokens, token_id]

    def finish(self):
        """Sequences that are done give their blocks back."""
        for sequence in self.sequences:
            if sequence.is_done:
                self.free += sequence.table
                self.free_slots += sequence.slots
                sequence.table, sequence.slots = [], []


def _split(pairs):
    return [source for source, _ in pairs], [target for _, target in pairs]


@pytest.mark.parametrize("seed", range(6))
def test_random_swaps_and_relocations_change_no_token(seed):
    print(f"seed {seed}")
    shuffler = _Shuffler(seed)
    for _ in range(500):
        shuffler.move()
        shuffler.step()
        shuffler.finish()
        if all(sequence.is_done for sequence in shuffler.sequences):
            break
    for sequence in shuffler.sequences:
        expected = _alone(sequence.prompt, _NUM_OUTPUT, seed=seed)
        assert sequence.tokens[len(sequence.prompt) :] == expected, f"row {sequence.row}"
