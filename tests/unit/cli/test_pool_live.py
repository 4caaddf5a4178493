"""The live view outlives the executor, and leaves nothing behind."""

import asyncio
import io
import threading

import numpy as np
import pytest
from rich.console import Console

from pageframe.cli.pool_live import run_live
from pageframe.cli.pool_tally import WatchingTally
from pageframe.client.kv_memory import KvMemoryClient
from pageframe.core.errors import PermissionDeniedError, UnavailableError
from pageframe.core.replica import PoolAccount
from pageframe.core.trace import KvOperation
from pageframe.wire.memory_facts import MemorySnapshot
from unit.executor.memory_house import run_in_house


def snapshot(step):
    return MemorySnapshot(
        step=step,
        block_size=4,
        account=PoolAccount(total=1, free=1),
        states=np.zeros(1, dtype=np.uint8),
        ref_counts=np.zeros(1, dtype=np.int32),
        pin_counts=np.zeros(1, dtype=np.int32),
        is_indexed=np.zeros(1, dtype=np.bool_),
    )


class PlayedClient:
    """Gives one answer after the other; nothing ever happens to its blocks."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def snapshot(self):
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def watch(self):
        raise UnavailableError("TRANSPORT", "nobody there")


def shown(client):
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, height=40, color_system=None
    )
    run_live(client, console, interval_s=0.0)
    return console.file.getvalue()


def test_it_goes_on_when_the_executor_was_away():
    text = shown(
        PlayedClient(
            snapshot(1),
            UnavailableError("TRANSPORT", "it is restarting"),
            snapshot(2),
            KeyboardInterrupt(),
        )
    )
    away = "the executor is away (it is restarting); this is how it was"
    first, _, rest = text.partition(away)
    assert "step 1" in first
    assert "step 2" in rest
    assert away not in rest


@pytest.mark.parametrize(
    "answers",
    [
        [UnavailableError("TRANSPORT", "nobody there")],
        [snapshot(1), PermissionDeniedError("OPERATOR_NEEDED", "no")],
    ],
)
def test_it_ends_when_there_is_nothing_to_hope_for(answers):
    with pytest.raises(type(answers[-1])):
        shown(PlayedClient(*answers))


def test_operations_are_counted_from_a_real_watch(tmp_path):
    async def scenario(house):
        client = KvMemoryClient(f"unix:{tmp_path}/executor.sock")
        tally = await asyncio.to_thread(WatchingTally(client).__enter__)
        while house.log.on_operations is None:
            await house.settle()
        await house.run(1, 8)
        # What a step has filled is entered into the index when the next one comes.
        await house.finish(1)
        while KvOperation.INDEX not in tally.rates().by_operation:
            await house.settle()
        assert KvOperation.ALLOCATE in tally.rates().by_operation
        await asyncio.to_thread(tally.__exit__, None, None, None)
        assert not [thread for thread in threading.enumerate() if thread.name == "watch"]
        while house.log.on_operations is not None:
            await house.settle()
        await asyncio.to_thread(client.close)

    run_in_house(tmp_path, scenario)
