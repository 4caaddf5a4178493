import pytest

from pageframe.core.errors import InternalError
from pageframe.executor.memory.host_tier import NO_SLOT, BlockStore, HostTier


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def numbers(tier: HostTier) -> list[int]:
    """Keys in order of use, as the numbers that made them."""
    in_order = tier.keys()
    return [int.from_bytes(found, "little") for found in in_order]


def filled(num_slots: int, *stored: int) -> HostTier:
    """A tier with these keys in it, first one oldest, and nothing in transfer."""
    tier = HostTier(num_slots)
    for number in stored:
        assert tier.store(key(number)) != NO_SLOT
    tier.finish_transfers()
    assert tier.check() == []
    return tier


def test_slots_are_given_out_from_zero_and_found_by_key():
    tier = HostTier(3)
    assert [tier.store(key(n)) for n in (7, 8)] == [0, 1]
    assert [tier.slot_of(key(n)) for n in (7, 8, 9)] == [0, 1, NO_SLOT]
    assert key(7) in tier
    assert key(9) not in tier
    assert (tier.num_slots, tier.num_used, tier.num_held, tier.num_dropped) == (3, 2, 0, 0)
    assert tier.check() == []


def test_the_least_recently_used_entry_makes_room_and_its_slot_is_used_again():
    tier = filled(3, 1, 2, 3)
    assert tier.store(key(4)) == 0
    assert key(1) not in tier
    assert numbers(tier) == [2, 3, 4]
    assert tier.num_dropped == 1
    assert tier.check() == []


def test_a_read_makes_an_entry_the_newest():
    tier = filled(3, 1, 2, 3)
    assert tier.read(key(1)) == 0
    tier.finish_transfers()
    assert numbers(tier) == [2, 3, 1]
    assert [tier.store(key(n)) for n in (4, 5)] == [1, 2]
    assert numbers(tier) == [1, 4, 5]


def test_a_touch_makes_an_entry_the_newest_without_a_transfer():
    tier = filled(2, 1, 2)
    tier.touch(key(1))
    assert tier.store(key(3)) == 1
    assert numbers(tier) == [1, 3]
    assert tier.store(key(4)) == 0
    assert numbers(tier) == [3, 4]
    assert tier.check() == []


def test_asking_for_a_slot_is_not_a_use():
    tier = filled(2, 1, 2)
    tier.slot_of(key(1))
    assert key(1) in tier
    tier.store(key(3))
    assert numbers(tier) == [2, 3]


def test_what_is_in_transfer_is_not_dropped_until_the_copies_were_made():
    tier = HostTier(2)
    tier.store(key(1))
    tier.store(key(2))
    assert tier.store(key(3)) == NO_SLOT
    assert numbers(tier) == [1, 2]
    assert tier.num_dropped == 0
    tier.finish_transfers()
    assert tier.store(key(3)) == 0


def test_an_entry_that_is_being_read_keeps_its_slot():
    tier = filled(2, 1, 2)
    tier.read(key(1))
    assert tier.store(key(3)) == 1
    assert tier.store(key(4)) == NO_SLOT
    tier.finish_transfers()
    assert tier.store(key(4)) == 0


def test_content_may_be_read_in_the_step_that_stores_it():
    tier = HostTier(1)
    assert tier.store(key(1)) == 0
    assert tier.read(key(1)) == 0
    tier.finish_transfers()
    assert tier.store(key(2)) == 0
    assert tier.check() == []


def test_one_finished_transfer_leaves_the_others_alone():
    tier = HostTier(2)
    tier.store(key(1))
    tier.store(key(2))
    tier.finish_transfer(key(2))
    assert tier.store(key(3)) == 1
    assert tier.store(key(4)) == NO_SLOT
    assert numbers(tier) == [1, 3]


def test_held_entries_are_passed_over_however_old_they_are():
    tier = filled(3, 1, 2, 3)
    tier.hold(key(1))
    tier.hold(key(2))
    assert tier.num_held == 2
    assert tier.store(key(4)) == 2
    assert numbers(tier) == [1, 2, 4]
    assert tier.store(key(5)) == NO_SLOT


def test_the_last_of_several_holds_lets_an_entry_go_and_its_age_has_not_changed():
    tier = filled(2, 1, 2)
    tier.hold(key(1))
    tier.hold(key(1))
    tier.drop_hold(key(1))
    assert tier.num_held == 1
    assert tier.store(key(3)) == 1
    tier.finish_transfers()
    tier.drop_hold(key(1))
    assert tier.num_held == 0
    assert tier.store(key(4)) == 0
    assert numbers(tier) == [3, 4]
    assert tier.check() == []


def test_an_entry_held_while_in_transfer_stays_when_the_transfer_ends():
    tier = HostTier(1)
    tier.store(key(1))
    tier.hold(key(1))
    tier.finish_transfers()
    assert tier.store(key(2)) == NO_SLOT
    tier.drop_hold(key(1))
    assert tier.store(key(2)) == 0


def test_a_hold_dropped_while_in_transfer_does_not_let_the_entry_go():
    tier = HostTier(1)
    tier.store(key(1))
    tier.hold(key(1))
    tier.drop_hold(key(1))
    assert tier.store(key(2)) == NO_SLOT
    tier.finish_transfers()
    assert tier.store(key(2)) == 0


