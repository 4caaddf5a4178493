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


class Mailboxes:
    """What gathers until the outbox asks for it."""

    def __init__(self, outbox):
        self.outbox = outbox
        self.filled = []
        self.num_gathered = 0

    def fill(self, part):
        self.filled.append(part)
        self.outbox.wake()

    def gather(self):
        self.num_gathered += 1
        for part in self.filled:
            self.outbox.put(part)
        self.filled.clear()


async def turns_of_the_loop():
    for _ in range(5):
        await asyncio.sleep(0)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_all_that_one_event_fills_leaves_in_one_message():
    async def scenario():
        outbox, wire = Outbox(), Wire()
        mailboxes = Mailboxes(outbox)
        writer = asyncio.create_task(outbox.write_all(wire.write, mailboxes.gather))
        await turns_of_the_loop()
        for number in range(64):
            mailboxes.fill(number)
        await wire.began.wait()
        outbox.close()
        await writer
        return wire.messages

    assert run(scenario) == [list(range(64))]


def test_nothing_is_gathered_while_a_write_is_under_way():
    async def scenario():
        outbox, wire = Outbox(), Wire()
        mailboxes = Mailboxes(outbox)
        wire.is_open.clear()
        writer = asyncio.create_task(outbox.write_all(wire.write, mailboxes.gather))
        outbox.put("a")
        await wire.began.wait()
        num_gathered = mailboxes.num_gathered
        mailboxes.fill("c")
        outbox.put("b")
        await turns_of_the_loop()
        assert mailboxes.num_gathered == num_gathered
        assert mailboxes.filled == ["c"]
        wire.is_open.set()
        while len(wire.messages) < 2:  # noqa: ASYNC110 - turns of the loop, not time
            await asyncio.sleep(0)
        outbox.close()
        await writer
        return wire.messages

    assert run(scenario) == [["a"], ["b", "c"]]


def test_what_is_gathered_wakes_nobody_once_more(monkeypatch):
    async def scenario():
        # Nothing takes time, so nothing rests.
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 100.0)
        outbox, wire = Outbox(), Wire()
        mailboxes = Mailboxes(outbox)
        writer = asyncio.create_task(outbox.write_all(wire.write, mailboxes.gather))
        for number in range(3):
            mailboxes.fill(number)
            await turns_of_the_loop()
        # A second pass for each message would be a rest with a timer, and nothing to write.
        outbox.close()
        await writer
        assert (wire.messages, mailboxes.num_gathered) == ([[0], [1], [2]], 3 + 1)

    run(scenario)


def test_who_is_filled_while_others_are_gathered_is_gathered_next():
    async def scenario():
        outbox, wire = Outbox(), Wire()

        def gather():
            if not wire.messages:
                outbox.put("first")
                outbox.wake()
            elif len(wire.messages) == 1:
                outbox.put("second")

        writer = asyncio.create_task(outbox.write_all(wire.write, gather))
        outbox.wake()
        while len(wire.messages) < 2:  # noqa: ASYNC110 - turns of the loop, not time
            await asyncio.sleep(0)
        outbox.close()
        await writer
        assert wire.messages == [["first"], ["second"]]

    run(scenario)


def test_one_that_is_woken_for_nothing_writes_nothing():
    async def scenario():
        outbox, wire = Outbox(), Wire()
        mailboxes = Mailboxes(outbox)
        writer = asyncio.create_task(outbox.write_all(wire.write, mailboxes.gather))
        outbox.wake()
        await turns_of_the_loop()
        outbox.close()
        await writer
        return mailboxes.num_gathered, wire.messages

    assert run(scenario) == (2, [])


@pytest.mark.parametrize(
    ("blocked_s", "rest_s"), [(0.005, 0.007), (30.0, 0.01)], ids=["busy", "slow reader"]
)
def test_a_write_is_followed_by_as_long_a_rest_but_not_after_a_slow_reader(
    monkeypatch, blocked_s, rest_s
):
    async def scenario():
        loop, now_s, timers = asyncio.get_running_loop(), 100.0, []
        monkeypatch.setattr(loop, "time", lambda: now_s)

        def call_later(delay_s, call, *arguments):
            timers.append((delay_s, lambda: call(*arguments)))
            return loop.call_soon(lambda: None)

        monkeypatch.setattr(loop, "call_later", call_later)
        outbox, wire = Outbox(), Wire()
        mailboxes = Mailboxes(outbox)

        def gather():
            nonlocal now_s
            mailboxes.gather()
            now_s += 0.002

        wire.is_open.clear()
        writer = asyncio.create_task(outbox.write_all(wire.write, gather))
        mailboxes.fill("a")
        await wire.began.wait()
        now_s += blocked_s
        wire.is_open.set()
        await turns_of_the_loop()
        mailboxes.fill("b")
        await turns_of_the_loop()
        assert mailboxes.filled == ["b"]
        ((delay_s, end_rest),) = timers
        end_rest()
        await turns_of_the_loop()
        assert wire.messages == [["a"], ["b"]]
        writer.cancel()
        return delay_s

    assert run(scenario) == pytest.approx(rest_s), "from its first part to its end"


def test_what_was_put_before_the_close_is_written_and_nothing_else():
    async def scenario():
        outbox, wire = Outbox(), Wire()
        outbox.put(1)
        outbox.close()
        outbox.put(2)
        await outbox.write_all(wire.write, Mailboxes(outbox).gather)
        return wire.messages

    assert run(scenario) == [[1]]


def test_a_write_that_fails_ends_the_writing():
    async def scenario():
        async def write(_parts):
            raise UnavailableError("GONE", "the caller is gone")

        outbox = Outbox()
        outbox.put(1)
        await outbox.write_all(write, Mailboxes(outbox).gather)

    with pytest.raises(UnavailableError):
        run(scenario)
