"""How much memory this process may still take: the machine's, or its control group's if less."""

from pathlib import Path

HEADROOM_BYTES = 128 * 1024 * 1024
"""What stays free beside blocks and host slots: activations, gather buffers, the interpreter."""

_UNLIMITED_BYTES = 1 << 60


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated before the machine or the control group runs out.

    Page cache counts as available, because the kernel drops it first.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    return min(_machine_bytes(root), *(_group_bytes(folder) for folder in _group_folders(root)))


def _machine_bytes(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return _UNLIMITED_BYTES


def _group_folders(root: Path) -> list[Path]:
    """The process's control groups and all above them, version 2 and version 1.

    Inside a container the path in ``/proc/self/cgroup`` may be the host's; folders that do not
    exist then count as unlimited, and the mount's top is the container's own group.
    """
    folders = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        parts = Path(path.strip()).parts[1:]
        folders += [mount.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _group_bytes(folder: Path) -> int:
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _read(folder / limit_name).strip()
        usage = _read(folder / usage_name).strip()
        if limit.isdigit() and usage.isdigit():
            cache = _statistic(folder / "memory.stat", cache_name)
            return max(0, int(limit) - int(usage) + cache)
    return _UNLIMITED_BYTES


def _statistic(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
