"""Where the rings of a run lie, and how they go away with it.

Rings belong into shared memory: on a disk, writing pages back would now and then delay a step. The
folder there is everybody's, so a name says whose the ring is and of which run::

    /dev/shm/pageframe-<uid>-<pid of the supervisor>-<digest of the run folder>-<service>.ring

An exporter removes each ring that it has read out and whose producer is gone, and a supervisor
removes what is left at the end of its run. What neither could remove, because both were killed, the
next run of the same user removes.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Final

from pageframe.core.errors import PageframeError
from pageframe.telemetry.ring import RingReader

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108, private by mode 0600
_SUFFIX: Final = ".ring"
_RING_NAME: Final = re.compile(r"pageframe-(\d+)-(\d+)-[0-9a-f]{12}-[a-z]+(?:-\d+)?\.ring")


def ring_path(
    run_dir: Path, supervisor_pid: int, service: str, *, folder: Path = SHARED_MEMORY
) -> Path:
    """The ring of a service: in shared memory if there is any, else in the run folder.

    All processes of a run come to the same path, and no two runs do.

    Args:
        run_dir: Folder of the run.
        supervisor_pid: Process that started the run.
        service: Short name, in lower-case letters; ``-<number>`` may follow, of a replica.
        folder: Shared memory.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        return run_dir / f"{service}{_SUFFIX}"
    digest = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest()
    return folder / f"pageframe-{os.getuid()}-{supervisor_pid}-{digest}-{service}{_SUFFIX}"


def remove_dead_rings(*, folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove rings of this user whose run is over, and say which.

    A run is over when its supervisor and the producer are gone and no exporter reads the ring.
    """
    if not folder.is_dir():
        return []
    removed = []
    for path in sorted(folder.glob(f"pageframe-{os.getuid()}-*{_SUFFIX}")):
        name = _RING_NAME.fullmatch(path.name)
        if name is None or Path(f"/proc/{name[2]}").exists() or not _is_abandoned(path):
            continue
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _is_abandoned(path: Path) -> bool:
    try:
        reader = RingReader(path)
    except (PageframeError, OSError):
        return False  # Somebody reads it, or it is not ours to judge.
    try:
        return reader.is_producer_gone()
    finally:
        reader.close()
