"""Clients that ask without a pause, and compare what they get with an undisturbed run."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from bench.chaos.system import PATIENCE_S, System
from bench.chaos.verdict import Verdict
from pageframe.client import GenerationRequest
from pageframe.client.aio import AsyncPageframeClient
from pageframe.core.errors import PageframeError, UnavailableError

NUM_STREAMS = 32


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
        self._expected = [token_ids for token_ids, _ in answers]

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
                token_ids, num_again = await self._ask(self._requests[which], stream)
            except (PageframeError, TimeoutError) as error:
                self._verdict.failed.append(f"request {which}: {error!r}")
                continue
            self._verdict.num_requests += 1
            self._verdict.num_asked_again += num_again
            if token_ids != self._expected[which]:
                self._verdict.wrong.append(f"request {which}")

    async def _ask(self, request: GenerationRequest, stream: int) -> tuple[list[list[int]], int]:
        """Tokens by sample, and how often it was asked again from the start."""
        num_again = 0
        async with (
            AsyncPageframeClient(self._system.address, retry_for_s=PATIENCE_S) as client,
            asyncio.timeout(PATIENCE_S),
        ):
            while True:
                try:
                    return await self._collect(client, request, stream), num_again
                except UnavailableError:
                    if request.num_samples == 1:
                        raise
                    num_again += 1
                    await asyncio.sleep(0.1)
                finally:
                    self._under_way.discard(stream)

    async def _collect(
        self, client: AsyncPageframeClient, request: GenerationRequest, stream: int
    ) -> list[list[int]]:
        token_ids: list[list[int]] = [[] for _ in range(request.num_samples)]
        async with contextlib.aclosing(client.generate(request)) as events:
            async for event in events:
                new = getattr(event, "token_ids", None)
                if new is not None:
                    self._under_way.add(stream)
                    token_ids[event.sample_index] += new
        return token_ids


def make_requests(rng: random.Random, vocab_size: int, longest: int) -> list[GenerationRequest]:
    """Requests of all lengths; half of them begin alike, some have several samples."""
    prefix = [rng.randrange(3, vocab_size) for _ in range(60)]
    requests = []
    for number in range(NUM_STREAMS):
        own = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 40))]
        # What cannot be resumed has to come to its end between two deaths.
        num_samples = 3 if number % 8 == 7 else 1
        max_tokens = rng.randint(longest // 4, longest)
        requests.append(
            GenerationRequest(
                token_ids=(prefix[: rng.randint(1, 60)] if number % 2 else []) + own,
                max_tokens=max_tokens if num_samples == 1 else longest // 8,
                seed=rng.getrandbits(32),
                temperature=rng.choice((0.0, 1.0)),
                num_samples=num_samples,
                ignore_eos=True,
            )
        )
    return requests
