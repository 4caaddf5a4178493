"""The arena reserves addresses, not memory, and refuses what does not fit."""

import resource
from pathlib import Path

import pytest
import torch

from pageframe.core.errors import ResourceExhaustedError
from pageframe.executor.model import arena as arena_module
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.host_memory import available_memory_bytes
from pageframe.kernels.layouts import KvLayout

_CPU = torch.device("cpu")
_LAYOUT = KvLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8)


def _resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_is_contiguous_over_all_layers(dtype):
    arena = KvArena(_LAYOUT, 5, dtype, _CPU)
    assert arena.blocks.shape == (5, 3, 2, 4, 2, 8)
    assert arena.blocks.dtype == dtype
    assert arena.blocks[2].is_contiguous()
    assert arena.layer(1).shape == (5, 2, 4, 2, 8)
    assert arena.layer(1).data_ptr() == arena.blocks[0, 1].data_ptr()


def test_untouched_blocks_take_no_memory():
    layout = KvLayout(num_layers=8, block_size=16, num_kv_heads=8, head_dim=64)
    before_bytes = _resident_bytes()
    arena = KvArena(layout, 1024, torch.float32, _CPU)
    assert arena.blocks.numel() * 4 == 512 * 2**20
    arena.blocks[7] = 1.0
    taken_bytes = _resident_bytes() - before_bytes
    assert taken_bytes < 64 * 2**20


def test_fresh_blocks_are_zero_and_copies_take_all_layers():
    arena = KvArena(_LAYOUT, 4, torch.float32, _CPU)
    assert not arena.blocks.any()
    arena.blocks[1] = torch.randn(_LAYOUT.block_shape)
    arena.copy(torch.tensor([1]), torch.tensor([3]))
    assert torch.equal(arena.blocks[3], arena.blocks[1])
    assert not arena.blocks[0].any()
    assert not arena.blocks[2].any()


def test_refuses_with_the_numbers_before_reserving(monkeypatch):
    monkeypatch.setattr(arena_module, "available_memory_bytes", lambda: 200 * 2**20)
    with pytest.raises(ResourceExhaustedError) as caught:
        KvArena(_LAYOUT, 100_000, torch.float32, _CPU)
    assert caught.value.reason == "KV_ARENA_TOO_LARGE"
    assert caught.value.limits == {
        "needed_bytes": str(100_000 * 3 * 2 * 4 * 2 * 8 * 4),
        "available_bytes": str(200 * 2**20),
        "num_blocks": "100000",
    }


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
