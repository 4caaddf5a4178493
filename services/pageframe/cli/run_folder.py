"""The folder of one run: sockets, trace rings and the launch file; private, short-lived.

It lies in the state folder, unless that path is too long for a Unix socket; then it is a fresh
folder in ``XDG_RUNTIME_DIR`` or the system's folder for temporary files.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pageframe.core.errors import PreconditionError

# struct sockaddr_un has 108 bytes for a path, the last of which is 0.
SOCKET_PATH_BYTES_MAX = 107
_LONGEST_SOCKET_NAME = "scheduler.sock"


def make_run_folder(state_dir: Path, environ: Mapping[str, str]) -> Path:
    """Make the folder of this process and remove those of dead ones.

    Raises:
        PreconditionError: ``SOCKET_PATH_TOO_LONG`` if no place is short enough, or
            ``RUN_DIR_UNUSABLE``.
    """
    preferred = state_dir / "run" / str(os.getpid())
    try:
        remove_dead_run_folders(state_dir / "run")
        if _fits(preferred):
            shutil.rmtree(preferred, ignore_errors=True)
            preferred.mkdir(mode=0o700, parents=True)
            return preferred
        return _short_folder(environ)
    except OSError as error:
        raise PreconditionError(
            "RUN_DIR_UNUSABLE",
            f"cannot make a folder for sockets near {state_dir}: {error.strerror}; "
            "give another --state-dir",
        ) from None


def remove_dead_run_folders(parent: Path) -> None:
    """Remove what runs left that were ended by SIGKILL."""
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if folder.name.isdecimal() and not Path(f"/proc/{folder.name}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX


def _short_folder(environ: Mapping[str, str]) -> Path:
    for base in (environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        # mkdtemp appends eight characters to the prefix; it makes the folder with mode 0700.
        if base and os.access(base, os.W_OK) and _fits(Path(base, "pageframe-12345678")):
            return Path(tempfile.mkdtemp(prefix="pageframe-", dir=base))
    raise PreconditionError(
        "SOCKET_PATH_TOO_LONG",
        "the state folder's path is too long for a Unix socket "
        f"({SOCKET_PATH_BYTES_MAX} bytes): give a shorter --state-dir",
    )
