"""The arena reserves addresses, not memory, refuses what does not fit, shrinks and grows."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from pageframe.core.errors import (
    InvalidRequestError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnimplementedError,
)
from pageframe.executor.model import arena as arena_module
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.host_memory import HEADROOM_BYTES, available_memory_bytes
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

_CPU = torch.device("cpu")
_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
_MIB = 2**20


def _layout(dtype=torch.float32, **sizes):
    sizes = {"num_layers": 3, "block_size": 4, "num_kv_heads": 2, "head_dim": 8} | sizes
    return KvLayout(dtype=dtype, is_quantised=dtype in QUANTISED_DTYPES, **sizes)


# One block takes 512 KiB.
_LARGE = {"num_layers": 8, "block_size": 16, "num_kv_heads": 8, "head_dim": 64}


def _resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _number(block_id, layer, kind, token, head):
    """Small, exact in every type, and different for neighbours."""
    return float((block_id * 31 + layer * 17 + kind * 11 + token * 3 + head * 7) % 13)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_one_row_holds_all_layers_of_a_block_then_its_scales(dtype):
    layout = _layout(dtype)
    arena = KvArena(layout, 5, _CPU)
    assert (arena.blocks.shape, arena.blocks.dtype) == ((5, layout.block_bytes), torch.uint8)
    for layer in range(3):
        assert arena.layer(layer).shape == (5, 2, 4, 2, 8)
        assert arena.layer(layer).dtype == dtype
        for place in np.ndindex(5, 2, 4, 2):
            arena.layer(layer)[place] = torch.full((8,), _number(place[0], layer, *place[1:])).to(
                dtype
            )
            if layout.is_quantised:
                arena.scales(layer)[place] = 100 + _number(place[0], layer, *place[1:])
    for block_id in range(5):
        row = torch.frombuffer(bytearray(arena.read(block_id)), dtype=torch.uint8)
        payload_bytes = layout.num_elements_per_block * dtype.itemsize
        payload = row[:payload_bytes].view(dtype).float().view(3, 2, 4, 2, 8)
        expected = torch.tensor(
            [_number(block_id, *place) for place in np.ndindex(3, 2, 4, 2)]
        ).view(3, 2, 4, 2)
        assert torch.equal(payload, expected[..., None].expand(3, 2, 4, 2, 8))
        scales = row[layout.payload_bytes_per_block :][: layout.scale_bytes_per_block]
        if layout.is_quantised:
            assert torch.equal(scales.view(torch.float32), expected.view(-1) + 100)
        else:
            assert arena.scales(0) is None


@pytest.mark.parametrize("dtype", _DTYPES)
def test_copies_take_every_byte_of_a_block(dtype):
    arena = KvArena(_layout(dtype), 4, _CPU)
    assert not arena.blocks.any()
    rng = np.random.default_rng(1)
    for block_id in range(3):
        arena.write(block_id, rng.bytes(arena.layout.block_bytes))
    before = [arena.read(block_id) for block_id in range(4)]
    arena.copy(np.array([1, 0]), np.array([3, 1]))
    after = [arena.read(block_id) for block_id in range(4)]
    assert after == [before[0], before[0], before[2], before[1]]


def test_untouched_blocks_take_no_memory():
    before_bytes = _resident_bytes()
    arena = KvArena(_layout(**_LARGE), 1024, _CPU)
    assert arena.blocks.nbytes == 512 * _MIB
    arena.blocks[7] = 1
    # A page of the range may be larger than the block.
    assert _MIB // 2 <= arena.resident_bytes <= 2 * _MIB
    assert _resident_bytes() - before_bytes < 64 * _MIB


def test_shrinking_gives_memory_back_and_keeps_what_is_below():
    arena = KvArena(_layout(**_LARGE), 400, _CPU, num_blocks_max=100_000)
    arena.blocks[:400] = torch.arange(400, dtype=torch.int64).to(torch.uint8)[:, None]
    before_bytes = _resident_bytes()
    assert arena.resident_bytes == 200 * _MIB
    arena.resize(100)
    assert arena.num_blocks == 100
    assert arena.resident_bytes == 50 * _MIB
    # 150 MiB go back; the rest of the process may have grown or shrunk meanwhile.
    assert before_bytes - _resident_bytes() > 100 * _MIB
    below = torch.arange(100, dtype=torch.uint8)[:, None]
    assert torch.equal(arena.blocks[:100], below.expand(100, _MIB // 2))
    arena.resize(600)
    arena.layer(7)[599] = 2.5
    assert torch.equal(arena.layer(7)[599], torch.full((2, 16, 8, 64), 2.5))
    assert torch.equal(arena.blocks[:100], below.expand(100, _MIB // 2))


def test_a_large_page_that_the_last_block_shares_is_kept():
    arena = KvArena(_layout(**_LARGE), 16, _CPU)
    arena.blocks[:] = 9
    assert arena.resident_bytes == 8 * _MIB
    arena.resize(5)
    # Four blocks fill a page of 2 MiB; small ones, where there are no others, fit blocks exactly.
    assert 5 * _MIB // 2 <= arena.resident_bytes <= 4 * _MIB
    assert bool((arena.blocks[:5] == 9).all())
    arena.resize(16)
    assert not arena.blocks[8:].any()


def test_a_page_that_the_last_block_shares_is_kept():
    # 512 bytes a block: eight of them in one page.
    layout = _layout(num_layers=1, head_dim=8)
    assert layout.block_bytes == 512
    arena = KvArena(layout, 24, _CPU)
    arena.blocks[:] = 9
    arena.resize(11)
    assert arena.resident_bytes == 2 * 4096
    assert bool((arena.blocks[:11] == 9).all())
    arena.resize(24)
    assert not arena.blocks[16:].any()


def test_sizes_that_no_pool_can_have_are_refused():
    arena = KvArena(_layout(), 4, _CPU, num_blocks_max=6)
    for num_blocks in (-1, 0, 7):
        with pytest.raises(OutOfRangeError) as caught:
            arena.resize(num_blocks)
        assert caught.value.reason == "POOL_SIZE_OUT_OF_RANGE"
        limits = {"num_blocks": str(num_blocks), "num_blocks_max": "6"}
        assert caught.value.limits == limits
    assert arena.num_blocks == 4


def test_only_the_blocks_of_the_pool_can_be_read_and_written():
    arena = KvArena(_layout(), 4, _CPU, num_blocks_max=6)
    data = bytes(arena.layout.block_bytes)
    for block_id in (-1, 4):
        with pytest.raises(OutOfRangeError, match=f"no block {block_id} in a pool of 4"):
            arena.read(block_id)
        with pytest.raises(OutOfRangeError):
            arena.write(block_id, data)
    for wrong in (b"", data[1:], data + b"x"):
        with pytest.raises(InvalidRequestError) as caught:
            arena.write(0, wrong)
        assert caught.value.reason == "BLOCK_BYTES_INVALID"


def test_an_arena_of_another_device_does_not_resize(monkeypatch):
    # No memory is behind tensors of this device; it only is not the CPU.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    arena = KvArena(_layout(), 4, torch.device("meta"), num_blocks_max=6)
    assert arena.num_blocks_max == 4
    with pytest.raises(UnimplementedError) as caught:
        arena.resize(3)
    assert caught.value.reason == "RESIZE_UNAVAILABLE"


def _set_available(monkeypatch, num_bytes):
    monkeypatch.setattr(arena_module, "available_memory_bytes", lambda: num_bytes)


def test_refuses_with_the_numbers_before_reserving(monkeypatch):
    _set_available(monkeypatch, 200 * _MIB)
    with pytest.raises(ResourceExhaustedError) as caught:
        KvArena(_layout(), 100_000, _CPU, promised_bytes=77)
    assert caught.value.reason == "KV_ARENA_TOO_LARGE"
    assert caught.value.limits == {
        "needed_bytes": str(100_000 * 3 * 2 * 4 * 2 * 8 * 4),
        "promised_bytes": "77",
        "available_bytes": str(200 * _MIB),
        "num_blocks": "100000",
    }


def test_what_the_pool_may_grow_to_does_not_count_but_promises_do(monkeypatch):
    layout = _layout(**_LARGE)
    _set_available(monkeypatch, 10 * layout.block_bytes + HEADROOM_BYTES)
    KvArena(layout, 10, _CPU, num_blocks_max=1_000_000)
    KvArena(layout, 7, _CPU, promised_bytes=3 * layout.block_bytes)
    with pytest.raises(ResourceExhaustedError):
        KvArena(layout, 11, _CPU)
    with pytest.raises(ResourceExhaustedError):
        KvArena(layout, 7, _CPU, promised_bytes=3 * layout.block_bytes + 1)


def test_growing_needs_memory_for_all_that_was_not_taken_yet(monkeypatch):
    layout = _layout(**_LARGE)
    arena = KvArena(layout, 10, _CPU, num_blocks_max=40)
    arena.blocks[:4] = 1
    # Six blocks of the first ten are still to be taken.
    _set_available(monkeypatch, 12 * layout.block_bytes + HEADROOM_BYTES)
    with pytest.raises(ResourceExhaustedError) as caught:
        arena.resize(17)
    assert caught.value.limits["needed_bytes"] == str(13 * layout.block_bytes)
    assert arena.num_blocks == 10
    arena.resize(16)
    with pytest.raises(ResourceExhaustedError):
        arena.resize(17, promised_bytes=1)
    assert arena.num_blocks == 16


def test_more_addresses_than_there_are_are_refused():
    with pytest.raises(ResourceExhaustedError, match="no addresses") as caught:
        KvArena(_layout(), 4, _CPU, num_blocks_max=2**50)
    assert caught.value.reason == "KV_ARENA_TOO_LARGE"
    assert caught.value.limits["num_blocks"] == str(2**50)


def _write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_available_memory_is_the_machines_without_control_groups(tmp_path):
    _write(tmp_path, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert available_memory_bytes(tmp_path) == 4096 * 1024


def test_available_memory_obeys_the_tightest_control_group(tmp_path):
    _write(tmp_path, "proc/meminfo", "MemAvailable: 1000000 kB\n")
    _write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    for folder, limit, used in (("a", "5000", "1000"), ("a/b", "max", "900")):
        _write(tmp_path, f"sys/fs/cgroup/{folder}/memory.max", f"{limit}\n")
        _write(tmp_path, f"sys/fs/cgroup/{folder}/memory.current", f"{used}\n")
    _write(tmp_path, "sys/fs/cgroup/a/memory.stat", "anon 700\ninactive_file 300\n")
    assert available_memory_bytes(tmp_path) == 5000 - 1000 + 300


def test_available_memory_obeys_version_one_groups(tmp_path):
    _write(tmp_path, "proc/meminfo", "MemAvailable: 1000000 kB\n")
    _write(tmp_path, "proc/self/cgroup", "5:cpu:/x\n4:memory:/x\n")
    _write(tmp_path, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", "7000\n")
    _write(tmp_path, "sys/fs/cgroup/memory/x/memory.usage_in_bytes", "2000\n")
    assert available_memory_bytes(tmp_path) == 5000


def test_available_memory_of_this_machine_is_plausible():
    assert 2**20 < available_memory_bytes() < 2**50


def test_memory_is_taken_little_by_little_up_to_a_block():
    arena = KvArena(_layout(**_LARGE), 40, _CPU)
    slices = 1
    while arena.take_memory(24):
        slices += 1
    if arena.resident_bytes == 0:
        pytest.skip("this system takes memory only for what is written")
    assert slices == 6  # of 2 MiB
    assert arena.resident_bytes == 12 * _MIB
    assert not arena.take_memory(20)
    assert arena.resident_bytes == 12 * _MIB


def test_a_pool_that_shrank_takes_no_memory_above_and_takes_it_again_below():
    arena = KvArena(_layout(**_LARGE), 40, _CPU)
    while arena.take_memory(40):
        pass
    arena.resize(8)
    before = arena.resident_bytes
    assert not arena.take_memory(40)
    assert arena.resident_bytes == before
    arena.resize(16)
    while arena.take_memory(40):
        pass
    assert arena.resident_bytes == (8 * _MIB if before else 0)
