"""Compiled draws against the definition, written out with NumPy on the kernels' exponentials."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.executor.model import philox
from pageframe.kernels.cpu.attention import exp_below_one
from pageframe.kernels.cpu.draw import CpuDraw, DrawColumns
from pageframe.kernels.cpu.library import CpuLibrary
from unit.kernels.cpu.libraries import USABLE, loaded

WEIGHT_ONE = 2**40
# Around the widths of vectors, of blocks of 256, and where samples stand in for all blocks.
SIZES = [1, 2, 7, 8, 15, 16, 17, 255, 256, 257, 511, 1000, 4096, 5001, 32_003, 49_152, 70_000]

NUM_ROWS = 40


@pytest.fixture(scope="module", params=USABLE)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return loaded(request.param)


@dataclass
class Kind:
    """How to draw, as one draw has it."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@pytest.fixture
def drawer(library):
    pools = []

    def create(num_threads=1):
        pools.append(library.create_pool(num_threads))
        return CpuDraw(library, pools[-1])

    yield create
    for pool in pools:
        pool.close()


def draw(drawer, logits, kinds, uniforms, rows=None):
    """Tokens of one draw for each kind, from rows 0, 1, .. unless ``rows`` says which."""
    vocab_size = logits.shape[1]
    return drawer.draw(
        logits,
        logits.amax(1),
        np.arange(len(kinds)) if rows is None else np.array(rows, np.int64),
        temperature=np.array([kind.temperature for kind in kinds], np.float32),
        top_k=np.array([min(kind.top_k or vocab_size, vocab_size) for kind in kinds], np.int64),
        top_p=np.array([kind.top_p for kind in kinds], np.float64),
        min_p=np.array([kind.min_p for kind in kinds], np.float32),
        uniforms=np.array(uniforms, np.float64),
    ).tolist()


def columns_of(kinds, seeds, sample_indices):
    """What says how to draw for sequence 0, 1, .."""
    return DrawColumns(
        seeds=np.array(seeds, np.uint64),
        sample_indices=np.array(sample_indices, np.uint32),
        temperature=np.array([kind.temperature for kind in kinds], np.float32),
        top_k=np.array([kind.top_k or 2**31 for kind in kinds], np.int64),
        top_p=np.array([kind.top_p for kind in kinds], np.float64),
        min_p=np.array([kind.min_p for kind in kinds], np.float32),
    )


def weights_of(library, logits, temperature):
    """Weights of a row [V] as float32, and as whole numbers."""
    with np.errstate(over="ignore"):  # minus infinity is what a tiny temperature is to make
        scaled = (logits - logits.max()) / np.float32(temperature)
    weights = exp_below_one(library, torch.from_numpy(scaled)).numpy()
    return weights, np.floor(weights.astype(np.float64) * WEIGHT_ONE).astype(np.int64)


def running_weights(library, logits, kind):
    """Running sums of what is kept, by token id: the definition, sorting everything."""
    weights, whole = weights_of(library, logits, kind.temperature)
    ordered = -np.sort(-logits)
    threshold = ordered[kind.top_k - 1] if 0 < kind.top_k < len(logits) else np.float32(-np.inf)
    if kind.top_p < 1.0:
        best_first = np.argsort(-logits, kind="stable")
        running = np.where(logits >= threshold, whole, 0)[best_first].cumsum()
        is_short = running.astype(np.float64) < kind.top_p * float(running[-1])
        threshold = max(threshold, ordered[is_short.sum()])
    is_kept = (logits >= threshold) & (weights >= np.float32(kind.min_p))
    return np.where(is_kept, whole, 0).cumsum()


def token_of(running, uniform):
    return int((running <= int(uniform * float(running[-1]))).sum())


def random_logits(rng, vocab_size):
    """float32 [V] of one of the shapes that distributions have, and of some that they have not."""
    noise = np.random.default_rng(rng.getrandbits(64))
    logits = noise.standard_normal(vocab_size) * rng.choice([0.01, 1.0, 3.0, 30.0])
    if rng.random() < 0.3:  # ties, some of them everywhere
        logits = np.round(logits * rng.choice([0, 1, 8])) / 8
    if rng.random() < 0.3:  # a few that hold nearly everything
        logits[noise.integers(vocab_size, size=5)] += rng.choice([5.0, 20.0, 1e6])
    if rng.random() < 0.2:
        logits = np.sort(logits) * rng.choice([1, -1])
    if rng.random() < 0.4:  # a mask, of a few or of nearly all
        is_masked = noise.random(vocab_size) < rng.choice([0.1, 0.9, 0.999])
        is_masked[noise.integers(vocab_size)] = False
        logits[is_masked] = -np.inf
    return (logits + rng.choice([0.0, -1e3, 50.0])).astype(np.float32)


def random_kind(rng, vocab_size):
    return Kind(
        temperature=rng.choice([1.0, 1.0, 0.1, 0.7, 2.5, 1e9, float(np.finfo(np.float32).tiny)]),
        top_k=rng.choice([0, 0, 1, 2, 50, 900, rng.randrange(1, vocab_size + 1)]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5, 1e-9, 1 - 2**-53, rng.random() or 0.5]),
        min_p=rng.choice([0.0, 0.0, 0.1, 1.0, 1e-40, rng.random()]),
    )


