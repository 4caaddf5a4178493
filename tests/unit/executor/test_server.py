"""How many blocks there are, and how long a sequence may be."""

import dataclasses

import pytest

from pageframe.core.errors import OutOfRangeError
from pageframe.executor.batch import ModelFacts
from pageframe.executor.server import (
    KV_MEMORY_BYTES_DEFAULT,
    PoolSize,
    num_host_slots,
    size_pool,
)

FACTS = ModelFacts(
    name="tiny",
    folder="nowhere",
    vocab_size=97,
    max_model_len=1000,
    eos_token_ids=(1,),
    kv_bytes_per_token=100,
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    runner="sim",
)


def size(facts=FACTS, **chosen):
    fields = {"block_size": 16, "num_blocks": 0, "kv_memory_bytes": 0, "max_model_len": 0}
    return size_pool(facts, **(fields | chosen))


def test_a_number_of_blocks_goes_before_an_amount_of_memory():
    assert size(num_blocks=5, kv_memory_bytes=1 << 30).num_blocks == 5


def test_memory_is_rounded_down_to_whole_blocks_of_1600_bytes():
    assert size(kv_memory_bytes=1600).num_blocks == 1
    assert size(kv_memory_bytes=4799).num_blocks == 2
    assert size(kv_memory_bytes=4800).num_blocks == 3


def test_a_block_of_one_of_several_groups_has_a_part_of_the_layers():
    grouped = dataclasses.replace(FACTS, group_windows=(0, 9, 9, 9))
    assert size(grouped, kv_memory_bytes=1600).num_blocks == 4
    # The four hold sixteen tokens together.
    assert size(grouped, kv_memory_bytes=1600).max_model_len == 16
    assert size(grouped, num_blocks=3).max_model_len == 16
    assert num_host_slots(grouped, 16, 1600) == 4


def test_nothing_chosen_is_the_default_memory():
    assert size().num_blocks == KV_MEMORY_BYTES_DEFAULT // 1600


def test_memory_without_room_for_one_block_is_refused_with_the_numbers():
    with pytest.raises(OutOfRangeError) as caught:
        size(kv_memory_bytes=1599)
    assert caught.value.reason == "POOL_TOO_SMALL"
    assert caught.value.limits == {"kv_memory_bytes": "1599", "block_bytes": "1600"}


def test_the_longest_sequence_is_what_model_and_pool_both_allow():
    assert size(num_blocks=10) == PoolSize(num_blocks=10, max_model_len=160)
    assert size(num_blocks=100) == PoolSize(num_blocks=100, max_model_len=1000)


def test_a_chosen_length_is_kept_even_beyond_the_pool():
    """A request that does not fit is refused by its own numbers, not by a changed setting."""
    assert size(num_blocks=10, max_model_len=900).max_model_len == 900


def test_a_length_beyond_the_model_is_refused_with_the_numbers():
    assert size(num_blocks=10, max_model_len=1000).max_model_len == 1000
    with pytest.raises(OutOfRangeError) as caught:
        size(num_blocks=10, max_model_len=1001)
    assert caught.value.reason == "MODEL_LEN_TOO_LONG"
    assert caught.value.limits == {"max_model_len": "1001", "model_max_len": "1000"}


def test_a_model_without_keys_and_values_divides_nothing_by_zero():
    facts = dataclasses.replace(FACTS, kv_bytes_per_token=0)
    assert size(facts, kv_memory_bytes=7).num_blocks == 7
