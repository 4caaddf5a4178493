"""Where replicas are: as given, and for ``dns:///NAME:PORT`` all addresses of the name.

gRPC itself would resolve such a name to one channel over all its addresses, and choose among them
without knowing what a request is. Here each address is a replica of its own.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import structlog

from pageframe.config.values import DNS_PREFIX, HostPort, parse_host_port

_log = structlog.get_logger(__name__)

_DNS_S: Final = 5.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""All numeric addresses of a name, for a port."""


async def resolve_host(host: str, port: int) -> list[str]:
    """All addresses that the system knows of a name.

    Raises:
        OSError: it knows none.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class ReplicaAddresses:
    """One service of all replicas, resolved again every few seconds where targets are names.

    Args:
        targets: ``HOST:PORT``, ``unix:/path``, or ``dns:///NAME:PORT``.
        resolve: Looks names up.
    """

    def __init__(self, targets: Sequence[str], resolve: Resolve = resolve_host) -> None:
        self._targets = targets
        self._resolve = resolve
        self._known: dict[str, list[str]] = {}

    async def find(self) -> list[str]:
        """The address of every replica, each once; what a name had last where it has none now."""
        addresses: dict[str, None] = {}
        for target in self._targets:
            addresses |= dict.fromkeys(await self._find(target))
        return list(addresses)

    async def wait_due(self) -> None:
        """Wait until looking again is of use; for ever where no target is a name."""
        if any(target.startswith(DNS_PREFIX) for target in self._targets):
            await asyncio.sleep(_DNS_S)
        else:
            await asyncio.Event().wait()

    async def _find(self, target: str) -> list[str]:
        if not target.startswith(DNS_PREFIX):
            return [target]
        host, port = parse_host_port(target.removeprefix(DNS_PREFIX))
        try:
            found = await self._resolve(host, port)
        except OSError as error:
            # A name server that is away takes no replica with it.
            _log.warning("name_not_resolved", name=host, reason=str(error))
        else:
            self._known[target] = sorted({str(HostPort(address, port)) for address in found})
        return self._known.get(target, [])


def short_name(address: str) -> str:
    """What a replica is called in metrics and traces: of a socket, its file without the ending."""
    if address.startswith("unix:"):
        return address.rpartition("/")[2].removesuffix(".sock")
    return address


def by_name(addresses: Iterable[str]) -> dict[str, str]:
    """Addresses by what replicas are called: the short name, or the address where it is taken."""
    named: dict[str, str] = {}
    for address in addresses:
        name = short_name(address)
        named[address if name in named else name] = address
    return named
