"""Orders on their way into a stream: those that are ready at the same time share a message.

    put a, b, c ──▶ [ a b c ] ──▶ one message of three

A message of gRPC costs its writer and its reader about as much as the order inside it, so a burst
of requests is written in few. Not in one: the other end begins with the first while the next are
still being made.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from google.protobuf.message import Message

Order = TypeVar("Order", bound=Message)

_NUM_ORDERS_MAX: Final = 8
# A message is read whole before its first order is carried out; what is larger goes by itself.
_NUM_BYTES_MAX: Final = 64 * 1024


class OrderQueue(Generic[Order]):
    """Orders in, messages out, in their order. For one writer, on one event loop.

    Args:
        join: Makes one order that stands for several.
    """

    def __init__(self, join: Callable[[list[Order]], Order]) -> None:
        self._join = join
        self._orders: deque[Order] = deque()
        self._filled = asyncio.Event()

    def put(self, order: Order) -> None:
        """Add an order; it must not be changed any more."""
        self._orders.append(order)
        self._filled.set()

    def clear(self) -> None:
        """Forget what was not written."""
        self._orders.clear()

    async def write_all(self, write: Callable[[Order], Awaitable[None]]) -> None:
        """Write whatever there is, until ``write`` fails or this is cancelled."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._orders:
                await write(self._next())

    def _next(self) -> Order:
        orders = [self._orders.popleft()]
        num_bytes = orders[0].ByteSize()
        while self._orders and len(orders) < _NUM_ORDERS_MAX:
            num_bytes += self._orders[0].ByteSize()
            if num_bytes > _NUM_BYTES_MAX:
                break
            orders.append(self._orders.popleft())
        return orders[0] if len(orders) == 1 else self._join(orders)
