from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pageframe.core.errors import (
    InvalidRequestError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from pageframe.executor.memory.retention import NEVER, Retention, RetentionKind, Retentions

HANDLE, SESSION = RetentionKind.HANDLE, RetentionKind.SESSION


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def opened(retentions: Retentions, name: str = "h", **changes) -> Retention:
    facts = {"tenant": "a", "kind": HANDLE, "keys": keys(1, 2), "expire_ns": 100} | changes
    return retentions.open(name=name, **facts)


@pytest.fixture
def retentions() -> Iterator[Retentions]:
    made = Retentions(handle_ttl_ns_max=1000, num_handles_per_tenant_max=2)
    yield made
    assert made.check() == []


def test_an_open_retention_is_found_by_kind_tenant_and_name(retentions):
    handle = opened(retentions)
    session = opened(retentions, kind=SESSION)
    assert retentions.get(HANDLE, "a", "h") is handle
    assert retentions.get(SESSION, "a", "h") is session
    assert list(retentions) == [handle, session]
    assert len(retentions) == 2


def test_a_handle_of_another_tenant_looks_like_one_that_never_was(retentions):
    opened(retentions, tenant="b")
    answers = []
    for name in ("h", "x"):
        with pytest.raises(NotFoundError) as caught:
            retentions.get(HANDLE, "a", name)
        answers.append((caught.value.reason, caught.value.message.replace(f"{name!r}", "NAME")))
        assert caught.value.limits == {}
    assert answers == [("HANDLE_UNKNOWN", "the tenant has no handle NAME open")] * 2


def test_it_wants_each_of_its_keys_until_a_block_is_pinned_for_it(retentions):
    handle = opened(retentions)
    assert retentions.wanting(key(1)) == [handle]
    retentions.note_pinned(handle, key(1), 7)
    assert retentions.wanting(key(1)) == []
    assert retentions.wanting(key(2)) == [handle]
    assert handle.pinned == {key(1): 7}
    assert retentions.wanting(key(3)) == []


def test_it_wants_a_key_again_when_its_pin_was_given_back(retentions):
    handle = opened(retentions)
    retentions.note_pinned(handle, key(1), 7)
    retentions.note_unpinned(handle, key(1))
    assert handle.pinned == {}
    assert retentions.wanting(key(1)) == [handle]
    assert retentions.num_pinned_by_tenant("a") == 0
    retentions.note_pinned(handle, key(1), 3)
    assert handle.pinned == {key(1): 3}


def test_several_may_pin_the_same_block(retentions):
    first, second = opened(retentions, "h"), opened(retentions, "i")
    other = opened(retentions, tenant="b")
    assert retentions.wanting(key(1)) == [first, second, other]
    for retention in (first, second, other):
        retentions.note_pinned(retention, key(1), 7)
    retentions.note_pinned(first, key(2), 8)
    assert [retentions.num_pinned_by_tenant(tenant) for tenant in "abc"] == [3, 1, 0]
    assert list(retentions.pinned_block_ids()) == [7, 7, 7, 8]
    retentions.note_unpinned(second, key(1))
    assert [retentions.num_pinned_by_tenant(tenant) for tenant in "abc"] == [2, 1, 0]
    assert retentions.wanting(key(1)) == [second]


def test_pins_follow_a_block_that_moves(retentions):
    first, second = opened(retentions, "h"), opened(retentions, "i", keys=keys(1))
    retentions.note_pinned(first, key(1), 7)
    retentions.note_pinned(first, key(2), 8)
    retentions.note_pinned(second, key(1), 7)
    retentions.move_block(7, 0)
    assert first.pinned == {key(1): 0, key(2): 8}
    assert second.pinned == {key(1): 0}
    retentions.move_block(5, 1)
    retentions.move_block(8, 7)
    assert first.pinned == {key(1): 0, key(2): 7}
    assert sorted(retentions.pinned_block_ids()) == [0, 0, 7]
    retentions.note_unpinned(second, key(1))
    assert sorted(retentions.pinned_block_ids()) == [0, 7]


def test_a_renewal_keeps_the_object_and_what_is_pinned_for_it(retentions):
    handle = opened(retentions, keys=keys(1, 2))
    retentions.note_pinned(handle, key(1), 7)
    assert opened(retentions, keys=keys(1, 3), expire_ns=200) is handle
    assert (handle.keys, handle.expire_ns) == (keys(1, 3), 200)
    assert handle.pinned == {key(1): 7}
    assert retentions.wanting(key(1)) == []
    assert retentions.wanting(key(2)) == []
    assert retentions.wanting(key(3)) == [handle]
    assert len(retentions) == 1


def test_what_a_renewal_lists_no_more_stays_pinned_until_given_back(retentions):
    handle = opened(retentions, keys=keys(1, 2))
    retentions.note_pinned(handle, key(1), 7)
    handle.held_keys.update(keys(2))
    assert handle.unlisted_keys() == []
    opened(retentions, keys=keys(3))
    assert handle.unlisted_keys() == keys(1, 2)
    assert handle.pinned == {key(1): 7}
    retentions.note_unpinned(handle, key(1))
    handle.held_keys.clear()
    assert handle.unlisted_keys() == []
    assert retentions.wanting(key(1)) == []
    assert list(retentions.pinned_block_ids()) == []


def test_a_key_that_is_listed_again_while_pinned_is_not_wanted(retentions):
    handle = opened(retentions, keys=keys(1))
    retentions.note_pinned(handle, key(1), 7)
    opened(retentions, keys=keys(2))
    opened(retentions, keys=keys(1))
    assert retentions.wanting(key(1)) == []
    retentions.note_unpinned(handle, key(1))
    assert retentions.wanting(key(1)) == [handle]


def test_a_closed_retention_wants_nothing_and_tells_what_was_pinned(retentions):
    handle = opened(retentions, keys=keys(1, 2))
    retentions.note_pinned(handle, key(1), 7)
    handle.held_keys.update(keys(2))
    retentions.close(handle)
    assert handle.pinned == {key(1): 7}
    assert handle.held_keys == set(keys(2))
    assert retentions.wanting(key(2)) == []
    assert list(retentions) == []
    assert list(retentions.pinned_block_ids()) == []
    assert retentions.num_pinned_by_tenant("a") == 0
    assert retentions.next_due_ns == NEVER
    with pytest.raises(NotFoundError):
        retentions.get(HANDLE, "a", "h")
    assert opened(retentions) is not handle


def test_a_retention_ends_at_its_time_and_is_told_once(retentions):
    late = opened(retentions, "late", expire_ns=200)
    early = opened(retentions, "early", expire_ns=100)
    assert retentions.next_due_ns == 100
    assert retentions.due(99) == ([], [])
    assert retentions.due(100) == ([early], [])
    assert retentions.due(150) == ([], [])
    retentions.close(early)
    assert retentions.next_due_ns == 200
    assert retentions.due(1000) == ([late], [])
    assert retentions.next_due_ns == NEVER


def test_a_session_is_demoted_before_it_ends(retentions):
    session = opened(retentions, kind=SESSION, expire_ns=100, demote_ns=40)
    assert retentions.next_due_ns == 40
    assert retentions.due(40) == ([], [session])
    assert session.demote_ns == NEVER
    assert retentions.next_due_ns == 100
    assert retentions.due(99) == ([], [])
    assert retentions.due(100) == ([session], [])


def test_what_has_ended_is_not_also_to_be_demoted(retentions):
    session = opened(retentions, kind=SESSION, expire_ns=100, demote_ns=40)
    assert retentions.due(500) == ([session], [])
    assert retentions.due(500) == ([], [])


def test_those_whose_time_has_come_are_told_in_the_order_of_their_times(retentions):
    third = opened(retentions, "c", tenant="c", expire_ns=30)
    first = opened(retentions, "a", tenant="a", expire_ns=10)
    second = opened(retentions, "b", tenant="b", expire_ns=20)
    opened(retentions, "d", tenant="d", expire_ns=40)
    assert retentions.due(30).expired == [first, second, third]


def test_a_renewal_replaces_both_times(retentions):
    session = opened(retentions, kind=SESSION, expire_ns=100, demote_ns=40)
    opened(retentions, kind=SESSION, expire_ns=300, demote_ns=200)
    assert retentions.next_due_ns == 200
    assert retentions.due(199) == ([], [])
    assert retentions.due(200) == ([], [session])
    opened(retentions, kind=SESSION, expire_ns=250)
    assert retentions.next_due_ns == 250
    assert retentions.due(250) == ([session], [])


def test_a_renewal_with_the_same_times_is_told_once(retentions):
    session = opened(retentions, kind=SESSION, expire_ns=100, demote_ns=40)
    opened(retentions, kind=SESSION, expire_ns=100, demote_ns=40)
    assert retentions.due(40) == ([], [session])
    assert retentions.due(100) == ([session], [])


def test_a_name_opened_anew_has_nothing_of_its_predecessor(retentions):
    old = opened(retentions, expire_ns=100)
    retentions.close(old)
    new = opened(retentions, expire_ns=100)
    assert retentions.due(100) == ([new], [])


def test_a_handle_lives_for_at_most_the_servers_maximum(retentions):
    assert retentions.handle_expire_ns(now_ns=5, ttl_ns=1000) == 1005
    with pytest.raises(OutOfRangeError) as caught:
        retentions.handle_expire_ns(now_ns=5, ttl_ns=1001)
    assert caught.value.reason == "HANDLE_TTL_ABOVE_MAX"
    assert caught.value.limits == {"ttl_ns": "1001", "ttl_ns_max": "1000"}
    with pytest.raises(InvalidRequestError) as too_short:
        retentions.handle_expire_ns(now_ns=5, ttl_ns=0)
    assert too_short.value.reason == "HANDLE_TTL_NOT_POSITIVE"


@pytest.mark.parametrize("kind", [HANDLE, SESSION])
def test_a_tenant_may_open_so_many_of_each_kind_and_renew_them_always(kind):
    retentions = Retentions(num_handles_per_tenant_max=2, num_sessions_per_tenant_max=2)
    first = opened(retentions, "h", kind=kind)
    opened(retentions, "i", kind=kind)
    with pytest.raises(ResourceExhaustedError) as caught:
        opened(retentions, "j", kind=kind)
    assert caught.value.reason == "RETENTIONS_FULL"
    assert caught.value.limits == {"num_open": "2", "num_max": "2"}
    assert len(retentions) == 2
    assert opened(retentions, "h", kind=kind, expire_ns=500) is first
    opened(retentions, "j", kind=kind, tenant="b")
    opened(retentions, "j", kind=SESSION if kind is HANDLE else HANDLE)
    retentions.close(first)
    opened(retentions, "j", kind=kind)
    assert retentions.check() == []


def test_renewing_for_ever_keeps_the_books_short(retentions):
    for now_ns in range(1, 2000):
        session = opened(retentions, kind=SESSION, expire_ns=now_ns + 100, demote_ns=now_ns + 50)
        assert len(retentions._alarms) <= 4 * len(retentions) + 18
    assert retentions.next_due_ns == 2049
    assert retentions.due(2049) == ([], [session])
    assert retentions.due(2099) == ([session], [])


def test_one_that_is_never_renewed_among_busy_ones_ends_at_its_time(retentions):
    still = opened(retentions, "still", expire_ns=500)
    for now_ns in range(1, 400):
        opened(retentions, "busy", expire_ns=now_ns + 1000)
        assert retentions.due(now_ns) == ([], [])
    assert retentions.next_due_ns == 500
    assert retentions.due(500) == ([still], [])


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda r, h: r.note_pinned(h, key(9), 3), "does not want key"),
        (lambda r, h: r.note_pinned(h, key(1), 3), "does not want key"),
        (lambda r, h: r.note_pinned(h, key(2), 7), "pins block 7 under two keys"),
        (lambda r, h: r.note_unpinned(h, key(2)), "has not pinned key"),
        (lambda r, _: r.move_block(3, 7), "block 7 is pinned, 3 moves there"),
        (lambda r, h: (r.close(h), r.close(h)), "is not open"),
        (lambda r, h: (r.close(h), r.note_unpinned(h, key(1))), "is not open"),
        (lambda r, _: opened(r, expire_ns=0), "expires at 0 ns"),
    ],
)
def test_a_broken_precondition_is_our_bug(misuse, message):
    retentions = Retentions()
    handle = opened(retentions)
    retentions.note_pinned(handle, key(1), 7)
    with pytest.raises(AssertionError, match=message):
        misuse(retentions, handle)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda _, h: h.pinned.update({key(2): 8}), "2 blocks are pinned, 1 are booked"),
        (lambda r, _: r._wanting.clear(), "1 keys are wanted, 0 are booked"),
        (lambda r, _: r._num_pinned.update(a=1), "pins per tenant"),
        (lambda r, _: r._num_open.clear(), "1 are open, 0 were counted"),
    ],
)
def test_the_check_finds_each_kind_of_fault(spoil, sentence):
    retentions = Retentions()
    handle = opened(retentions)
    retentions.note_pinned(handle, key(1), 7)
    assert retentions.check() == []
    spoil(retentions, handle)
    assert any(sentence in fault for fault in retentions.check())


