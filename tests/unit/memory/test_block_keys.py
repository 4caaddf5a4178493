"""Keys of blocks: equal exactly when everything that the content depends on is equal."""

import hashlib
import struct
from itertools import combinations

import numpy as np
import pytest

from pageframe.executor.memory.block_keys import (
    chain_keys,
    chain_root,
    child_key,
    little_endian,
    private_key,
    token_bytes,
)


def tokens(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, dtype=np.int32)


def root(**fields: object) -> bytes:
    return chain_root(**({"model": "m", "block_size": 4, "salt": b"s"} | fields))


def field(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content


def test_a_root_is_the_hash_of_its_typed_and_length_prefixed_fields():
    message = (
        field(b"d", b"kv root")
        + field(b"t", b"smol")
        + field(b"i", struct.pack("<q", 16))
        + field(b"b", b"\x00salt")
        + field(b"t", b"lora")
        + field(b"t", b"int8")
    )
    made = chain_root(
        model="smol", block_size=16, salt=b"\x00salt", adapter="lora", kv_dtype="int8"
    )
    assert made == hashlib.sha256(message).digest()


def test_a_child_is_the_hash_of_its_parent_and_its_tokens():
    parent = root()
    message = (
        field(b"d", b"kv block") + field(b"b", parent) + field(b"b", struct.pack("<2i", 7, -1))
    )
    assert child_key(parent, struct.pack("<2i", 7, -1)) == hashlib.sha256(message).digest()


def test_a_private_key_is_the_hash_of_its_four_numbers():
    message = field(b"d", b"kv private") + b"".join(
        field(b"i", struct.pack("<q", number)) for number in (7, 2**40, 3, 5)
    )
    assert private_key(7, 2**40, 3, 5) == hashlib.sha256(message).digest()


def test_a_chain_is_one_child_after_the_other():
    token_ids = tokens(*range(12))
    expected = []
    parent = root()
    for start in (0, 4, 8):
        parent = child_key(parent, token_bytes(token_ids[start : start + 4]))
        expected.append(parent)
    assert chain_keys(root(), token_ids, 4) == expected


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_only_full_blocks_have_keys(num_tokens, num_keys):
    assert len(chain_keys(root(), tokens(*range(num_tokens)), 4)) == num_keys


def test_a_chain_may_be_continued_from_any_of_its_keys():
    token_ids = tokens(*range(16))
    whole = chain_keys(root(), token_ids, 4)
    assert chain_keys(whole[1], token_ids[8:], 4) == whole[2:]


def test_tokens_are_hashed_alike_whatever_their_layout_in_memory():
    spread = np.zeros(16, dtype=np.int32)[::2]
    spread[:] = range(8)
    swapped = tokens(*range(8)).astype(">i4")
    expected = chain_keys(root(), tokens(*range(8)), 4)
    assert chain_keys(root(), spread, 4) == expected
    assert chain_keys(root(), swapped, 4) == expected


def test_one_token_changes_its_block_and_all_behind_it():
    kept = chain_keys(root(), tokens(*range(16)), 4)
    changed = chain_keys(root(), tokens(0, 1, 2, 3, 4, 99, *range(6, 16)), 4)
    assert [a == b for a, b in zip(kept, changed, strict=True)] == [True, False, False, False]


def test_the_same_tokens_in_another_place_are_another_block():
    first, second = chain_keys(root(), tokens(1, 2, 3, 4, 1, 2, 3, 4), 4)
    assert first != second


CONFUSABLE_ROOTS = {
    "salt a, model bc": {"salt": b"a", "model": "bc"},
    "salt ab, model c": {"salt": b"ab", "model": "c"},
    "salt bc, model a": {"salt": b"bc", "model": "a"},
    "salt abc, no model": {"salt": b"abc", "model": ""},
    "no salt, model abc": {"salt": b"", "model": "abc"},
    "no salt, adapter abc": {"salt": b"", "model": "", "adapter": "abc"},
    "no salt, dtype abc": {"salt": b"", "model": "", "kv_dtype": "abc"},
    "nothing": {"salt": b"", "model": ""},
    "zero salt": {"salt": b"\x00", "model": ""},
    "two zeros": {"salt": b"\x00\x00", "model": ""},
    "adapter m": {"adapter": "m"},
    "adapter s": {"adapter": "s"},
    "adapter is salt": {"salt": b"", "adapter": "s"},
    "salt is adapter": {"salt": b"s", "adapter": ""},
    "dtype is adapter": {"adapter": "", "kv_dtype": "m"},
    "size 1": {"block_size": 1},
    "size 16": {"block_size": 16},
    "size 256": {"block_size": 256},
    "size in the salt": {"salt": b"s" + field(b"i", struct.pack("<q", 4))},
    "a name that is not text": {"model": "\udcff"},
    "a name that is text": {"model": "\u00ff"},
    "a name of one mark": {"model": "?"},
}


@pytest.mark.parametrize("pair", list(combinations(CONFUSABLE_ROOTS, 2)), ids=" / ".join)
def test_roots_of_different_fields_differ(pair):
    one, other = (root(**CONFUSABLE_ROOTS[name]) for name in pair)
    assert one != other


def test_a_field_that_imitates_its_neighbours_is_no_other_root():
    """The bytes of all fields behind the salt, put into the salt, move the boundary only."""
    plain = root(salt=b"s", adapter="a")
    imitated = root(salt=b"s" + field(b"t", b"a") + field(b"t", b""), adapter="")
    assert plain != imitated


def test_tokens_are_no_salt():
    """A salt that spells a block, or the whole message of one, is still a salt."""
    held = token_bytes(tokens(1, 2, 3, 4))
    parent = root()
    message = field(b"d", b"kv block") + field(b"b", parent) + field(b"b", held)
    salts = (held, parent + held, message, message.removeprefix(field(b"d", b"kv block")))
    roots = {root(model="", salt=salt) for salt in salts}
    assert len(roots) == 4
    assert child_key(parent, held) not in roots


def test_block_size_1_and_16_share_no_key_for_the_same_tokens():
    token_ids = tokens(*range(32))
    one = set(chain_keys(root(block_size=1), token_ids, 1))
    sixteen = set(chain_keys(root(block_size=16), token_ids, 16))
    assert len(one) == 32
    assert len(sixteen) == 2
    assert not one & sixteen


def test_even_under_one_root_blocks_of_other_lengths_share_no_key():
    token_ids = tokens(*[0] * 32)
    assert not set(chain_keys(root(), token_ids, 1)) & set(chain_keys(root(), token_ids, 16))


def test_tenants_share_no_key():
    token_ids = tokens(*range(16))
    tenants = [chain_keys(root(salt=salt), token_ids, 4) for salt in (b"", b"a", b"b", b"ab")]
    assert len({key for keys in tenants for key in keys}) == 16


def test_private_keys_differ_in_each_number_and_from_every_chain():
    threes = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (3, 2, 1), (12, 3, 0), (1, 23, 0), (0, 0, 0)]
    numbers = [(epoch, *three) for epoch in (0, 1) for three in threes]
    private = {private_key(*four) for four in numbers}
    assert len(private) == len(numbers)
    spelled = np.frombuffer(struct.pack("<qqq", 1, 2, 3), dtype="<i4")
    chained = {root(model="", salt=b""), *chain_keys(root(), spelled, 6)}
    assert not private & chained