def test_every_draw_is_the_one_that_the_definition_names(library, drawer):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    compiled = drawer()
    for case in range(250):
        vocab_size = rng.choice(SIZES if case % 5 == 0 else SIZES[:12])
        vocab_size = max(1, vocab_size - rng.choice([0, 0, rng.randrange(vocab_size)]))
        logits = random_logits(rng, vocab_size)
        kind = random_kind(rng, vocab_size)
        running = running_weights(library, logits, kind)
        # On both sides of where one token ends, too.
        border = float(running[rng.randrange(vocab_size)]) / float(running[-1])
        uniforms = [0.0, 1 - 2**-53, rng.random(), border, np.nextafter(border, 0.0)]
        uniforms = [min(uniform, 1 - 2**-53) for uniform in uniforms]
        found = draw(compiled, torch.from_numpy(logits)[None], [kind] * 5, uniforms, [0] * 5)
        expected = [token_of(running, uniform) for uniform in uniforms]
        assert found == expected, (case, vocab_size, kind, uniforms)


@pytest.mark.parametrize("is_sampled", [True, False])
def test_a_guess_that_misses_is_made_good(library, drawer, is_sampled):
    # A sample takes vector n of block n: all that stands out, or none of it.
    logits = (-5.0 - np.arange(256 * 40) * 7919 % 10240 / 10240).astype(np.float32)
    for index in range(40):
        start = 256 * index + (index * library.num_lanes + 128 * (not is_sampled)) % 256
        logits[start : start + library.num_lanes] = -3.0 - index / 100
    logits[5000] = 0.0
    kinds = [Kind(top_p=0.5), Kind(top_p=0.97), Kind(top_k=2000), Kind(top_k=2000, top_p=0.6)]
    compiled, uniforms = drawer(), np.linspace(0.0, 0.999, 50)
    for kind in kinds:
        running = running_weights(library, logits, kind)
        found = draw(compiled, torch.from_numpy(logits)[None], [kind] * 50, uniforms, [0] * 50)
        assert found == [token_of(running, uniform) for uniform in uniforms], kind


def test_sums_of_many_best_tokens_have_room(library, drawer):
    # 40,000 weights of 2**40, of which the upper halves alone pass 2**31 in a lane.
    logits = np.where(np.arange(70_000) % 7 < 4, 0.0, -0.5).astype(np.float32)
    kind, uniforms = Kind(top_p=0.5), [0.0, 0.3, 0.6, 1 - 2**-53]
    found = draw(drawer(), torch.from_numpy(logits)[None], [kind] * 4, uniforms, [0] * 4)
    running = running_weights(library, logits, kind)
    assert running[-1] == 40_000 * WEIGHT_ONE
    assert found == [token_of(running, uniform) for uniform in uniforms]


@pytest.mark.parametrize("vocab_size", [257, 5001, 49_152])
def test_a_row_draws_the_same_alone_in_a_batch_and_by_any_threads(drawer, vocab_size):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    logits = torch.from_numpy(np.stack([random_logits(rng, vocab_size) for _ in range(NUM_ROWS)]))
    kinds = [random_kind(rng, vocab_size) for _ in range(NUM_ROWS)]
    uniforms = [rng.random() for _ in range(NUM_ROWS)]
    one = drawer()
    alone = [
        draw(one, logits[row : row + 1], [kinds[row]], [uniforms[row]])[0]
        for row in range(NUM_ROWS)
    ]
    # More than once, for threads do not always meet.
    for num_threads in (1, 2, 2, 2, 3, 3):
        compiled = drawer(num_threads)
        assert draw(compiled, logits, kinds, uniforms) == alone
        order = rng.sample(range(NUM_ROWS), 7)
        some = draw(
            compiled, logits, [kinds[i] for i in order], [uniforms[i] for i in order], order
        )
        assert some == [alone[row] for row in order]


def test_rows_may_lie_apart(drawer):
    wide = torch.randn(6, 1200, generator=torch.Generator().manual_seed(1))
    kinds, uniforms = [Kind(top_p=0.9)] * 6, [0.1, 0.3, 0.5, 0.7, 0.9, 0.99]
    expected = draw(drawer(), wide[:, 100:1100].contiguous(), kinds, uniforms)
    assert draw(drawer(), wide[:, 100:1100], kinds, uniforms) == expected
    assert draw(drawer(), wide.T.contiguous().T[:, 100:1100], kinds, uniforms) == expected


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_total_weights_are_whole_sums(library, drawer, temperature):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for vocab_size in SIZES:
        logits = torch.from_numpy(np.stack([random_logits(rng, vocab_size) for _ in range(3)]))
        totals = drawer(2).total_weights(
            logits,
            logits.amax(1),
            np.array([2, 0, 1, 1]),
            temperature=np.full(4, temperature, np.float32),
        )
        rows = [weights_of(library, row, temperature)[1].sum() for row in logits.numpy()]
        assert totals.tolist() == [rows[2], rows[0], rows[1], rows[1]], vocab_size


