"""The baseline takes many steps at once; here is the slow, obvious version beside it."""

import random
from collections import deque

import numpy as np
import pytest

from bench.paper.buddy import BuddyAllocator
from bench.paper.cost_model import CostModel
from bench.paper.orca import OrcaServer, Reservation
from bench.paper.workload import Workload
from unit.bench.bench_house import make_cost, make_workload

NUM_SLOTS = 8192
MAX_RUNNING = 6
MAX_TOKENS = 300


def step_by_step(reservation: Reservation, workload: Workload, cost: CostModel) -> list[float]:
    """When each request ends, in nanoseconds, one step after another."""
    memory = BuddyAllocator(cost.num_slots)
    lengths = workload.lengths
    arrivals = deque(range(len(workload)))
    waiting: deque[int] = deque()
    running: list[list[int]] = []  # request, address, computed, left
    ends = [0.0] * len(workload)
    now = 0.0
    while arrivals or waiting or running:
        while arrivals and workload.arrival_ns[arrivals[0]] <= now:
            waiting.append(arrivals.popleft())
        num_new = num_decodes = len(running)
        while waiting and len(running) < MAX_RUNNING:
            request = waiting[0]
            prompt, output = (
                int(column[request])
                for column in (lengths.num_prompt_tokens, lengths.num_output_tokens)
            )
            if num_new + prompt > MAX_TOKENS:
                break
            address = memory.allocate(reservation.num_slots(prompt, output))
            if address is None:
                break
            waiting.popleft()
            num_new += prompt
            running.append([request, address, prompt - 1, output])
        if not running:
            now = float(workload.arrival_ns[arrivals[0]])
            continue
        assert num_decodes <= num_new
        for one in running:
            one[2] += 1
            one[3] -= 1
        now += cost.of_step(num_new, sum(one[2] for one in running))
        for one in running:
            if not one[3]:
                memory.free(one[1])
                ends[one[0]] = now
        running = [one for one in running if one[3]]
    return ends


@pytest.mark.parametrize("reservation", Reservation)
@pytest.mark.parametrize("seed", range(6))
def test_many_steps_at_once_are_the_same_as_one_by_one(reservation, seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 200), rng.randint(1, 150)) for _ in range(60)]
    gap_ns = rng.choice([1_000, 30_000, 300_000])
    arrivals = np.cumsum([rng.randint(0, gap_ns) for _ in pairs]).tolist()
    workload = make_workload(pairs, arrivals)
    cost = make_cost(NUM_SLOTS)
    server = OrcaServer(reservation, cost, max_num_running=MAX_RUNNING, max_step_tokens=MAX_TOKENS)
    run = server.serve(workload)
    ends_ns = np.array(step_by_step(reservation, workload, cost))
    expected = (ends_ns - workload.arrival_ns) / 1e9 / workload.lengths.num_output_tokens
    np.testing.assert_allclose(run.latency_s_per_token, expected, rtol=1e-9)
    parts = ("num_token_slots", "num_future_slots", "num_unused_slots")
    assert sum(run.usage.mean(name) for name in parts) <= run.usage.mean("num_held_slots")
    assert run.usage.columns["num_unused_slots"].min() >= 0
    assert run.usage.columns["num_future_slots"].min() >= 0


def test_what_is_reserved():
    assert Reservation.MAX.num_slots(100, 25) == 2048
    assert Reservation.POW2.num_slots(100, 25) == 132
    assert Reservation.POW2.num_slots(1800, 200) == 2048
    assert Reservation.ORACLE.num_slots(100, 25) == 125


def test_a_lone_request_costs_its_steps():
    cost = make_cost(2048)
    server = OrcaServer(Reservation.ORACLE, cost, max_num_running=4, max_step_tokens=64)
    run = server.serve(make_workload([(5, 3)], [7]))
    # 5 tokens of prompt, then two more: the keys and values of the third are never computed.
    steps_ns = (1000 + 50 + 10) + (1000 + 10 + 12) + (1000 + 10 + 14)
    assert run.latency_s_per_token.tolist() == [pytest.approx(steps_ns / 1e9 / 3)]
    assert run.usage.num_steps == 3
    # 5, 6 and 7 of the 8 slots hold tokens; the one of the last token is never used.
    assert run.usage.mean("num_token_slots") == 6
    assert run.usage.mean("num_future_slots") == 1
    assert run.usage.mean("num_unused_slots") == 1
    assert run.usage.mean("num_held_slots") == 8


def test_samples_are_sequences_of_their_own():
    cost = make_cost(2048)
    server = OrcaServer(Reservation.ORACLE, cost, max_num_running=4, max_step_tokens=64)
    run = server.serve(make_workload([(4, 2)], [0], num_samples=3))
    assert run.usage.columns["num_running"].tolist() == [3, 3]
    assert run.usage.mean("num_held_slots") == 3 * 8