def test_every_key_has_32_bytes():
    keys = [root(), child_key(root(), b"\0" * 16), private_key(0, 1, 0, 0)]
    assert {len(key) for key in keys} == {32}


def test_a_block_of_16_tokens_is_two_rounds_of_sha256_and_one_of_256_keeps_the_gil():
    """SHA-256 pads by 9 bytes to rounds of 64; hashlib gives up the GIL above 2,047 bytes."""
    num_other_bytes = len(field(b"d", b"kv block") + field(b"b", bytes(32)) + field(b"b", b""))
    assert num_other_bytes + 4 * 16 + 9 == 2 * 64
    assert num_other_bytes + 4 * 256 <= 2047


def test_a_parent_of_another_length_is_our_bug():
    with pytest.raises(AssertionError, match="a key of 31 bytes"):
        child_key(b"\0" * 31, b"\0" * 16)
    with pytest.raises(AssertionError, match="a key of 33 bytes"):
        chain_keys(b"\0" * 33, tokens(1, 2, 3, 4), 4)


def test_half_a_token_is_our_bug():
    with pytest.raises(AssertionError, match="tokens in 15 bytes"):
        child_key(root(), b"\0" * 15)


def test_a_block_of_no_tokens_is_our_bug():
    with pytest.raises(AssertionError, match="blocks of 0 tokens"):
        root(block_size=0)


def test_bytes_in_place_are_those_that_are_hashed():
    tokens = np.arange(24, dtype=np.int32).reshape(3, 8)
    assert bytes(little_endian(tokens)[4 * 8 : 4 * 16]) == token_bytes(tokens[1])