@pytest.mark.parametrize("num_holds", [0, 1])
def test_a_hold_that_nobody_has_cannot_be_dropped(num_holds):
    tier = filled(2, 1)
    for _ in range(num_holds):
        tier.hold(key(1))
        tier.drop_hold(key(1))
    for unheld in (key(1), key(2)):
        with pytest.raises(InternalError) as caught:
            tier.drop_hold(unheld)
        assert caught.value.reason == "HOST_KEY_NOT_HELD"
        assert caught.value.limits == {"key": unheld.hex(), "num_held": "0"}
    assert tier.num_held == 0


def test_what_is_not_inside_cannot_be_held():
    with pytest.raises(InternalError) as caught:
        filled(2, 1).hold(key(2))
    assert caught.value.reason == "HOST_KEY_UNKNOWN"
    assert caught.value.limits == {"key": key(2).hex(), "num_used": "1"}


def test_a_removed_entry_leaves_its_slot_and_nothing_else():
    tier = filled(2, 1, 2)
    tier.remove(key(1))
    assert key(1) not in tier
    assert (tier.num_used, tier.num_dropped) == (1, 0)
    assert tier.store(key(3)) == 0
    tier.finish_transfers()
    tier.remove(key(3))
    assert tier.store(key(1)) == 0
    assert numbers(tier) == [2, 1]
    assert tier.check() == []


def test_without_slots_there_is_no_tier():
    tier = HostTier(0)
    assert tier.store(key(1)) == NO_SLOT
    assert tier.slot_of(key(1)) == NO_SLOT
    assert key(1) not in tier
    tier.finish_transfers()
    assert (tier.num_slots, tier.num_used, tier.num_held, tier.num_dropped) == (0, 0, 0, 0)
    assert tier.keys() == []
    assert tier.check() == []


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda tier: tier.store(key(1)), "stored twice"),
        (lambda tier: tier.read(key(9)), "read and not inside"),
        (lambda tier: tier.touch(key(9)), "touched and not inside"),
        (lambda tier: tier.finish_transfer(key(1)), "not in transfer"),
        (lambda tier: tier.remove(key(9)), "removed and not inside"),
        (lambda tier: (tier.hold(key(1)), tier.remove(key(1))), "removed under 1 holds"),
        (lambda tier: (tier.read(key(1)), tier.remove(key(1))), "removed in transfer"),
    ],
)
def test_a_broken_precondition_is_our_bug(misuse, message):
    tier = filled(2, 1)
    with pytest.raises(AssertionError, match=message):
        misuse(tier)


def test_less_than_no_slots_is_our_bug():
    with pytest.raises(AssertionError, match="a host tier of -1 slots"):
        HostTier(-1)


def test_a_tier_that_is_used_and_never_full_keeps_its_books_short():
    tier = filled(4, 1, 2)
    for _ in range(1000):
        tier.read(key(1))
        tier.hold(key(2))
        tier.drop_hold(key(2))
        tier.finish_transfers()
        assert len(tier._candidates) <= 2 * tier.num_slots + 1
    assert numbers(tier) == [2, 1]
    assert tier.check() == []


def test_an_entry_that_lies_still_among_busy_ones_is_dropped_in_its_turn():
    tier = filled(3, 1, 2, 3)
    for _ in range(100):
        tier.touch(key(1))
        tier.touch(key(3))
        assert tier.check() == []
    assert [tier.store(key(n)) for n in (4, 5, 6)] == [1, 0, 2]


def lose_a_slot(tier: HostTier) -> None:
    tier._free_slots.pop()


def use_a_slot_twice(tier: HostTier) -> None:
    tier._entries[key(1)].slot = tier._entries[key(2)].slot


def lose_a_use(tier: HostTier) -> None:
    tier._by_use.popitem()


def turn_the_order_round(tier: HostTier) -> None:
    tier._by_use = dict(reversed(tier._by_use.items()))


def miscount_holds(tier: HostTier) -> None:
    tier._num_held = 1


def transfer_a_stranger(tier: HostTier) -> None:
    tier._in_transfer[key(9)] = None


def hold_less_than_never(tier: HostTier) -> None:
    tier._entries[key(1)].num_holds = -1


def forget_a_candidate(tier: HostTier) -> None:
    tier._candidates.clear()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lose_a_slot, "not all of [0, 4) once"),
        (use_a_slot_twice, "not all of [0, 4) once"),
        (lose_a_use, "1 keys in order of use, 2 inside"),
        (turn_the_order_round, "the order of use runs back"),
        (miscount_holds, "0 keys are held, 1 were counted"),
        (transfer_a_stranger, "1 keys are in transfer and not inside"),
        (hold_less_than_never, "has -1 holds"),
        (forget_a_candidate, "could be dropped and is not offered"),
    ],
)
def test_the_check_finds_each_kind_of_fault(spoil, sentence):
    tier = filled(4, 1, 2)
    spoil(tier)
    assert any(sentence in fault for fault in tier.check())


class DictStore:
    """The smallest block store."""

    def __init__(self) -> None:
        self._data: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self._data.get(key)

    def put(self, key: bytes, data: bytes) -> bool:
        self._data[key] = data
        return True

    def __contains__(self, key: object) -> bool:
        return key in self._data


def test_a_dictionary_makes_a_block_store():
    store: BlockStore = DictStore()
    assert store.get(key(1)) is None
    assert store.put(key(1), b"\0\1")
    assert key(1) in store
    assert store.get(key(1)) == b"\0\1"
