"""`--deterministic`: no token depends on what else runs, or on what happened to a request.

Requests of all kinds of sampling are served one at a time, and then in every other way. Every token
counts, flat draws from the whole vocabulary among them: in bfloat16, over int8 keys and values, and
in float32.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from exactness import embedded, tiny_models
from exactness.serving import Served, Shape, serve
from pageframe.core.plan import Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.loader import load_runner
from pageframe.kernels.cpu import library
from unit.executor.played_drafter import KnowingDrafter

NUM_REQUESTS = 32
MAX_NEW_TOKENS = 12
BLOCK_SIZE = 16

pytestmark = pytest.mark.skipif(library.choose().library is None, reason="no compiled kernels")


def _wishes(vocab_size: int) -> list[SamplingParams]:
    """Greedy, flat, filtered and edited requests in turns."""
    kinds = (*embedded.KINDS_OF_SAMPLING, {"temperature": 2.0, "top_k": vocab_size - 1})
    return [
        SamplingParams(
            seed=1000 + index,
            max_tokens=MAX_NEW_TOKENS,
            ignore_eos=True,
            **kinds[index % len(kinds)],
        )
        for index in range(NUM_REQUESTS)
    ]


class _House:
    """A model in one type of keys and values, its requests, and what each gets alone."""

    def __init__(self, folder: Path, prompts: Sequence[Sequence[int]], **settings: str) -> None:
        self._folder, self._settings = folder, settings
        self.prompts = [list(prompt) for prompt in prompts]
        longest = max(map(len, self.prompts)) + MAX_NEW_TOKENS
        self.num_blocks_each = -(-longest // BLOCK_SIZE)
        runner = self._load()
        self.wishes = _wishes(runner.facts.vocab_size)
        self.has_windows = runner.facts.num_kv_groups > 1
        runner.close()
        # One after the other: no step has tokens of two.
        served = self.together(max_num_sequences=1, lookahead=False)
        assert served.num_preemptions == 0
        self.alone = served.token_ids

    def together(self, *, drafts: int = 0, block_size: int = BLOCK_SIZE, **changes) -> Served:
        """All at once; ``num_blocks`` counts tokens divided by 16, whatever the block size."""
        num_blocks = changes.pop("num_blocks", NUM_REQUESTS * self.num_blocks_each)
        shape = {
            "num_blocks": num_blocks * BLOCK_SIZE // block_size,
            "block_size": block_size,
            "prefill_chunk_tokens": 0,
            "lookahead": True,
            "max_num_sequences": NUM_REQUESTS,
            "token_budget": 512,
            "num_draft_tokens": drafts,
        }
        texts = list(zip(self.prompts, self.alone, strict=True)) if drafts else []
        runner = self._load()
        drafter = KnowingDrafter(texts) if drafts else None
        served = serve(runner, self.prompts, self.wishes, Shape(**shape | changes), drafter)
        runner.close()
        return served

    def _load(self):
        return load_runner(
            str(self._folder),
            device="cpu",
            num_threads=1,
            max_num_sequences=NUM_REQUESTS,
            is_deterministic=True,
            **self._settings,
        )


def _tiny(tmp_path_factory, name: str, **settings: str) -> _House:
    folder = tiny_models.build(name, tmp_path_factory.mktemp(name))
    lengths = np.random.default_rng(11).integers(1, 97, NUM_REQUESTS).tolist()
    return _House(folder, tiny_models.prompts(lengths, seed=6), **settings)


def _embedded(**settings: str) -> _House:
    folder = embedded.prepare()
    token_ids = embedded.prose(folder)
    lengths = np.random.default_rng(12).integers(1, 49, NUM_REQUESTS).tolist()
    starts = range(0, 29 * NUM_REQUESTS, 29)
    prompts = [token_ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]
    return _House(folder, prompts, **settings)


_HOUSES = {
    "tiny-bf16": ("llama31", {"dtype": "bfloat16"}),
    "tiny-int8": ("qwen3", {"dtype": "bfloat16", "kv_dtype": "int8"}),
    "tiny-windows": ("qwen2", {"dtype": "bfloat16"}),
    "bf16": (None, {"dtype": "bfloat16"}),
    "int8": (None, {"dtype": "bfloat16", "kv_dtype": "int8"}),
    "fp32": (None, {"dtype": "float32"}),
}


def _marks_of(name: str, family: str | None) -> list[pytest.MarkDecorator]:
    if family is not None:
        return []
    # Two minutes each; one of the three is enough for every day.
    often = [] if name == "bf16" else [pytest.mark.soak]
    return [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1800), *often]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=_marks_of(name, family)) for name, (family, _) in _HOUSES.items()
    ],
)
def house(request, tmp_path_factory) -> _House:
    torch.set_num_threads(1)
    family, settings = _HOUSES[request.param]
    if family is None:
        return _embedded(**settings)
    return _tiny(tmp_path_factory, family, **settings)


def _assert_equal(house: _House, served: Served) -> None:
    for index, (alone, together) in enumerate(zip(house.alone, served.token_ids, strict=True)):
        assert together == alone, f"request {index}, {house.wishes[index]}"


def test_requests_alone_differ_and_draws_are_not_greedy(house):
    assert all(len(answer) == MAX_NEW_TOKENS for answer in house.alone)
    assert len({tuple(answer) for answer in house.alone}) == NUM_REQUESTS


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_batch_of_32_in_chunks_of(house, chunk):
    served = house.together(prefill_chunk_tokens=chunk)
    assert served.num_preemptions == 0
    _assert_equal(house, served)


@pytest.mark.parametrize("block_size", [1, 64])
def test_blocks_of(house, block_size):
    _assert_equal(house, house.together(block_size=block_size))


@pytest.mark.parametrize("recovery", list(Recovery), ids=lambda recovery: recovery.name.lower())
def test_preempted_and_brought_back_by(house, recovery):
    # Two of the longest have room, and small blocks make decodes ask often.
    num_blocks, block_size = 2 * house.num_blocks_each, 4
    served = house.together(
        num_blocks=num_blocks,
        block_size=block_size,
        num_host_slots=2 * num_blocks * BLOCK_SIZE // block_size,
        recovery=recovery,
    )
    # What leaves a window is given back as fast as decodes take it.
    assert served.num_preemptions > 0 or house.has_windows
    _assert_equal(house, served)


def test_rebuilt_after_the_executor_was_lost(house):
    _assert_equal(house, house.together(loses_each_request=True))


def test_with_speculation(house):
    served = house.together(drafts=4)
    assert served.num_accepted > NUM_REQUESTS
    _assert_equal(house, served)
