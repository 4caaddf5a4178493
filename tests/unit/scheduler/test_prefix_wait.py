"""Holding back who could share what another one is just computing."""

import pytest

from pageframe.core.plan import StepPlan
from pageframe.core.request import StallCause
from pageframe.core.sampling import SamplingParams
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.prefix_wait import PrefixWait
from pageframe.scheduler.prefixes import Prefixes
from pageframe.scheduler.sequence import Knowledge, Sequence
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    GATEWAY,
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_sequence import make_sequence
from unit.scheduler.test_tracing import Spans, submit

PROMPT = list(range(1, 14))
"""Three blocks of four, and a token."""


def sharing(**fields) -> Driver:
    facts = fields.pop("facts", make_facts())
    engine = FakeEngine(facts, shares_prefixes=True)
    return Driver(facts=facts, engine=engine, **fields)


def admitted(driver: Driver) -> list[list[int]]:
    return [plan.may.sequence_ids for plan in driver.sent]


def announced(plan: StepPlan) -> list[int]:
    return [announcement.sequence_id for announcement in plan.announce]


@pytest.mark.parametrize("lookahead", [True, False])
def test_of_two_equal_prompts_the_second_finds_what_the_first_computed(lookahead):
    driver = sharing(token_budget=64, lookahead=lookahead)
    requests = [make_submission(handle, PROMPT, max_tokens=4) for handle in (1, 2)]
    for request in requests:
        driver.submit(request)
    driver.run()
    assert announced(driver.sent[0]) == [1, 2]
    num_before = 2 if lookahead else 1
    assert admitted(driver)[: num_before + 1] == [[1], *[[]] * (num_before - 1), [2]]
    # Twelve of thirteen tokens are there, in three blocks.
    assert driver.sent[num_before].may.num_tokens == [1]
    assert driver.completion(2).account.num_blocks_shared == 3
    for request in requests:
        assert driver.output(request.handle) == expected_output(request, driver.facts)
    assert_scheduler_empty(driver)


def test_those_behind_it_pass():
    driver = sharing(token_budget=64, lookahead=False)
    for handle, prompt in ((1, PROMPT), (2, PROMPT), (3, 5), (4, PROMPT)):
        driver.submit(make_submission(handle, prompt, max_tokens=3))
    driver.run()
    assert admitted(driver)[:2] == [[1, 3], [2, 4]]
    assert_scheduler_empty(driver)


def test_a_long_prefix_is_waited_for_chunk_after_chunk():
    driver = sharing(token_budget=8, lookahead=False)
    prompt = list(range(1, 42))
    for handle in (1, 2):
        driver.submit(make_submission(handle, prompt, max_tokens=2))
    driver.run()
    chunks = [list(zip(p.may.sequence_ids, p.may.num_tokens, strict=True)) for p in driver.sent]
    # After five of them one token of the first is left; it decodes by itself.
    assert chunks[:7] == [[(1, 8)]] * 5 + [[(2, 1)], []]
    assert driver.completion(2).account.num_blocks_shared == 10
    assert_scheduler_empty(driver)


def test_only_what_is_shared_is_waited_for():
    driver = sharing(token_budget=64, prefill_chunk_tokens=8, lookahead=False)
    driver.submit(make_submission(1, list(range(1, 33)), max_tokens=2))
    driver.submit(make_submission(2, [*range(1, 9), 500, 501], max_tokens=2))
    driver.run()
    # Two blocks are shared; the first step computed them.
    assert admitted(driver)[:3] == [[1], [1, 2], [1]]
    assert driver.completion(2).account.num_blocks_shared == 2
    assert driver.completion(2).stall_ns[StallCause.PREFIX_WAIT] == 1_000_000


