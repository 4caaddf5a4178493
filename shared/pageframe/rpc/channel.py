"""Channels between processes, opened in one place: their options, and whether they speak TLS."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from pageframe.core.limits import LIMITS
from pageframe.rpc.keepalive import Keepalive
from pageframe.rpc.tls import ClientTls

ChannelOptions = list[tuple[str, Any]]

MESSAGE_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.max_send_message_length", LIMITS.message_bytes_max),
    ("grpc.max_receive_message_length", LIMITS.message_bytes_max),
]

# Despite its name this bounds one attempt to connect, TLS included; how soon the next one follows
# is said by the other two. A peer 200 ms away takes longer than a second.
CONNECT_TIMEOUT_OPTION: Final = ("grpc.min_reconnect_backoff_ms", 5000)

INNER_OPTIONS: Final[list[tuple[str, int]]] = [
    *MESSAGE_OPTIONS,
    # Inner traffic is loopback, a Unix socket or a private network: a proxy for the outside
    # world must never see it.
    ("grpc.enable_http_proxy", 0),
    # A peer that comes back is wanted at once, not after the two minutes of the default back-off.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    CONNECT_TIMEOUT_OPTION,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerChannels:
    """Opens channels to other services of the same system.

    Attributes:
        tls: What is believed and shown over TCP; None for plain text.
        keepalive: How soon a peer that has vanished is noticed; None for not at all, for channels
            that nobody waits on.
    """

    tls: ClientTls | None = None
    keepalive: Keepalive | None = field(default_factory=Keepalive)

    def __call__(self, address: str) -> grpc.aio.Channel:
        """A channel to ``HOST:PORT`` or ``unix:/path/to.sock``.

        Raises:
            InvalidRequestError: files of TLS, which are read anew for each channel, are amiss.
        """
        pings = [] if self.keepalive is None else self.keepalive.options()
        return open_aio_channel(address, [*INNER_OPTIONS, *pings], self.tls)


open_inner_channel: Final = InnerChannels()
"""Channels where nothing was chosen."""


def open_channel(address: str, options: ChannelOptions, tls: ClientTls | None) -> grpc.Channel:
    """A channel for programs without an event loop.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """
    if tls is None or is_socket(address):
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.credentials(), options=[*options, *tls.options()])


def open_aio_channel(
    address: str, options: ChannelOptions, tls: ClientTls | None
) -> grpc.aio.Channel:
    """The same for an event loop.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """
    if tls is None or is_socket(address):
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials(), options=[*options, *tls.options()])


def is_socket(address: str) -> bool:
    """Whether an address is that of a Unix socket."""
    return address.startswith("unix:")


def is_local(address: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if is_socket(address):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
