"""What Triton attention refuses, and with which words."""

import pytest
import torch

from pageframe.kernels.ops import attention, triton_attention
from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.paged_attention import PagedAttention
from pageframe.kernels.ops.triton_attention_checks import check_device
from unit.kernels.pools import garbage_pool
from unit.kernels.triton.attention_batches import make_batch

_CPU = torch.device("cpu")


def test_shapes_that_do_not_belong_together():
    batch = make_batch([(1, 20), (3, 5)], heads=(4, 2), head_dim=16)
    ours = batch.attention(_CPU)
    plan = ours.plan(**batch.tables, window=None)
    query, layer = batch.query, batch.pool.layer
    with pytest.raises(ValueError, match="evenly"):
        ours.run(plan, query[:, :3], layer, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        ours.run(plan, query[:, :, :8], layer, 1.0)
    with pytest.raises(ValueError, match="blocks of 16"):
        ours.run(plan, query, layer[:, :, :8], 1.0)
    with pytest.raises(ValueError, match="blocks of 16"):
        ours.run(plan, query, layer.half(), 1.0)
    with pytest.raises(ValueError, match="elements apart"):
        ours.run(plan, query, layer.transpose(3, 4).contiguous().transpose(3, 4), 1.0)
    with pytest.raises(ValueError, match="positive"):
        ours.run(plan, query, layer, 0.0)
    with pytest.raises(ValueError, match="slopes"):
        ours.run(plan, query, layer, 1.0, alibi=Alibi(torch.ones(2)))
    with pytest.raises(ValueError, match="scales for numbers"):
        ours.run(plan, query, layer, 1.0, kv_scales=torch.zeros(layer.shape[:-1]))
    with pytest.raises(ValueError, match="window is 0"):
        ours.plan(**batch.tables, window=0)


def test_a_plan_for_short_chunks_takes_no_long_ones_unless_it_has_room():
    short, long = (make_batch([(new, 30)], head_dim=16) for new in (2, 5))
    ours = short.attention(_CPU)
    plan = ours.plan(**short.tables, window=None)
    ours.refill(ours.plan(**short.tables, window=None, room=plan.room), **long.tables)
    with pytest.raises(ValueError, match="short chunks"):
        ours.refill(plan, **long.tables)


def _chip(monkeypatch, capability):
    """A machine whose GPU can be asked, but not used."""

    class _Properties:
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Properties)
    return torch.device("cuda")


def _layout(dtype, head_dim=64):
    return garbage_pool(1, 16, 1, head_dim, dtype).layout


_CHIPS = pytest.mark.parametrize(
    ("capability", "stored", "is_fit"),
    [
        ((7, 5), torch.float16, False),
        ((8, 0), torch.bfloat16, True),
        ((8, 6), torch.int8, True),
        ((8, 6), torch.float8_e4m3fn, False),
        ((8, 9), torch.float8_e4m3fn, True),
    ],
)


@_CHIPS
def test_chips_without_the_instructions(monkeypatch, capability, stored, is_fit):
    device = _chip(monkeypatch, capability)
    if is_fit:
        expected = (10 * capability[0] + capability[1], 7)
        assert check_device(device, torch.float16, _layout(stored)) == expected
    else:
        with pytest.raises(ValueError, match="needs compute capability"):
            check_device(device, torch.float16, _layout(stored))


@pytest.mark.parametrize(
    ("head_dim", "stored", "widest"),
    [(258, torch.float16, 256), (63, torch.float16, 256), (130, torch.int8, 128)],
)
def test_heads_that_fit_no_tile(monkeypatch, head_dim, stored, widest):
    device = _chip(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match=f"{head_dim} channels; even counts to {widest}"):
        check_device(device, torch.float16, _layout(stored, head_dim))
    check_device(device, torch.float16, _layout(stored, widest))


@_CHIPS
def test_a_chip_without_kernels_gets_torch(monkeypatch, capability, stored, is_fit):
    device = _chip(monkeypatch, capability)
    monkeypatch.setattr(triton_attention, "TritonAttention", lambda *_, **__: "triton")
    monkeypatch.setattr(attention, "PagedAttention", lambda *_: "torch")
    chosen = attention.choose_attention(_layout(stored), 4, torch.float16, device)
    assert chosen == ("triton" if is_fit else "torch")


def test_a_cpu_gets_torch_even_where_triton_is_interpreted():
    chosen = attention.choose_attention(_layout(torch.float32), 4, torch.float32, _CPU)
    assert isinstance(chosen, PagedAttention)


def test_devices_without_kernels():
    with pytest.raises(ValueError, match="no Triton kernels for meta"):
        triton_attention.TritonAttention(
            _layout(torch.float32), 4, torch.float32, torch.device("meta")
        )