@pytest.mark.parametrize(("last_chunk_tokens", "is_waiting"), [(16, True), (8, True), (7, False)])
def test_who_would_be_there_sooner_by_itself_does_not_wait(last_chunk_tokens, is_waiting):
    driver = sharing(token_budget=16, lookahead=False)
    driver.submit(make_submission(1, list(range(1, 41)), max_tokens=2))
    driver.step()
    roster = driver.scheduler._roster
    leader, follower = roster.running[1], make_sequence(40, 2)
    follower.knowledge = Knowledge.KNOWN
    follower.leader_id, follower.num_leader_tokens = 1, 32
    leader.last_chunk_tokens = last_chunk_tokens
    flight = Flight(step=2, builds_on=1, tick=2, planned_ns=1)
    builder = PlanBuilder(roster.capacity, flight, num_blocks_left=50)
    # Sixteen of 32 tokens are missing. The follower would compute them all in two steps.
    waits_for = PrefixWait(roster, is_enabled=True).leader_of(builder, follower)
    assert waits_for is (leader if is_waiting else None)


@pytest.mark.parametrize("how", ["cancel", "finish"])
def test_the_wait_ends_when_the_leader_runs_no_longer(how):
    driver = sharing(token_budget=4, lookahead=False)
    driver.submit(make_submission(1, list(range(1, 33)), max_tokens=2))
    second = make_submission(2, list(range(1, 33)), max_tokens=3)
    driver.submit(second)
    driver.step()
    driver.step()
    assert admitted(driver) == [[1], [1]]
    if how == "cancel":
        driver.take(driver.scheduler.cancel(GATEWAY, 1))
    else:
        driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 0))
    driver.step()
    assert admitted(driver)[2] == [2]
    driver.run()
    assert driver.output(2) == expected_output(second, driver.facts)
    assert_scheduler_empty(driver)


def test_a_guess_costs_one_step_and_no_more():
    # This executor shares no prefixes, so it names no leader.
    driver = Driver(token_budget=64, lookahead=False)
    for handle in (1, 2):
        driver.submit(make_submission(handle, PROMPT, max_tokens=2))
    driver.run()
    assert admitted(driver)[:2] == [[1], [2]]


def test_nobody_waits_where_nothing_is_shared():
    driver = Driver(token_budget=64, lookahead=False, shares_prefixes=False)
    for handle in (1, 2):
        driver.submit(make_submission(handle, PROMPT, max_tokens=2))
    driver.run()
    assert admitted(driver)[0] == [1, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": b"other"},
        {"prompt": [9, *PROMPT]},
        {"prompt": PROMPT[:4]},
        {"num_prompt_logprobs": 0},
    ],
    ids=["salt", "tokens", "one block", "prompt logprobs"],
)
def test_who_cannot_share_does_not_wait(fields):
    driver = sharing(token_budget=64, lookahead=False)
    driver.submit(make_submission(1, PROMPT, max_tokens=2))
    prompt, salt = fields.get("prompt", PROMPT), fields.get("cache_salt", b"")
    sampling = SamplingParams(
        temperature=0.0, max_tokens=2, num_prompt_logprobs=fields.get("num_prompt_logprobs", -1)
    )
    driver.submit(make_submission(2, prompt, sampling=sampling, cache_salt=salt))
    driver.run()
    assert admitted(driver)[0] == [1, 2]


def test_the_wait_is_a_stall_that_links_to_the_leader():
    driver = sharing(token_budget=64, prefill_chunk_tokens=8, lookahead=False, trace=Spans())
    prompt = list(range(1, 30))
    submit(driver, 1, prompt, 2)
    submit(driver, 2, prompt, 2)
    driver.run()
    leader = driver.trace.named("sequence")[0]
    (stall,) = [
        span
        for span in driver.trace.named("stall")
        if span.attributes["pageframe.stall.cause"] == "prefix_wait"
    ]
    assert stall.links == ((leader.trace_id, leader.span_id),)
    assert stall.attributes["pageframe.sequence_id"] == 2
    assert driver.completion(2).stall_ns[StallCause.PREFIX_WAIT] == 4_000_000


def test_many_followers_hold_nobody_else_back_and_cost_no_longer_plans():
    driver = sharing(facts=make_facts(num_blocks=1000), token_budget=200, max_num_running=100)
    for handle in range(1, 61):
        driver.submit(make_submission(handle, PROMPT, max_tokens=2, tenant="a"))
    driver.submit(make_submission(61, 5, max_tokens=2, tenant="b"))
    first = driver.send_plan()
    assert first.may.sequence_ids == [1, 61]
    # As many are passed over as may be; they are announced so that the answer names the leader.
    assert announced(first) == [1, 61, *range(2, 34)]
    driver.run()
    assert_scheduler_empty(driver)


