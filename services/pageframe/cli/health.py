"""``pageframe health``: whether a service is serving, for health checks of containers.

``python -m pageframe.cli.health HOST:PORT`` does the same without loading the command's libraries:
a health check runs every few seconds, for ever.
"""

import sys
from collections.abc import Sequence

from pageframe.cli.exit_codes import EXIT_BAD_ENVIRONMENT, EXIT_FAILURE, EXIT_OK
from pageframe.rpc.health import ask_health


def health(address: str) -> None:
    """Ask a service at HOST:PORT or unix:/path whether it serves; exit code 0 if so, else 1."""
    sys.exit(main([address]))


def main(arguments: Sequence[str]) -> int:
    """Print what the service says; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m pageframe.cli.health HOST:PORT", file=sys.stderr)
        return EXIT_BAD_ENVIRONMENT
    status = ask_health(arguments[0])
    print(status)
    return EXIT_OK if status == "SERVING" else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
