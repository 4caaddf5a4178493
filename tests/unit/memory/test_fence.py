import numpy as np
import pytest

from pageframe.core.trace import KvCause
from pageframe.executor.memory.fence import Fence
from pageframe.executor.memory.purpose import Purpose

FINISHED = Purpose(KvCause.FINISHED, sequence_id=7)


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, dtype=np.int32)


def test_blocks_come_out_when_their_step_has_finished_and_not_before():
    fence = Fence()
    fence.hold(ids(1, 2), 5, FINISHED)
    fence.hold(ids(3), 6, FINISHED)
    assert fence.clear(4) == []
    (batch,) = fence.clear(5)
    assert batch.block_ids.tolist() == [1, 2]
    assert batch.purpose == FINISHED
    assert fence.block_ids().tolist() == [3]
    assert [batch.block_ids.tolist() for batch in fence.clear(9)] == [[3]]
    assert fence.block_ids().tolist() == []


def test_a_ticket_that_runs_back_is_our_bug():
    fence = Fence()
    fence.hold(ids(1), 5, FINISHED)
    with pytest.raises(AssertionError, match="ticket 4 after 5"):
        fence.hold(ids(2), 4, FINISHED)


def test_discarded_blocks_never_come_out():
    fence = Fence()
    fence.hold(ids(1, 2), 5, FINISHED)
    fence.discard(ids(1))
    assert fence.clear(5)[0].block_ids.tolist() == [2]
