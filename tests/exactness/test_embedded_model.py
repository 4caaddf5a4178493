"""The embedded model through three processes says what Hugging Face says, token for token."""

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from exactness import embedded
from exactness.tiny_models import GreedyAnswer, hf_greedy
from pageframe.client import AsyncPageframeClient, GenerationRequest, GenerationResult

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT_LENGTHS = (
    *(1, 2, 3, 5, 8, 13, 16, 17, 24, 33, 48, 64),
    *(70, 96, 120, 128, 150, 200, 256, 300, 400, 512, 900, 1500),
)
MAX_NEW_TOKENS = 48
NUM_UNDECIDED_MAX = 2


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded.prepare()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    """Pieces of English prose, each from another place."""
    token_ids = embedded.prose(folder)
    starts = range(0, 24 * 31, 31)
    return [token_ids[start : start + n] for start, n in zip(starts, PROMPT_LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def answers(folder: Path, prompts: list[list[int]]) -> list[GreedyAnswer]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return hf_greedy(folder, prompts, MAX_NEW_TOKENS)
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def serving(state_dir: Path, *arguments: str) -> Iterator[str]:
    """The address of a fresh system; afterwards it has to drain and leave nothing behind."""
    command = [
        str(embedded.PAGEFRAME),
        "up",
        "--dtype",
        "fp32",
        "--grpc",
        "127.0.0.1:0",
        "--http",
        "off",
        "--metrics-port",
        "0",
    ]
    command += ["--state-dir", str(state_dir), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.match(r"pageframe ready grpc=(\S+)", process.stdout.readline())
        assert found, "the system did not come up"
        yield found.group(1)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 0
    log = (state_dir / "logs" / "executor.log").read_text()
    assert "integrity_violation" not in log


async def _generate(address: str, prompts: list[list[int]]) -> list[GenerationResult]:
    async with AsyncPageframeClient(address) as client:
        requests = [
            client.complete(
                GenerationRequest(
                    token_ids=prompt,
                    temperature=0.0,
                    max_tokens=MAX_NEW_TOKENS,
                    ignore_eos=True,
                )
            )
            for prompt in prompts
        ]
        return await asyncio.gather(*requests)


def _check(results: list[GenerationResult], answers: list[GreedyAnswer]) -> None:
    num_undecided = sum(answer.num_certain < MAX_NEW_TOKENS for answer in answers)
    print(f"undecided by rounding: {num_undecided} of {len(answers)}")
    assert num_undecided <= NUM_UNDECIDED_MAX
    for length, result, answer in zip(PROMPT_LENGTHS, results, answers, strict=True):
        token_ids = result.samples[0].token_ids
        certain = answer.num_certain
        assert len(token_ids) == MAX_NEW_TOKENS, f"prompt of {length}"
        assert list(token_ids[:certain]) == answer.token_ids[:certain], f"prompt of {length}"


def test_24_prompts_at_once_equal_hugging_face_in_float32(tmp_path, prompts, answers):
    with serving(tmp_path) as address:
        results = asyncio.run(_generate(address, prompts))
    _check(results, answers)


def test_forced_preemption_changes_no_token(tmp_path, prompts, answers):
    # 98 blocks of 16 hold the longest request with 48 new tokens and hardly anything beside it.
    arguments = ("--num-blocks", "98", "--max-model-len", "1568", "--prefill-chunk-tokens", "64")
    short = [i for i, length in enumerate(PROMPT_LENGTHS) if length <= 300]
    with serving(tmp_path, *arguments) as address:
        results = asyncio.run(_generate(address, [prompts[i] for i in short]))
    accounts = [result.samples[0].account for result in results]
    assert sum(account.num_preemptions for account in accounts) > 0, "the pool was meant to be full"
    for i, result in zip(short, results, strict=True):
        certain = answers[i].num_certain
        assert list(result.samples[0].token_ids[:certain]) == answers[i].token_ids[:certain]
