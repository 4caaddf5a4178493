"""Channels to a gateway."""

from typing import Final

import grpc

from pageframe.rpc.channel import (
    CONNECT_TIMEOUT_OPTION,
    MESSAGE_OPTIONS,
    is_local,
    open_aio_channel,
    open_channel,
)
from pageframe.rpc.tls import ClientTls

DEFAULT_SERVER: Final = "127.0.0.1:50051"

# A gateway that comes back is wanted soon: by default gRPC waits up to two minutes before it looks
# again, longer than a caller tries.
_RECONNECT_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    CONNECT_TIMEOUT_OPTION,
]


def channel_options(server: str) -> list[tuple[str, int]]:
    """Options for a channel to ``HOST:PORT`` or ``unix:/path``.

    A proxy for the outside world (``http_proxy``) is not asked for this machine's own addresses,
    which it could not reach.
    """
    options = [*MESSAGE_OPTIONS, *_RECONNECT_OPTIONS]
    if is_local(server):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def open_gateway_channel(server: str, tls: ClientTls | None) -> grpc.Channel:
    """A channel to a server, for programs without an event loop.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """
    return open_channel(server, channel_options(server), tls)


def open_aio_gateway_channel(server: str, tls: ClientTls | None) -> grpc.aio.Channel:
    """The same for an event loop.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """
    return open_aio_channel(server, channel_options(server), tls)
