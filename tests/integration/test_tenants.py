"""Tenants do not share cached prefixes, and one tenant does; over the whole system."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.system import PATIENCE_S, System
from pageframe.client import GenerationRequest, PageframeClient
from pageframe.client.types import MemoryAccount

BLOCK_SIZE = 16
PROMPT = [7 + index % 50 for index in range(5 * BLOCK_SIZE)]


@pytest.fixture(scope="module")
def system(
    start: Callable[..., System], sim_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("key-of-alice alice\nother-key-of-alice alice\nkey-of-bob bob\n")
    keys.chmod(0o600)
    system = start(
        sim_model,
        *("--api-keys", str(keys), "--sim-step", "0"),
        *("--num-blocks", "64", "--block-size", str(BLOCK_SIZE)),
    )
    yield system
    system.settle()
    system.stop()


def account_of(system: System, api_key: str, prompt: list[int]) -> MemoryAccount:
    """What one request cost."""
    request = GenerationRequest(token_ids=prompt, max_tokens=3, ignore_eos=True)
    with PageframeClient(system.address, api_key=api_key) as client:
        (sample,) = client.complete(request, timeout_s=PATIENCE_S).samples
    return sample.account


def test_the_same_prompt_of_two_tenants_is_computed_twice_and_of_one_tenant_once(
    system: System,
) -> None:
    assert account_of(system, "key-of-alice", PROMPT).num_cached_tokens == 0
    assert account_of(system, "key-of-bob", PROMPT).num_cached_tokens == 0
    for api_key in ("key-of-alice", "other-key-of-alice", "key-of-bob"):
        account = account_of(system, api_key, PROMPT)
        # All of it but the newest token, which has to be computed to sample the next one.
        assert account.num_cached_tokens == len(PROMPT) - 1
        assert account.num_blocks_shared == len(PROMPT) // BLOCK_SIZE
        assert account.num_copies_on_write == 1
        assert account.num_blocks_saved == len(PROMPT) // BLOCK_SIZE - 1


def test_a_tenant_shares_the_part_that_is_the_same(system: System) -> None:
    first = [9] * (2 * BLOCK_SIZE) + [11] * 10
    second = [9] * (2 * BLOCK_SIZE) + [12] * 10
    assert account_of(system, "key-of-alice", first).num_cached_tokens == 0
    assert account_of(system, "key-of-alice", second).num_cached_tokens == 2 * BLOCK_SIZE
    assert account_of(system, "key-of-bob", second).num_cached_tokens == 0


def test_a_prefix_may_end_inside_a_block(system: System) -> None:
    first = [13] * (2 * BLOCK_SIZE) + [14] * BLOCK_SIZE
    second = [13] * (2 * BLOCK_SIZE) + [14] * 5 + [15] * 20
    assert account_of(system, "key-of-bob", first).num_cached_tokens == 0
    account = account_of(system, "key-of-bob", second)
    assert account.num_cached_tokens == 2 * BLOCK_SIZE + 5
    assert account.num_copies_on_write == 1
