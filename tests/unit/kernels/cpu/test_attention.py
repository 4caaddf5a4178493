"""Compiled attention equals its plain reference, reads nothing else, and is the same in any cut."""

import numpy as np
import pytest
import torch

from pageframe.kernels.cpu.attention import exp_below_one
from pageframe.kernels.cpu.library import CpuLibrary
from pageframe.kernels.cpu.model import KV_DTYPES
from pageframe.kernels.reference.paged_attention import paged_attention
from pageframe.kernels.reference.quantise import quantise
from unit.kernels.cpu.libraries import USABLE, loaded, parts_of
from unit.kernels.pools import garbage_pool

_SCALE = 0.3
# Following this entry of a table would end the process.
_OUTSIDE = 2**31 - 1
_MIDDLE = 1
# (new tokens, context length) of each sequence.
_MIXED = ((1, 1), (1, 65), (7, 7), (33, 100), (5, 64), (1, 33))
_HEADS = pytest.mark.parametrize(
    "heads",
    [(4, 4, 8), (6, 2, 24), (9, 3, 64), (22, 11, 64), (12, 2, 128), (5, 1, 40)],
    ids=["mha", "gqa", "gqa64", "many", "gqa128", "mqa"],
)


@pytest.fixture(scope="module", params=USABLE)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return loaded(request.param)


class Setup:
    """A pool full of NaN in which only what a sequence may see holds numbers."""

    def __init__(self, library, shapes, block_size, heads, dtype, *, window=None, groups=1, seed=0):
        num_heads, num_kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(seed)
        self.block_size = block_size
        self.window = window
        self.contexts = np.array([context for _, context in shapes], np.int32)
        self.starts = np.cumsum([0] + [new for new, _ in shapes]).astype(np.int32)
        widths = -(-self.contexts // block_size)
        self.pool = garbage_pool(int(widths.sum()) + 3, block_size, num_kv_heads, head_dim, dtype)
        self.parts = parts_of(library, self.pool, _MIDDLE)
        self.tables = np.full((len(shapes), int(widths.max()) + 2), _OUTSIDE, np.int32)
        free = iter(np.random.default_rng(seed).permutation(int(widths.sum()) + 3).tolist())
        for sequence, (num_new, context_len) in enumerate(shapes):
            table = self.tables[sequence]
            table[: widths[sequence]] = [next(free) for _ in range(widths[sequence])]
            channels = torch.randn(2, context_len, num_kv_heads, head_dim, generator=generator)
            first = 0 if window is None else max(0, context_len - num_new - window + 1)
            positions = np.arange(first, context_len)
            slots = table[positions // block_size].astype(np.int64) * block_size
            slots += positions % block_size
            for side in (0, 1):
                self.parts.write(side, slots, channels[side, first:].contiguous())
            table[: first // block_size] = _OUTSIDE
        self.query = torch.randn(int(self.starts[-1]), num_heads, head_dim, generator=generator)
        self.library = library

    def run(self, query=None, starts=None, contexts=None, tables=None, num_threads=1, layers=None):
        threads = self.library.create_pool(num_threads)
        first, num_layers = layers or (_MIDDLE, 1)
        mixed = parts_of(self.library, self.pool, first).attend(
            threads,
            self.query if query is None else query,
            query_start=self.starts if starts is None else starts,
            context_lens=self.contexts if contexts is None else contexts,
            block_tables=np.ascontiguousarray(self.tables if tables is None else tables),
            scale=_SCALE,
            window=self.window,
            num_layers=num_layers,
        )
        threads.close()
        return mixed

    @property
    def rounds_to_bf16(self):
        """Whether queries and weights are rounded, as machines do that multiply pairs of bf16."""
        dtypes = {KV_DTYPES[torch.bfloat16], self.library.row_dtype(KV_DTYPES[torch.bfloat16])}
        return {KV_DTYPES[self.pool.layout.dtype]} == dtypes

    @property
    def has_quads(self):
        """Whether int8 is used in whole numbers, as machines do that multiply bytes by fours."""
        layout = self.pool.layout
        return (
            layout.dtype == torch.int8
            and layout.head_dim % 64 == 0
            and self.library.isa in ("avx512bf16", "avx512-emulated")
        )

    def expected(self):
        query = self.query
        if self.rounds_to_bf16:
            query = (query * _SCALE).bfloat16().float() / _SCALE
        if self.has_quads:
            # Two bytes a channel, the lower one from -128 on.
            step = query.abs().amax(-1, keepdim=True) / (127 * 256 + 127)
            query = (query / step).round() * step
        return paged_attention(
            query,
            self.pool.layer,
            query_start=self.starts,
            context_lens=self.contexts,
            block_tables=self.tables,
            scale=_SCALE,
            window=self.window,
            kv_scales=self.pool.scales,
        )


def _check(setup):
    actual, expected = setup.run(), setup.expected()
    assert expected.isfinite().all()
    if setup.has_quads:
        # Of 32 weights each is off by half of 2^-16 of the largest, times a value, at random.
        torch.testing.assert_close(actual, expected, atol=2.5e-4, rtol=0)
        assert float((actual - expected).abs().mean()) < 2e-5
        return
    if not setup.rounds_to_bf16:
        torch.testing.assert_close(actual, expected, atol=3e-6, rtol=3e-6)
        return
    # A weight is off by at most 2^-9 of itself, what the weights add up to likewise.
    most = float(setup.pool.layer.float().nan_to_num().abs().max())
    torch.testing.assert_close(actual, expected, atol=most * 2**-8, rtol=0)
    assert float((actual - expected).abs().mean()) < 2**-10


@_HEADS
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
def test_attention_equals_its_reference(library, heads, dtype, block_size):
    _check(Setup(library, _MIXED, block_size, heads, dtype))


# Of itself only, smaller than a block, a tile of keys, between two, larger than any context.
@pytest.mark.parametrize("window", [1, 6, 32, 40, 1000])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("heads", [(6, 2, 16), (6, 2, 64)], ids=["dim16", "dim64"])
def test_windows_read_nothing_before_themselves(library, window, block_size, dtype, heads):
    _check(Setup(library, _MIXED, block_size, heads, dtype, window=window))


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 8), (torch.int8, 64)], ids=["fp32", "int8"]
)
def test_contexts_longer_than_a_split(library, window, dtype, head_dim):
    shapes = ((3, 1100), (1, 1025), (1, 512), (1, 513))
    _check(Setup(library, shapes, 16, (2, 1, head_dim), dtype, window=window))