class RetentionMachine(RuleBasedStateMachine):
    """Open, pin, move, and let time pass; the model looks at every retention each time."""

    NUM_BLOCKS = 6
    names = st.tuples(
        st.sampled_from(list(RetentionKind)), st.sampled_from("ab"), st.sampled_from("xyz")
    )
    some_keys = st.lists(st.integers(0, 5), max_size=4, unique=True)

    def __init__(self) -> None:
        super().__init__()
        self.retentions = Retentions()
        self.open: dict[tuple, Retention] = {}
        # What the last opening said: keys, expire_ns and demote_ns (None once told).
        self.said: dict[tuple, list] = {}
        self.pins: dict[tuple, dict[bytes, int]] = {}
        self.now_ns = 1

    @rule(name=names, some_keys=some_keys, expires=st.integers(1, 9), demotes=st.integers(0, 9))
    def open_one(self, name: tuple, some_keys: list[int], expires: int, demotes: int) -> None:
        kind, tenant, short = name
        expire_ns = self.now_ns + expires
        demote_ns = self.now_ns + demotes if demotes else NEVER
        retention = self.retentions.open(
            name=short,
            tenant=tenant,
            kind=kind,
            keys=keys(*some_keys),
            expire_ns=expire_ns,
            demote_ns=demote_ns,
        )
        assert self.open.setdefault(name, retention) is retention
        self.pins.setdefault(name, {})
        self.said[name] = [keys(*some_keys), expire_ns, demote_ns or None]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        retention = self.open[name]
        self.retentions.close(retention)
        assert retention.pinned == self.pins[name]
        self.forget(name)

    def forget(self, name: tuple) -> None:
        del self.open[name], self.said[name], self.pins[name]

    @rule(number=st.integers(0, 5), block_id=st.integers(0, NUM_BLOCKS - 1))
    def index_a_block(self, number: int, block_id: int) -> None:
        """A block with this content appears, where no other content is pinned."""
        elsewhere = {
            pinned_id if pinned != key(number) else -1
            for pins in self.pins.values()
            for pinned, pinned_id in pins.items()
        }
        if block_id in elsewhere:
            return
        for retention in self.retentions.wanting(key(number)):
            self.retentions.note_pinned(retention, key(number), block_id)
            self.pins[retention.kind, retention.tenant, retention.name][key(number)] = block_id

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name in self.pins if self.pins[name])))
        unpinned = data.draw(st.sampled_from(sorted(self.pins[name])))
        self.retentions.note_unpinned(self.open[name], unpinned)
        del self.pins[name][unpinned]

    @rule(ends=st.tuples(*[st.integers(0, NUM_BLOCKS - 1)] * 2))
    def move(self, ends: tuple[int, int]) -> None:
        source, target = ends
        if any(target in pins.values() for pins in self.pins.values()):
            return
        self.retentions.move_block(source, target)
        for pins in self.pins.values():
            for pinned, block_id in pins.items():
                if block_id == source:
                    pins[pinned] = target

    @rule(ns=st.integers(0, 6))
    def let_time_pass(self, ns: int) -> None:
        self.now_ns += ns
        expired, to_demote = self.retentions.due(self.now_ns)
        ended = [name for name in self.open if self.said[name][1] <= self.now_ns]
        assert sorted(map(id, expired)) == sorted(id(self.open[name]) for name in ended)
        for name in ended:
            self.retentions.close(self.open[name])
            self.forget(name)
        cold = [
            name
            for name in self.open
            if self.said[name][2] is not None and self.said[name][2] <= self.now_ns
        ]
        assert sorted(map(id, to_demote)) == sorted(id(self.open[name]) for name in cold)
        for name in cold:
            self.said[name][2] = None

    @invariant()
    def agrees_with_the_model(self) -> None:
        retentions = self.retentions
        assert retentions.check() == []
        assert list(map(id, retentions)) == [id(found) for found in self.open.values()]
        for name, retention in self.open.items():
            assert retentions.get(*name) is retention
            listed, expire_ns, demote_ns = self.said[name]
            assert (retention.keys, retention.expire_ns) == (listed, expire_ns)
            assert retention.demote_ns == (demote_ns or NEVER)
            assert retention.pinned == self.pins[name]
            assert set(retention.unlisted_keys()) == self.pins[name].keys() - set(listed)
        for wanted in keys(*range(6)):
            expected = {
                id(self.open[name])
                for name, (listed, _, _) in self.said.items()
                if wanted in listed and wanted not in self.pins[name]
            }
            assert {id(found) for found in retentions.wanting(wanted)} == expected
        for tenant in "ab":
            expected_num = sum(len(pins) for name, pins in self.pins.items() if name[1] == tenant)
            assert retentions.num_pinned_by_tenant(tenant) == expected_num
        references = sorted(b for pins in self.pins.values() for b in pins.values())
        assert sorted(retentions.pinned_block_ids()) == references
        times = [time for _, *both in self.said.values() for time in both if time is not None]
        assert retentions.next_due_ns == min(times, default=NEVER)


TestRetentions = RetentionMachine.TestCase
TestRetentions.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, print_blob=True
)
