"""``pageframe simulate`` and ``pageframe replay``, as a person calls them."""

import json
from pathlib import Path

import pytest

from pageframe.cli.main import main
from pageframe.core.clock import ManualClock
from pageframe.core.journal import MemorySetup
from pageframe.core.replica import ReplicaFacts
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner
from pageframe.lab.replay_arrivals import read_workload
from pageframe.scheduler.journal import JournalFile, RecordingScheduler
from pageframe.scheduler.options import SchedulerOptions
from pageframe.wire.journal import JournalReader
from unit.scheduler.driver import make_submission

SHORT = ["--arrivals", "poisson", "--num-requests", "20", "--mean-output-tokens", "5"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0


def test_policies_stand_side_by_side(capsys):
    assert run("simulate", *SHORT, "--policy", "fcfs", "--policy", "big:token-budget=4096") == 0
    shown = capsys.readouterr()
    assert "fcfs" in shown.out
    assert "big" in shown.out
    assert "goodput [requests/s]" in shown.out
    assert "simulating" in shown.err


def test_figures_are_told_to_machines(capsys):
    assert run("simulate", *SHORT, "--json", "--slo-ttft", "1s", "--slo-itl", "50ms") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["objectives"] == {"ttft_s": 1.0, "itl_s": 0.05}
    (policy,) = document["policies"]
    assert policy["name"] == "default"
    assert policy["num_finished"] == 20
    assert policy["itl_s"]["p99"] >= policy["itl_s"]["p50"] > 0


def test_a_file_of_arrivals_is_served(tmp_path: Path, capsys):
    path = tmp_path / "arrivals.jsonl"
    path.write_text('{"arrival_s": 0, "num_prompt_tokens": 10, "num_output_tokens": 4}\n')
    assert run("simulate", "--arrivals", str(path), "--cost", "base=10ms", "--json") == 0
    (policy,) = json.loads(capsys.readouterr().out)["policies"]
    assert policy["latency_s"]["max"] == pytest.approx(0.04)


def test_prefixes_are_found_again(capsys):
    prefixes = ("--num-prefixes", "1", "--num-prefix-tokens", "64")
    assert run("simulate", *SHORT, *prefixes, "--json") == 0
    assert json.loads(capsys.readouterr().out)["policies"][0]["cached_share"] > 0


def test_plots_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert run("simulate", *SHORT, "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "colour=blue"], "neither KEY=VALUE"),
        (["--policy", "token-budget=none"], "token-budget"),
        (["--set", "block-size"], "must be KEY=VALUE"),
        (["--set", "colour=blue"], "colour"),
        (["--cost", "base=fast"], "is no cost"),
        (["--slo-itl", "soon"], "--slo-itl"),
        (["--arrivals", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_malformed_is_named_in_a_line(arguments, message, capsys):
    assert run("simulate", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("pageframe: ")
    assert message in error


def record(path: Path, num_requests: int = 12) -> ReplicaFacts:
    """Serve some requests with steps of 1 ms and 20 us a prefill token, and record it."""
    clock = ManualClock(1_000_000)
    cost = SimCost(step_ns=1e6, prefill_token_ns=20e3)
    runner = SimRunner(SimConfig(max_model_len=256, max_num_rows=8, cost=cost), clock)
    engine = StepEngine(
        runner,
        num_blocks=100,
        block_size=16,
        max_num_sequences=8,
        max_step_tokens=64,
        max_model_len=256,
        trace=NullTraceSink(),
        clock=clock,
    )
    facts = engine.describe("recorded")
    journal = JournalFile(path)
    scheduler = RecordingScheduler(
        facts,
        SchedulerOptions(token_budget=64, max_num_running=8),
        trace=NullTraceSink(),
        clock=clock,
        journal=journal,
        memory=MemorySetup(),
    )
    plans = []
    for handle in range(1, num_requests + 1):
        sampling = SamplingParams(max_tokens=5 + handle, seed=handle, ignore_eos=True)
        scheduler.submit(make_submission(handle, 40 * (1 + handle % 3), sampling=sampling), 1)
        for _ in range(3):
            while (plan := scheduler.plan(clock.now_ns())) is not None:
                plans.append(plan)
            scheduler.on_result(engine.step(plans.pop(0)), clock.now_ns())
    while not scheduler.is_idle:
        while (plan := scheduler.plan(clock.now_ns())) is not None:
            plans.append(plan)
        if plans:
            scheduler.on_result(engine.step(plans.pop(0)), clock.now_ns())
        scheduler.expire(clock.now_ns())
    journal.close()
    return facts


def test_a_recorded_run_is_the_same_again(tmp_path: Path, capsys):
    path = tmp_path / "journal"
    record(path)
    assert run("replay", str(path)) == 0
    first, second = capsys.readouterr().out.splitlines()
    num_steps = int(first.split()[0])
    assert first == f"{num_steps} of {num_steps} steps the same"
    assert second == f"KV memory: {num_steps} of {num_steps} results the same"
    assert run("replay", str(path), "--no-memory", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["is_same"], document["num_results"]) == (True, 0)
    assert (document["num_requests"], document["num_steps"]) == (12, num_steps)


def test_a_run_that_differs_ends_with_1_and_shows_where(tmp_path: Path, capsys):
    path = tmp_path / "journal"
    record(path)
    data = path.read_bytes()
    assert data.count(b'"token_budget":64') == 1
    path.write_bytes(data.replace(b'"token_budget":64', b'"token_budget":63'))
    assert run("replay", str(path)) == 1
    shown = capsys.readouterr().out
    assert "first difference: plan, record " in shown
    assert "-  num_tokens: [64]" in shown
    assert "+  num_tokens: [63]" in shown


def test_a_journal_that_was_cut_off_is_read_with_a_warning(tmp_path: Path, capsys):
    path = tmp_path / "journal"
    record(path)
    path.write_bytes(path.read_bytes()[:-3])
    assert run("replay", str(path)) == 0
    shown = capsys.readouterr()
    assert "steps the same" in shown.out
    assert "the journal was cut off" in shown.err


def test_a_journal_that_is_none_is_named_in_a_line(tmp_path: Path, capsys):
    path = tmp_path / "journal"
    path.write_bytes(b"\x03abc")
    assert run("replay", str(path)) == 2
    assert "record 1 of the journal cannot be read" in capsys.readouterr().err
    assert run("replay", str(tmp_path / "nowhere")) == 2
    assert "cannot read" in capsys.readouterr().err


def test_recorded_arrivals_are_served_under_other_policies(tmp_path: Path, capsys):
    path = tmp_path / "journal"
    record(path)
    policies = ("--policy", "small:token-budget=16", "--policy", "fcfs")
    assert run("replay", str(path), *policies, "--json") == 0
    recorded, small, fcfs = json.loads(capsys.readouterr().out)["policies"]
    assert [recorded["name"], small["name"], fcfs["name"]] == ["recorded", "small", "fcfs"]
    assert {it["num_finished"] for it in (recorded, small, fcfs)} == {12}
    assert small["ttft_s"]["p99"] > recorded["ttft_s"]["p99"]


def test_a_journal_says_who_came_and_what_steps_cost(tmp_path: Path):
    path = tmp_path / "journal"
    facts = record(path)
    with path.open("rb") as file:
        workload = read_workload(JournalReader(file))
    assert workload.header.facts == facts
    assert [it.num_output_tokens for it in workload.arrivals] == [5 + it for it in range(1, 13)]
    assert [it.num_prompt_tokens for it in workload.arrivals[:3]] == [80, 120, 40]
    assert workload.arrivals[0].arrival_s == 0
    assert workload.cost.base_ns == pytest.approx(1e6, rel=0.01)
    assert workload.cost.prefill_ns == pytest.approx(20e3, rel=0.05)
    assert workload.cost.num_blocks(16) == 100


def test_too_few_steps_do_not_tell_what_steps_cost(tmp_path: Path, capsys):
    path = tmp_path / "journal"
    record(path, num_requests=1)
    assert run("replay", str(path), "--policy", "fcfs") == 2
    assert "at least 20 do" in capsys.readouterr().err