# What a sequence of one head holds, token by token; a query for its last one.
def _attend_to(library, keys, values, query):
    num_tokens, head_dim = keys.shape
    setup = Setup(library, ((1, num_tokens),), 16, (1, 1, head_dim), torch.int8)
    positions = np.arange(num_tokens)
    slots = setup.tables[0][positions // 16].astype(np.int64) * 16 + positions % 16
    for side, channels in enumerate((keys, values)):
        setup.parts.write(side, slots, channels[:, None].contiguous())
    return setup.run(query=query[None, None])[0, 0]


@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_largest_numbers_fit(library, head_dim):
    keys = torch.full((20, head_dim), 127.0)
    keys[1::2] *= -1
    values = torch.full((20, head_dim), 50.0)
    values[1::2] = -3.0
    query = torch.full((head_dim,), 1e3)
    for sign, expected in ((1.0, 50.0), (-1.0, -3.0)):
        mixed = _attend_to(library, keys, values, sign * query)
        torch.testing.assert_close(mixed, torch.full((head_dim,), expected), rtol=1e-4, atol=0)


def test_many_that_matter_little_are_not_lost_beside_one_that_matters(library):
    # One token has e^12 times the weight of each other; all others together have 2 % of it.
    num_tokens, head_dim = 4001, 64
    keys = torch.zeros(num_tokens, head_dim)
    keys[0, 0] = 12.0 / _SCALE
    values = torch.ones(num_tokens, head_dim)
    values[0] = 0.0
    query = torch.zeros(head_dim)
    query[0] = 1.0
    mixed = _attend_to(library, keys, values, query)
    tail = 4000 * np.exp(-12.0)
    # Those beside it in a tile may be, where weights are whole numbers: half of one each.
    torch.testing.assert_close(
        mixed, torch.full((head_dim,), float(tail / (1 + tail))), rtol=0, atol=31 * 2**-17
    )


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_a_query_that_is_no_number_gets_none_and_others_theirs(library, broken, dtype, head_dim):
    setup = Setup(library, ((1, 40), (1, 70), (3, 50)), 16, (2, 1, head_dim), dtype)
    before = setup.run()
    setup.query[1, 0, 3] = broken
    after = setup.run()
    assert after[1, 0].isnan().all()
    after[1, 0] = before[1, 0]
    assert torch.equal(after, before)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("window", [None, 600])
def test_threads_change_no_bit(library, num_threads, window):
    shapes = ((1, 1300), (40, 700))
    setup = Setup(library, shapes, 16, (6, 2, 16), torch.float32, window=window)
    assert torch.equal(setup.run(), setup.run(num_threads=num_threads))


@pytest.mark.parametrize(
    "heads", [(6, 2, 16), (9, 3, 64), (6, 6, 64)], ids=["dim16", "dim64", "many"]
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 64])
@pytest.mark.parametrize("window", [None, 45])
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_chunks_change_no_bit(library, chunk, window, dtype, heads):
    # Short chunks use keys and values where they lie, longer ones turn them.
    num_tokens = 150
    setup = Setup(library, ((num_tokens, num_tokens),), 16, heads, dtype)
    setup.window = window
    whole = setup.run()
    for first in range(0, num_tokens, chunk):
        end = min(num_tokens, first + chunk)
        part = setup.run(
            query=setup.query[first:end],
            starts=np.array([0, end - first], np.int32),
            contexts=np.array([end], np.int32),
        )
        assert torch.equal(part, whole[first:end]), f"tokens from {first}"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_layers_one_after_the_other_are_each_as_alone(library, num_threads):
    setup = Setup(library, _MIXED, 16, (9, 3, 64), torch.bfloat16)
    setup.pool.rows[setup.pool.rows == 255] = 0x3C
    alone = [setup.run(layers=(place, 1)) for place in range(3)]
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(setup.run(layers=(0, 3), num_threads=num_threads), torch.cat(alone))


