"""The automaton against a naive search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageframe.gateway.stop_strings import StopAutomaton, StopMatcher

# Few letters, so that strings overlap, repeat and contain one another all the time.
_TEXT = st.text(alphabet="abé", max_size=40)
_STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=6)
_PIECES = st.lists(st.text(alphabet="abé", max_size=4), max_size=15)


def _naive(text, stops):
    """The occurrence that ends first, and of those the longest: ``(end, stop)`` or None."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def _naive_num_held(text, stops):
    """Length of the longest tail that could become a stop string."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ),
        default=0,
    )


def _run(pieces, stops, *, include_stop=False):
    matcher = StopMatcher(StopAutomaton(stops), include_stop=include_stop)
    out = []
    for piece in pieces:
        out.append(matcher.feed(piece))
        if matcher.match is not None:
            return matcher, out
    return matcher, [*out, matcher.flush()]


@given(_PIECES, _STOPS, st.booleans())
def test_equals_a_naive_search(pieces, stops, include_stop):
    text = "".join(pieces)
    matcher, out = _run(pieces, stops, include_stop=include_stop)
    expected = _naive(text, stops)
    if expected is None:
        assert matcher.match is None
        assert "".join(out) == text
    else:
        end, stop = expected
        assert matcher.match is not None
        assert (matcher.match.end, matcher.match.stop) == (end, stop)
        assert "".join(out) == text[: end if include_stop else end - len(stop)]


@given(_TEXT, _STOPS)
def test_holds_back_exactly_what_may_become_a_stop_string(text, stops):
    matcher = StopMatcher(StopAutomaton(stops))
    given_out = 0
    for position, character in enumerate(text, start=1):
        given_out += len(matcher.feed(character))
        if matcher.match is not None:
            return
        assert position - given_out == _naive_num_held(text[:position], stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "out"),
    [
        (["Hello wor", "ld"], ["world"], ["Hello ", ""]),
        (["the E", "arth"], ["END"], ["the ", "Earth", ""]),
        (["aab"], ["ab", "b"], ["a"]),
        (["x\n", "\nUser", ": hi"], ["\n\nUser:"], ["x", "", ""]),
        (["ein €", "€ viel"], ["€€"], ["ein ", ""]),
        (["abc"], ["bc", "abcd"], ["a"]),
    ],
)
def test_by_example(pieces, stops, out):
    assert _run(pieces, stops)[1] == out


def test_with_the_stop_string_included_nothing_is_held_back():
    matcher = StopMatcher(StopAutomaton(["END"]), include_stop=True)
    assert matcher.feed("the EN") == "the EN"
    assert matcher.feed("D of it") == "D"


def test_the_largest_allowed_set_is_built_and_searched():
    """64 strings of 1,024 characters that share no prefix and fail at the last character."""
    stops = [chr(0x4E00 + index) + "a" * 1023 for index in range(64)]
    matcher = StopMatcher(StopAutomaton(stops))
    text = "".join(stop[:-1] + "b" for stop in stops)
    out = "".join([matcher.feed(text[start : start + 7]) for start in range(0, len(text), 7)])
    assert out + matcher.flush() == text
    assert matcher.match is None


def test_without_stop_strings_text_passes():
    matcher = StopMatcher(StopAutomaton([]))
    assert matcher.feed("anything") == "anything"
    assert matcher.flush() == ""
