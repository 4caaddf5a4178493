"""Deltas put together are the whole text, however the tokens were grouped."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageframe.gateway.detokenizer import ByteLevelDetokenizer
from pageframe.gateway.tokenizer import TextCodec


def _in_groups(rng, ids):
    position = 0
    while position < len(ids):
        size = rng.randrange(1, 6)
        yield ids[position : position + size]
        position += size


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_deltas_of_random_tokens_are_the_whole_text(tokenizer_folder, skip_special_tokens):
    """Random ids hold every kind of broken character, special tokens and ids without a token."""
    codec = TextCodec.load(tokenizer_folder)
    vocab_size = max(codec._tokenizer.get_vocab().values()) + 4
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    for _ in range(1500):
        ids = [rng.randrange(vocab_size) for _ in range(rng.randrange(0, 25))]
        expected = codec.decode(ids, skip_special_tokens=skip_special_tokens)
        stream = codec.detokenizer(skip_special_tokens=skip_special_tokens)
        text = "".join([stream.feed(group) for group in _in_groups(rng, ids)]) + stream.flush()
        assert text == expected, f"seed {seed}, ids {ids}"


def test_what_goes_out_depends_on_tokens_and_not_on_groups(tokenizer_folder):
    """Resuming a broken stream rests on this."""
    codec = TextCodec.load(tokenizer_folder)
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    for _ in range(300):
        ids = [rng.randrange(300) for _ in range(12)]
        one_by_one, at_once = codec.detokenizer(), codec.detokenizer()
        text = "".join([one_by_one.feed([token_id]) for token_id in ids])
        assert text == at_once.feed(ids), f"seed {seed}, ids {ids}"
        assert one_by_one.flush() == at_once.flush()


def test_an_incomplete_character_is_held_back():
    """The euro sign in three tokens: nothing, nothing, the sign."""
    table = [b"\xe2", b"\x82", b"\xac", b"!"]
    stream = ByteLevelDetokenizer(table)
    assert [stream.feed([token_id]) for token_id in (3, 0, 1, 2)] == ["!", "", "", "€"]
    assert stream.flush() == ""


def test_an_incomplete_character_at_the_end_is_replaced():
    stream = ByteLevelDetokenizer([b"\xe2", b"\x82"])
    assert stream.feed([0, 1]) == ""
    assert stream.flush() == "\ufffd"


def test_invalid_bytes_are_replaced_as_soon_as_they_are_known_to_be():
    stream = ByteLevelDetokenizer([b"\xff", b"\xe2", b"a"])
    assert stream.feed([0]) == "\ufffd"
    assert stream.feed([1]) == ""
    assert stream.feed([2]) == "\ufffda"


def test_characters_stream_without_delay(byte_level_codec):
    """Text of whole characters never waits for a later token."""
    stream = byte_level_codec.detokenizer()
    for token_id in byte_level_codec.encode("the quick brown fox"):
        assert stream.feed([token_id]) == byte_level_codec.decode([token_id])


def test_a_fork_goes_its_own_way(tokenizer_folder):
    codec = TextCodec.load(tokenizer_folder)
    ids = codec.encode("the dog € and the fox ü")
    for cut in range(len(ids)):
        stream = codec.detokenizer()
        stream.feed(ids[:cut])
        fork = stream.fork()
        rest = stream.feed(ids[cut:]) + stream.flush()
        assert fork.feed(ids[cut:]) + fork.flush() == rest


@given(st.lists(st.binary(min_size=0, max_size=3), max_size=20))
def test_bytes_stream_like_they_decode(pieces):
    stream = ByteLevelDetokenizer(pieces)
    text = "".join([stream.feed([index]) for index in range(len(pieces))]) + stream.flush()
    assert text == b"".join(pieces).decode("utf-8", "replace")


def test_bytes_of_single_tokens_put_together_are_the_text(tokenizer_folder):
    codec = TextCodec.load(tokenizer_folder)
    for text in ("the dog sleeps, and the fox runs.", "the the dog ü", "a  b"):
        ids = codec.encode(text, add_special_tokens=False)
        data = b"".join(codec.token_bytes(token_id) for token_id in ids)
        # A text may begin without the space that its first token has elsewhere.
        assert data.decode("utf-8").lstrip(" ") == codec.decode(ids)
    assert codec.token_bytes(100_000) == b""
