"""``pageframe health``: whether a service is serving, for health checks of containers.

``python -m pageframe.cli.health HOST:PORT`` does the same without loading the command's libraries:
a health check runs every few seconds, for ever. Over TLS both go as ``PAGEFRAME_SERVER_TLS`` says.
"""

import os
import sys
from collections.abc import Sequence

from pageframe.cli.exit_codes import EXIT_BAD_ENVIRONMENT, EXIT_FAILURE, EXIT_OK
from pageframe.core.errors import PageframeError
from pageframe.rpc.health import ask_health
from pageframe.rpc.tls import TLS_VARIABLE, parse_client_tls
from pageframe.rpc.tls_probe import find_tls_fault

# As gRPC names it when a channel could not be opened.
_NOBODY = "UNAVAILABLE"


def health(address: str) -> None:
    """Ask a service at HOST:PORT or unix:/path whether it serves; exit code 0 if so, else 1.

    Over TLS where PAGEFRAME_SERVER_TLS says how, as --tls of other commands.
    """
    sys.exit(main([address]))


def main(arguments: Sequence[str]) -> int:
    """Print what the service says; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m pageframe.cli.health HOST:PORT", file=sys.stderr)
        return EXIT_BAD_ENVIRONMENT
    (address,) = arguments
    how = os.environ.get(TLS_VARIABLE)
    try:
        tls = parse_client_tls(how) if how else None
        status = ask_health(address, tls=tls)
    except PageframeError as error:
        print(f"pageframe: {error.message}", file=sys.stderr)
        return EXIT_BAD_ENVIRONMENT
    print(status)
    if status == _NOBODY and (fault := find_tls_fault(address, tls)):
        print(f"pageframe: {fault}", file=sys.stderr)
    return EXIT_OK if status == "SERVING" else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
