"""`--deterministic` in real processes: no token depends on company, on preemption, or on who dies.

The embedded model in bfloat16. Every request runs alone first. Then all of them run at once in the
same pool, which is far too small for them, and in the midst of that the scheduler is killed, and
later the executor: whatever a sequence had is gone and computed again, in other chunks and beside
other sequences than before.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from exactness import embedded
from integration.system import PATIENCE_S, System
from pageframe.client import Delta, Finished, GenerationRequest
from pageframe.core.request import StallCause

NUM_REQUESTS = 32
NUM_PROMPT_TOKENS_MAX = 48
NUM_TOKENS = 16
NUM_TOKENS_LONG = 64
BLOCK_SIZE = 4
NUM_BLOCKS = 48
"""Room for three of the longest; all requests together would need eight times as many blocks."""

# Executors start twice here, and all processes share what cores there are.
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True, slots=True)
class Output:
    """What one request gave."""

    token_ids: list[int]
    num_preemptions: int
    executor_lost_ns: int


class _Progress:
    """Counts tokens of all requests; others wait until there are so many."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        with self._changed:
            self._num_tokens += num_tokens
            self._changed.notify_all()

    def wait_for(self, num_tokens: int) -> None:
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._num_tokens >= num_tokens, PATIENCE_S)
        assert arrived, f"{self._num_tokens} of {num_tokens} tokens within {PATIENCE_S:g} s"


@pytest.fixture(scope="module")
def system(start: Callable[..., System]) -> Iterator[System]:
    system = start(
        embedded.prepare(),
        *("--deterministic", "--device", "cpu", "--dtype", "bf16"),
        *("--max-num-sequences", str(NUM_REQUESTS), "--max-model-len", "256"),
        *("--block-size", str(BLOCK_SIZE), "--num-blocks", str(NUM_BLOCKS)),
        runner="native",
    )
    yield system
    system.settle()
    system.stop()


def _requests(num_tokens: int) -> list[GenerationRequest]:
    """Prose of all lengths, and greedy, flat, filtered and edited sampling in turns."""
    kinds = embedded.KINDS_OF_SAMPLING
    token_ids = embedded.prose(embedded.prepare())
    lengths = np.random.default_rng(3).integers(1, NUM_PROMPT_TOKENS_MAX + 1, NUM_REQUESTS)
    return [
        GenerationRequest(
            token_ids=token_ids[31 * index : 31 * index + num_prompt_tokens],
            max_tokens=num_tokens,
            seed=500 + index,
            ignore_eos=True,
            **kinds[index % len(kinds)],
        )
        for index, num_prompt_tokens in enumerate(lengths.tolist())
    ]


def _run(
    system: System, request: GenerationRequest, on_tokens: Callable[[int], None] = lambda _: None
) -> Output:
    token_ids: list[int] = []
    with system.client(retry_for_s=PATIENCE_S) as client:
        for event in client.generate(request, timeout_s=4 * PATIENCE_S):
            if isinstance(event, Delta):
                token_ids += event.token_ids
                on_tokens(len(event.token_ids))
            elif isinstance(event, Finished):
                account = event.account
    lost_ns = account.stall_ns.get(StallCause.EXECUTOR_LOST, 0)
    return Output(token_ids, account.num_preemptions, lost_ns)


def _run_together(
    system: System, requests: Sequence[GenerationRequest], deaths: Sequence[tuple[str, int]]
) -> list[Output]:
    """All requests at once.

    Args:
        system: Serves them.
        requests: Up to as many as run at once.
        deaths: Which service is killed, and how many tokens there are by then, in that order.
    """
    progress = _Progress()
    with ThreadPoolExecutor(len(requests)) as threads:
        running = [threads.submit(_run, system, request, progress.add) for request in requests]
        for name, num_tokens in deaths:
            progress.wait_for(num_tokens)
            system.kill_service(name)
            assert not all(request.done() for request in running), "nothing was left to lose"
            system.wait_restarted(name)
        return [request.result() for request in running]


def _check(system: System, num_tokens: int, deaths: Sequence[tuple[str, int]]) -> None:
    requests = _requests(num_tokens)
    alone = [_run(system, request) for request in requests]
    assert all(len(output.token_ids) == num_tokens for output in alone)
    assert len({tuple(output.token_ids) for output in alone}) == NUM_REQUESTS
    assert not any(output.num_preemptions or output.executor_lost_ns for output in alone)
    together = _run_together(system, requests, deaths)
    for index, (once, again) in enumerate(zip(alone, together, strict=True)):
        assert again.token_ids == once.token_ids, f"request {index}, {requests[index]}"
    # A scheduler that was started anew counts from zero, so these are of the time behind its death.
    assert sum(output.num_preemptions for output in together) > 0
    assert sum(output.executor_lost_ns for output in together) > 0


def test_32_at_once_with_preemptions_a_killed_scheduler_and_a_killed_executor(system: System):
    num_all = NUM_REQUESTS * NUM_TOKENS
    _check(system, NUM_TOKENS, [("scheduler", num_all // 6), ("executor", num_all // 2)])


@pytest.mark.soak
def test_long_outputs_and_each_service_killed_twice(system: System):
    num_all = NUM_REQUESTS * NUM_TOKENS_LONG
    names = ("scheduler", "executor", "scheduler", "executor")
    deaths = [(name, num_all * (1 + turn) // 6) for turn, name in enumerate(names)]
    _check(system, NUM_TOKENS_LONG, deaths)
