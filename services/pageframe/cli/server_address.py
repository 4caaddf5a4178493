"""Which server client commands talk to."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pageframe.client.channel import DEFAULT_SERVER
from pageframe.config.settings import load_settings
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.rpc.tls import ClientTls
from pageframe.rpc.tls_probe import find_tls_fault

SERVER_VARIABLE = "PAGEFRAME_SERVER"
ADDRESS_FILE_NAME = "address.json"


def find_server(
    server: str | None, state_dir: Path | None, environ: Mapping[str, str] = os.environ
) -> str:
    """The server as given, else of the environment, else what runs from the state folder.

    Args:
        server: ``HOST:PORT`` as given with ``--server``.
        state_dir: State folder as given; None for the one that settings name.
        environ: Environment.
    """
    return server or environ.get(SERVER_VARIABLE) or _running_server(state_dir, environ)


def _running_server(state_dir: Path | None, environ: Mapping[str, str]) -> str:
    """What `pageframe up` wrote when it was ready."""
    try:
        folder = state_dir or load_settings({}, environ).state_dir
        address = json.loads((folder / ADDRESS_FILE_NAME).read_text(encoding="utf-8"))["grpc"]
    except (OSError, ValueError, LookupError, TypeError, PageframeError):
        # Nothing runs from there, or nothing that we know how to find.
        return DEFAULT_SERVER
    return address if isinstance(address, str) else DEFAULT_SERVER


def explained(error: PageframeError, address: str, tls: ClientTls | None = None) -> str:
    """An error for people; where nobody answers, what to do about it."""
    if isinstance(error, UnavailableError) and error.reason == "TRANSPORT":
        if fault := find_tls_fault(address, tls):
            return fault
        return (
            f"no server answers at {address}; start one with `pageframe up`, or say where it is "
            "with --server HOST:PORT"
        )
    return f"{error.reason}: {error.message}"
