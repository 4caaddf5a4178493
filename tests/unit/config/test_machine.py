"""Machines put together in a folder: what the kernel grants is what counts."""

from pathlib import Path

import pytest

from pageframe.config import machine

GIB = 1024**3


def build_machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))


def meminfo(available_bytes: int) -> dict[str, str]:
    text = f"MemTotal: 99999999 kB\nMemAvailable:   {available_bytes // 1024} kB\n"
    return {"proc/meminfo": text}


def test_without_a_cgroup_the_affinity_and_the_system_count(tmp_path: Path) -> None:
    root = build_machine(tmp_path, meminfo(4 * GIB))
    assert machine.num_usable_cpus(root) == 8
    assert machine.memory_available_bytes(root) == 4 * GIB


def test_the_smallest_limit_among_the_ancestors_counts_in_cgroup_v2(tmp_path: Path) -> None:
    root = build_machine(
        tmp_path,
        meminfo(16 * GIB)
        | {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
        },
    )
    assert machine.num_usable_cpus(root) == 1, "half a processor is not a second thread"
    assert machine.memory_available_bytes(root) == GIB + GIB // 2


def test_a_container_sees_its_own_limits_at_the_mount(tmp_path: Path) -> None:
    root = build_machine(
        tmp_path,
        meminfo(16 * GIB)
        | {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert machine.num_usable_cpus(root) == 3
    assert machine.memory_available_bytes(root) == 2 * GIB


def test_cgroup_v1_is_read_too_even_when_its_name_is_the_hosts(tmp_path: Path) -> None:
    root = build_machine(
        tmp_path,
        meminfo(16 * GIB)
        | {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 4}\n",
        },
    )
    assert machine.num_usable_cpus(root) == 2
    assert machine.memory_available_bytes(root) == GIB - GIB // 4


def test_cgroup_v1_without_limits_limits_nothing(tmp_path: Path) -> None:
    root = build_machine(
        tmp_path,
        meminfo(GIB)
        | {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.num_usable_cpus(root) == 8
    assert machine.memory_available_bytes(root) == GIB


def test_a_tiny_quota_still_grants_one_thread(tmp_path: Path) -> None:
    root = build_machine(
        tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}
    )
    assert machine.num_usable_cpus(root) == 1


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC\n",
            "470.57.02",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "580.65.06",
        ),
    ],
)
def test_the_nvidia_driver_is_read_from_the_kernel(tmp_path: Path, text: str, version: str) -> None:
    assert machine.nvidia_driver_version(tmp_path) is None
    root = build_machine(tmp_path, {"proc/driver/nvidia/version": text})
    assert machine.nvidia_driver_version(root) == version


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    free = machine.disk_free_bytes(tmp_path / "not" / "yet" / "made")
    assert free > 0
