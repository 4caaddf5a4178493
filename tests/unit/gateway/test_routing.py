"""Requests that begin alike go to one replica; nobody else moves when a replica goes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageframe.gateway.routing import (
    GRANULE_TOKENS,
    Place,
    RoutingOptions,
    choose,
    load_bound,
    prefix_key,
    rendezvous_order,
    session_key,
)

NAMES = [f"replica-{number}" for number in range(5)]
KEYS = [prefix_key(b"salt", [number], 256) for number in range(2000)]
NAME_LISTS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


def test_prompts_that_share_the_first_tokens_share_a_key():
    shared = list(range(256))
    assert prefix_key(b"a", [*shared, 1, 2], 256) == prefix_key(b"a", [*shared, 3], 256)
    assert prefix_key(b"a", [*shared[:-1], 9], 256) != prefix_key(b"a", shared, 256)


def test_a_prompt_counts_in_whole_granules_but_a_short_one_as_it_is():
    granule = list(range(GRANULE_TOKENS))
    assert prefix_key(b"a", [*granule, 7], 256) == prefix_key(b"a", [*granule, 8, 9], 256)
    assert prefix_key(b"a", granule[:5], 256) != prefix_key(b"a", granule[:6], 256)
    assert prefix_key(b"a", [1] * 100, 10) == prefix_key(b"a", [1] * 10, 10)


def test_tenants_and_kinds_of_keys_are_told_apart():
    assert prefix_key(b"a", [1], 256) != prefix_key(b"b", [1], 256)
    assert prefix_key(b"", [], 256) != session_key(b"", "")
    assert session_key(b"ab", "c") != session_key(b"a", "bc")


def test_the_order_is_the_same_for_ever():
    # A gateway of the next release must not send everybody elsewhere while both run.
    order = rendezvous_order(prefix_key(b"salt", [1, 2, 3], 256), NAMES[:3])
    assert order == ["replica-1", "replica-2", "replica-0"]


@given(st.binary(max_size=40), NAME_LISTS, st.randoms())
def test_the_order_is_not_that_of_the_list(key, names, random):
    shuffled = random.sample(names, len(names))
    assert rendezvous_order(key, names) == rendezvous_order(key, shuffled)


@given(st.binary(max_size=40), NAME_LISTS, st.data())
def test_only_the_keys_of_a_lost_replica_move(key, names, data):
    lost = data.draw(st.sampled_from(names))
    before = rendezvous_order(key, names)
    after = rendezvous_order(key, [name for name in names if name != lost])
    assert after == [name for name in before if name != lost]


def test_keys_spread_evenly_over_replicas_and_over_the_next_ones():
    firsts = Counter(rendezvous_order(key, NAMES)[0] for key in KEYS)
    expected = len(KEYS) / len(NAMES)
    chi_square = sum((count - expected) ** 2 / expected for count in firsts.values())
    # 18.5 is passed by one set of keys in 1,000; these keys are always the same.
    assert len(firsts) == len(NAMES)
    assert chi_square < 18.5
    seconds = Counter(
        order[1] for key in KEYS if (order := rendezvous_order(key, NAMES))[0] == NAMES[0]
    )
    assert len(seconds) == len(NAMES) - 1
    assert max(seconds.values()) < 1.5 * min(seconds.values())


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([0, 0, 0], 0),
        ([7, 0, 0], 0),  # light: below 8
        ([8, 0, 0], 1),
        ([40, 40, 40], 0),
        ([51, 34, 35], 1),  # the bound is 1.25 * 121 / 3, so 51
        ([50, 35, 35], 0),
        ([60, 60, 0], 2),
    ],
)
def test_a_replica_over_the_bound_takes_none(loads, chosen):
    places = [Place(f"r{index}", load) for index, load in enumerate(loads)]
    assert choose(places, RoutingOptions()) == places[chosen]


def test_a_full_replica_comes_last():
    places = [Place("a", 0, is_full=True), Place("b", 30), Place("c", 3)]
    assert choose(places, RoutingOptions()).name == "c"
    places = [Place("a", 4, is_full=True), Place("b", 3, is_full=True)]
    assert choose(places, RoutingOptions()).name == "b"
    places = [Place("a", 0, is_full=True), Place("b", 9)]
    assert choose(places, RoutingOptions()).name == "b"


@given(
    st.integers(1, 8),
    st.lists(st.integers(0, 30), min_size=1, max_size=300),
    st.lists(st.integers(0, 300), max_size=100),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from([0, 8]),
)
def test_no_replica_ever_takes_more_than_its_bound(
    num_replicas, prompts, endings, headroom, num_light
):
    options = RoutingOptions(headroom=headroom, num_light=num_light)
    loads = Counter({f"r{index}": 0 for index in range(num_replicas)})
    running: list[str] = []
    for number, prompt in enumerate(prompts):
        order = rendezvous_order(prefix_key(b"", [prompt], 256), list(loads))
        places = [Place(name, loads[name]) for name in order]
        place = choose(places, options)
        loads[place.name] += 1
        running.append(place.name)
        assert loads[place.name] <= load_bound(places, options)
        before = places[: places.index(place)]
        assert all(other.num_requests >= load_bound(places, options) for other in before)
        if number in endings:
            loads[running.pop(number % len(running))] -= 1
