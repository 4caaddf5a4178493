"""Traffic that shows all that a pool can show: tenants, shared prefixes, samples, chats, waits."""

import random
import threading
from typing import Self

from pageframe.client import GenerationRequest, PageframeClient
from pageframe.core.errors import PageframeError

TENANTS = ("atlas", "birch", "cedar", "delta")
OPERATOR_KEY = "operator-key-for-tests"
_WORDS = ("blue", "door", "lake", "stone", "early", "train", "paper", "quiet", "seven", "north")


def write_keys(path) -> None:
    """A key for each tenant, which is its name and `-key`, and one for an operator."""
    lines = [f"{tenant}-key {tenant}" for tenant in TENANTS]
    path.write_text("\n".join([*lines, f"{OPERATOR_KEY} operations operator", ""]))


class Lively:
    """Sends requests of all tenants until it is left; a context manager."""

    def __init__(self, address: str, *, seed: int, num_callers: int = 5) -> None:
        self._address = address
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(tenant, random.Random(f"{seed} {tenant} {n}")))
            for tenant in TENANTS
            for n in range(num_callers)
        ]
        self.num_ended = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, tenant: str, rng: random.Random) -> None:
        with PageframeClient(self._address, api_key=f"{tenant}-key") as client:
            number = 0
            while not self._is_over.is_set():
                number += 1
                self._ask(client, tenant, rng, number)

    def _ask(self, client, tenant: str, rng: random.Random, number: int) -> None:
        instructions = f"You are the assistant of {tenant}. " + " ".join(_WORDS * 6)
        question = " ".join(rng.choices(_WORDS, k=rng.randint(4, 90)))
        request = GenerationRequest(
            prompt=f"{instructions} {question}",
            max_tokens=rng.randint(20, 220),
            num_samples=rng.choice((1, 1, 1, 3)),
            ignore_eos=True,
            seed=rng.getrandbits(32),
            request_id=f"{tenant}-{rng.getrandbits(24):06x}",
            session_id=f"{tenant}-chat-{rng.randint(1, 3)}" if rng.random() < 0.25 else "",
        )
        try:
            for _ in client.generate(request):
                if self._is_over.is_set():
                    return
        except PageframeError:
            if not self._is_over.is_set():
                raise
        self.num_ended += 1
