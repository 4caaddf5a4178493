"""Facts of this machine: processors and memory as the kernel *grants* them, disk, NVIDIA driver.

Standard library only, because the installer uses it before anything is installed. Every function
takes the root of the file system, so a test can put a machine into a folder. A container's limits
stand in its cgroup or in any ancestor; the smallest one counts.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# cgroup v1 writes "no limit" as the largest multiple of a page; no machine has that much.
_NO_LIMIT_BYTES = 1 << 60


def num_usable_cpus(root: Path = ROOT) -> int:
    """Processors this process may keep busy: affinity and cgroup quota, at least 1.

    A quota of 1.5 counts as 1: a second thread would be throttled half of the time.
    """
    quotas = [len(os.sched_getaffinity(0)), *_cpu_quotas(root)]
    return max(1, int(min(quotas)))


def memory_available_bytes(root: Path = ROOT) -> int:
    """Memory this process and its children may still take before the kernel intervenes."""
    return min([_system_available_bytes(root), *_cgroup_available_bytes(root)])


def disk_free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds ``path``, which need not exist yet."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def nvidia_driver_version(root: Path = ROOT) -> str | None:
    """Version of the loaded NVIDIA kernel driver, such as ``"550.54.14"``; None without one."""
    text = _read(root / "proc/driver/nvidia/version")
    # "… Kernel Module  470.57.02  Tue …", or "… Kernel Module for x86_64  580.65.06  …".
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text or "")
    return match[1] if match else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def _system_available_bytes(root: Path) -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo") or "", re.M)
    return int(match[1]) * 1024 if match else _NO_LIMIT_BYTES


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of our cgroup and its ancestors for one controller."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            base, version = root / "sys/fs/cgroup" / controllers, 1
            if not base.is_dir():
                base = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the name may be the host's; then only the mount itself is ours.
        folder = base / name.lstrip("/")
        while folder != base:
            yield version, folder
            folder = folder.parent
        yield version, base


def _cpu_quotas(root: Path) -> Iterator[float]:
    for version, folder in _cgroup_folders(root, "cpu"):
        if version == 2:
            quota, _, period = (_read(folder / "cpu.max") or "max 100000").partition(" ")
        else:
            quota = (_read(folder / "cpu.cfs_quota_us") or "-1").strip()
            period = _read(folder / "cpu.cfs_period_us") or "100000"
        if quota.isdecimal():
            yield int(quota) / int(period)


def _cgroup_available_bytes(root: Path) -> Iterator[int]:
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for version, folder in _cgroup_folders(root, "memory"):
        limit_name, usage_name, reclaimable_name = names[version]
        limit = (_read(folder / limit_name) or "max").strip()
        if not limit.isdecimal() or int(limit) >= _NO_LIMIT_BYTES:
            continue
        used = int(_read(folder / usage_name) or "0")
        # The page cache counts as used, and is given back when somebody asks.
        statistics = _read(folder / "memory.stat") or ""
        match = re.search(rf"^{reclaimable_name} (\d+)$", statistics, re.M)
        yield max(0, int(limit) - used + (int(match[1]) if match else 0))
