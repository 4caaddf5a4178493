"""Rotation and cache write in one pass: what the reference does, and nothing beside it."""

import pytest
import torch

from pageframe.kernels.ops.rotary_write import rotary_write
from pageframe.kernels.reference.rotary_write import rotary_write as rotary_write_plainly
from unit.kernels.pools import QUANTISED, Pool, garbage_pool, random_pool
from unit.kernels.triton.tolerances import FLOATS, RELATIVE

# num_heads, num_kv_heads, head_dim, block_size: one head; no powers of two; more heads than a
# program turns; as Llama has them.
_SHAPES = [(1, 1, 2, 1), (3, 3, 40, 4), (9, 3, 64, 16), (20, 2, 96, 8), (8, 2, 128, 16)]
_NUM_BLOCKS = 5


def _inputs(shape, dtype, num_tokens, seed=0):
    num_heads, num_kv_heads, head_dim, block_size = shape
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(
        dtype
    )
    angles = torch.rand(num_tokens, head_dim // 2, generator=generator) * 6.28
    slots = torch.randperm(_NUM_BLOCKS * block_size, generator=generator)[:num_tokens]
    return heads, angles.cos().to(dtype), angles.sin().to(dtype), slots


def _on(pool, device):
    return Pool(pool.layout, pool.rows.to(device, copy=True))


def _run_both(device, pool, heads, cosines, sines, slots, **options):
    """Run op and reference; their queries and pools."""
    num_heads = heads.shape[1] - 2 * pool.layout.num_kv_heads
    expected = pool.clone()
    exact = torch.empty_like(heads[:, :num_heads]).contiguous()
    rotary_write_plainly(
        heads, cosines, sines, exact, expected.layer, slots, kv_scales=expected.scales, **options
    )
    ours = _on(pool, device)
    queries = torch.full_like(exact, torch.nan, device=device)
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    rotary_write(
        *(part.to(device) for part in (heads, cosines, sines)),
        queries,
        ours.layer,
        slots.to(device),
        kv_scales=ours.scales,
        **options,
    )
    return queries.cpu(), exact, _on(ours, "cpu"), expected


def _assert_close(actual, expected, dtype):
    # One rounding each side, of a difference of two products that may cancel.
    tolerance = 2 * RELATIVE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", _SHAPES)
def test_queries_keys_and_values_are_those_of_the_reference(device, dtype, shape):
    _, num_kv_heads, head_dim, block_size = shape
    pool = garbage_pool(_NUM_BLOCKS, block_size, num_kv_heads, head_dim, dtype)
    pool.rows.zero_()
    heads, cosines, sines, slots = _inputs(shape, dtype, 4)
    queries, exact, ours, expected = _run_both(device, pool, heads, cosines, sines, slots)
    _assert_close(queries, exact, dtype)
    _assert_close(ours.layer[:, 0], expected.layer[:, 0], dtype)
    # Values are moved, not computed.
    assert torch.equal(ours.layer[:, 1], expected.layer[:, 1])


@pytest.mark.parametrize("stored", [*FLOATS, *QUANTISED])
def test_nothing_but_the_named_slots_is_written(device, stored):
    shape = (3, 2, 40, 4)
    pool = random_pool(_NUM_BLOCKS, 4, 2, 40, stored)
    heads, cosines, sines, slots = _inputs(shape, torch.float32, 3)
    slots[1] = -1
    _, _, ours, _ = _run_both(device, pool, heads, cosines, sines, slots)
    written = Pool(pool.layout, pool.rows.clone())
    for slot in (int(slots[0]), int(slots[2])):
        block, offset = divmod(slot, 4)
        written.layer[block, :, offset] = ours.layer[block, :, offset]
        if written.scales is not None:
            written.scales[block, :, offset] = ours.scales[block, :, offset]
    assert torch.equal(ours.rows, written.rows)
    assert not torch.equal(ours.rows, pool.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize("shape", [(3, 3, 40, 4), (8, 2, 128, 16)])
def test_quantised_numbers_and_scales_are_those_of_the_reference(device, dtype, stored, shape):
    _, num_kv_heads, head_dim, block_size = shape
    pool = garbage_pool(_NUM_BLOCKS, block_size, num_kv_heads, head_dim, stored)
    pool.rows.zero_()
    heads, cosines, sines, slots = _inputs(shape, dtype, 4)
    heads[0, -1] = 0.0
    _, _, ours, expected = _run_both(device, pool, heads, cosines, sines, slots)
    torch.testing.assert_close(ours.scales, expected.scales, rtol=2 * RELATIVE[dtype], atol=0)
    # Keys may have been rounded apart: one step, which is widest at the end of fp8.
    step = 1.0 if stored == torch.int8 else 32.0
    torch.testing.assert_close(ours.layer.float(), expected.layer.float(), rtol=0, atol=step)
    # Values come as they are: their numbers and scales have to be equal.
    assert torch.equal(ours.layer[:, 1].float(), expected.layer[:, 1].float())
    assert torch.equal(ours.scales[:, 1], expected.scales[:, 1])


@pytest.mark.parametrize("stored", QUANTISED)
def test_the_largest_number_of_a_row_is_stored_as_the_largest_there_is(device, stored):
    pool = garbage_pool(1, 1, 1, 8, stored)
    heads = torch.tensor([[[0.0] * 8, [3.0, -1.0] + [0.5] * 6, [-0.7] * 7 + [0.1]]])
    angles = torch.zeros(1, 4)
    queries, _, ours, _ = _run_both(
        device, pool, heads, angles.cos(), angles.sin(), torch.tensor([0])
    )
    largest = ours.layer.float().abs().amax(-1).flatten().tolist()
    assert largest == [127.0 if stored == torch.int8 else 448.0] * 2
    assert not queries.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_gets_no_finite_scale(device, bad):
    pool = garbage_pool(1, 1, 1, 8, torch.int8)
    pool.rows.zero_()
    heads = torch.ones(1, 3, 8)
    heads[0, 1, 2] = heads[0, 2, 7] = bad
    ones, zeros = torch.ones(1, 4, device=device), torch.zeros(1, 4, device=device)
    ours = _on(pool, device)
    rotary_write(
        heads.to(device), ones, zeros, torch.empty(1, 1, 8, device=device), ours.layer,
        torch.zeros(1, dtype=torch.int64, device=device), kv_scales=ours.scales,
    )  # fmt: skip
    assert not torch.isfinite(ours.scales).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_normalised_first_where_weights_are_given(device, dtype):
    shape = (5, 2, 64, 4)
    pool = garbage_pool(_NUM_BLOCKS, 4, 2, 64, dtype)
    pool.rows.zero_()
    heads, cosines, sines, slots = _inputs(shape, dtype, 3)
    weight = (torch.rand(7, 64, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    queries, exact, ours, expected = _run_both(
        device, pool, heads, cosines, sines, slots, norm_weight=weight, epsilon=1e-6
    )
    _assert_close(queries, exact, dtype)
    _assert_close(ours.layer[:, 0], expected.layer[:, 0], dtype)
    assert torch.equal(ours.layer[:, 1], expected.layer[:, 1])


def test_queries_may_be_rotated_in_place(device):
    shape = (4, 2, 16, 4)
    pool = garbage_pool(_NUM_BLOCKS, 4, 2, 16, torch.float32)
    heads, cosines, sines, slots = _inputs(shape, torch.float32, 3)
    _, exact, _, _ = _run_both(device, pool, heads, cosines, sines, slots)
    heads, cosines, sines = (part.to(device) for part in (heads, cosines, sines))
    rotary_write(heads, cosines, sines, heads[:, :4], _on(pool, device).layer, slots.to(device))
    _assert_close(heads[:, :4].cpu(), exact, torch.float32)


def test_shapes_that_do_not_fit_are_refused():
    pool = garbage_pool(2, 4, 2, 8, torch.float32)
    heads, cosines, sines, slots = _inputs((4, 2, 8, 4), torch.float32, 2)
    queries = torch.empty(2, 4, 8)
    with pytest.raises(ValueError, match="must be"):
        rotary_write(heads[:, :7], cosines, sines, queries, pool.layer, slots)
    with pytest.raises(ValueError, match="angles"):
        rotary_write(heads, cosines[:, :3], sines, queries, pool.layer, slots)
    with pytest.raises(ValueError, match="1 slots for 2 tokens"):
        rotary_write(heads, cosines, sines, queries, pool.layer, slots[:1])
    with pytest.raises(ValueError, match="layer has shape"):
        rotary_write(heads, cosines, sines, queries, pool.layer[0], slots)
    with pytest.raises(ValueError, match="strides"):
        rotary_write(heads, cosines, sines, queries[..., ::2], pool.layer[..., ::2], slots)
    with pytest.raises(ValueError, match="norm weights"):
        rotary_write(
            heads, cosines, sines, queries, pool.layer, slots, norm_weight=torch.ones(4, 8)
        )
    with pytest.raises(ValueError, match="scales for numbers"):
        rotary_write(
            heads, cosines, sines, queries, pool.layer, slots, kv_scales=torch.ones(2, 2, 4, 2)
        )
