from array import array

import pytest

from pageframe.core.request import StallCause
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.sequence import LEGAL_TRANSITIONS, Sequence, SequenceState
from pageframe.scheduler.stalls import Stall, StallMeter
from unit.scheduler.driver import make_submission


def make_sequence(num_prompt_tokens: int = 10, sequence_id: int = 1, **submission) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        sample_index=0,
        submission=make_submission(sequence_id, num_prompt_tokens, **submission),
        gateway_id=1,
        outbox=Outbox(1),
        output=array("i"),
        span_id=0,
        submit_ns=0,
        stalls=StallMeter(),
    )


def test_only_the_written_transitions_are_legal():
    for source in SequenceState:
        for target in SequenceState:
            sequence = make_sequence()
            sequence.state = source
            if target in LEGAL_TRANSITIONS[source]:
                sequence.move_to(target)
                assert sequence.state is target
            else:
                with pytest.raises(AssertionError, match="is not legal"):
                    sequence.move_to(target)


def test_every_state_can_end_and_nothing_leads_out_of_the_end():
    for state in SequenceState:
        is_end = state is SequenceState.ENDED
        assert (SequenceState.ENDED in LEGAL_TRANSITIONS[state]) is not is_end
    assert LEGAL_TRANSITIONS[SequenceState.ENDED] == frozenset()


def test_computed_tokens_follow_the_output_once_caught_up():
    sequence = make_sequence(10)
    sequence.advance(7)
    assert (sequence.num_computed, sequence.is_caught_up) == (7, False)
    sequence.advance(10)
    sequence.output.append(5)
    assert (sequence.num_computed, sequence.num_tokens, sequence.is_caught_up) == (10, 11, True)
    sequence.output.append(6)
    assert sequence.num_computed == 11


def test_a_prompt_that_lacks_one_token_has_caught_up():
    sequence = make_sequence(10)
    sequence.advance(9)
    assert sequence.is_caught_up
    assert sequence.num_computed == 9


def test_tokens_in_flight_never_plan_beyond_the_known_tokens():
    sequence = make_sequence(10)
    sequence.advance(6)
    sequence.num_tokens_in_flight = 8
    assert (sequence.num_planned, sequence.num_uncomputed) == (10, 0)


def test_losing_blocks_makes_entries_in_flight_a_thing_of_the_past():
    sequence = make_sequence(10)
    sequence.advance(6)
    sequence.num_tokens_in_flight = 2
    sequence.lose_blocks(1)
    assert (sequence.num_computed, sequence.num_planned, sequence.generation) == (0, 0, 1)
    with pytest.raises(AssertionError, match="generation 1 after 1"):
        sequence.lose_blocks(1)


def test_a_lost_tail_leaves_the_head_and_makes_entries_in_flight_stale_too():
    sequence = make_sequence(10)
    sequence.advance(10)
    sequence.output.append(5)
    sequence.num_tokens_in_flight = 2
    sequence.lose_tail(1, 8)
    assert (sequence.num_computed, sequence.num_planned, sequence.generation) == (8, 8, 1)
    assert (sequence.is_caught_up, sequence.has_lost_tail) == (False, True)
    sequence.advance(10)
    assert (sequence.is_caught_up, sequence.has_lost_tail) == (True, False)
    with pytest.raises(AssertionError, match="keeps 11 of 10"):
        sequence.lose_tail(2, 11)


def test_what_was_swapped_out_is_expected_to_be_found():
    sequence = make_sequence(10)
    sequence.advance(10)
    sequence.lose_blocks(1, num_swapped=10)
    # At least the newest token is computed.
    assert (sequence.num_computed, sequence.num_cached_tokens) == (0, 9)


def test_a_stall_meter_measures_one_cause_after_the_other():
    meter = StallMeter(StallCause.QUEUE, 100)
    assert meter.switch(StallCause.QUEUE, 120) is None
    assert meter.switch(StallCause.KV_FULL, 150, (b"t", 9)) == Stall(StallCause.QUEUE, 100, 150)
    assert meter.switch(None, 170) == Stall(StallCause.KV_FULL, 150, 170, (b"t", 9))
    assert meter.switch(StallCause.QUEUE, 200) is None
    assert meter.switch(None, 230) == Stall(StallCause.QUEUE, 200, 230)
    assert meter.stall_ns == {StallCause.QUEUE: 80, StallCause.KV_FULL: 20}


def test_a_clock_that_runs_back_measures_nothing():
    meter = StallMeter(StallCause.QUEUE, 100)
    assert meter.switch(StallCause.KV_FULL, 90) is None
    assert meter.switch(None, 110) == Stall(StallCause.KV_FULL, 100, 110)
    assert meter.stall_ns == {StallCause.KV_FULL: 10}
