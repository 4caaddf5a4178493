"""A model of windows throughout needs no block that lies before all of them."""

import numpy as np
import pytest

from exactness import tiny_models
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import StepBatch
from pageframe.executor.model.loader import load_runner

_BLOCK_SIZE = 4
_WINDOW = 11
_PROMPT = list(range(5, 33))
_NUM_BLOCKS = 12
_OUTSIDE = 2**31 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.build("mistral", tmp_path_factory.mktemp("model") / "tiny-mistral")


def _step(runner, token_ids, start, table):
    end = start + len(token_ids)
    positions = np.arange(start, end)
    blocks = table[positions // _BLOCK_SIZE].astype(np.int64)
    samples = np.zeros(int(end >= len(_PROMPT)), np.int32)
    return runner.execute(
        StepBatch(
            step=1,
            num_decodes=int(len(token_ids) == 1),
            rows=np.zeros(1, np.int32),
            token_ids=np.array(token_ids, np.int32),
            positions=positions.astype(np.int32),
            slots=blocks * _BLOCK_SIZE + positions % _BLOCK_SIZE,
            query_start=np.array([0, len(token_ids)], np.int32),
            context_lens=np.array([end], np.int32),
            block_tables=table[None],
            samples=samples,
            sample_rows=samples,
        )
    )


def _generate(folder, kv_dtype, runner_name, *, gives_away):
    """Log-probabilities of greedy tokens; blocks before the window are spoilt, or kept."""
    runner = load_runner(
        str(folder), runner=runner_name, device="cpu", dtype="float32", kv_dtype=kv_dtype
    )
    runner.allocate_pool(_NUM_BLOCKS, _BLOCK_SIZE)
    for block_id in range(_NUM_BLOCKS):
        runner.write_block(block_id, b"\xff" * runner.block_bytes)
    sampling = SamplingParams(temperature=0.0, max_tokens=10, num_logprobs=5)
    prompt = np.array(_PROMPT, np.int32)
    runner.admit(
        0, sampling=sampling, sample_index=0, token_ids=prompt, num_prompt_tokens=len(prompt)
    )
    table = np.random.default_rng(1).permutation(_NUM_BLOCKS).astype(np.int32)
    told, tokens, start = [], _PROMPT, 0
    for end in (15, 28, *range(29, 38)):
        if gives_away:
            num_gone = max(0, start - _WINDOW + 1) // _BLOCK_SIZE
            for block_id in table[:num_gone][table[:num_gone] != _OUTSIDE].tolist():
                runner.write_block(block_id, b"\xff" * runner.block_bytes)
            table[:num_gone] = _OUTSIDE
        output = _step(runner, tokens[start:end], start, table)
        if end >= len(_PROMPT):
            tokens = [*tokens, int(output.token_ids[0])]
            told.append(output.logprobs[0].top_logprobs)
        start = end
    runner.close()
    return tokens[len(_PROMPT) :], np.array(told)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "fp8"])
@pytest.mark.parametrize("runner_name", ["native", "transformers"])
def test_what_lies_before_all_windows_has_no_say(folder, kv_dtype, runner_name):
    kept, kept_told = _generate(folder, kv_dtype, runner_name, gives_away=False)
    given, given_told = _generate(folder, kv_dtype, runner_name, gives_away=True)
    assert given == kept
    assert len(set(kept)) > 3
    np.testing.assert_array_equal(given_told, kept_told)
