"""Domain enums and their protobuf twins have the same names and the same values."""

import pytest

from pageframe.core.beams import EarlyStopping
from pageframe.core.plan import Recovery
from pageframe.core.request import Delivery, StallCause
from pageframe.core.step import FinishReason, RefusedBecause
from pageframe.core.trace import KvOperation
from pageframe.executor.memory.block_columns import BlockState
from pageframe.v1 import executor_service_pb2, kv_block_pb2, sequence_pb2

TWINS = [
    (FinishReason, sequence_pb2.FinishReason, "FINISH_REASON_"),
    (Delivery, sequence_pb2.Delivery, "DELIVERY_"),
    (EarlyStopping, sequence_pb2.EarlyStopping, "EARLY_STOPPING_"),
    (StallCause, sequence_pb2.StallCause, "STALL_CAUSE_"),
    (Recovery, executor_service_pb2.Recovery, "RECOVERY_"),
    (RefusedBecause, executor_service_pb2.RefusedBecause, "REFUSED_BECAUSE_"),
    (KvOperation, kv_block_pb2.KvOperation, "KV_OPERATION_"),
]


@pytest.mark.parametrize(("domain", "wire", "prefix"), TWINS, ids=lambda value: str(value)[:20])
def test_values_agree(domain, wire, prefix):
    ours = {f"{prefix}{member.name}": member.value for member in domain}
    theirs = dict(wire.items())
    assert theirs.pop(f"{prefix}UNSPECIFIED") == 0
    ours.pop(f"{prefix}NONE", None)
    assert ours == theirs


def test_every_block_state_has_a_name_on_the_wire():
    wire = {name.removeprefix("BLOCK_STATE_") for name in dict(kv_block_pb2.BlockState.items())}
    assert {member.name for member in BlockState} <= wire
