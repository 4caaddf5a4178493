"""A model as a GPU would serve it, from its folder to the tokens, with kernels interpreted."""

import pytest
import torch

from exactness import tiny_models
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.executor.engine import StepEngine
from pageframe.executor.model import loader, sampling_choice
from pageframe.executor.model.device_decoder import DeviceDecoder
from pageframe.executor.model.device_sampler import DeviceSampler
from pageframe.executor.model.loader import load_runner
from pageframe.executor.model.native_choice import TRITON
from unit.memory.kv_records import RecordingSink
from unit.memory.memories import entries
from unit.model.tape import TapeRecorder

_NUM_TOKENS = 4
_PROMPTS = tiny_models.prompts((5, 3))
_SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=9, seed=3, max_tokens=_NUM_TOKENS, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.build("llama", tmp_path_factory.mktemp("served"))


@pytest.fixture
def recorder(monkeypatch):
    """Makes ``load_runner`` choose on the CPU what it chooses on a GPU; what records graphs."""

    def load_native(request):
        decoder = DeviceDecoder(
            request.folder, request.config, request.dtype, request.device, request.progress
        )
        return decoder, TRITON

    recorder = TapeRecorder()
    monkeypatch.setattr("pageframe.executor.model.linear.can_pack", lambda _: False)
    monkeypatch.setattr(loader, "load_native", load_native)
    monkeypatch.setattr(sampling_choice, "CudaRecorder", lambda _: recorder)
    return recorder


def _load(folder, **settings):
    return load_runner(
        str(folder),
        device="cpu",
        dtype="float32",
        max_num_sequences=2,
        max_step_tokens=8,
        **settings,
    )


def _engine(runner):
    return StepEngine(
        runner,
        num_blocks=12,
        block_size=4,
        max_num_sequences=2,
        max_step_tokens=8,
        max_model_len=24,
        trace=RecordingSink(),
        clock=ManualClock(1_000),
        check_every_step=True,
    )


def _answers(engine):
    """Tokens of both requests, which run together."""
    announced = [
        Announcement(
            sequence_id=number + 1,
            token_ids=_PROMPTS[number],
            num_prompt_tokens=len(_PROMPTS[number]),
            sampling=_SAMPLING[number],
        )
        for number in (0, 1)
    ]
    found = {1: [], 2: []}
    more = {"announce": announced, "may": entries((1, 0, 8), (2, 0, 8))}
    for _ in range(_NUM_TOKENS):
        memory = engine.memory
        result = engine.step(
            StepPlan(step=memory.last_received_step + 1, builds_on=memory.last_applied_step, **more)
        )
        more = {}
        for sequence_id, token_id in zip(result.sampled_ids, result.token_ids, strict=True):
            found[sequence_id].append(token_id)
    assert result.finish_reasons == [FinishReason.LENGTH] * 2
    return found


@pytest.mark.parametrize("has_graphs", [True, False])
def test_the_engines_tokens_are_those_of_the_plain_runner(folder, recorder, has_graphs):
    told = []
    runner = _load(
        folder,
        has_graphs=has_graphs,
        progress=lambda message, fraction: told.append((message, fraction)),
    )
    assert isinstance(runner._sampler, DeviceSampler)
    assert runner.facts.kernels == TRITON
    engine = _engine(runner)
    runner.warm_up()
    sizes = [message for message, _ in told if message.startswith("recording")]
    assert len(sizes) == recorder.num_recorded == (2 if has_graphs else 0)
    found = _answers(engine)
    # All steps but the one of the prompts.
    assert recorder.num_replays == (_NUM_TOKENS - 1 if has_graphs else 0)
    engine.close()
    assert found == _plain_answers(folder)


def _plain_answers(folder):
    # Of transformers, which the fixture leaves alone.
    engine = _engine(_load(folder, runner="transformers"))
    found = _answers(engine)
    engine.close()
    return found


def test_windows_of_layers_are_known_without_a_run(tmp_path, recorder):
    """Its layers do not ask for ``attend``, which is what a probe listens to."""
    runner = _load(tiny_models.build("qwen2", tmp_path), has_graphs=False)
    assert runner.facts.group_windows == (0, 9, 9)


def test_memory_that_runs_out_in_a_recorded_step_costs_its_requests_alone(
    folder, recorder, monkeypatch
):
    runner = _load(folder)
    engine = _engine(runner)
    runner.warm_up()
    expected = _answers(engine)
    launch = runner._on_device.launch

    def fail(batch):
        monkeypatch.setattr(runner._on_device, "launch", launch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner._on_device, "launch", fail)
    announced = Announcement(
        sequence_id=7, token_ids=_PROMPTS[0], num_prompt_tokens=5, sampling=_SAMPLING[0]
    )
    memory = engine.memory
    for more in ({"announce": [announced], "may": entries((7, 0, 8))}, {}):
        result = engine.step(
            StepPlan(step=memory.last_received_step + 1, builds_on=memory.last_applied_step, **more)
        )
    assert result.finish_reasons == [FinishReason.ERROR]
    assert result.errors == {7: "DEVICE_OUT_OF_MEMORY"}
    assert "DEVICE_OUT_OF_MEMORY: the memory of cpu ran out in a step" in str(engine.last_failure)
    assert engine.check_integrity() == []
    assert _answers(engine) == expected
    engine.close()
