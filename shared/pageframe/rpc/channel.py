"""Channels between the processes of one system, and the address forms they take."""

from typing import Final

import grpc

from pageframe.core.limits import LIMITS

MESSAGE_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.max_send_message_length", LIMITS.message_bytes_max),
    ("grpc.max_receive_message_length", LIMITS.message_bytes_max),
]

INNER_OPTIONS: Final[list[tuple[str, int]]] = [
    *MESSAGE_OPTIONS,
    # Inner traffic is loopback, a Unix socket or a private network: a proxy for the outside
    # world must never see it.
    ("grpc.enable_http_proxy", 0),
    # A peer that comes back is wanted at once, not after the two minutes of the default back-off.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
]


def open_inner_channel(address: str) -> grpc.aio.Channel:
    """A channel to another service of the same system.

    ``address`` is ``HOST:PORT`` or ``unix:/path/to.sock``.
    """
    return grpc.aio.insecure_channel(address, options=INNER_OPTIONS)
