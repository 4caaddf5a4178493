"""How the exporter process is called."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pageframe.telemetry.spool import SPOOL_BYTES_DEFAULT

EXPORTER_MODULE: Final = "pageframe.telemetry"
DRAIN_S_DEFAULT: Final = 10.0


def exporter_arguments(
    rings: Sequence[Path],
    state_dir: Path,
    *,
    parent_pid: int,
    drain_seconds: float = DRAIN_S_DEFAULT,
    is_lossless: bool = False,
    file_stem: str = "pageframe",
    spool_bytes_max: int = SPOOL_BYTES_DEFAULT,
) -> list[str]:
    """The arguments of ``python -m pageframe.telemetry``.

    Whoever starts it blocks SIGTERM and SIGINT in itself meanwhile: the exporter inherits the mask
    and lifts it once it can drain. Without that, a signal that comes while Python still imports
    ends the process with its rings unread.

    Args:
        rings: One path per service; the rings may appear later.
        state_dir: For trace files and the spool.
        parent_pid: The exporter drains and ends by itself when this process dies.
        drain_seconds: Bound for the last flush.
        is_lossless: Never delete old trace files; for ``--trace audit``.
        file_stem: Name of the trace file; give each exporter on a state folder its own.
        spool_bytes_max: Bound of what waits on disk to be sent; beyond it records are dropped.
    """
    arguments = [argument for ring in rings for argument in ("--ring", str(ring))]
    arguments += ["--state-dir", str(state_dir), "--parent-pid", str(parent_pid)]
    arguments += ["--drain-seconds", str(drain_seconds), "--file-stem", file_stem]
    arguments += ["--spool-bytes", str(spool_bytes_max)]
    return [*arguments, "--lossless"] if is_lossless else arguments
