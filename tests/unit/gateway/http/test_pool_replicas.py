"""The executors whose pools are shown: looked up now and then, each with a channel of its own."""

import asyncio

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import NotFoundError
from pageframe.gateway.http.pool_replicas import PoolReplicas
from pageframe.rpc.addresses import ReplicaAddresses, by_name

ONE, TWO = "10.0.0.1:50053", "10.0.0.2:50053"
AGAIN_NS = 5 * 10**9


class Channels:
    """Stands for the clients of one address; tells which are open."""

    opened: list[str]
    closed: list[str]

    def __init__(self, address):
        self.address = address
        Channels.opened.append(address)

    def client(self, authorization):
        return (self.address, authorization)

    async def close(self):
        Channels.closed.append(self.address)


class House:
    def __init__(self):
        Channels.opened, Channels.closed = [], []
        self.answers = [ONE, TWO]
        self.num_asked = 0
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.watched = set()
        self.clock = ManualClock(AGAIN_NS)
        directory = ReplicaAddresses([])
        directory.find = self.find
        self.replicas = PoolReplicas(directory, self.clock, self.watched.__contains__, Channels)

    async def find(self):
        self.num_asked += 1
        self.is_asked.set()
        await self.may_answer.wait()
        return self.answers


def run(scenario):
    async def main():
        async with asyncio.timeout(30):
            await scenario(House())

    asyncio.run(main())


def test_names_are_looked_up_once_in_a_while():
    async def scenario(house):
        for _ in range(3):
            assert await house.replicas.address_of(TWO) == TWO
        assert house.num_asked == 1
        house.answers = [ONE]
        house.clock.advance_ns(AGAIN_NS)
        with pytest.raises(NotFoundError):
            await house.replicas.address_of(TWO)
        assert house.num_asked == 2

    run(scenario)


def test_who_comes_while_names_are_looked_up_waits_for_them():
    async def scenario(house):
        house.may_answer.clear()
        both = [asyncio.create_task(house.replicas.address_of("")) for _ in range(2)]
        await house.is_asked.wait()
        house.may_answer.set()
        assert await asyncio.gather(*both) == [ONE, ONE]

    run(scenario)


def test_a_channel_to_what_is_no_replica_any_more_is_kept_while_somebody_looks():
    async def scenario(house):
        await house.replicas.address_of("")
        for address in (ONE, TWO, ONE):
            assert house.replicas.client(address, "k") == (address, "k")
        assert Channels.opened == [ONE, TWO]
        house.answers = []
        house.watched.add(TWO)
        house.clock.advance_ns(AGAIN_NS)
        assert await house.replicas.pools() == []
        assert Channels.closed == [ONE]
        await house.replicas.close()
        assert Channels.closed == [ONE, TWO]

    run(scenario)


def test_two_sockets_of_one_file_name_are_told_apart():
    first, second = "unix:/a/executor.sock", "unix:/b/executor.sock"
    assert by_name([first, second, ONE]) == {"executor": first, second: second, ONE: ONE}
