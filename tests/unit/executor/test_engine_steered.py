"""Steered sequences in the engine: a token when an entry names them, and not otherwise."""

from pageframe.core.plan import Recovery, Victims
from unit.executor.small_engine import SmallEngine, alone, fork, request
from unit.memory.memories import entries

SIX = list(range(10, 16))


def steered(sequence_id: int, token_ids=SIX):
    return request(sequence_id, token_ids, is_steered=True)


def test_it_takes_no_token_unasked():
    small = SmallEngine()
    assert small.start(steered(1)).sampled_ids == [1]
    assert small.step().sampled_ids == []
    assert small.num_computed(1) == 6
    result = small.step(must=entries((1, 0, 1)))
    assert (result.sampled_ids, result.computed_ids) == ([1], [1])
    assert (result.num_computed, result.first_positions) == ([7], [6])
    assert small.step(may=entries((1, 0, 1))).computed_ids == [1]
    assert small.output(1) == alone(SIX, 3)


def test_others_go_on_beside_it():
    small = SmallEngine()
    small.start(steered(1), request(2, SIX[:3]))
    assert small.step().sampled_ids == [2]
    # Whoever decodes unasked stands first in the batch.
    assert small.step(must=entries((1, 0, 1))).sampled_ids == [2, 1]
    assert small.output(2) == alone(SIX[:3], 3)


def test_an_entry_is_never_more_than_what_is_known():
    small = SmallEngine()
    small.start(steered(1))
    small.step(must=entries((1, 0, 9)))
    assert small.num_computed(1) == 7


def test_its_token_counts_when_victims_are_chosen():
    small = SmallEngine(num_blocks=4)
    # Both fill their two blocks with this step; one of them has to go for the other's third.
    small.start(steered(1, [*SIX, 20, 21]), request(2, [30, 31, 32, 33, 34, 35, 36]))
    small.step()
    victims = Victims()
    victims.add(2, 0, Recovery.RECOMPUTE, 1)
    result = small.step(must=entries((1, 0, 1)), victims=victims)
    assert (result.preempted_ids, result.sampled_ids) == ([2], [1])
    assert small.table(1) == [0, 1, 3]


def test_a_step_of_too_many_tokens_is_refused():
    small = SmallEngine(num_rows=64, num_blocks=64)
    small.start(*(steered(number, [number]) for number in range(1, 61)))
    small.start(request(61, [1]), request(62, [2]), request(63, [3]), request(64, [4]))
    plan = entries(*((number, 0, 1) for number in range(1, 61)))
    assert small.step(must=plan).refusal == ""
    small.engine._bounds = type(small.engine._bounds)(
        max_step_tokens=63, max_model_len=64, vocab_size=97
    )
    assert small.step(must=plan).refusal == "STEP_TOKENS_EXCEEDED"


def test_a_child_of_a_fork_is_steered_too():
    small = SmallEngine()
    small.step(announce=[steered(1)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    assert small.step().sampled_ids == []
    # Both write into the partly filled block that they share: the first copies it.
    assert small.step(must=entries((1, 0, 1), (2, 0, 1))).sampled_ids == [1, 2]
    assert small.table(1)[0] == small.table(2)[0]
    assert small.table(1)[1] != small.table(2)[1]
    assert small.output(2) == alone(SIX, 2, sample_index=1)


def test_its_row_is_nobodys_when_it_has_gone():
    small = SmallEngine(num_rows=1)
    small.start(steered(1))
    small.step(finish=[1])
    small.start(request(2, SIX))
    assert small.step().sampled_ids == [2]


def test_it_stays_steered_when_it_comes_back():
    small = SmallEngine()
    small.start(steered(1))
    small.preempt(1, Recovery.RECOMPUTE)
    assert small.resume(1).sampled_ids == [1]
    assert small.step().sampled_ids == []
