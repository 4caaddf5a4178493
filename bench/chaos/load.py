"""Clients that ask without a pause, and compare what they get with an undisturbed run."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from bench.chaos.system import PATIENCE_S, System
from bench.chaos.verdict import Verdict
from pageframe.client import Delta, GenerationRequest
from pageframe.client.aio import AsyncPageframeClient
from pageframe.core.errors import PageframeError

NUM_STREAMS = 32
# Drawn tokens are compared, and a draw from the whole vocabulary falls so near to the boundary of
# two tokens now and then that the rounding of another batch moves it; with few tokens, never.
_TOP_K = 20


class Load:
    """Clients that ask without a pause, and compare what they get."""

    def __init__(self, system: System, requests: list[GenerationRequest], verdict: Verdict) -> None:
        self._system = system
        self._requests = requests
        self._verdict = verdict
        self._expected: list[list[list[int]]] = []
        self._under_way: set[int] = set()
        self._is_over = False

    @property
    def num_under_way(self) -> int:
        """Streams that have begun and not ended."""
        return len(self._under_way)

    async def learn(self) -> None:
        """Ask everything once while nobody dies."""
        answers = await asyncio.gather(
            *(self._ask(request, number) for number, request in enumerate(self._requests))
        )
        self._expected = list(answers)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask while the block runs; every request that was begun is brought to its end."""
        asking = [asyncio.create_task(self._keep_asking(index)) for index in range(NUM_STREAMS)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*asking)

    async def _keep_asking(self, stream: int) -> None:
        number = stream
        while not self._is_over:
            which = number % len(self._requests)
            number += NUM_STREAMS + 1
            try:
                token_ids = await self._ask(self._requests[which], stream)
            except (PageframeError, TimeoutError) as error:
                self._verdict.failed.append(f"request {which}: {error!r}")
                continue
            self._verdict.num_requests += 1
            for sample_index, samples in enumerate(
                zip(token_ids, self._expected[which], strict=True)
            ):
                if samples[0] != samples[1]:
                    difference = _first_difference(*samples)
                    self._verdict.wrong.append(
                        f"request {which}, sample {sample_index}: {difference}"
                    )

    async def _ask(self, request: GenerationRequest, stream: int) -> list[list[int]]:
        """Tokens by sample."""
        token_ids: list[list[int]] = [[] for _ in range(request.num_samples)]
        async with (
            AsyncPageframeClient(self._system.address, retry_for_s=PATIENCE_S) as client,
            asyncio.timeout(PATIENCE_S),
            contextlib.aclosing(client.generate(request)) as events,
        ):
            try:
                async for event in events:
                    if isinstance(event, Delta):
                        self._under_way.add(stream)
                        token_ids[event.sample_index] += event.token_ids
            finally:
                self._under_way.discard(stream)
        return token_ids


def _first_difference(token_ids: list[int], expected: list[int]) -> str:
    for position, (token_id, due) in enumerate(zip(token_ids, expected, strict=False)):
        if token_id != due:
            return f"output token {position} is {token_id} instead of {due}"
    return f"{len(token_ids)} tokens instead of {len(expected)}"


def make_requests(rng: random.Random, vocab_size: int, longest: int) -> list[GenerationRequest]:
    """Requests of all lengths; half of them begin alike, some have several samples."""
    prefix = [rng.randrange(3, vocab_size) for _ in range(60)]
    requests = []
    for number in range(NUM_STREAMS):
        own = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 40))]
        requests.append(
            GenerationRequest(
                token_ids=(prefix[: rng.randint(1, 60)] if number % 2 else []) + own,
                max_tokens=rng.randint(longest // 4, longest),
                seed=rng.getrandbits(32),
                temperature=rng.choice((0.0, 1.0)),
                top_k=_TOP_K,
                num_samples=3 if number % 8 == 7 else 1,
                ignore_eos=True,
            )
        )
    return requests
