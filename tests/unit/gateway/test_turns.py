"""Few writers at a time, and none of them for ever."""

import asyncio

from pageframe.gateway.turns import WriteTurns


def test_no_more_write_at_once_than_allowed_and_all_get_their_turn():
    async def scenario():
        turns = WriteTurns(num_writers=2, turn_s=60)
        writing, most, done = 0, 0, []

        async def write(number):
            nonlocal writing, most
            async with turns.turn():
                writing += 1
                most = max(most, writing)
                await asyncio.sleep(0)
                writing -= 1
            done.append(number)

        await asyncio.gather(*(write(number) for number in range(9)))
        return most, done

    most, done = asyncio.run(scenario())
    assert most == 2
    assert done == list(range(9))


def test_a_caller_that_does_not_read_holds_up_nobody_for_long():
    async def scenario():
        turns = WriteTurns(num_writers=1, turn_s=0.001)
        blocked = asyncio.Event()

        async def write_for_ever():
            async with turns.turn():
                blocked.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(write_for_ever())
        await blocked.wait()
        for _ in range(3):
            async with asyncio.timeout(20), turns.turn():
                pass
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # The one that went away late gives no second place back.
        turns._turn_s = 60
        async with turns.turn():
            waiting = asyncio.create_task(turns.turn().__aenter__())
            await asyncio.sleep(0)
            assert not waiting.done()
            waiting.cancel()

    asyncio.run(scenario())
