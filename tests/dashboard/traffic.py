"""A minute of four tenants: three that behave, and one that comes late with much at once.

Every request of a tenant begins with the same instructions, so prefixes are found. Some ask for
several samples, so blocks are shared and copied; some repeat one token, so it can be guessed; some
go away, and some are refused. The pool is too small for all of them.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pageframe.client import GenerationRequest, PageframeClient
from pageframe.core.errors import PageframeError

SYSTEM_OPTIONS = (
    *("--block-size", "16", "--num-blocks", "56", "--host-kv-memory", "384KiB"),
    *("--token-budget", "128", "--speculation", "ngram"),
)
_INSTRUCTION_TOKENS = 70
# Ids that every vocabulary has; the first ones are often special.
_TOKEN_IDS = range(5, 200)
_GUESSABLE = {9: 90.0}


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls.

    Attributes:
        name: Also what its key and its instructions are made of.
        num_callers: Requests that it has at once.
        begin: Share of the time after which it comes.
        end: Share of the time after which it sends nothing more.
    """

    name: str
    num_callers: int
    begin: float = 0.0
    end: float = 1.0

    @property
    def key(self) -> str:
        """What it proves itself with."""
        return f"key-of-{self.name}"


TENANTS = (
    Tenant("atlas", 2),
    Tenant("birch", 2),
    Tenant("cedar", 1),
    Tenant("delta", 9, begin=0.35, end=0.7),
)


def access_lines() -> str:
    """The access file of these tenants."""
    return "".join(f"{tenant.key} {tenant.name}\n" for tenant in TENANTS)


def run_traffic(address: str, *, seconds: float, seed: int) -> dict[str, int]:
    """Send requests for so many seconds; returns how many ended, by how.

    Args:
        address: The gateway's.
        seconds: How long.
        seed: Of everything that is random.

    Raises:
        PageframeError: a request failed otherwise than it should.
    """
    begin_s = time.monotonic()
    outcomes: dict[str, int] = {}
    failures: list[BaseException] = []
    is_over = threading.Event()
    lock = threading.Lock()

    def count(outcome: str) -> None:
        with lock:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def call(tenant: Tenant, number: int) -> None:
        try:
            is_over.wait(tenant.begin * seconds)
            end_s = begin_s + tenant.end * seconds
            rng = random.Random(f"{seed} {tenant.name} {number}")
            with PageframeClient(address, api_key=tenant.key) as client:
                for kind in _kinds(rng):
                    if time.monotonic() >= end_s or is_over.is_set():
                        return
                    _ask(client, tenant, rng, kind, count)
        except BaseException as error:
            failures.append(error)
            is_over.set()

    threads = [
        threading.Thread(target=call, args=(tenant, number))
        for tenant in TENANTS
        for number in range(tenant.num_callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return outcomes


def _kinds(rng: random.Random) -> Iterator[str]:
    """One of each first, so that even a slow machine sees them all."""
    yield from ("refused", "leaves", "guessable", "plain")
    while True:
        yield rng.choices(("plain", "guessable", "leaves", "refused"), (75, 12, 8, 5))[0]


def _ask(
    client: PageframeClient,
    tenant: Tenant,
    rng: random.Random,
    kind: str,
    count: Callable[[str], None],
) -> None:
    instructions = random.Random(tenant.name).choices(_TOKEN_IDS, k=_INSTRUCTION_TOKENS)
    request = GenerationRequest(
        token_ids=instructions + rng.choices(_TOKEN_IDS, k=rng.randint(5, 120)),
        max_tokens=rng.randint(20, 140),
        num_samples=rng.choice((1, 1, 1, 3)),
        temperature=-1.0 if kind == "refused" else 1.0,
        logit_bias=_GUESSABLE if kind == "guessable" else {},
        ignore_eos=True,
        seed=rng.getrandbits(32),
    )
    try:
        for number, _ in enumerate(client.generate(request)):
            if kind == "leaves" and number > 10:
                break
        assert kind != "refused", "a negative temperature was taken"
        count("left" if kind == "leaves" else "ok")
    except PageframeError as error:
        if kind != "refused":
            raise
        count(error.reason)
