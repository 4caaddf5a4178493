"""The figures of the split are exact where time is: sides played, clocks moved by hand."""

import asyncio
from types import SimpleNamespace

import pytest

from pageframe.lab import bench_split
from pageframe.lab.bench_split import measure_split
from pageframe.lab.workload import WorkloadShape, make_workload

SHAPE = WorkloadShape(num_requests=2, num_prompt_tokens=(1, 8), num_output_tokens=(50, 50))
VOCAB_SIZE = 100


class PlayedSides:
    """Two sides that take as long as they are told, round by round, the warm-up first."""

    def __init__(self, split_s, single_s):
        self.durations_s = {"split": list(split_s), "single": list(single_s)}
        self.now_s = 1000.0
        self.order = []
        self.loads = {"split": [], "single": []}
        self.cpu_s = {"gateway": 5.0, "client": 7.0}

    def run(self, side):
        async def run(loads):
            self.order.append(side)
            self.loads[side].append(loads)
            duration_s = self.durations_s[side].pop(0)
            self.now_s += duration_s
            # The client works for both sides, but only the split's share may count.
            self.cpu_s["client"] += duration_s
            if side == "split":
                self.cpu_s["gateway"] += duration_s / 4

        return run

    async def rest(self):
        self.now_s += 10
        self.cpu_s["client"] += 3
        self.order.append("rest")

    def measure(self, monkeypatch, num_rounds):
        clock = SimpleNamespace(perf_counter=lambda: self.now_s)
        monkeypatch.setattr(bench_split, "time", clock)
        rounds = []
        report = asyncio.run(
            measure_split(
                self.run("split"),
                self.run("single"),
                shape=SHAPE,
                vocab_size=VOCAB_SIZE,
                num_rounds=num_rounds,
                cpu_seconds=lambda: dict(self.cpu_s),
                rest=self.rest,
                on_round=lambda index, entry: rounds.append((index, entry)),
            )
        )
        assert rounds == list(enumerate(report.rounds, 1))
        return report


def test_ratios_are_exact_and_the_figure_is_their_median(monkeypatch):
    sides = PlayedSides(split_s=[9, 2, 4, 1], single_s=[9, 1, 1, 1])
    report = sides.measure(monkeypatch, 3)
    assert [entry.ratio for entry in report.rounds] == [0.5, 0.25, 1.0]
    assert report.ratio == 0.5
    assert [entry.split_tokens_per_s for entry in report.rounds] == [50, 25, 100]
    assert [entry.single_tokens_per_s for entry in report.rounds] == [100, 100, 100]
    assert report.to_json()["ratio"] == 0.5
    assert report.to_json()["rounds"][1] == {
        "split_tokens_per_s": 25,
        "single_tokens_per_s": 100,
        "ratio": 0.25,
    }


def test_order_alternates_behind_a_warm_up_of_both(monkeypatch):
    sides = PlayedSides(split_s=[1, 1, 1], single_s=[1, 1, 1])
    sides.measure(monkeypatch, 2)
    assert sides.order[::2] == ["rest"] * 6
    assert sides.order[5::2] == ["split", "single", "single", "split"]
    assert sorted(sides.order[1:4:2]) == ["single", "split"]


def test_both_sides_do_the_same_work_and_rounds_bring_new_tokens(monkeypatch):
    sides = PlayedSides(split_s=[1, 1, 1], single_s=[1, 1, 1])
    sides.measure(monkeypatch, 2)
    assert sides.loads["split"] == sides.loads["single"]
    first, second, third = sides.loads["split"]
    assert first != second != third
    assert [len(load.prompt_token_ids) for load in first] == [
        len(load.prompt_token_ids) for load in second
    ]


def test_processor_time_is_that_of_the_split_side_without_the_warm_up(monkeypatch):
    sides = PlayedSides(split_s=[9, 2, 4], single_s=[9, 1, 1])
    report = sides.measure(monkeypatch, 2)
    # 6 s of client and a quarter of that of gateway, over 2 rounds of 100 tokens.
    assert report.cpu_us_per_token == {"client": 30_000.0, "gateway": 7_500.0}


@pytest.mark.parametrize("seed", range(5))
def test_a_workload_has_the_same_lengths_for_every_seed(seed):
    shape = WorkloadShape(num_requests=40, num_prompt_tokens=(3, 9), num_output_tokens=(2, 5))
    loads = make_workload(shape, VOCAB_SIZE, seed)
    assert loads == make_workload(shape, VOCAB_SIZE, seed)
    other = make_workload(shape, VOCAB_SIZE, seed + 1)
    assert loads != other

    def lengths(workload):
        return [(len(load.prompt_token_ids), load.num_output_tokens) for load in workload]

    assert lengths(loads) == lengths(other)
    # Forty draws meet both ends of so short a range.
    assert {length for length, _ in lengths(loads)} >= {3, 9}
    assert {length for _, length in lengths(loads)} == {2, 3, 4, 5}
    token_ids = [token_id for load in loads for token_id in load.prompt_token_ids]
    assert 17 <= min(token_ids) <= max(token_ids) < VOCAB_SIZE
