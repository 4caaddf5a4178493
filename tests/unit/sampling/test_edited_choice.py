"""However a row's token is chosen, it is the one that a masked copy of its logits gives."""

import random

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model import edited_choice, masked_rows
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.executor.model.masked_rows import Masked, list_allowed, without_forbidden
from pageframe.executor.model.sampler import Sampler
from pageframe.grammar.library import load_vocabulary
from unit.gateway.tiny_tokenizers import byte_level
from unit.sampling.paths import PATHS, kernels_of
from unit.sampling.tiny_vocabulary import regex

VOCAB_SIZE, END, NUM_ROWS = 405, 1, 24
# Few tokens, all but few, and something between, one after the other.
GRAMMARS = [regex(text) for text in ("[01]{30}", ".{30}", "[ -~]{30}", "(7[^{}]){20}")]


KERNELS = None


@pytest.fixture(autouse=True, params=PATHS)
def _path(request, monkeypatch):
    monkeypatch.setitem(globals(), "KERNELS", kernels_of(request.param))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = byte_level(tmp_path_factory.mktemp("model"))
    store = GrammarStore(load_vocabulary(folder, VOCAB_SIZE, (END,)))
    yield store
    store.close()


def sampler_of(store, params):
    sampler = Sampler(VOCAB_SIZE, NUM_ROWS, (END,), grammars=store, kernels=KERNELS)
    for row, sampling in enumerate(params):
        sampler.admit(
            row, sampling=sampling, sample_index=0,
            token_ids=np.array([5, 6], dtype=np.int32), num_prompt_tokens=2,
        )  # fmt: skip
    return sampler


def params_of(rng):
    """All that can meet in a batch: every grammar or none, every way to draw, other edits."""
    return SamplingParams(
        grammar=rng.choice([None, *GRAMMARS]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 3.0]),
        top_k=rng.choice([0, 0, 1, 3, 60, 399]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.2]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        logit_bias=rng.choice([{}, {}, {40: 3.0}]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        min_tokens=rng.choice([0, 0, 5]),
        num_logprobs=rng.choice([-1, 2]),
        seed=rng.randrange(2**64),
        max_tokens=50,
    )


def test_every_way_chooses_the_same_token(store, monkeypatch):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    # So small a vocabulary is mostly bytes, of which many cannot begin a character.
    monkeypatch.setattr(masked_rows, "_LISTED_PART", 3)
    taken = set()
    for name in ("_best", "_from_allowed", "_from_others", "_from_copy"):
        way = getattr(edited_choice, name)

        def counting(*arguments, way=way, name=name):
            taken.add(name)
            return way(*arguments)

        monkeypatch.setattr(edited_choice, name, counting)
    for _ in range(6):
        params = [params_of(rng) for _ in range(NUM_ROWS)]
        quick, slow = sampler_of(store, params), sampler_of(store, params)
        rows = np.arange(NUM_ROWS, dtype=np.int32)
        for position in range(2, 12):
            logits = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=noise) * 4
            logits = logits.round() if position % 3 == 0 else logits
            before = logits.clone()
            positions = np.full(NUM_ROWS, position, dtype=np.int32)
            found = quick.sample(logits, rows, positions)
            assert torch.equal(logits, before)
            with monkeypatch.context() as patch:
                patch.setattr(edited_choice, "_ways", lambda *_: [])
                expected = slow.sample(logits, rows, positions)
            assert found[0].tolist() == expected[0].tolist()
            assert found[1] == expected[1]
    assert taken == {"_best", "_from_allowed", "_from_others", "_from_copy"}


def packed(*rows):
    bits = np.zeros((len(rows), 32 * 13), dtype=np.uint8)
    for row, token_ids in enumerate(rows):
        bits[row, token_ids] = 1
    return np.packbits(bits, axis=1, bitorder="little")


def test_allowed_tokens_are_laid_side_by_side():
    logits = torch.arange(800.0).view(2, 400)
    allowed = list_allowed(logits, np.array([1, 0]), packed([7], [0, 8, 399]))
    assert allowed.values[0].tolist() == [407.0, -np.inf, -np.inf]
    assert allowed.values[1].tolist() == [0.0, 8.0, 399.0]
    assert allowed.tokens(np.array([0, 2])).tolist() == [7, 399]


def test_what_is_forbidden_comes_back_also_behind_an_error():
    logits = torch.arange(800.0).view(2, 400)
    before = logits.clone()
    everything = range(400)
    masks = packed([i for i in everything if i not in (3, 399)])

    def fail():
        with without_forbidden(logits, np.array([1]), masks):
            assert torch.isneginf(logits).nonzero().tolist() == [[1, 3], [1, 399]]
            raise InternalError("TEST", "a test")

    with pytest.raises(InternalError):
        fail()
    assert torch.equal(logits, before)


def test_sides_are_told_by_what_a_mask_itself_allows():
    # An eighth of 400 is the most that is listed.
    masks = packed(range(50), range(51), range(349), range(350), range(400))
    few_allowed, few_forbidden = Masked(np.arange(5), masks).sides(400)
    assert few_allowed.tolist() == [True, False, False, False, False]
    assert few_forbidden.tolist() == [False, False, False, True, True]
    assert masked_rows.is_allowed(masks, np.array([49, 51, 348, 350, 0])).tolist() == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_some_of_the_rows_keep_their_masks():
    masked = Masked(np.array([1, 4, 5]), packed([1], [2], [3]))
    some = masked.of(np.array([0, 4, 5, 7]))
    assert some.index.tolist() == [1, 2]
    assert np.array_equal(some.masks, masked.masks[1:])
