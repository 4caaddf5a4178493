"""Samples of one prompt: they share it, and each is what it would be as a request of its own."""

import json
from pathlib import Path

import pytest

from exactness import tiny_models
from exactness.serving import Served, Shape, serve
from pageframe.core.clock import SystemClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.core.units import ceil_div
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.loader import load_runner
from unit.memory.memories import entries

MAX_LEN = 768
BLOCK_SIZE = 16
SAMPLING = SamplingParams(temperature=1.0, seed=4321, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny llama, for longer prompts."""
    made = tiny_models.build("llama", tmp_path_factory.mktemp("samples"))
    config = json.loads((made / "config.json").read_text())
    config["max_position_embeddings"] = MAX_LEN
    (made / "config.json").write_text(json.dumps(config))
    return made


def _apart(folder: Path, prompt: list[int], num: int) -> tuple[list[list[int]], int]:
    """Tokens of ``num`` sequences that share nothing, and the most blocks that they hold together.

    Each has a sample index of its own.
    """
    runner = load_runner(str(folder), device="cpu", dtype="float32")
    engine = StepEngine(
        runner,
        num_blocks=num * ceil_div(len(prompt) + SAMPLING.max_tokens, BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_sequences=num,
        max_step_tokens=num * len(prompt),
        max_model_len=MAX_LEN,
        trace=NullTraceSink(),
        clock=SystemClock(),
        has_prefix_cache=False,
    )
    plan = StepPlan(
        step=1,
        builds_on=0,
        announce=[
            Announcement(
                sequence_id=1 + index,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=SAMPLING,
                sample_index=index,
            )
            for index in range(num)
        ],
        may=entries(*((1 + index, 0, len(prompt)) for index in range(num))),
    )
    tokens: list[list[int]] = [[] for _ in range(num)]
    num_held = 0
    while not (plan.step > 1 and engine.is_idle):
        result = engine.step(plan)
        num_held = max(num_held, result.account.held)
        for sequence_id, token_id in zip(result.sampled_ids, result.token_ids, strict=True):
            tokens[sequence_id - 1].append(token_id)
        plan = StepPlan(step=plan.step + 1, builds_on=plan.step)
    runner.close()
    return tokens, num_held


def _together(folder: Path, prompt: list[int], num: int) -> Served:
    runner = load_runner(str(folder), device="cpu", dtype="float32")
    shape = Shape(
        num_blocks=ceil_div(len(prompt), BLOCK_SIZE) + 2 * num,
        block_size=BLOCK_SIZE,
        prefill_chunk_tokens=0,
        lookahead=True,
        max_num_sequences=num,
        token_budget=len(prompt),
        max_model_len=MAX_LEN,
        num_samples=num,
    )
    served = serve(runner, [prompt], SAMPLING, shape)
    runner.close()
    return served


@pytest.mark.parametrize("num_prompt_tokens", [512, 519])
def test_eight_samples_take_a_third_of_the_blocks_of_apart_or_less(folder, num_prompt_tokens):
    (prompt,) = tiny_models.prompts([num_prompt_tokens], seed=11)
    tokens, _ = _apart(folder, prompt, 8)
    served = _together(folder, prompt, 8)
    assert served.samples[0] == tokens
    # Copies of the prompt's last block are the prompt's too.
    num_prompt_blocks = ceil_div(num_prompt_tokens, BLOCK_SIZE)
    copies = [completion.account.num_copies_on_write for completion in served.completions[0]]
    num_blocks = num_prompt_blocks + sum(copies)
    assert sum(copies) == (7 if num_prompt_tokens % BLOCK_SIZE else 0)
    assert 3 * num_blocks <= 8 * num_prompt_blocks
    print(f"{num_prompt_tokens} tokens: {num_blocks} blocks, {8 * num_prompt_blocks} apart")


def test_sixty_four_samples_of_one_prompt(folder):
    (prompt,) = tiny_models.prompts([37], seed=12)
    tokens, num_held_apart = _apart(folder, prompt, 64)
    served = _together(folder, prompt, 64)
    assert served.samples[0] == tokens
    assert len({tuple(sample) for sample in tokens}) > 32
    assert num_held_apart == 64 * ceil_div(37 + SAMPLING.max_tokens - 1, BLOCK_SIZE)