def test_a_best_logit_of_another_row_is_refused(drawer):
    logits = torch.zeros(1, 300)
    with pytest.raises(InternalError, match="refused its arguments") as refusal:
        drawer().draw(
            logits,
            torch.full((1,), 100.0),
            np.zeros(1, np.int64),
            temperature=np.ones(1, np.float32),
            top_k=np.full(1, 300),
            top_p=np.ones(1),
            min_p=np.zeros(1, np.float32),
            uniforms=np.zeros(1),
        )
    assert refusal.value.reason == "KERNEL_ARGUMENT"


def test_no_draws_are_no_work(drawer):
    assert draw(drawer(2), torch.zeros(3, 10), [], []) == []


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_best_token_is_the_first_of_equals(drawer, vocab_size):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    rows = [random_logits(rng, vocab_size) for _ in range(20)]
    rows += [np.full(vocab_size, value, np.float32) for value in (0.0, -np.inf, np.inf)]
    rows += [np.round(row) for row in rows]
    signed = np.zeros(vocab_size, np.float32)
    signed[: vocab_size // 2] = -0.0
    logits = np.stack([*rows, signed, signed[::-1]])
    for num_threads in (1, 3):
        maxima, token_ids = drawer(num_threads).best(torch.from_numpy(logits))
        assert token_ids.tolist() == logits.argmax(1).tolist()
        assert maxima.tolist() == logits.max(1).tolist()


@pytest.mark.parametrize("vocab_size", [1, 17, 256, 300, 5001])
def test_a_nan_anywhere_is_told_and_disturbs_no_other_row(drawer, vocab_size):
    logits = torch.randn(vocab_size + 1, vocab_size, generator=torch.Generator().manual_seed(3))
    logits[:, 0] = np.inf  # the best one, but for a NaN
    logits[0, 0] = 7.0
    places = range(vocab_size) if vocab_size <= 300 else range(0, vocab_size, 97)
    for place in places:
        logits[place + 1, place] = np.nan
    columns = columns_of([Kind()] * len(logits), [1] * len(logits), [0] * len(logits))
    each = np.arange(len(logits), dtype=np.int32)
    maxima, token_ids = drawer(2).choose(logits, each, each, each >= 0, columns)
    assert np.isnan(maxima).tolist() == [place in places for place in range(-1, vocab_size)]
    assert maxima[0] == logits[0].max()
    assert ((token_ids >= 0) & (token_ids < vocab_size)).all()


@pytest.mark.parametrize("vocab_size", [3, 257, 5001, 49_152])
def test_what_is_chosen_is_what_a_draw_with_its_random_number_says(drawer, vocab_size):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    logits = torch.from_numpy(np.stack([random_logits(rng, vocab_size) for _ in range(NUM_ROWS)]))
    kinds = [random_kind(rng, vocab_size) for _ in range(NUM_ROWS + 5)]
    seeds = [rng.getrandbits(64) for _ in kinds]
    samples = [rng.choice([0, 1, 2**32 - 1]) for _ in kinds]
    rows = np.array(rng.sample(range(len(kinds)), NUM_ROWS), np.int32)
    positions = np.array([rng.choice([0, 7, 2**31 - 1]) for _ in rows], np.int32)
    is_drawn = np.array([rng.random() < 0.7 for _ in rows])
    columns = columns_of(kinds, seeds, samples)
    uniforms = philox.uniform(columns.seeds[rows], columns.sample_indices[rows], positions)
    drawn = draw(drawer(), logits, [kinds[row] for row in rows], uniforms)
    expected = np.where(is_drawn, drawn, logits.numpy().argmax(1)).tolist()
    for num_threads in (1, 2, 3):
        compiled = drawer(num_threads)
        maxima, token_ids = compiled.choose(logits, rows, positions, is_drawn, columns)
        assert token_ids.tolist() == expected
        assert maxima.tolist() == logits.amax(1).tolist()
    one = slice(4, 5)
    alone = compiled.choose(logits[one], rows[one], positions[one], is_drawn[one], columns)
    assert alone[1].tolist() == expected[one]


def test_columns_may_change_and_rows_lie_apart(drawer):
    wide = torch.randn(6, 1200, generator=torch.Generator().manual_seed(1))
    rows = np.arange(6, dtype=np.int32)
    positions, is_drawn = rows + 10, rows % 2 == 0
    columns = columns_of([Kind(temperature=0.5)] * 6, [5] * 6, range(6))
    compiled = drawer()
    for seeds in ([5] * 6, range(6)):
        columns.seeds[:] = seeds
        expected = compiled.choose(
            wide[:, 100:1100].contiguous(), rows, positions, is_drawn, columns
        )
        for apart in (wide[:, 100:1100], wide.T.contiguous().T[:, 100:1100]):
            found = compiled.choose(apart, rows, positions, is_drawn, columns)
            assert found[1].tolist() == expected[1].tolist()
    assert compiled.best(torch.zeros(0, 10))[1].tolist() == []
