"""The simulated runner: tokens that prove the paging, and time that obeys the formula."""

import subprocess
import sys
import time

import numpy as np
import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import ResourceExhaustedError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import StepBatch
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner

VOCAB_SIZE = 1000
EOS = 2


def make_runner(*, num_blocks=64, block_size=4, clock=None, **config):
    fields = {"vocab_size": VOCAB_SIZE, "eos_token_ids": (EOS,), "max_model_len": 512} | config
    runner = SimRunner(SimConfig(**fields), clock or ManualClock())
    runner.allocate_pool(num_blocks, block_size)
    return runner


def admit(runner, row, tokens, *, sample_index=0, **sampling):
    runner.admit(
        row,
        sampling=SamplingParams(**sampling),
        sample_index=sample_index,
        token_ids=np.array(tokens, dtype=np.int32),
        num_prompt_tokens=len(tokens),
    )


def make_batch(entries, *, block_size=4):
    """``entries``: (row, all tokens, from, to, block table, samples) in batch order."""
    token_ids, positions, slots, query_start = [], [], [], [0]
    for _, tokens, start, stop, table, _ in entries:
        token_ids += tokens[start:stop]
        positions += range(start, stop)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        query_start.append(len(token_ids))
    width = max(len(entry[4]) for entry in entries)
    # Undefined entries hold what must never be read.
    tables = [[*entry[4], *[2**30] * (width - len(entry[4]))] for entry in entries]
    return StepBatch(
        step=1,
        num_decodes=sum(1 for entry in entries if entry[5] and entry[3] - entry[2] == 1),
        rows=np.array([entry[0] for entry in entries], np.int32),
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int64),
        query_start=np.array(query_start, np.int32),
        context_lens=np.array([entry[3] for entry in entries], np.int32),
        block_tables=np.array(tables, np.int32),
        samples=np.array([i for i, entry in enumerate(entries) if entry[5]], np.int32),
        sample_rows=np.array([entry[0] for entry in entries if entry[5]], np.int32),
    )


def step(runner, *entries, **kwargs):
    return runner.execute(make_batch(entries, **kwargs)).token_ids.tolist()


