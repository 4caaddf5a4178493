"""What a scheduler recorded is replayed decision for decision, and so is KV memory."""

import dataclasses
import io
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pageframe.core.beams import BeamParams
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.journal import (
    Cancelled,
    Entry,
    ExecutorLost,
    Header,
    Planned,
    ResultTaken,
    Submitted,
)
from pageframe.core.plan import Recovery
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.core.trace import QuietTraceSink
from pageframe.lab.replay import replay
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.journal import RecordingScheduler
from pageframe.wire.journal import JournalReader
from property.recording import MoodyRunner, Recording, make_recording, record
from unit.scheduler.driver import make_submission


def happened(driver: Recording) -> Counter:
    found: Counter = Counter()
    for entry in driver.notes.entries:
        found[type(entry.call).__name__] += 1
    for result in driver.engine.results:
        found["preempted"] += len(result.preempted_ids)
        found["forked"] += len(result.forked_ids)
        found["refused plans"] += bool(result.refusal)
        for account in result.accounts.values():
            found["hits"] += account.num_cached_tokens > 0
            found["copies"] += account.num_copies_on_write
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [True, False])
def test_a_thousand_requests_are_replayed_decision_for_decision(lookahead):
    seed = 7 + lookahead
    print(f"seed={seed}")
    driver = record(1000, seed, lookahead=lookahead, trace=QuietTraceSink())
    found = happened(driver)
    assert found["Submitted"] == 1000
    for what in ("Cancelled", "GatewayCancelled", "SampleFinished", "ExecutorLost"):
        assert found[what] > 2, found
    for what in ("preempted", "forked", "hits", "copies"):
        assert found[what] > 2, found
    report = replay(driver.notes.entries)
    assert report.difference is None, "\n".join(report.difference.lines())
    assert report.num_steps == report.num_steps_same > 1000
    assert report.memory_stopped == ""
    assert report.num_results == report.num_results_same > 1000


@pytest.mark.parametrize("seed", range(3))
def test_plans_that_are_refused_on_the_way_are_planned_again_in_the_same_way(seed):
    # The driver spoils them on their way to the engine, so memory cannot refuse them again.
    print(f"seed={seed}")
    driver = record(120, seed, refuses=True)
    assert happened(driver)["refused plans"] > 0
    report = replay(driver.notes.entries, compares_memory=False)
    assert report.difference is None, "\n".join(report.difference.lines())
    assert report.num_steps == report.num_steps_same
    assert report.num_results == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recovery", list(Recovery))
