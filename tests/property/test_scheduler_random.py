"""Random lives of a scheduler against the fake engine: whatever happens, everything ends once."""

import random

import pytest

from pageframe.core.errors import DeadlineError
from pageframe.core.plan import Announcement
from pageframe.core.replica import TenantQuota
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.core.trace import NullTraceSink
from pageframe.scheduler.policies.registry import RECOVERY, VICTIM
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_tracing import Spans

MAX_LEN = 40
PROFILES = {
    "roomy": {"num_blocks": 200, "block_size": 4},
    "tight": {"num_blocks": 24, "block_size": 4},
    "one fits": {"num_blocks": 10, "block_size": 4},
    "blocks of one token": {"num_blocks": 60, "block_size": 1},
    "one block each": {"num_blocks": 3, "block_size": 64},
    "host tier": {"num_blocks": 24, "block_size": 4, "num_host_blocks": 30},
}


def hit_some(announcement: Announcement) -> int:
    return min(announcement.sequence_id * 5 % 17, len(announcement.token_ids) - 1)


def begin_alike(rng: random.Random, num_tokens: int) -> list[int]:
    """One of few prompts, with a tail of its own."""
    start, num_shared = rng.choice([1, 500]), rng.randint(0, num_tokens)
    shared = [start + index for index in range(num_shared)]
    return shared + [rng.randint(1, 900) for _ in range(num_tokens - num_shared)]


