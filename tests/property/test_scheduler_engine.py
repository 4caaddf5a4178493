"""The scheduler with the real engine over the simulated model, which reads its history through
block tables: a token that depends on how it was scheduled would show.

Half of the requests begin alike, some have several samples, and the sampling is random, so forks,
prefix hits, copies on write, swaps and lost tails all have their chance to mix histories up.
"""

import functools
import random

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.plan import Recovery, StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.core.request import Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, RefusedBecause, StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner
from pageframe.scheduler.policies.registry import RECOVERY, VICTIM
from unit.executor.played_drafter import KnowingDrafter
from unit.scheduler.driver import Driver, assert_scheduler_consistent, make_submission

MAX_LEN = 64
REQUESTS = [
    (num_prompt_tokens, max_tokens)
    for num_prompt_tokens in (1, 2, 7, 16, 33)
    for max_tokens in (1, 2, 9, 31)
]


class RealEngine:
    """A step engine behind the face that the driver expects."""

    def __init__(self, num_blocks: int, block_size: int, **options) -> None:
        self.clock = ManualClock(1)
        runner = SimRunner(
            SimConfig(max_model_len=MAX_LEN, max_num_rows=32, cost=SimCost(step_ns=1e6)),
            self.clock,
        )
        self.engine = StepEngine(
            runner,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_sequences=32,
            max_step_tokens=256,
            max_model_len=MAX_LEN,
            trace=NullTraceSink(),
            clock=self.clock,
            check_every_step=True,
            **options,
        )
        self.facts = self.engine.describe("real-0")
        self.cancel = self.engine.cancel
        self.results: list[StepResult] = []

    @property
    def now_ns(self) -> int:
        return self.clock.now_ns()

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        self.clock.advance_ns(value - self.clock.now_ns())

    def step(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        self.results.append(result)
        return result


def knowing_drafter() -> KnowingDrafter:
    return KnowingDrafter(
        (request(handle).prompt_token_ids, output)
        for (_, handle, _), output in undisturbed().items()
    )


def make_driver(num_blocks: int, block_size: int, *, options=None, **fields) -> Driver:
    engine = RealEngine(num_blocks, block_size, **(options or {}))
    fields.setdefault("max_num_running", 20)
    return Driver(facts=engine.facts, engine=engine, **fields)


def request(handle: int, **fields) -> Submission:
    """One of the requests; every other one begins like the others."""
    num_prompt_tokens, max_tokens = REQUESTS[handle - 1]
    start = 5 if handle % 2 else 100 * handle
    return make_submission(
        handle,
        [start + index for index in range(num_prompt_tokens)],
        sampling=SamplingParams(temperature=1.0, seed=handle, max_tokens=max_tokens),
        num_samples=1 + handle % 3,
        **fields,
    )


def serve(driver: Driver, *, steered: int = 0) -> dict[tuple[int, int, int], list[int]]:
    """Serve all requests; every ``steered``-th one is steered, 0 for none."""
    for handle in range(1, len(REQUESTS) + 1):
        driver.submit(request(handle), is_steered=steered > 0 and handle % steered == 0)
    driver.run()
    return driver.tokens


@functools.cache
def undisturbed() -> dict[tuple[int, int, int], list[int]]:
    """Each sample alone, from nothing."""
    options = {"has_prefix_cache": False}
    driver = make_driver(
        1000, 16, options=options, token_budget=256, lookahead=False, max_num_running=1
    )
    outputs = serve(driver)
    results = driver.engine.results
    assert not any(result.preempted_ids or result.forked_ids for result in results)
    assert len({tuple(tokens) for tokens in outputs.values() if len(tokens) > 5}) > 15
    return outputs


def happened(driver: Driver) -> set[str]:
    """What the driver's run was to be a test of."""
    results = driver.engine.results
    found = {f"preempted: {kind.name}" for r in results for kind in r.preempted_recoveries}
    found |= {f"refused: {RefusedBecause(b).name}" for r in results for b in r.refused_because}
    accounts = [account for result in results for account in result.accounts.values()]
    facts = {
        "forked": any(result.forked_ids for result in results),
        "led": any(any(result.leader_ids) for result in results),
        "hit": any(account.num_cached_tokens for account in accounts),
        "copied": any(account.num_copies_on_write for account in accounts),
        "refused plan": any(result.refusal for result in results),
    }
    return found | {name for name, is_so in facts.items() if is_so}


def assert_engine_empty(driver: Driver) -> None:
    engine = driver.engine.engine
    assert engine.is_idle
    account = engine.account()
    assert account.free + account.cached == account.total
    assert engine.check_integrity() == []


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("token_budget", [1, 7, 64])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_tokens_do_not_depend_on_pool_chunks_blocks_or_look_ahead(
    block_size, token_budget, lookahead
):
    num_blocks = MAX_LEN // block_size
    driver = make_driver(num_blocks, block_size, token_budget=token_budget, lookahead=lookahead)
    assert serve(driver) == undisturbed()
    if block_size == 1 and token_budget > 1:
        assert "preempted: RECOMPUTE" in happened(driver)
    assert_engine_empty(driver)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("recovery", list(Recovery))
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 80), (4, 24), (16, 6)])
def test_tokens_do_not_depend_on_drafts(block_size, num_blocks, recovery, lookahead):
    options = {"num_host_slots": 64, "drafter": knowing_drafter()}
    driver = make_driver(
        num_blocks,
        block_size,
        options=options,
        recovery=recovery,
        token_budget=40,
        lookahead=lookahead,
        num_draft_tokens=4,
    )
    assert serve(driver) == undisturbed()
    assert any(result.preempted_ids for result in driver.engine.results)
    num_accepted = sum(sum(result.num_accepted) for result in driver.engine.results)
    completions = driver.completions.values()
    assert num_accepted > 0
    assert sum(it.account.num_accepted_tokens for it in completions) == num_accepted
    assert sum(it.account.num_draft_tokens for it in completions) > num_accepted
    assert_engine_empty(driver)


