"""The real scheduler and engine in virtual time, on workloads small enough to count."""

import pytest

from bench.paper.orca import OrcaServer, Reservation
from bench.paper.paged import PagedConfig, PagedServer
from unit.bench.bench_house import make_cost, make_workload

LONE_NS = (1000 + 50 + 10) + (1000 + 10 + 12) + (1000 + 10 + 14)


def serve(workload, num_slots=4096, **fields):
    config = PagedConfig(**{"block_size": 4, "max_num_running": 8, "token_budget": 256} | fields)
    return PagedServer(config, make_cost(num_slots), seed=0).serve(workload)


def test_a_lone_request_costs_its_steps():
    run = serve(make_workload([(5, 3)], [100]))
    assert run.latency_s_per_token.tolist() == [pytest.approx(LONE_NS / 1e9 / 3)]
    columns = run.usage.columns
    assert columns["num_token_slots"].tolist() == [5, 6, 7]
    assert columns["num_held_slots"].tolist() == [8, 8, 8]
    assert columns["num_blocks_unshared"].tolist() == [2, 2, 2]
    assert not columns["is_waiting"].any()


def test_alone_and_in_time_every_system_is_equally_fast():
    workload = make_workload([(5, 3), (9, 2), (1, 4)], [0, 100_000, 200_000])
    paged = serve(workload)
    orca = OrcaServer(
        Reservation.ORACLE, make_cost(4096), max_num_running=8, max_step_tokens=256
    ).serve(workload)
    # The paged clock has whole nanoseconds and begins at one.
    assert paged.latency_s_per_token == pytest.approx(orca.latency_s_per_token, rel=1e-3)


def test_somebody_waits_while_the_batch_is_full():
    run = serve(make_workload([(4, 6), (4, 6), (4, 6)], [0, 0, 0]), max_num_running=2)
    pressed = run.usage.under_pressure()
    assert pressed.num_steps == 6
    assert run.usage.num_steps == 12
    assert pressed.mean("num_running") == 2


def test_a_small_memory_preempts_and_still_serves_everybody():
    run = serve(make_workload([(8, 1500)] * 3, [0, 0, 0]), num_slots=2048)
    assert run.num_preemptions > 0
    assert (run.latency_s_per_token > 0).all()


def test_samples_of_one_request_share_its_prompt():
    run = serve(make_workload([(10, 4)], [0], num_samples=3))
    columns = run.usage.columns
    # Ten tokens: two full blocks, which stay shared, and two tokens in a third.
    assert columns["num_running"].tolist() == [1, 3, 3, 3]
    assert columns["num_blocks"].tolist() == [3, 5, 5, 8]
    assert columns["num_blocks_unshared"].tolist() == [3, 9, 9, 12]
    assert columns["num_copies"].tolist() == [0, 2, 0, 0]