def test_company_and_block_size_change_no_bit(library):
    shapes = ((1, 90), (20, 600), (1, 33))
    setups = {
        block_size: Setup(library, shapes, block_size, (6, 2, 16), torch.bfloat16)
        for block_size in (1, 16, 256)
    }
    together = setups[16].run()
    for block_size, setup in setups.items():
        assert torch.equal(setup.run(), together), f"blocks of {block_size}"
    setup = setups[16]
    for sequence in range(len(shapes)):
        first, end = setup.starts[sequence : sequence + 2]
        alone = setup.run(
            query=setup.query[first:end],
            starts=np.array([0, end - first], np.int32),
            contexts=setup.contexts[sequence : sequence + 1],
            tables=setup.tables[sequence : sequence + 1],
            num_threads=2,
        )
        assert torch.equal(alone, together[first:end]), f"sequence {sequence}"


# In place and turned; the first and the second of two lanes.
@pytest.mark.parametrize("position", [20, 21])
@pytest.mark.parametrize("heads", [(2, 1, 8), (2, 1, 64)], ids=["dim8", "dim64"])
@pytest.mark.parametrize("num_tokens", [2, 40])
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_what_is_no_number_in_a_later_token_does_not_reach_an_earlier_one(
    library, dtype, num_tokens, heads, position
):
    first = min(20, 40 - num_tokens)
    context_len = first + num_tokens
    setup = Setup(library, ((num_tokens, context_len),), 16, heads, dtype)
    before = setup.run()
    slot = setup.tables[0, position // 16].astype(np.int64) * 16 + position % 16
    setup.parts.write(1, np.array([slot]), torch.full((1, 1, heads[2]), torch.inf))
    after = setup.run()
    assert torch.equal(after[: position - first], before[: position - first])
    assert not after[position - first :].isfinite().any()


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_a_written_row_is_what_the_reference_stores(library, dtype, head_dim):
    print("seed", 5)
    pool = garbage_pool(4, 3, 2, head_dim, dtype)
    generator = torch.Generator().manual_seed(5)
    channels = torch.randn(5, 2, head_dim, generator=generator) * 10.0
    channels[1, 0] = 0.0
    channels[2, 1, 3] = -1e-30
    slots = np.array([0, 11, 5, 7, 2])
    neighbours = pool.rows.clone()
    parts_of(library, pool, _MIDDLE).write(1, slots, channels)
    at = (torch.from_numpy(slots // 3), torch.from_numpy(slots % 3))
    stored = pool.layer[:, 1][at]
    if pool.scales is None:
        assert torch.equal(stored, channels.to(dtype))
    else:
        expected, scales = quantise(channels, dtype)
        assert torch.equal(stored, expected)
        assert torch.equal(pool.scales[:, 1][at], scales)
    # Everything else is as it was.
    pool.layer[:, 1].view(torch.uint8)[at] = 255
    if pool.scales is not None:
        pool.scales.view(torch.uint8).view(4, 2, 3, -1)[:, 1][at] = 255
    assert torch.equal(pool.rows, neighbours)


def test_a_row_that_is_not_finite_gets_no_finite_scale(library):
    pool = garbage_pool(1, 4, 1, 8, torch.int8)
    channels = torch.ones(3, 1, 8)
    channels[0, 0, 5] = torch.nan
    channels[1, 0, 2] = torch.inf
    parts_of(library, pool, _MIDDLE).write(0, np.arange(3), channels)
    assert pool.scales is not None
    assert pool.scales[0, 0, :3, 0].isfinite().tolist() == [False, False, True]


def test_the_softmax_exponential_is_within_two_units_in_the_last_place(library):
    x = -torch.rand(100_003, generator=torch.Generator().manual_seed(3)) * 87.0
    x[:2] = torch.tensor([0.0, -87.0])
    actual, exact = exp_below_one(library, x), x.double().exp()
    unit = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert float(((actual.double() - exact).abs() / unit).max()) <= 2.0
    assert float(actual[0]) == 1.0


def test_the_softmax_exponential_at_its_ends(library):
    x = torch.tensor([-torch.inf, -1000.0, torch.nan])
    actual = exp_below_one(library, x)
    assert float(actual[0]) <= 2.0**-125
    assert float(actual[1]) <= 2.0**-125
    assert bool(actual[2].isnan())
