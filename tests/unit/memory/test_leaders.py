"""Who is about to compute which prefix, and what an announcement is told about it."""

from pageframe.core.plan import Recovery
from pageframe.executor.memory.leaders import Leaders
from unit.executor.small_engine import SmallEngine, request
from unit.memory.memories import entries

A, B, C, D = (bytes([letter]) * 32 for letter in b"abcd")
EIGHT = list(range(10, 18))
TEN = list(range(10, 20))


class TestBook:
    def test_the_first_who_announces_a_key_leads(self):
        leaders = Leaders()
        leaders.lead(1, [A, B])
        leaders.lead(2, [A, B, C])
        assert leaders.find([A, B, C]) == (1, 2)
        assert leaders.find([C]) == (2, 1)
        assert len(leaders) == 3

    def test_it_leads_as_far_as_its_keys_go_without_a_break(self):
        leaders = Leaders()
        leaders.lead(1, [A])
        leaders.lead(2, [A, B])
        leaders.lead(1, [C])
        assert leaders.find([A, B, C]) == (1, 1)

    def test_nobody_leads_what_nobody_announced(self):
        leaders = Leaders()
        leaders.lead(1, [B])
        assert leaders.find([A, B]) == (0, 0)
        assert leaders.find([]) == (0, 0)

    def test_what_is_computed_is_led_no_longer(self):
        leaders = Leaders()
        leaders.lead(1, [A, B])
        leaders.computed([A, D])
        assert leaders.find([A]) == (0, 0)
        assert leaders.find([B]) == (1, 1)
        leaders.computed([B])
        assert len(leaders) == 0
        leaders.forget(1)

    def test_a_sequence_that_is_gone_leads_nothing(self):
        leaders = Leaders()
        leaders.lead(1, [A, B])
        leaders.lead(2, [B, C])
        leaders.forget(1)
        assert leaders.find([A]) == leaders.find([B]) == (0, 0)
        assert leaders.find([C]) == (2, 1)
        leaders.forget(1)
        leaders.forget(9)

    def test_the_place_of_one_who_is_gone_is_taken_by_the_next_announcement(self):
        leaders = Leaders()
        leaders.lead(1, [A])
        leaders.forget(1)
        leaders.lead(2, [A])
        assert leaders.find([A]) == (2, 1)


class TestAnnouncements:
    def test_the_second_of_two_alike_is_told_who_leads_and_how_far(self):
        small = SmallEngine()
        result = small.step(announce=[request(1, TEN), request(2, [*EIGHT, 30, 31])])
        assert result.leader_ids == [0, 1]
        assert result.num_leader_tokens == [0, 8]
        assert result.num_cached_tokens == [0, 0]

    def test_it_is_told_of_all_tokens_but_one_at_most(self):
        small = SmallEngine()
        result = small.step(announce=[request(1, EIGHT), request(2, EIGHT)])
        assert (result.leader_ids, result.num_leader_tokens) == ([0, 1], [0, 7])

    def test_what_is_here_already_counts_as_shared_with_what_is_led(self):
        small = SmallEngine()
        small.cache(TEN[:5])
        result = small.step(announce=[request(1, [*EIGHT, 1]), request(2, [*EIGHT, 2])])
        assert result.num_cached_tokens == [4, 4]
        assert (result.leader_ids, result.num_leader_tokens) == ([0, 1], [0, 8])

    def test_nobody_leads_once_the_leader_has_written(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        result = small.step(announce=[request(2, TEN)])
        assert (result.num_cached_tokens, result.leader_ids) == ([8], [0])

    def test_what_the_leader_has_written_is_led_no_longer(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN), request(2, [*TEN, 30, 31])], may=entries((1, 0, 5)))
        assert len(small.memory.leaders) == 2
        small.step(must=entries((1, 0, 5)), may=entries((2, 0, 64)))
        assert len(small.memory.leaders) == 0

    def test_a_leader_in_the_middle_of_its_prompt_leads_the_rest(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 5)))
        result = small.step(announce=[request(2, TEN)])
        assert result.num_cached_tokens == [4]
        assert (result.leader_ids, result.num_leader_tokens) == ([1], [8])

    def test_a_leader_that_gave_way_leads_still(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 3)))
        small.preempt(1, Recovery.RECOMPUTE)
        assert small.step(announce=[request(2, TEN)]).leader_ids == [1]

    def test_a_leader_that_ended_leads_no_more(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)])
        small.engine.cancel([1])
        assert small.step(announce=[request(2, TEN)]).leader_ids == [0]
        assert len(small.memory.leaders) == 2

    def test_another_salt_has_another_leader(self):
        small = SmallEngine()
        result = small.step(announce=[request(1, TEN), request(2, TEN, cache_salt=b"x")])
        assert result.leader_ids == [0, 0]

    def test_without_a_prefix_cache_nobody_leads(self):
        small = SmallEngine(has_prefix_cache=False)
        result = small.step(announce=[request(1, TEN), request(2, TEN)])
        assert result.leader_ids == [0, 0]

    def test_nobody_is_told_to_wait_for_nothing(self):
        """With blocks of one token the last one is computed anew whoever computed it before."""
        small = SmallEngine(block_size=1)
        result = small.step(announce=[request(1, [10]), request(2, [10])])
        assert (result.leader_ids, result.num_leader_tokens) == ([0, 0], [0, 0])
        small.cache(range(30, 35))
        result = small.step(announce=[request(3, range(30, 36)), request(4, range(30, 36))])
        assert (result.num_cached_tokens, result.leader_ids) == ([5, 5], [0, 0])

    def test_nothing_is_left_when_all_have_ended(self):
        small = SmallEngine()
        small.start(request(1, TEN), request(2, TEN))
        small.step(announce=[request(3, [*TEN, 30, 31])])
        small.engine.cancel([1, 2, 3])
        assert len(small.memory.leaders) == 0