def test_sequences_announced_anew_after_a_loss_share_again():
    driver = sharing(token_budget=64, lookahead=False)
    requests = [make_submission(handle, PROMPT, max_tokens=6) for handle in (1, 2)]
    for request in requests:
        driver.submit(request)
    for _ in range(3):
        driver.step()
    driver.lose_executor()
    driver.start_executor()
    num_sent = len(driver.sent)
    driver.run()
    assert admitted(driver)[num_sent : num_sent + 2] == [[1], [2]]
    for request in requests:
        assert driver.output(request.handle) == expected_output(request, driver.facts)
    assert_scheduler_empty(driver)


def make_prompt_sequence(sequence_id: int, prompt: list[int]) -> Sequence:
    return make_sequence(prompt, sequence_id)


def test_a_prefix_is_under_way_from_admission_until_it_is_computed():
    prefixes = Prefixes(block_size=4)
    leader = make_prompt_sequence(1, PROMPT)
    follower = make_prompt_sequence(2, PROMPT)
    assert prefixes.find(follower) is None
    prefixes.begin(leader)
    assert prefixes.find(follower) is leader
    assert prefixes.find(make_prompt_sequence(3, [*PROMPT[:3], 99, *PROMPT[4:]])) is None
    prefixes.end(leader)
    prefixes.end(leader)
    assert (prefixes.find(follower), len(prefixes)) == (None, 0)


@pytest.mark.parametrize(
    ("num_equal", "num_computed", "num_expected", "is_worth_it"),
    [
        (4, 0, 0, True),
        (4, 4, 0, False),
        (7, 4, 0, False),
        (8, 4, 0, True),
        (12, 4, 8, True),
        (11, 4, 8, False),
        (19, 16, 0, False),
        (20, 16, 0, True),
    ],
)
def test_only_whole_blocks_that_are_not_there_yet_are_worth_a_wait(
    num_equal, num_computed, num_expected, is_worth_it
):
    prefixes = Prefixes(block_size=4)
    prompt = list(range(1, 31))
    leader = make_prompt_sequence(1, prompt)
    leader.advance(num_computed)
    leader.num_cached_tokens = num_expected
    prefixes.begin(leader)
    follower = make_prompt_sequence(2, [*prompt[:num_equal], *range(500, 520)])
    assert prefixes.find(follower) is (leader if is_worth_it else None)


def test_what_is_usually_found_is_no_reason_to_wait():
    prefixes = Prefixes(block_size=4)
    house = list(range(1, 9))
    finds = iter([0, 8, 16, 8])
    sequences = [make_prompt_sequence(i, [*house, *range(100 * i, 100 * i + 30)]) for i in (1, 2)]
    guesses = []
    for num_found in finds:
        leader, follower = sequences
        prefixes.begin(leader)
        guesses.append(prefixes.find(follower) is leader)
        prefixes.confirm(leader, num_found)
        prefixes.end(leader)
    # The words of the house are found from the second time on. A third one found its own history,
    # which says nothing about others.
    assert guesses == [True, True, False, False]
    leader = make_prompt_sequence(3, sequences[0].submission.prompt_token_ids)
    prefixes.begin(leader)
    assert prefixes.find(sequences[0]) is leader
    assert prefixes.find(sequences[1]) is None


def test_usual_finds_are_forgotten_in_the_order_of_their_last_use():
    prefixes = Prefixes(block_size=1)
    for number in [*range(1, 1025), 1, 2000]:
        sequence = make_prompt_sequence(number, [number, 7, 8])
        prefixes.begin(sequence)
        prefixes.confirm(sequence, 2)
        prefixes.end(sequence)
    leaders = [make_prompt_sequence(9000 + first, [first, 7, 8]) for first in (1, 2, 3)]
    for leader in leaders:
        prefixes.begin(leader)
    found = [
        prefixes.find(make_prompt_sequence(9100 + first, [first, 7, 9])) for first in (1, 2, 3)
    ]
    assert found == [None, leaders[1], None]
