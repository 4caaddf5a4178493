"""Logits of the embedded model in bfloat16, and over 8-bit keys and values, beside float32.

The reference is Hugging Face in float32. A logit's error is told in parts of how far logits of one
row lie apart (their standard deviation), so that it does not depend on the model's scale. Of what
is narrow, tolerances are twice what was measured; docs/kv-memory.md has the figures.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from exactness import embedded
from exactness.driver import Driver
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.loader import load_runner

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_PROMPTS, PROMPT_LEN = 3, 160


class Error(NamedTuple):
    """Of all logits: root of the mean square, and the largest; of rows: best token another."""

    rms: float
    worst: float
    part_other_best: float


# By type of weights and of keys and values.
TOLERANCES = {
    ("float32", "float32"): Error(2e-5, 2e-4, 0.0),
    ("float32", "bfloat16"): Error(0.023, 0.42, 0.01),
    ("float32", "int8"): Error(0.09, 1.2, 0.045),
    ("float32", "fp8"): Error(0.33, 4.8, 0.14),
    ("bfloat16", "bfloat16"): Error(0.023, 0.42, 0.01),
    ("bfloat16", "int8"): Error(0.1, 1.4, 0.055),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded.prepare()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    token_ids = embedded.prose(folder)
    return [token_ids[start : start + PROMPT_LEN] for start in range(0, 200 * NUM_PROMPTS, 200)]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """Shape (NUM_PROMPTS * (PROMPT_LEN - 1), vocab_size)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor(prompts)).logits[:, :-1].flatten(0, 1)


def _logits(folder: Path, prompts: list[list[int]], dtype: str, kv_dtype: str) -> torch.Tensor:
    """What the sampler is given for each place of the prompts but the last."""
    runner = load_runner(str(folder), device="cpu", dtype=dtype, kv_dtype=kv_dtype)
    seen: list[torch.Tensor] = []
    describe = runner._sampler.prompt_logprobs

    def listen(row, logits, next_token_ids):
        seen.append(logits.clone())
        return describe(row, logits, next_token_ids)

    runner._sampler.prompt_logprobs = listen
    driver = Driver(runner, num_blocks=16, block_size=16, chunk_size=64, seed=0)
    asking = SamplingParams(temperature=0.0, max_tokens=1, num_prompt_logprobs=0)
    for prompt in prompts:
        driver.generate([prompt], 1, sampling=asking)
    runner.close()
    return torch.cat(seen)


@pytest.mark.parametrize(("dtype", "kv_dtype"), TOLERANCES)
def test_logits_are_as_near_to_float32_as_stated(folder, prompts, expected, dtype, kv_dtype):
    actual = _logits(folder, prompts, dtype, kv_dtype)
    assert actual.shape == expected.shape
    error = (actual - expected) / expected.std(dim=1, keepdim=True)
    other_best = actual.argmax(1) != expected.argmax(1)
    found = Error(
        rms=float(error.square().mean().sqrt()),
        worst=float(error.abs().max()),
        part_other_best=float(other_best.float().mean()),
    )
    print(f"{dtype}, keys and values {kv_dtype}: {found}")
    allowed = TOLERANCES[dtype, kv_dtype]
    assert all(had <= most for had, most in zip(found, allowed, strict=True)), (found, allowed)
