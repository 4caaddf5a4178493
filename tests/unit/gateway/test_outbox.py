"""What is there leaves as one message, and what comes while one leaves waits for the next."""

import asyncio

import pytest

from pageframe.core.errors import UnavailableError
from pageframe.gateway.outbox import Outbox


class Wire:
    """Takes messages, one at a time, when the test lets it."""

    def __init__(self):
        self.messages = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.began = asyncio.Event()

    async def write(self, parts):
        self.began.set()
        await self.is_open.wait()
        self.messages.append(parts)


async def turns_of_the_loop():
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_whoever_is_woken_by_one_event_leaves_in_one_message():
    async def scenario():
        outbox, wire, event = Outbox(), Wire(), asyncio.Event()
        writer = asyncio.create_task(outbox.write_all(wire.write))

        async def wait_and_put(number):
            await event.wait()
            async with outbox.turn():
                outbox.put(number)

        tasks = [asyncio.create_task(wait_and_put(number)) for number in range(64)]
        await turns_of_the_loop()
        event.set()
        await asyncio.gather(*tasks)
        outbox.close()
        await writer
        return wire.messages

    assert run(scenario) == [list(range(64))]


def test_nobody_has_a_turn_while_a_write_is_under_way():
    async def scenario():
        outbox, wire = Outbox(), Wire()
        wire.is_open.clear()
        writer = asyncio.create_task(outbox.write_all(wire.write))
        outbox.put("a")
        await wire.began.wait()
        has_turn = asyncio.Event()

        async def take_turn():
            async with outbox.turn():
                has_turn.set()
                outbox.put("c")

        task = asyncio.create_task(take_turn())
        # What needs no turn may be put: it goes into the next message.
        outbox.put("b")
        await turns_of_the_loop()
        assert not has_turn.is_set()
        wire.is_open.set()
        await task
        outbox.close()
        await writer
        return wire.messages

    assert run(scenario) in ([["a"], ["b"], ["c"]], [["a"], ["b", "c"]])


@pytest.mark.parametrize(
    ("blocked_s", "rest_s"), [(0.005, 0.007), (30.0, 0.01)], ids=["busy", "slow reader"]
)
def test_a_write_is_followed_by_as_long_a_rest_but_not_after_a_slow_reader(
    monkeypatch, blocked_s, rest_s
):
    async def scenario():
        loop, now_s, timers = asyncio.get_running_loop(), 100.0, []
        monkeypatch.setattr(loop, "time", lambda: now_s)
        monkeypatch.setattr(
            loop, "call_later", lambda delay_s, call: timers.append((delay_s, call)) or call_soon()
        )

        def call_soon():
            return loop.call_soon(lambda: None)

        outbox, wire = Outbox(), Wire()
        wire.is_open.clear()
        writer = asyncio.create_task(outbox.write_all(wire.write))
        outbox.put("a")
        now_s += 0.002
        outbox.put("b")
        await wire.began.wait()
        now_s += blocked_s
        wire.is_open.set()
        await turns_of_the_loop()
        has_turn = asyncio.ensure_future(outbox.turn().__aenter__())
        await turns_of_the_loop()
        assert not has_turn.done()
        ((delay_s, end_rest),) = timers
        end_rest()
        await has_turn
        outbox.close()
        await writer
        return delay_s

    assert run(scenario) == pytest.approx(rest_s), "from its first part to its end"


def test_what_was_put_before_the_close_is_written_and_nothing_else():
    async def scenario():
        outbox, wire = Outbox(), Wire()
        outbox.put(1)
        outbox.close()
        outbox.put(2)
        await outbox.write_all(wire.write)
        return wire.messages

    assert run(scenario) == [[1]]


def test_a_write_that_fails_ends_the_writing():
    async def scenario():
        async def write(_parts):
            raise UnavailableError("GONE", "the caller is gone")

        outbox = Outbox()
        outbox.put(1)
        await outbox.write_all(write)

    with pytest.raises(UnavailableError):
        run(scenario)