def generate(prompt, num_tokens, *, block_size=4, chunk=100, table=None, **sampling):
    """One sequence by itself, its prompt in chunks."""
    runner = make_runner(block_size=block_size)
    table = table or list(range(512 // block_size))[:64]
    admit(runner, 0, prompt, **sampling)
    tokens = list(prompt)
    for start in range(0, len(prompt), chunk):
        stop = min(start + chunk, len(prompt))
        sampled = step(
            runner, (0, tokens, start, stop, table, stop == len(prompt)), block_size=block_size
        )
    tokens += sampled
    while len(tokens) < len(prompt) + num_tokens:
        entry = (0, tokens, len(tokens) - 1, len(tokens), table, True)
        tokens += step(runner, entry, block_size=block_size)
    return tokens[len(prompt) :]


PROMPT = [5, 6, 7, 8, 9, 10, 11]


def test_tokens_do_not_depend_on_blocks_chunks_or_place():
    expected = generate(PROMPT, 20)
    assert len(set(expected)) > 15
    for block_size in (1, 2, 16, 64):
        table = None if block_size > 8 else list(range(63, -1, -1))
        found = generate(PROMPT, 20, block_size=block_size, table=table)
        assert found == expected, f"block size {block_size}"
    for chunk in (1, 3, 4):
        assert generate(PROMPT, 20, chunk=chunk) == expected, f"chunk {chunk}"


def test_tokens_depend_on_seed_sample_and_history():
    tokens = {
        tuple(generate(prompt, 8, seed=seed, sample_index=sample_index))
        for prompt in (PROMPT, [*PROMPT, 0], [6, 5, *PROMPT[2:]], [0, *PROMPT])
        for seed in (0, 1, 2**63)
        for sample_index in (0, 1)
    }
    assert len(tokens) == 4 * 3 * 2


def test_greedy_ignores_the_key():
    assert generate(PROMPT, 8, temperature=0.0, seed=1) == generate(PROMPT, 8, temperature=0.0)


def test_a_batch_gives_each_sequence_what_it_gets_alone():
    runner = make_runner()
    prompts = {3: [1, 2, 3], 0: [9] * 9, 7: [4, 4, 4, 4]}
    tables = {3: [8, 9], 0: [1, 2, 3, 4], 7: [20, 21, 22]}
    for row, prompt in prompts.items():
        admit(runner, row, prompt, seed=row)
    first = step(runner, *((r, p, 0, len(p), tables[r], True) for r, p in prompts.items()))
    tokens = {r: [*p, token] for (r, p), token in zip(prompts.items(), first, strict=True)}
    second = step(runner, *((r, t, len(t) - 1, len(t), tables[r], True) for r, t in tokens.items()))
    for row, one, two in zip(prompts, first, second, strict=True):
        assert [one, two] == generate(prompts[row], 2, seed=row)


def test_sequences_that_only_catch_up_sample_nothing():
    runner = make_runner()
    admit(runner, 0, PROMPT)
    admit(runner, 1, [1, 2])
    batch = make_batch([(0, PROMPT, 0, 4, [0, 1], False), (1, [1, 2], 0, 2, [5], True)])
    output = runner.execute(batch)
    assert output.token_ids.tolist() == generate([1, 2], 1)
    nothing = runner.execute(make_batch([(0, PROMPT, 4, 5, [0, 1], False)]))
    assert nothing.token_ids.tolist() == []


@pytest.mark.parametrize("where", range(7))
def test_a_slot_overwritten_by_another_sequence_changes_the_token(where):
    runner = make_runner()
    admit(runner, 0, PROMPT)
    admit(runner, 1, PROMPT)
    table = [3, 4]
    expected = step(runner, (0, PROMPT, 0, 7, table, True))
    again = step(runner, (0, PROMPT, 6, 7, table, True))
    assert again == expected
    # Row 1 writes one token into a block that row 0 still holds.
    slots = np.array([table[where // 4] * 4 + where % 4], np.int64)
    intruder = make_batch([(1, [77], 0, 1, [9], False)])
    intruder.slots = slots
    runner.execute(intruder)
    # Row 0 reads without writing: its own write would repair the last slot.
    reader = make_batch([(0, PROMPT, 6, 7, table, True)])
    reader.slots, reader.token_ids = np.zeros(0, np.int64), np.zeros(0, np.int32)
    assert runner.execute(reader).token_ids.tolist() != expected


@pytest.mark.parametrize("table", [[4, 3], [3, 5], [5, 4], [3, 3]])
def test_a_wrong_block_table_changes_the_token(table):
    runner = make_runner()
    admit(runner, 0, PROMPT)
    assert step(runner, (0, PROMPT, 0, 7, [3, 4], True)) == generate(PROMPT, 1)
    reader = make_batch([(0, PROMPT, 6, 7, table, True)])
    reader.slots = np.array([4 * 4 + 2], np.int64)
    assert runner.execute(reader).token_ids.tolist() != generate(PROMPT, 1)


def test_what_a_block_held_before_does_not_matter():
    runner = make_runner()
    admit(runner, 0, list(range(12)))
    step(runner, (0, list(range(12)), 0, 12, [3, 4, 5], True))
    runner.release(0)
    admit(runner, 0, PROMPT)
    assert step(runner, (0, PROMPT, 0, 7, [4, 3], True)) == generate(PROMPT, 1)


@pytest.mark.parametrize("seed", range(5))
def test_random_paging_with_preemption_gives_the_undisturbed_tokens(seed):
    rng = np.random.default_rng(seed)
    block_size, num_tokens = int(rng.choice([1, 2, 4, 8])), 10
    runner = make_runner(num_blocks=400, block_size=block_size)
    prompts = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 30)).tolist() for _ in range(6)]
    free = rng.permutation(400).tolist()
    tokens, computed, tables = [list(p) for p in prompts], [0] * 6, [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        admit(runner, row, prompt, seed=seed)
    while any(len(t) < len(p) + num_tokens for t, p in zip(tokens, prompts, strict=True)):
        if rng.random() < 0.1:
            # All blocks go, and others come: everything is computed again.
            row = int(rng.integers(6))
            free = tables[row] + free
            tables[row], computed[row] = [], 0
        entries = []
        for row in range(6):
            left = len(tokens[row]) - computed[row]
            if len(tokens[row]) == len(prompts[row]) + num_tokens or rng.random() < 0.3:
                continue
            stop = computed[row] + min(left, int(rng.integers(1, 12)))
            while len(tables[row]) * block_size < stop:
                tables[row].append(free.pop(int(rng.integers(len(free)))))
            is_last = stop == len(tokens[row])
            entries.append((row, tokens[row], computed[row], stop, list(tables[row]), is_last))
            computed[row] = stop
        if entries:
            sampled = iter(step(runner, *entries, block_size=block_size))
            for entry in entries:
                if entry[5]:
                    tokens[entry[0]].append(next(sampled))
    for row, prompt in enumerate(prompts):
        assert tokens[row][len(prompt) :] == generate(prompt, num_tokens, seed=seed)


def test_end_of_sequence_comes_as_often_as_asked():
    def ends(**config):
        runner = make_runner(num_blocks=2000, block_size=1, vocab_size=40, **config)
        rows = [(row, [row % 39 + 3 if row % 39 < 37 else 1], row) for row in range(1000)]
        for row, tokens, _ in rows:
            admit(runner, row, tokens, seed=row)
        sampled = step(runner, *((r, t, 0, 1, [block], True) for r, t, block in rows), block_size=1)
        assert min(sampled) >= 0
        assert max(sampled) < 40
        return sampled.count(EOS)

    assert ends() == 0
    assert 60 < ends(eos_probability=0.1) < 140
    assert ends(eos_probability=1.0) == 1000


def test_min_tokens_holds_stops_back():
    prompt = [1]

    def first_tokens(**sampling):
        runner = make_runner(vocab_size=4, eos_probability=0.5)
        admit(runner, 0, prompt, max_tokens=100, **sampling)
        tokens = list(prompt)
        for _ in range(20):
            tokens += step(
                runner, (0, tokens, len(tokens) - 1, len(tokens), [0, 1, 2, 3, 4, 5], True)
            )
        return tokens[1:]

    assert EOS in first_tokens()[:10]
    assert EOS not in first_tokens(min_tokens=10)[:10]
    assert EOS in first_tokens(min_tokens=10)[10:]
    assert EOS in first_tokens(min_tokens=10, ignore_eos=True)[:10]
    held = first_tokens(min_tokens=10, stop_token_ids=(0, 1))
    assert set(held[:10]) == {3}


def test_logprobs_are_those_of_the_distribution_drawn_from():
    runner = make_runner(eos_probability=0.5)
    admit(runner, 0, PROMPT, num_logprobs=3, num_prompt_logprobs=1)
    admit(runner, 1, PROMPT)
    half = runner.execute(
        make_batch([(0, PROMPT, 0, 5, [0, 1], False), (1, PROMPT, 0, 7, [2, 3], True)])
    )
    assert half.prompt_logprobs == {}
    assert half.logprobs == {}
    whole = runner.execute(make_batch([(0, PROMPT, 5, 7, [0, 1], True)]))
    one = np.log(0.5 / (VOCAB_SIZE - 1))
    assert whole.logprobs[0].token_id == whole.token_ids[0]
    assert whole.logprobs[0].top_token_ids == [EOS, 0, 1]
    assert whole.logprobs[0].top_logprobs == pytest.approx([np.log(0.5), one, one])
    described = whole.prompt_logprobs[0]
    assert [entry.token_id for entry in described] == PROMPT[1:]
    assert [entry.logprob for entry in described] == pytest.approx([one] * 6)
    assert runner.execute(make_batch([(0, PROMPT, 6, 7, [0, 1], True)])).prompt_logprobs == {}


def test_a_step_costs_what_the_formula_says():
    cost = SimCost(step_ns=1000, prefill_token_ns=10, decode_sequence_ns=3, context_token_ns=0.5)
    clock = ManualClock(start_ns=7)
    runner = make_runner(clock=clock, cost=cost)
    for row in range(3):
        admit(runner, row, PROMPT)
    batch = make_batch(
        [
            (0, [1], 0, 1, [0], True),
            (1, [1, 2], 1, 2, [1], True),
            (2, PROMPT, 0, 7, [2, 3], False),
        ]
    )
    assert batch.num_decodes == 2
    expected = 1000 + 7 * 10 + 2 * 3 + (1 + 2 + 7) // 2
    assert cost.of(batch) == expected
    assert runner.execute(batch).execute_ns == expected
    assert clock.now_ns() == 7 + expected


def test_real_time_passes_when_no_clock_is_given():
    runner = SimRunner(SimConfig(cost=SimCost(step_ns=20e6)))
    runner.allocate_pool(4, 4)
    admit(runner, 0, PROMPT)
    start_ns = time.monotonic_ns()
    output = runner.execute(make_batch([(0, PROMPT, 0, 7, [2, 3], True)]))
    assert time.monotonic_ns() - start_ns >= output.execute_ns >= 20_000_000


def test_facts_tell_of_the_simulated_model():
    facts = make_runner(name="toy", kv_bytes_per_token=64, dtype="bfloat16").facts
    assert (facts.runner, facts.device, facts.name) == ("sim", "sim", "toy")
    assert (facts.dtype, facts.kv_dtype, facts.kv_bytes_per_token) == ("bfloat16", "bfloat16", 64)
    assert (facts.vocab_size, facts.max_model_len) == (VOCAB_SIZE, 512)
    assert facts.eos_token_ids == (EOS,)


def test_a_pool_too_large_is_refused_with_its_numbers():
    runner = SimRunner(SimConfig())
    with pytest.raises(ResourceExhaustedError) as caught:
        runner.allocate_pool(2**50, 16)
    assert caught.value.reason == "KV_ARENA_TOO_LARGE"
    assert caught.value.limits["num_blocks"] == str(2**50)


def test_the_module_loads_no_torch():
    code = "import sys, pageframe.executor.model.sim; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_launch_is_told_before_anything_is_written():
    runner = make_runner()
    admit(runner, 0, [7, 8])
    before = step(runner, (0, [7, 8], 0, 2, [3], True))
    told = []
    batch = make_batch([(0, [9, 9], 0, 2, [3], True)])
    batch.on_launch = lambda: told.append(step(runner, (0, [7, 8], 1, 2, [3], True)))
    runner.execute(batch)
    assert told == [before]
