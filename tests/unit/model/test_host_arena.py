"""Host slots keep whole blocks, byte for byte, and take memory as they are used."""

import numpy as np
import pytest
import torch

from pageframe.core.errors import InvalidRequestError, OutOfRangeError, ResourceExhaustedError
from pageframe.executor.model import host_arena as host_arena_module
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.host_arena import HostArena
from pageframe.executor.model.host_memory import HEADROOM_BYTES
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

_CPU = torch.device("cpu")
_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


def _ids(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_blocks_come_back_as_they_left(dtype):
    layout = KvLayout(
        num_layers=3,
        block_size=2,
        num_kv_heads=3,
        head_dim=5,
        dtype=dtype,
        is_quantised=dtype in QUANTISED_DTYPES,
    )
    arena = KvArena(layout, 6, _CPU)
    host = HostArena(4, layout.block_bytes, _CPU)
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        numbers = torch.randn(6, 2, 2, 3, 5, generator=generator) * 20
        arena.layer(layer).copy_(numbers.to(dtype))
        if layout.is_quantised:
            arena.scales(layer).copy_(torch.rand(6, 2, 2, 3, generator=generator))
    before = [arena.read(block_id) for block_id in range(6)]
    assert len(set(before)) == 6

    host.store(arena.blocks, _ids(5, 0, 3), _ids(2, 3, 0))
    assert [host.read(slot) for slot in (2, 3, 0)] == [before[5], before[0], before[3]]
    assert host.read(1) == bytes(layout.block_bytes)
    arena.blocks.fill_(0xA5)
    host.load(arena.blocks, _ids(0, 2, 3), _ids(3, 4, 0))
    overwritten = b"\xa5" * layout.block_bytes
    assert [arena.read(block_id) for block_id in range(6)] == [
        before[0],
        overwritten,
        overwritten,
        before[3],
        before[5],
        overwritten,
    ]


def test_one_slot_may_come_in_twice():
    arena = KvArena(
        KvLayout(num_layers=1, block_size=1, num_kv_heads=1, head_dim=16, dtype=torch.float32),
        3,
        _CPU,
    )
    host = HostArena(1, 128, _CPU)
    data = bytes(range(128))
    host.write(0, data)
    host.load(arena.blocks, _ids(0, 0), _ids(2, 1))
    assert [arena.read(block_id) for block_id in range(3)] == [bytes(128), data, data]


def test_slots_take_memory_once_they_are_stored_to():
    block_bytes = 1 << 20
    host = HostArena(1000, block_bytes, _CPU)
    assert host.untouched_bytes == 1000 << 20
    host.write(17, bytes(block_bytes))
    # A page of the range may be larger than the slot.
    assert 998 << 20 <= host.untouched_bytes <= 999 << 20


def test_no_slots_are_no_tier():
    host = HostArena(0, 64, _CPU)
    assert host.slots.shape == (0, 64)
    assert host.untouched_bytes == 0
    with pytest.raises(OutOfRangeError, match="no slot 0 in a host tier of 0"):
        host.read(0)


def test_wrong_slots_and_lengths_are_refused():
    host = HostArena(2, 64, _CPU)
    for slot in (-1, 2):
        with pytest.raises(OutOfRangeError) as caught:
            host.write(slot, bytes(64))
        assert caught.value.reason == "HOST_SLOT_OUT_OF_RANGE"
    with pytest.raises(InvalidRequestError, match="64 bytes, not 63"):
        host.write(0, bytes(63))


def test_refuses_with_the_numbers_what_does_not_fit(monkeypatch):
    available_bytes = HEADROOM_BYTES + 6400
    monkeypatch.setattr(host_arena_module, "available_memory_bytes", lambda: available_bytes)
    assert HostArena(100, 64, _CPU).num_slots == 100
    with pytest.raises(ResourceExhaustedError) as caught:
        HostArena(101, 64, _CPU)
    assert caught.value.reason == "HOST_TIER_TOO_LARGE"
    assert caught.value.limits == {
        "needed_bytes": "6464",
        "available_bytes": str(available_bytes),
        "num_slots": "101",
    }


def test_more_addresses_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(host_arena_module, "available_memory_bytes", lambda: 1 << 62)
    with pytest.raises(ResourceExhaustedError) as caught:
        HostArena(2**40, 2**20, _CPU)
    assert caught.value.reason == "HOST_TIER_TOO_LARGE"


class _Played:
    """Copies of a device, as calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *(list(it) for it in arguments[1:])))


def test_beside_a_device_what_is_loaded_is_settled_at_once_or_when_asked(monkeypatch):
    played = _Played()
    monkeypatch.setattr(HostArena, "_device_copies", lambda _: played)
    host = HostArena(2, 64, _CPU)
    blocks = torch.zeros(4, 64, dtype=torch.uint8)
    host.store(blocks, _ids(3), _ids(0))
    host.load(blocks, _ids(0), _ids(2))
    host.load(blocks, _ids(0), _ids(1), settles=False)
    host.settle()
    host.read(0)
    host.write(1, bytes(64))
    assert played.calls == [
        ("store", [3], [0]),
        ("load", [0], [2]),
        ("settle",),
        ("load", [0], [1]),
        ("settle",),
        ("finish",),
        ("finish",),
    ]


def test_a_device_without_room_for_copies_on_their_way_is_told(monkeypatch):
    def no_room(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HostArena, "_device_copies", no_room)
    with pytest.raises(ResourceExhaustedError, match="for copies on their way") as caught:
        HostArena(100, 1 << 20, _CPU)
    assert caught.value.reason == "HOST_TIER_TOO_LARGE"
    # Two buffers of 64 blocks.
    assert caught.value.limits == {"needed_bytes": str(128 << 20), "num_slots": "100"}