@pytest.mark.parametrize("steered", [1, 2])
@pytest.mark.parametrize("recovery", list(Recovery))
def test_tokens_do_not_depend_on_who_is_steered(recovery, steered):
    options = {"num_host_slots": 64}
    driver = make_driver(24, 4, options=options, recovery=recovery, token_budget=40)
    assert serve(driver, steered=steered) == undisturbed()
    assert f"preempted: {recovery.name}" in happened(driver)
    assert any(len(plan.must) for plan in driver.sent)
    assert_engine_empty(driver)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [40, 400])
def test_tokens_do_not_depend_on_what_is_shared(num_blocks, has_prefix_cache, lookahead):
    driver = make_driver(
        num_blocks,
        4,
        options={"has_prefix_cache": has_prefix_cache},
        shares_prefixes=has_prefix_cache,
        token_budget=32,
        lookahead=lookahead,
    )
    assert serve(driver) == undisturbed()
    assert happened(driver) >= {"forked", "copied"}
    assert ({"led", "hit"} <= happened(driver)) is has_prefix_cache
    assert "refused plan" not in happened(driver)
    assert_engine_empty(driver)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("num_blocks", [16, 24])
@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("recovery", list(Recovery))
def test_tokens_do_not_depend_on_how_victims_come_back(
    recovery, has_prefix_cache, num_blocks, lookahead
):
    driver = make_driver(
        num_blocks,
        4,
        options={"num_host_slots": 64, "has_prefix_cache": has_prefix_cache},
        token_budget=32,
        lookahead=lookahead,
        recovery=recovery,
    )
    assert serve(driver) == undisturbed()
    assert f"preempted: {recovery.name}" in happened(driver)
    if recovery is Recovery.SWAP:
        assert "refused: PROMOTING" in happened(driver)
    assert_engine_empty(driver)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("recovery", list(Recovery))
def test_a_tenant_at_its_ceiling_waits_for_itself_and_others_go_on(recovery, lookahead):
    quota = TenantQuota(tenant="bounded", ceiling_blocks=18)
    driver = make_driver(
        200,
        4,
        options={"num_host_slots": 64},
        token_budget=64,
        lookahead=lookahead,
        recovery=recovery,
        quotas=(quota,),
    )
    driver.engine.engine.desk.replace_quotas([quota])
    for handle in range(1, len(REQUESTS) + 1):
        driver.submit(request(handle, tenant="bounded" if handle % 4 else "free"))
    driver.run()
    assert driver.tokens == undisturbed()
    assert "refused: QUOTA" in happened(driver)
    assert "refused plan" not in happened(driver)
    assert_engine_empty(driver)


@pytest.mark.parametrize("seed", range(10))
def test_cancels_and_refused_plans_disturb_nobody_else(seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    driver = make_driver(
        rng.choice([8, 16, 40]),
        8,
        options={"num_host_slots": 20},
        token_budget=rng.choice([3, 16, 64]),
        recovery=rng.choice([*RECOVERY.built_in]),
        victim_policy=rng.choice([*VICTIM.built_in]),
    )
    requests = list(range(1, len(REQUESTS) + 1))
    cancelled = set()
    while requests or not driver.scheduler.is_idle:
        act = rng.random()
        if requests and act < 0.2:
            driver.submit(request(requests.pop(0)))
        elif act < 0.25:
            handle = rng.randint(1, len(REQUESTS))
            cancelled.add(handle)
            driver.take(driver.scheduler.cancel(1, handle))
        elif act < 0.28 and driver.plans:
            driver.run_engine(refuse=True)
        elif act < 0.5:
            driver.send_plan()
        elif act < 0.75 and driver.plans:
            driver.run_engine()
        elif driver.results:
            driver.receive()
        assert_scheduler_consistent(driver.scheduler)
    for key, expected in undisturbed().items():
        tokens, completion = driver.tokens[key], driver.completions[key]
        assert tokens == expected[: len(tokens)]
        if completion.finish_reason is FinishReason.CANCELLED:
            assert key[1] in cancelled
        else:
            assert tokens == expected
    assert_engine_empty(driver)


def test_a_request_that_needs_the_blocks_of_an_idle_chat_runs_beside_another():
    options = {"session_times": SessionTimes(idle_ns=0, ttl_ns=10**12)}
    driver = make_driver(16, 4, options=options, token_budget=64, lookahead=False)
    driver.submit(make_submission(1, [7] * 40, max_tokens=1, session_id="chat"))
    driver.run()
    account = driver.engine.engine.account()
    assert (account.pinned, account.yieldable, account.free) == (10, 10, 6)
    driver.submit(make_submission(2, [8] * 4, max_tokens=20))
    driver.step()
    driver.submit(make_submission(3, [9] * 30, max_tokens=2))
    result = driver.step()
    assert result is not None
    # The second goes on, the third came in, and as much of the chat has given way as it needs.
    assert [result.sampled_ids, result.computed_ids] == [[2, 3], [3]]
    assert result.preempted_ids == []
    assert 0 < result.account.pinned < 10