def test_any_recovery_and_budget_is_replayed(recovery, seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    driver = record(
        120,
        seed,
        recovery=recovery,
        token_budget=rng.choice([25, 64, 256]),
        target_itl_ns=rng.choice([0, 2_000_000]),
        prefill_chunk_tokens=rng.choice([0, 7]),
    )
    report = replay(driver.notes.entries)
    assert report.difference is None, "\n".join(report.difference.lines())
    assert report.num_steps == report.num_steps_same
    assert report.num_results == report.num_results_same


@pytest.mark.parametrize("seed", range(3))
def test_drafts_and_searches_are_replayed(seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    # So few tokens that what comes has often come before.
    driver = make_recording(num_draft_tokens=3, vocab_size=8)
    for handle in range(1, 40):
        prompt = [rng.choice([5, 6]) for _ in range(rng.choice([8, 30, 50]))]
        sampling = SamplingParams(temperature=0.0, max_tokens=rng.choice([3, 30]), seed=handle)
        search = {"beams": BeamParams(num_beams=3), "delivery": Delivery.FINAL}
        fields = search if handle % 4 == 0 else {}
        driver.submit(make_submission(handle, prompt, sampling=sampling, **fields))
        for _ in range(rng.randrange(8)):
            driver.step()
        if rng.random() < 0.2:
            driver.take(driver.scheduler.cancel(1, rng.randint(1, handle)))
    driver.run()
    results = driver.engine.results
    assert any(result.candidates for result in results)
    assert any(result.drafted_ids for result in results)
    report = replay(driver.notes.entries)
    assert report.difference is None, "\n".join(report.difference.lines())
    assert report.num_results == report.num_results_same > 100


@pytest.mark.parametrize("windows", [(8,), (0, 8), (12, 0, 5)], ids=str)
def test_windows_of_layers_are_replayed(windows):
    seed = 17
    print(f"seed={seed}")
    driver = record(30, seed, windows=windows)
    assert happened(driver)["hits"] > 2
    report = replay(driver.notes.entries)
    assert (report.is_same, report.memory_stopped) == (True, "")
    assert report.num_results == report.num_results_same > 30


def test_grammars_that_are_late_or_left_are_replayed():
    seed = 23
    print(f"seed={seed}")
    driver = make_recording(kind=MoodyRunner)
    rng = random.Random(seed)
    for handle in range(1, 41):
        text = rng.choice(["soon", "never", "frail", ""])
        grammar = Grammar(GrammarForm.REGEX, text) if text else None
        sampling = SamplingParams(temperature=0.0, max_tokens=12, grammar=grammar)
        driver.submit(make_submission(handle, rng.randrange(1, 40), sampling=sampling))
        if rng.random() < 0.5:
            driver.step()
    driver.run()
    results = driver.engine.results
    reasons = Counter(reason for result in results for reason in result.errors.values())
    late = [RefusedBecause.NOT_READY in result.refused_because for result in results]
    assert reasons["GRAMMAR_MISMATCH"] > 3
    assert reasons["GRAMMAR_TOO_COMPLEX"] > 3
    assert sum(late) > 3
    report = replay(driver.notes.entries)
    assert (report.is_same, report.memory_stopped) == (True, "")
    assert report.num_results == report.num_results_same > 30


def test_an_executor_that_comes_back_has_what_was_cached_when_nothing_was_on_its_way():
    driver = make_recording()
    for handle in range(1, 6):
        driver.submit(make_submission(handle, 30, max_tokens=5))
    driver.run()
    driver.same_executor_again()
    driver.submit(make_submission(9, 30, max_tokens=5))
    driver.run()
    report = replay(driver.notes.entries)
    assert report.is_same
    assert report.memory_stopped == ""
    assert report.num_results == report.num_results_same > 5


def test_a_pool_that_somebody_else_changed_is_not_compared_any_more():
    driver = make_recording()
    driver.submit(make_submission(1, 30, max_tokens=5))
    driver.run()
    account = dataclasses.replace(driver.engine.account(), free=1, held=88)
    driver.take(driver.scheduler.on_result(StepResult(step=0, account=account), 5_000_000))
    report = replay(driver.notes.entries)
    assert report.is_same
    assert "changed by somebody else when nothing ran" in report.memory_stopped


def test_pins_that_somebody_else_made_while_a_step_ran_end_the_comparison_of_memory():
    driver = make_recording()
    driver.submit(make_submission(1, 30, max_tokens=5))
    driver.run()
    entries = driver.notes.entries
    places = [i for i, entry in enumerate(entries) if isinstance(entry.call, ResultTaken)]
    result = entries[places[1]].call.result
    account = dataclasses.replace(result.account, pinned=3)
    entries = replace_call(
        entries, places[1], ResultTaken(dataclasses.replace(result, account=account))
    )
    report = replay(entries)
    assert report.is_same
    assert "changed by somebody else before the end of step 2" in report.memory_stopped
    assert (report.num_results_same, report.num_results) == (1, 2)


class Contrary(Scheduler):
    """Asks for one token less in its fifth plan."""

    def plan(self, now_ns):
        plan = super().plan(now_ns)
        if plan is not None and plan.step == 5 and plan.may.num_tokens:
            plan.may.num_tokens[0] -= 1
        return plan


def contrary(header, options, trace, clock):
    return Contrary(header.facts, options, trace=trace, clock=clock)


def test_the_first_difference_is_shown():
    driver = make_recording(token_budget=10, lookahead=False)
    driver.submit(make_submission(1, 100, max_tokens=3))
    driver.run()
    report = replay(driver.notes.entries, make_scheduler=contrary)
    assert not report.is_same
    assert (report.num_steps_same, report.num_steps) == (4, 12)
    difference = report.difference
    assert (difference.what, difference.step) == ("plan", 5)
    lines = difference.lines()
    assert "-  num_tokens: [10]" in lines
    assert "+  num_tokens: [9]" in lines


def replace_call(entries: list[Entry], place: int, call) -> list[Entry]:
    return [*entries[:place], dataclasses.replace(entries[place], call=call), *entries[place + 1 :]]


def test_a_result_that_memory_does_not_give_again_is_a_difference():
    driver = make_recording()
    driver.submit(make_submission(1, 30, max_tokens=5))
    driver.run()
    entries = driver.notes.entries
    (place, *_) = [i for i, entry in enumerate(entries) if isinstance(entry.call, ResultTaken)]
    result = dataclasses.replace(entries[place].call.result)
    result.account = dataclasses.replace(result.account, free=result.account.free - 1)
    report = replay(replace_call(entries, place, ResultTaken(result)))
    assert report.difference.what == "result"
    assert any("free" in line for line in report.difference.lines())


def test_a_refused_submission_is_refused_again():
    driver = make_recording()
    driver.submit(make_submission(1))
    with pytest.raises(Exception, match="alive already"):
        driver.submit(make_submission(2, request_id="request-1"))
    driver.run()
    entries = driver.notes.entries
    (refused,) = [entry for entry in entries if entry.raised]
    assert refused.raised == "DUPLICATE_REQUEST"
    assert replay(entries).is_same
    place = entries.index(refused)
    entries[place] = dataclasses.replace(refused, raised="")
    difference = replay(entries).difference
    assert (difference.what, difference.replayed) == ("failure", "DUPLICATE_REQUEST")


def test_what_was_cut_off_is_left_out():
    driver = record(30, 3)
    entries = driver.notes.entries
    data = bytes(driver.notes.data)
    for num_bytes in (len(data), len(data) - 1, len(data) // 2, 100):
        reader = JournalReader(io.BytesIO(data[:num_bytes]))
        read = list(reader)
        assert read == entries[: len(read)]
        assert reader.num_records == len(read)
        again = JournalReader(io.BytesIO(data[: num_bytes - reader.num_bytes_cut]))
        assert len(list(again)) == len(read)
        assert again.num_bytes_cut == 0
        if read:
            assert replay(read).is_same
        assert (num_bytes == len(data)) == (len(read) == len(entries))


def test_every_call_that_changes_a_scheduler_is_recorded():
    reading = {"facts", "figures", "is_idle", "next_deadline_ns", "plan_due_ns", "snapshot"}
    calls = {name for name in vars(Scheduler) if not name.startswith("_")} - reading
    assert calls <= set(vars(RecordingScheduler))


def test_the_first_record_says_what_was_recorded():
    driver = make_recording(token_budget=33)
    header = driver.notes.entries[0].call
    assert isinstance(header, Header)
    assert header.facts == driver.facts
    assert '"token_budget":33' in header.options_json
    assert not header.is_traced


def test_another_process_with_other_hashes_replays_the_same(tmp_path: Path):
    driver = record(150, 11)
    path = tmp_path / "journal"
    path.write_bytes(driver.notes.data)
    program = (
        "import sys; from pageframe.lab.replay import replay;"
        "from pageframe.wire.journal import JournalReader;"
        "report = replay(JournalReader(open(sys.argv[1], 'rb')));"
        "print(report.is_same, report.num_steps_same == report.num_steps > 100)"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["True", "True"], done.stderr


def test_calls_keep_their_order_and_their_time():
    driver = make_recording()
    driver.submit(make_submission(1))
    driver.clock.advance_ns(5)
    driver.take(driver.scheduler.cancel(1, 1))
    driver.send_plan()
    calls = [(entry.now_ns, type(entry.call)) for entry in driver.notes.entries[1:]]
    assert calls[:2] == [(1_000_000, Submitted), (1_000_005, Cancelled)]
    assert calls[-1] == (1_000_005, Planned)
    driver.lose_executor()
    assert isinstance(driver.notes.entries[-1].call, ExecutorLost)