class Life:
    """One run: random acts, then peace until everything has ended."""

    def __init__(self, seed: int, profile: str) -> None:
        self.random = random.Random(seed)
        self.facts = make_facts(max_model_len=MAX_LEN, **PROFILES[profile])
        # What one request needs at most, and then a little or a lot more.
        ceiling = -(-MAX_LEN // self.facts.block_size) + self.random.choice([0, 1, 3, 100])
        quotas = (TenantQuota(tenant="bounded", ceiling_blocks=ceiling),)
        self.driver = Driver(
            facts=self.facts,
            token_budget=self.random.choice([1, 3, 7, 16, 64]),
            max_num_running=self.random.choice([1, 2, 5, 16]),
            lookahead=self.random.random() < 0.7,
            num_draft_tokens=self.random.choice([0, 1, 4, 7]),
            trace=self.random.choice([NullTraceSink(), Spans()]),
            recovery=self.random.choice([*RECOVERY.built_in]),
            victim_policy=self.random.choice([*VICTIM.built_in]),
            quotas=quotas,
            tenant_weights=self.random.choice([{}, {"bounded": 3.0}]),
            priority_ageing_ns=self.random.choice([0, 2_000_000]),
            more_policies={
                "order": self.random.choice(["fair", "fcfs", "prefix-aware"]),
                "admission": self.random.choice(["watermark", "conservative"]),
            },
            engine=FakeEngine(
                self.facts,
                num_hit_tokens=hit_some if self.random.random() < 0.3 else lambda _: 0,
                num_right=lambda: self.random.randint(0, 5),
                shares_prefixes=self.random.random() < 0.5,
                ceilings={"bounded": ceiling},
            ),
        )
        if self.random.random() < 0.5:
            # Plans are held back behind the shortest prefill, and asked for again at any time.
            self.driver.scheduler._lateness.prefill_ns_min = 1
        self.submissions: dict[tuple[int, int], Submission] = {}
        self.refused: list[tuple[int, DeadlineError]] = []
        self.disturbed: set[tuple[int, int, int]] = set()
        self.is_executor_there = True

    def live(self, num_acts: int) -> None:
        acts = [
            self.submit,
            self.cancel,
            self.finish_sample,
            self.vanish,
            self.pass_time,
            self.refuse,
            self.crash,
            self.send,
            self.compute,
            self.receive,
        ]
        weights = [8, 2, 2, 0.3, 1, 0.7, 0.3, 20, 20, 20]
        for _ in range(num_acts):
            self.random.choices(acts, weights)[0]()
            assert_scheduler_consistent(self.driver.scheduler)
        if not self.is_executor_there:
            self.start()
        self.driver.run()

    def submit(self) -> None:
        rng = self.random
        handle = len(self.submissions) + 1
        num_prompt_tokens = rng.choice([1, 2, 5, 13, 24])
        now_ns = self.driver.clock.now_ns()
        submission = make_submission(
            handle,
            # Few first tokens, so that many prompts begin alike.
            begin_alike(rng, num_prompt_tokens) if rng.random() < 0.5 else num_prompt_tokens,
            tenant=rng.choice(["free", "bounded"]),
            sampling=SamplingParams(
                temperature=0.0,
                max_tokens=rng.randint(1, MAX_LEN - num_prompt_tokens),
                stop_token_ids=tuple(rng.sample(range(1000), 30)),
                min_tokens=0,
            ),
            num_samples=rng.choice([1, 1, 1, 2, 3, 6]),
            delivery=rng.choice(list(Delivery)),
            num_tokens_per_event_max=rng.randint(1, 5),
            priority=rng.choice([0, 0, 0, 1]),
            deadline_ns=rng.choice([0, 0, 0, now_ns + rng.randint(1, 40_000_000)]),
        )
        gateway_id = rng.randint(1, 2)
        if rng.random() < 0.2:
            known = expected_output(submission, self.facts)
            num_known = rng.randint(0, len(known))
            submission.resume_token_ids = [known[:num_known]] * submission.num_samples
        try:
            self.driver.submit(submission, gateway_id, is_steered=rng.random() < 0.2)
        except DeadlineError as error:
            self.refused.append((submission.deadline_ns - now_ns, error))
            return
        self.submissions[gateway_id, handle] = submission

    def some_request(self) -> tuple[int, int]:
        return self.random.choice(list(self.submissions))

    def disturb(self, gateway_id: int, handle: int) -> None:
        for sample_index in range(self.submissions[gateway_id, handle].num_samples):
            self.disturbed.add((gateway_id, handle, sample_index))

    def cancel(self) -> None:
        if self.submissions:
            key = self.some_request()
            self.disturb(*key)
            self.driver.take(self.driver.scheduler.cancel(*key))

    def finish_sample(self) -> None:
        if self.submissions:
            gateway_id, handle = self.some_request()
            sample_index = self.random.randrange(self.submissions[gateway_id, handle].num_samples)
            self.disturbed.add((gateway_id, handle, sample_index))
            self.driver.take(self.driver.scheduler.finish_sample(gateway_id, handle, sample_index))

    def vanish(self) -> None:
        for gateway_id, handle in self.submissions:
            if gateway_id == 2:
                self.disturb(gateway_id, handle)
        self.driver.take(self.driver.scheduler.cancel_gateway(2))

    def pass_time(self) -> None:
        self.driver.clock.advance_ns(self.random.randint(1, 10_000_000))
        self.driver.take(self.driver.scheduler.expire(self.driver.clock.now_ns()))

    def refuse(self) -> None:
        if self.driver.plans:
            self.driver.run_engine(refuse=True)

    def crash(self) -> None:
        if self.is_executor_there:
            self.driver.lose_executor()
            self.is_executor_there = False
        else:
            self.start()

    def start(self) -> None:
        self.driver.start_executor()
        self.is_executor_there = True

    def send(self) -> None:
        if self.is_executor_there:
            if self.random.random() < 0.3:
                self.driver.wait_until_due()
            self.driver.send_plan()

    def compute(self) -> None:
        if self.driver.plans:
            self.driver.run_engine()
            token_budget = self.driver.scheduler._roster.capacity.token_budget
            assert max(self.driver.engine.steps, default=0) <= token_budget

    def receive(self) -> None:
        if self.driver.results:
            self.driver.receive()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("seed", range(30))
def test_every_sample_ends_once_with_the_tokens_that_an_undisturbed_run_gives(seed, profile):
    print(f"seed={seed} profile={profile!r}")
    life = Life(seed, profile)
    life.live(num_acts=400)
    driver = life.driver
    assert_scheduler_empty(driver)
    for left_ns, error in life.refused:
        assert error.reason == "DEADLINE_UNREACHABLE"
        assert left_ns < int(error.limits["least_ns"])
    assert len(driver.completions) == sum(s.num_samples for s in life.submissions.values())
    for (gateway_id, handle), submission in life.submissions.items():
        expected = expected_output(submission, life.facts)
        for sample_index in range(submission.num_samples):
            key = (gateway_id, handle, sample_index)
            completion, tokens = driver.completions[key], driver.tokens[key]
            assert tokens == expected[: len(tokens)], key
            if completion.finish_reason in (FinishReason.LENGTH, FinishReason.STOP):
                assert key in life.disturbed or tokens == expected
            else:
                is_late = completion.finish_reason is FinishReason.DEADLINE
                assert submission.deadline_ns if is_late else key in life.disturbed
