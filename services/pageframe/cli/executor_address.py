"""Where the executors of a running system listen.

The address that clients know is the gateway's. Executors' sockets lie in the folder of the run, and
so does the launch file that names them, or says where they are on other machines.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pageframe.cli.up import LAUNCH_FILE_NAME
from pageframe.config.launch import Launch
from pageframe.config.settings import load_settings
from pageframe.core.errors import NotFoundError, PreconditionError
from pageframe.rpc.addresses import ReplicaAddresses, by_name


def find_executors(
    server: str | None, state_dir: Path | None, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Addresses by what the pool page calls their replicas, in order.

    The executor as given, else those of the system that runs from the state folder.

    Args:
        server: ``unix:/path`` or ``HOST:PORT`` as given with ``--server``.
        state_dir: State folder as given; None for the one that settings name.
        environ: Environment.

    Raises:
        PreconditionError: reason EXECUTOR_NOT_FOUND.
        InvalidRequestError: the settings that would name the state folder are malformed.
    """
    if server:
        return by_name([server])
    folder = state_dir or load_settings({}, environ).state_dir
    found = [
        (path.stat().st_mtime_ns, launch.executor_targets)
        for path in _launch_files(folder, environ)
        if (launch := _read(path)) is not None and _is_of(launch, folder)
    ]
    if not found:
        raise PreconditionError(
            "EXECUTOR_NOT_FOUND",
            f"no system runs from {folder}: start one with `pageframe up`, give its --state-dir, "
            "or give --server",
            state_dir=folder,
        )
    addresses = asyncio.run(ReplicaAddresses(max(found)[1]).find())
    if not addresses:
        raise PreconditionError(
            "EXECUTOR_NOT_FOUND",
            f"the name of the executors of {folder} stands for no address now",
            state_dir=folder,
        )
    return by_name(addresses)


def choose_executor(executors: Mapping[str, str], replica: str) -> str:
    """The address of one of several; of the only one for an empty name.

    Args:
        executors: Addresses by name.
        replica: Name or address.

    Raises:
        PreconditionError: reason REPLICA_MISSING, when several are there and none is named.
        NotFoundError: reason REPLICA_UNKNOWN.
    """
    fitting = [address for name, address in executors.items() if replica in ("", name, address)]
    names = ", ".join(executors)
    if not fitting:
        raise NotFoundError(
            "REPLICA_UNKNOWN", f"there is no replica {replica}; there are {names}", replicas=names
        )
    if len(fitting) > 1:
        raise PreconditionError(
            "REPLICA_MISSING",
            f"there are several replicas: say which with --replica, one of {names}",
            replicas=names,
        )
    return fitting[0]


def _launch_files(state_dir: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    """Launch files of this user, wherever ``run_folder`` may have put them."""
    yield from (state_dir / "run").glob(f"*/{LAUNCH_FILE_NAME}")
    for base in (environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if base:
            for path in Path(base).glob(f"pageframe-*/{LAUNCH_FILE_NAME}"):
                # In a folder for everybody, anybody could have put it there.
                if path.stat().st_uid == os.getuid():
                    yield path


def _read(path: Path) -> Launch | None:
    try:
        return Launch.read(path)
    except (OSError, ValueError):
        # It was removed just now, or is of another release.
        return None


def _is_of(launch: Launch, state_dir: Path) -> bool:
    is_running = Path(f"/proc/{launch.supervisor_pid}").exists()
    return is_running and launch.settings.state_dir.resolve() == state_dir.resolve()
