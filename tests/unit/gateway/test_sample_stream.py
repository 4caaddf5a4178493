"""Text, tokens and stop strings of one sample together."""

import random

import pytest

from pageframe.gateway.detokenizer import ByteLevelDetokenizer
from pageframe.gateway.sample_stream import SampleStream
from pageframe.gateway.stop_strings import StopAutomaton
from pageframe.gateway.tokenizer import TextCodec

_TABLE = [b"a", b"b", b"ab", b"\xe2", b"\x82", b"\xac", b" END", b"END ", b""]


def _stream(*stops, include_stop=False, min_tokens=0):
    return SampleStream(
        ByteLevelDetokenizer(_TABLE),
        StopAutomaton(stops),
        include_stop=include_stop,
        min_tokens=min_tokens,
    )


def _feed_all(stream, groups):
    """Text and number of tokens until a stop string, or to the end."""
    text, num_tokens = "", 0
    for group in groups:
        more, num_more = stream.feed(group)
        text, num_tokens = text + more, num_tokens + num_more
        if stream.is_stopped:
            break
    return text + stream.finish(), num_tokens


def test_tokens_behind_the_one_that_completes_the_stop_string_are_dropped():
    stream = _stream("b€")
    assert stream.feed([0, 1, 3, 4, 5, 0, 0]) == ("a", 5)
    assert stream.stop == "b€"
    assert stream.num_tokens == 5


def test_a_stop_string_inside_a_token_keeps_the_token():
    stream = _stream("END")
    assert stream.feed([0, 7, 0]) == ("a", 2)


def test_the_stop_string_can_be_left_in_the_text():
    stream = _stream("END", include_stop=True)
    assert stream.feed([0, 6, 0])[0] == "a END"


def test_a_stop_string_may_be_completed_by_the_very_end():
    """An incomplete character at the end becomes U+FFFD, which is text like any other."""
    stream = _stream("a\ufffd")
    assert stream.feed([1, 0, 3])[0] == "b"
    assert stream.finish() == ""
    assert stream.stop == "a\ufffd"


def test_stop_strings_are_looked_for_only_behind_min_tokens():
    stream = _stream("ab", min_tokens=3)
    assert _feed_all(stream, [[0, 1], [0, 1, 2, 0]]) == ("abab", 5)


def test_no_stop_string_crosses_the_border_of_min_tokens():
    stream = _stream("ab", min_tokens=1)
    assert _feed_all(stream, [[0, 1, 0, 1]]) == ("ab", 4)


@pytest.mark.parametrize("min_tokens", [0, 2])
def test_grouping_changes_nothing(min_tokens):
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    for _ in range(2000):
        ids = [rng.randrange(len(_TABLE)) for _ in range(rng.randrange(1, 14))]
        stops = rng.sample(["ab", "ba", "€", "b\ufffd", "END", "aab"], 2)
        cuts = sorted(rng.sample(range(len(ids) + 1), min(3, len(ids))))
        groups = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        whole = _stream(*stops, min_tokens=min_tokens)
        single = _stream(*stops, min_tokens=min_tokens)
        grouped = _stream(*stops, min_tokens=min_tokens)
        expected = _feed_all(single, [[token_id] for token_id in ids])
        assert _feed_all(whole, [ids]) == expected, f"seed {seed}, ids {ids}, stops {stops}"
        assert _feed_all(grouped, groups) == expected, f"seed {seed}, ids {ids}, stops {stops}"
        assert single.stop == whole.stop == grouped.stop


def test_a_resumed_stream_goes_on_where_the_broken_one_stopped(tokenizer_folder):
    """Feed what the caller has, drop it, and the rest is exactly what the caller lacks."""
    codec = TextCodec.load(tokenizer_folder)
    ids = codec.encode("the dog € and the brown fox ü. the end, the dog")
    automaton = StopAutomaton(["fox ü. the dog", "zzz"])

    def fresh():
        return SampleStream(codec.detokenizer(), automaton)

    whole = fresh()
    expected = "".join([whole.feed([token_id])[0] for token_id in ids]) + whole.finish()
    for cut in range(len(ids)):
        broken, resumed = fresh(), fresh()
        before = "".join([broken.feed([token_id])[0] for token_id in ids[:cut]])
        resumed.feed(ids[:cut])
        after = resumed.feed(ids[cut:])[0] + resumed.finish()
        assert before + after == expected
