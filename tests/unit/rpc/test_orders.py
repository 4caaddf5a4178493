"""Orders that are ready at the same time share a message, in their order and within bounds."""

import asyncio

import pytest

from pageframe.rpc.orders import OrderQueue
from pageframe.v1 import gateway_service_pb2 as pb


def join(orders):
    return pb.GenerateManyRequest(orders=pb.GenerateOrders(orders=orders))


def cancel(handle):
    return pb.GenerateManyRequest(cancel=pb.GenerateCancel(handle=handle))


def start(handle, num_bytes):
    request = pb.GenerateRequest(text="x" * num_bytes)
    return pb.GenerateManyRequest(start=pb.GenerateStart(handle=handle, request=request))


def handles(message):
    orders = message.orders.orders if message.HasField("orders") else [message]
    return [order.start.handle or order.cancel.handle for order in orders]


def written(orders, *, later=()):
    """The messages that orders leave in; those of ``later`` come while the first one is written."""

    async def scenario():
        outbox, messages, has_all = OrderQueue(join), [], asyncio.Event()
        behind = list(later)

        async def write(message):
            messages.append(message)
            while behind:
                outbox.put(behind.pop(0))
            if sum(len(handles(message)) for message in messages) == len(orders) + len(later):
                has_all.set()

        for order in orders:
            outbox.put(order)
        writer = asyncio.create_task(outbox.write_all(write))
        await asyncio.wait_for(has_all.wait(), 10)
        writer.cancel()
        return messages

    return asyncio.run(scenario())


def test_one_order_goes_as_it_is():
    assert written([cancel(3)]) == [cancel(3)]


def test_a_burst_goes_in_few_messages_so_that_the_first_can_be_begun_with():
    messages = written([cancel(handle) for handle in range(1, 20)])
    assert list(map(handles, messages)) == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [9, 10, 11, 12, 13, 14, 15, 16],
        [17, 18, 19],
    ]


def test_what_comes_while_a_message_is_written_waits_for_the_next():
    messages = written([cancel(1)], later=[cancel(2), cancel(3)])
    assert list(map(handles, messages)) == [[1], [2, 3]]


def test_large_orders_do_not_hold_up_each_other():
    messages = written(
        [start(1, 40_000), start(2, 40_000), cancel(3), start(4, 900_000), cancel(5), cancel(6)]
    )
    assert list(map(handles, messages)) == [[1], [2, 3], [4], [5, 6]]


def test_what_was_forgotten_is_not_written():
    async def scenario():
        outbox, messages = OrderQueue(join), asyncio.Queue()
        outbox.put(cancel(1))
        outbox.clear()
        writer = asyncio.create_task(outbox.write_all(messages.put))
        await asyncio.sleep(0)
        outbox.put(cancel(2))
        message = await asyncio.wait_for(messages.get(), 10)
        writer.cancel()
        return message

    assert asyncio.run(scenario()) == cancel(2)


def test_a_write_that_fails_ends_the_writing():
    async def scenario():
        async def write(_message):
            raise ConnectionError

        outbox = OrderQueue(join)
        outbox.put(cancel(1))
        await outbox.write_all(write)

    with pytest.raises(ConnectionError):
        asyncio.run(scenario())
