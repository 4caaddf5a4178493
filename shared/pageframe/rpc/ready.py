"""How a service tells the supervisor that started it: progress, ready, or why it gave up.

One JSON object a line on the descriptor that ``PAGEFRAME_READY_FD`` names. Without that variable
(a service started by hand) all of these do nothing, so services need not ask.
"""

import json
import os
from collections.abc import Mapping
from types import MappingProxyType

from pageframe.core.errors import AbortedError, PageframeError

READY_FD_VARIABLE = "PAGEFRAME_READY_FD"
EXIT_FAILURE = 1
EXIT_BAD_ENVIRONMENT = 2
EXIT_REPLACED = 3

_NO_DETAILS: Mapping[str, str] = MappingProxyType({})


def announce_progress(message: str, fraction: float | None = None) -> None:
    """Say what start-up is doing; ``fraction`` in [0, 1] where it is known."""
    _send({"progress": {"message": message, "fraction": fraction}})


def announce_ready(address: str, details: Mapping[str, str] = _NO_DETAILS) -> None:
    """Say that the service is SERVING, and where it really listens (``:0`` has become a port).

    ``details`` go into the line that tells a person that the system is ready, by name.
    """
    _send({"ready": {"address": address, "details": dict(details)}})


def announce_failure(error: BaseException, *, exit_code: int | None = None) -> int:
    """Say why the service cannot start.

    Args:
        error: What happened; only its reason and message travel.
        exit_code: What the process will end with. Unless given, 3 for an ``AbortedError`` (a newer
            one serves in its place), 2 for any other ``PageframeError`` (a person can mend the
            world), and 1 for anything else (our bug).

    Returns:
        The exit code to leave with.
    """
    if isinstance(error, PageframeError):
        reason, message, usual_exit_code = error.reason, error.message, EXIT_BAD_ENVIRONMENT
        if isinstance(error, AbortedError):
            usual_exit_code = EXIT_REPLACED
    else:
        reason, message, usual_exit_code = type(error).__name__, str(error), EXIT_FAILURE
    code = usual_exit_code if exit_code is None else exit_code
    _send({"failed": {"reason": reason, "message": message, "exit_code": code}})
    return code


def _send(report: dict[str, object]) -> None:
    descriptor = os.environ.get(READY_FD_VARIABLE)
    if descriptor is None:
        return
    line = json.dumps(report) + "\n"
    try:
        # Children of the service must not hold the pipe open after the service is gone.
        os.set_inheritable(int(descriptor), False)
        os.write(int(descriptor), line.encode())
    except OSError:
        # The supervisor is gone; the parent watch ends this process, not a failed report.
        return
