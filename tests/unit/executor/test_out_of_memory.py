"""Memory that runs out in the middle of a step costs the requests of that step, and no others."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from exactness import tiny_models
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.loader import load_runner
from pageframe.executor.step_failure import StepFailedError
from unit.memory.kv_records import RecordingSink
from unit.memory.memories import entries

_NUM_TOKENS = 6
_GREEDY = SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS, ignore_eos=True)
_PROMPTS = tiny_models.prompts((9, 20, 33))
_NO_MEMORY = {
    "python": MemoryError("no memory for 12345 bytes"),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    # What PyTorch says on a CPU.
    "cpu": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.build("llama", tmp_path_factory.mktemp("oom"))


class _House:
    """An engine over a real model, driven plan by plan."""

    def __init__(self, folder, kernels, sampling=_GREEDY):
        self.sampling = sampling
        self.runner = load_runner(
            str(folder), device="cpu", dtype="float32", cpu_kernels=kernels, max_num_sequences=4
        )
        self.engine = StepEngine(
            self.runner,
            num_blocks=16,
            block_size=4,
            max_num_sequences=4,
            max_step_tokens=64,
            max_model_len=64,
            trace=RecordingSink(),
            clock=ManualClock(1_000),
            has_prefix_cache=False,
            check_every_step=True,
        )

    def step(self, **plan) -> StepResult:
        memory = self.engine.memory
        return self.engine.step(
            StepPlan(step=memory.last_received_step + 1, builds_on=memory.last_applied_step, **plan)
        )

    def start(self, *numbers: int) -> StepResult:
        return self.step(
            announce=[
                Announcement(
                    sequence_id=number,
                    token_ids=_PROMPTS[number],
                    num_prompt_tokens=len(_PROMPTS[number]),
                    sampling=self.sampling,
                )
                for number in numbers
            ],
            may=entries(*((number, 0, 64) for number in numbers)),
        )

    def answer(self, number: int) -> list[int]:
        """All tokens of a request that runs by itself."""
        results = [self.start(number), *(self.step() for _ in range(_NUM_TOKENS - 1))]
        assert results[-1].finish_reasons == [FinishReason.LENGTH]
        return [token_id for result in results for token_id in result.token_ids]


def _fail_in(target, name, error, monkeypatch):
    """The next call of a method gets half way through and fails; those after it do not."""
    real = getattr(target, name)

    def fail(*arguments, **more):
        monkeypatch.setattr(target, name, real)
        real(*arguments, **more)
        raise error

    monkeypatch.setattr(target, name, fail)


@pytest.mark.parametrize(
    ("kernels", "where"),
    [
        *product(["auto", "torch"], ["forward", "logits", "sample"]),
        ("auto", "prepare_decode"),
    ],
)
@pytest.mark.parametrize("kind", _NO_MEMORY)
def test_the_requests_of_the_step_end_and_the_next_one_is_served(
    folder, monkeypatch, kernels, where, kind
):
    # Compiled kernels do a step in one call, unless somebody wants to hear of its logits.
    is_heard_of = where != "prepare_decode"
    house = _House(folder, kernels, replace(_GREEDY, num_logprobs=0 if is_heard_of else -1))
    expected = house.answer(2)
    first = house.start(0)
    assert first.sampled_ids == [0]
    target = house.runner._sampler if where == "sample" else house.runner._decoder
    _fail_in(target, where, _NO_MEMORY[kind], monkeypatch)
    failed = house.start(1)
    assert sorted(failed.sampled_ids) == [0, 1]
    assert failed.finish_reasons == [FinishReason.ERROR] * 2
    assert isinstance(house.engine.last_failure, StepFailedError)
    assert str(_NO_MEMORY[kind]) in house.engine.last_failure.message
    account = house.engine.account()
    assert (account.free, account.total) == (16, 16), "nothing stays behind"
    assert house.engine.check_integrity() == []
    assert house.answer(2) == expected
    house.runner.close()


def test_a_failed_step_leaves_a_neighbour_that_was_not_in_it_alone(folder, monkeypatch):
    """One that waits for its admission is none of the step's, and gets its tokens."""
    house = _House(folder, "auto")
    expected = house.answer(1)
    waiting = Announcement(
        sequence_id=1,
        token_ids=_PROMPTS[1],
        num_prompt_tokens=len(_PROMPTS[1]),
        sampling=_GREEDY,
    )
    _fail_in(house.runner._decoder, "prepare_decode", MemoryError(), monkeypatch)
    failed = house.step(
        announce=[
            waiting,
            Announcement(
                sequence_id=0,
                token_ids=_PROMPTS[0],
                num_prompt_tokens=len(_PROMPTS[0]),
                sampling=_GREEDY,
            ),
        ],
        may=entries((0, 0, 64)),
    )
    assert failed.sampled_ids == [0]
    results = [house.step(may=entries((1, 0, 64))), *(house.step() for _ in range(5))]
    assert [token_id for result in results for token_id in result.token_ids] == expected
    assert np.all([result.sampled_ids == [1] for result in results])
    house.runner.close()
