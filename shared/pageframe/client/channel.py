"""Channels to a gateway."""

import ipaddress
from typing import Final

from pageframe.rpc.channel import MESSAGE_OPTIONS

DEFAULT_SERVER: Final = "127.0.0.1:50051"

# A gateway that comes back is wanted soon: by default gRPC waits up to two minutes before it looks
# again, longer than a caller tries.
_RECONNECT_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def channel_options(server: str) -> list[tuple[str, int]]:
    """Options for a channel to ``HOST:PORT`` or ``unix:/path``.

    A proxy for the outside world (``http_proxy``) is not asked for this machine's own addresses,
    which it could not reach.
    """
    options = [*MESSAGE_OPTIONS, *_RECONNECT_OPTIONS]
    if _is_local(server):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _is_local(server: str) -> bool:
    if server.startswith("unix:"):
        return True
    host = server.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
