"""The executors whose pools the pool page shows: who they are, and how to ask each.

A replica is named as everywhere: by its executor's address, or by the file of its socket. Without
a name the first is meant.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from pageframe.client.kv_memory_aio import KvMemoryClients
from pageframe.core.clock import Clock
from pageframe.core.errors import NotFoundError, PageframeError, UnavailableError
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.http.pool_feed import PoolClient
from pageframe.rpc.addresses import ReplicaAddresses, by_name
from pageframe.wire.memory_facts import ReplicaPool

_FIND_NS: Final = 5 * NANOSECONDS_PER_SECOND


class PoolClients(Protocol):
    """Clients of one executor for several callers; ``client.kv_memory_aio`` over the wire."""

    def client(self, authorization: str | None) -> PoolClient:
        """Asks with this ``authorization`` header."""
        ...

    async def close(self) -> None:
        """Let go of the executor; watches end."""
        ...


OpenClients = Callable[[str], PoolClients]
"""Makes the clients of the executor at an address."""


class PoolReplicas:
    """All executors, and a channel to each that was asked. For one event loop.

    Args:
        addresses: Where they are.
        clock: Source of time.
        is_watched: Whether somebody looks at the pool at an address; its channel is kept then.
        open_clients: Makes the clients of an address.
    """

    def __init__(
        self,
        addresses: ReplicaAddresses,
        clock: Clock,
        is_watched: Callable[[str], bool],
        open_clients: OpenClients = KvMemoryClients,
    ) -> None:
        self._addresses = addresses
        self._clock = clock
        self._is_watched = is_watched
        self._open_clients = open_clients
        self._clients: dict[str, PoolClients] = {}
        self._found: dict[str, str] = {}
        self._due_ns = 0

    async def address_of(self, name: str) -> str:
        """Where a replica's executor is; of the first for an empty name.

        Raises:
            NotFoundError: reason REPLICA_UNKNOWN.
            UnavailableError: reason REPLICAS_UNKNOWN, while not one is known.
        """
        found = await self._find()
        if not found:
            raise UnavailableError("REPLICAS_UNKNOWN", "no executor has been found yet")
        address = found.get(name) if name else next(iter(found.values()))
        if address is None:
            raise NotFoundError(
                "REPLICA_UNKNOWN",
                f"there is no replica {name[:200]!r} now; there are {', '.join(found)}",
                replicas=",".join(found),
            )
        return address

    async def pools(self) -> list[ReplicaPool]:
        """How full the pool of each replica is; of those that are away why."""
        found = await self._find()
        return list(await asyncio.gather(*(self._pool(*it) for it in found.items())))

    def client(self, address: str, authorization: str | None) -> PoolClient:
        """Asks the executor at an address, with an ``authorization`` header or without."""
        if address not in self._clients:
            self._clients[address] = self._open_clients(address)
        return self._clients[address].client(authorization)

    async def close(self) -> None:
        """Close all channels; watches end."""
        clients, self._clients = self._clients, {}
        await asyncio.gather(*(it.close() for it in clients.values()))

    async def _pool(self, name: str, address: str) -> ReplicaPool:
        try:
            return ReplicaPool(name, await self.client(address, None).account())
        except PageframeError as error:
            return ReplicaPool(name, None, error.message)

    async def _find(self) -> dict[str, str]:
        """All addresses by name; looked up again where they are some seconds old."""
        if self._clock.now_ns() >= self._due_ns:
            # Only then: who asks meanwhile would be told of what was found before.
            self._found = by_name(await self._addresses.find())
            self._due_ns = self._clock.now_ns() + _FIND_NS
            await self._leave_gone()
        return self._found

    async def _leave_gone(self) -> None:
        """Close channels to addresses that are no replica's any more."""
        present = set(self._found.values())
        for address in self._clients.keys() - present:
            if not self._is_watched(address):
                await self._clients.pop(address).close()
