"""Random beam searches beside random requests, over the real engine and a small pool.

Whatever gives way, is cancelled, is refused or is lost in between: a search that comes to its end
finds what it finds alone, nobody else's tokens change, and nothing stays behind.
"""

import random

import pytest

from pageframe.core.beams import EarlyStopping
from pageframe.core.plan import Recovery
from pageframe.core.request import Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from unit.scheduler.beam_house import (
    BeamEngine,
    alone,
    assert_engine_empty,
    found,
    make_driver,
    search,
)
from unit.scheduler.driver import Driver, assert_scheduler_consistent, make_submission

NUM_REQUESTS = 12
ENDED = (FinishReason.LENGTH, FinishReason.STOP)


def _request(rng: random.Random, handle: int) -> Submission:
    num_prompt_tokens = rng.choice((1, 3, 4, 9, 17))
    start = 5 if rng.random() < 0.5 else 20 + handle
    prompt = [start + index % 60 for index in range(num_prompt_tokens)]
    max_tokens = rng.choice((1, 7, 16, 30, 30))
    tenant = rng.choice(("red", "blue"))
    if rng.random() < 0.4:
        return make_submission(
            handle,
            prompt,
            sampling=SamplingParams(seed=handle, max_tokens=max_tokens),
            num_samples=rng.choice((1, 1, 3)),
            tenant=tenant,
        )
    num_beams = rng.choice((1, 2, 3, 4))
    return search(
        handle,
        prompt,
        num_beams=num_beams,
        num_return=rng.randint(1, num_beams),
        early_stopping=rng.choice(list(EarlyStopping)),
        length_penalty=rng.choice((0.0, 1.0, -0.5)),
        sampling=SamplingParams(max_tokens=max_tokens, min_tokens=rng.choice((0, 0, 1))),
        tenant=tenant,
    )


def _run(
    driver: Driver, requests: list[Submission], rng: random.Random, *, loses: bool, options: dict
) -> set[int]:
    """Run to the end; returns the handles that were cancelled."""
    waiting, cancelled = list(requests), set()
    for _ in range(4000):
        if waiting and rng.random() < 0.8:
            driver.submit(waiting.pop(0))
        if rng.random() < 0.02:
            handle = rng.choice(requests).handle
            cancelled.add(handle)
            driver.take(driver.scheduler.cancel(1, handle))
        if loses and rng.random() < 0.01:
            driver.lose_executor()
            driver.engine = BeamEngine(**options)
            account, now_ns = driver.engine.account(), driver.clock.now_ns()
            driver.take(driver.scheduler.on_executor_ready(driver.engine.facts, account, now_ns))
        while driver.send_plan() is not None:
            pass
        assert_scheduler_consistent(driver.scheduler)
        if driver.results:
            driver.receive()
        elif driver.plans:
            driver.run_engine(refuse=rng.random() < 0.03)
        elif not waiting:
            return cancelled
    raise AssertionError(f"not done: {driver.scheduler.snapshot()}")


@pytest.mark.parametrize("seed", range(40))
def test_searches_find_what_they_find_alone(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    options = {
        "block_size": rng.choice((1, 4)),
        "has_prefix_cache": rng.random() < 0.7,
        "eos_probability": rng.choice((0.0, 1.0)),
        "num_host_slots": rng.choice((0, 30)),
    }
    # What the widest needs alone, and at times much more.
    options["num_blocks"] = (133 if options["block_size"] == 1 else 36) * rng.choice((1, 1, 2))
    requests = [_request(rng, handle) for handle in range(1, NUM_REQUESTS + 1)]
    driver = make_driver(
        max_num_running=rng.choice((4, 7, 12)), recovery=rng.choice(list(Recovery)), **options
    )
    cancelled = _run(driver, requests, rng, loses=seed % 4 == 0, options=options)
    assert_engine_empty(driver)
    quiet = {"eos_probability": options["eos_probability"]}
    for request in requests:
        reasons = {driver.reason(request.handle, k) for k in range(request.num_samples)}
        if request.handle in cancelled:
            continue
        assert reasons <= set(ENDED)
        if request.beams is not None:
            assert found(driver, request) == alone(request, **quiet)
        else:
            solo = make_driver(num_blocks=600, num_rows=64, max_num_running=64, **quiet)
            solo.submit(request)
            solo.run()
            for index in range(request.num_samples):
                output = driver.output(request.handle, index)
                assert output == solo.output(request.handle, index)
