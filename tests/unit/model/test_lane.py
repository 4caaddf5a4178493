"""Steps on a lane of their own: in order, with the tokens of the one before, whatever fails."""

import threading
import time

import numpy as np
import pytest

from pageframe.executor.batch import NEWEST, StepBatch, StepOutput
from pageframe.executor.model.lane import Lane

PATIENCE_S = 30


def make_batch(step, rows, token_ids, **fields):
    """One token of each of ``rows``."""
    count = len(rows)
    return StepBatch(
        step=step,
        num_decodes=count,
        rows=np.array(rows),
        token_ids=np.array(token_ids, np.int32),
        positions=np.zeros(count, np.int32),
        slots=np.zeros(count, np.int64),
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=np.ones(count, np.int32),
        block_tables=np.zeros((count, 1), np.int32),
        samples=np.arange(count, dtype=np.int32),
        sample_rows=np.array(rows, np.int32),
        **fields,
    )


def launch(lane, model, batch):
    return lane.launch(batch, lambda: model.compute(batch))


class Model:
    """Adds ten to each token; a step may be held, or fail."""

    def __init__(self):
        self.inputs = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails_in = 0

    def compute(self, batch):
        assert self.gate.wait(PATIENCE_S)
        self.inputs.append((batch.step, batch.token_ids.tolist()))
        batch.on_launch()
        batch.meanwhile()
        if batch.step == self.fails_in:
            raise RuntimeError("the core is on fire")
        return StepOutput(token_ids=batch.token_ids + 10)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def lane(model):
    made = Lane()
    yield made
    model.gate.set()
    made.close()


def test_a_step_finds_the_tokens_of_the_one_before_by_row(lane, model):
    launch(lane, model, make_batch(1, [2, 0], [5, 6]))
    flight = launch(lane, model, make_batch(2, [0, 2, 1], [NEWEST, NEWEST, 7]))
    assert flight.collect().token_ids.tolist() == [26, 25, 17]
    assert model.inputs == [(1, [5, 6]), (2, [16, 15, 7])]


def test_launching_does_not_wait_and_collecting_does(lane, model):
    model.gate.clear()
    flights = [
        launch(lane, model, make_batch(step, [0], [token])) for step, token in ((1, 5), (2, NEWEST))
    ]
    assert not any(flight.is_over.is_set() for flight in flights)
    model.gate.set()
    assert [flight.collect().token_ids.tolist() for flight in flights] == [[5 + 10], [5 + 20]]


def test_hand_overs_are_made_by_who_launches(lane, model):
    threads = []
    batch = make_batch(
        1,
        [0],
        [5],
        on_launch=lambda: threads.append(threading.current_thread()),
        meanwhile=lambda: threads.append("meanwhile"),
    )
    launch(lane, model, batch).collect()
    assert threads == [threading.current_thread()]


def test_a_failure_is_told_to_who_collects_and_the_next_step_runs(lane, model):
    model.fails_in = 1
    first, second = (launch(lane, model, make_batch(step, [0], [5])) for step in (1, 2))
    second.wait()
    with pytest.raises(RuntimeError, match="on fire"):
        first.collect()
    assert second.collect().token_ids.tolist() == [15]


def test_closing_ends_behind_what_was_launched(model):
    lane = Lane()
    flight = launch(lane, model, make_batch(1, [0], [5]))
    lane.close()
    assert flight.is_over.is_set()
    assert not any(thread.name == "lane" for thread in threading.enumerate())
    lane.close()


def test_it_tells_when_a_step_was_over(lane, model):
    before_ns = time.monotonic_ns()
    flight = launch(lane, model, make_batch(1, [0], [5]))
    flight.wait()
    assert before_ns <= flight.collect().over_ns <= time.monotonic_ns()
