"""Groups of layers in the scheduler's arithmetic: ``block_size`` tokens take a block in each."""

import dataclasses

import pytest

from pageframe.core.errors import OutOfRangeError
from pageframe.scheduler.budget import Capacity
from pageframe.scheduler.decode import DecodeSet
from pageframe.scheduler.request import check_fits, num_blocks_needed
from pageframe.testing.fake_engine import make_facts
from pageframe.wire.replica import replica_from_proto, replica_to_proto
from unit.scheduler.driver import make_submission
from unit.scheduler.test_sequence import make_sequence

FACTS = dataclasses.replace(make_facts(block_size=4, num_blocks=24), kv_group_windows=(0, 0, 0))


def test_tokens_take_blocks_in_every_group():
    capacity = Capacity.of(FACTS, token_budget=64, max_num_running=4, prefill_chunk_tokens=0)
    assert [capacity.num_blocks(n) for n in (0, 1, 4, 5)] == [0, 3, 3, 6]
    assert [capacity.num_full_blocks(n) for n in (3, 4, 9)] == [0, 3, 6]


def test_a_decode_that_begins_a_block_needs_one_in_every_group_and_so_does_a_copy():
    decodes = DecodeSet(block_size=4, num_kv_groups=3)
    decodes.join(make_sequence(6, max_tokens=20), position=6, tick=10, copies_block=True)
    assert [decodes.num_blocks_at(tick) for tick in (10, 11, 12, 13)] == [3, 0, 3, 0]


def test_a_request_needs_room_in_every_group():
    # 30 tokens and 3 more, of which the last is never computed: eight logical blocks.
    fits, too_long = make_submission(1, 30, max_tokens=3), make_submission(1, 30, max_tokens=4)
    assert num_blocks_needed(fits, FACTS) == 24
    check_fits(fits, FACTS)
    with pytest.raises(OutOfRangeError) as caught:
        check_fits(too_long, FACTS)
    assert caught.value.reason == "EXCEEDS_POOL"
    assert caught.value.limits["num_blocks_needed"] == "27"


def test_facts_say_how_many_groups_there_are_and_an_executor_that_does_not_say_has_one():
    message = replica_to_proto(FACTS)
    assert message.num_kv_groups == 3
    assert replica_from_proto(message) == FACTS
    message.ClearField("kv_group_windows")
    assert replica_from_proto(message) == FACTS
    message.ClearField("num_kv_groups")
    assert replica_from_proto(message).num_kv_groups == 1
