"""The scheduler's arithmetic of sliding windows, over the real engine and memory.

Groups of layers give back what lies behind their windows, so sequences fit into a pool that could
not keep all they have computed. Tokens are made from what stands in the slot before, see
``bench.soak.device``: a block that was given back too early would show.
"""

import functools

import pytest

from bench.soak.device import Device
from pageframe.core.clock import ManualClock
from pageframe.core.errors import OutOfRangeError
from pageframe.core.plan import StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import StepBatch
from pageframe.executor.engine import StepEngine
from pageframe.scheduler.request import check_fits
from unit.scheduler.driver import Driver, make_submission

LENGTHS = [(1, 60), (33, 20), (50, 30), (64, 2), (7, 40), (50, 9), (90, 6), (20, 20)]
NUM_STEP_TOKENS = 16
LONGEST = (100, 40)


class WindowEngine:
    """A step engine over groups of layers with windows, behind the face that the driver expects."""

    def __init__(self, num_blocks: int, windows: tuple[int, ...]) -> None:
        self.clock = ManualClock(1)
        is_mixed = len(windows) > 1
        device = Device(0 if is_mixed else windows[0], windows if is_mixed else ())
        self.engine = StepEngine(
            device,
            num_blocks=num_blocks,
            block_size=4,
            max_num_sequences=8,
            max_step_tokens=NUM_STEP_TOKENS,
            max_model_len=160,
            trace=NullTraceSink(),
            clock=self.clock,
            check_every_step=True,
        )
        self.facts = self.engine.describe("windows-0")
        self.cancel = self.engine.cancel
        self.num_held_max = 0
        self.num_refused_plans = 0
        # Behind the step what the windows have left is given back already.
        device.on_execute = self._count_held

    @property
    def now_ns(self) -> int:
        return self.clock.now_ns()

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        self.clock.advance_ns(value - self.clock.now_ns())

    def step(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        self.num_refused_plans += bool(result.refusal)
        return result

    def _count_held(self, batch: StepBatch) -> None:
        self.num_held_max = max(self.num_held_max, self.engine.account().held)


def make_driver(num_blocks: int, windows: tuple[int, ...], **fields) -> Driver:
    engine = WindowEngine(num_blocks, windows)
    return Driver(facts=engine.facts, engine=engine, token_budget=NUM_STEP_TOKENS, **fields)


def request(handle: int, num_prompt_tokens: int, max_tokens: int):
    start = 1 if handle % 2 else 2 + handle
    return make_submission(
        handle,
        [(start + index) % 64 for index in range(num_prompt_tokens)],
        sampling=SamplingParams(temperature=1.0, seed=5, max_tokens=max_tokens),
    )


@functools.cache
def undisturbed(windows: tuple[int, ...]):
    """Each request alone in a pool that keeps everything."""
    driver = make_driver(2000, windows, lookahead=False, max_num_running=1)
    for handle, lengths in enumerate(LENGTHS, 1):
        driver.submit(request(handle, *lengths))
        driver.run()
    return driver.tokens


ALL_WINDOWS = [(6,), (0, 6), (5, 0, 9), (3, 6)]


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("windows", ALL_WINDOWS)
def test_all_come_to_their_ends_in_a_pool_that_holds_one_of_them(windows, lookahead):
    facts = make_driver(1, windows).facts
    peaks = [facts.num_blocks_peak(p + m - 1, NUM_STEP_TOKENS) for p, m in LENGTHS]
    driver = make_driver(max(peaks), windows, lookahead=lookahead)
    for handle, lengths in enumerate(LENGTHS, 1):
        driver.submit(request(handle, *lengths))
    driver.run()
    assert driver.tokens == undisturbed(windows)
    account = driver.engine.engine.account()
    assert account.free + account.cached == account.total


@pytest.mark.parametrize("windows", ALL_WINDOWS)
def test_a_sequence_alone_holds_no_more_than_its_peak_and_nearly_that(windows):
    driver = make_driver(2000, windows, lookahead=False)
    driver.submit(request(1, *LONGEST))
    driver.run()
    peak = driver.facts.num_blocks_peak(sum(LONGEST) - 1, NUM_STEP_TOKENS)
    num_windows = sum(window > 0 for window in windows)
    # Each window may begin anywhere in a block; and a group that keeps all is largest at the end,
    # when steps are small.
    num_less = num_windows * (1 if all(windows) else 1 + NUM_STEP_TOKENS // 4)
    assert peak - num_less <= driver.engine.num_held_max <= peak


@pytest.mark.parametrize("windows", [(6,), (3, 6)])
def test_as_many_run_at_once_as_their_windows_leave_room_for(windows):
    """Four that could not all be kept whole are let in together, and nobody has to give way."""
    facts = make_driver(1, windows).facts
    peak = facts.num_blocks_peak(sum(LONGEST) - 1, NUM_STEP_TOKENS)
    num_whole = -(-(sum(LONGEST) - 1) // 4) * len(windows)
    assert 4 * peak + 3 < 2 * num_whole
    driver = make_driver(4 * peak + 3, windows)
    for handle in range(1, 5):
        driver.submit(request(2 * handle, *LONGEST))
    num_running = 0
    while not driver.scheduler.is_idle:
        driver.step()
        num_running = max(num_running, driver.scheduler.snapshot().num_running)
    assert num_running == 4
    assert all(it.account.num_preemptions == 0 for it in driver.completions.values())
    assert driver.engine.num_refused_plans == 0


def test_what_fits_only_thanks_to_its_window_is_taken():
    (windowed,) = (make_driver(12, (6,)).facts,)
    check_fits(request(1, *LONGEST), windowed)
    with pytest.raises(OutOfRangeError, match="EXCEEDS_POOL"):
        check_fits(request(1, *LONGEST), make_driver(12, (0,)).facts)
    assert windowed.num_tokens_fitting(12) == 160
    assert make_driver(12, (0,)).facts.num_tokens_fitting(12) == 48
