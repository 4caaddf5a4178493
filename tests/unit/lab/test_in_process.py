"""The system in one process generates what scheduler and engine generate, and is taken down."""

import asyncio
import contextlib
import sys
import threading
from types import SimpleNamespace

import pytest

from exactness.serving import Shape, serve
from integration import models
from pageframe.config.launch import Launch
from pageframe.config.settings import load_settings
from pageframe.core.errors import InternalError, OutOfRangeError
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.model.loader import load_runner
from pageframe.gateway.output import OutputDelta, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.lab.bench_split import through_client, through_service
from pageframe.lab.in_process import in_process_system
from pageframe.lab.workload import Load, WorkloadShape, make_workload

PATIENCE_S = 60
SHAPE = WorkloadShape(num_requests=12, num_prompt_tokens=(1, 40), num_output_tokens=(5, 30))


@pytest.fixture(autouse=True)
def _switch_interval():
    """The system shortens it for its process, which is ours."""
    before_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.write_config_and_tokenizer(
        tmp_path_factory.mktemp("models") / "sim", max_model_len=512
    )


@pytest.fixture
def launch(folder, tmp_path):
    flags = {"model": str(folder), "runner": "sim", "sim-step": "0s", "state-dir": str(tmp_path)}
    pool = {"num-blocks": "40", "block-size": "4", "token-budget": "24", "max-num-sequences": "6"}
    return Launch(
        settings=load_settings(flags | pool, {}, working_dir=tmp_path),
        model_path=folder,
        run_dir=tmp_path,
        num_threads=1,
        supervisor_pid=1,
    )


def run(launch, scenario):
    """Run a scenario, a coroutine function that takes the service, to its end."""

    async def main():
        async with in_process_system(launch, NullTraceSink()) as service:
            return await asyncio.wait_for(scenario(service), PATIENCE_S)

    return asyncio.run(main())


async def generate(service, load, sampling):
    request = GenerateInput(
        token_ids=load.prompt_token_ids,
        max_tokens=load.num_output_tokens,
        seed=load.seed,
        sampling=sampling,
        delivery=Delivery.EVERY_TOKEN,
    )
    token_ids, num_ends = [], 0
    async with contextlib.aclosing(service.generate(request)) as outputs:
        async for output in outputs:
            if isinstance(output, OutputDelta):
                token_ids += output.token_ids
            num_ends += isinstance(output, SampleEnd)
    assert num_ends == 1
    return token_ids


def test_its_tokens_are_those_of_scheduler_and_engine_alone(launch, folder):
    """A pool for two of twelve requests, so that they wait for one another in both."""
    vocab_size = models.vocab_size(folder)
    loads = make_workload(SHAPE, vocab_size, seed=3)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)

    async def scenario(service):
        return await asyncio.gather(*(generate(service, load, greedy) for load in loads))

    generated = run(launch, scenario)
    runner = load_runner(str(folder), runner="sim", max_num_sequences=6)
    shape = Shape(
        num_blocks=40,
        block_size=4,
        prefill_chunk_tokens=0,
        lookahead=True,
        max_num_sequences=6,
        token_budget=24,
    )
    longest = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=30)
    served = serve(runner, [load.prompt_token_ids for load in loads], longest, shape)
    assert [len(token_ids) for token_ids in generated] == [load.num_output_tokens for load in loads]
    assert generated == [
        token_ids[: load.num_output_tokens]
        for token_ids, load in zip(served.token_ids, loads, strict=True)
    ]
    assert len({tuple(token_ids) for token_ids in generated}) == len(loads)


def test_a_refusal_reaches_the_caller_and_nobody_else(launch):
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    too_long = Load(prompt_token_ids=[20] * 150, num_output_tokens=30, seed=1)
    fine = Load(prompt_token_ids=[20, 21], num_output_tokens=3, seed=1)

    async def scenario(service):
        refused, generated = await asyncio.gather(
            generate(service, too_long, greedy),
            generate(service, fine, greedy),
            return_exceptions=True,
        )
        assert isinstance(refused, OutOfRangeError), refused
        assert len(generated) == 3

    run(launch, scenario)


@pytest.mark.parametrize("delivery", [Delivery.EVERY_TOKEN, Delivery.FINAL])
def test_requests_through_a_service_are_counted_to_the_last_token(launch, delivery):
    loads = make_workload(SHAPE, 400, seed=1)
    run(launch, lambda service: through_service(service, delivery)(loads))


@pytest.mark.parametrize("delivery", [Delivery.EVERY_TOKEN, Delivery.FINAL])
def test_both_sides_of_a_measurement_ask_for_the_same_delivery(delivery):
    asked = []

    class PlayedSide:
        async def generate(self, request):
            asked.append(request.delivery)
            yield OutputDelta(sample_index=0, token_ids=[1] * request.max_tokens)

        async def complete(self, request):
            asked.append(request.delivery)
            sample = SimpleNamespace(token_ids=[1] * request.max_tokens)
            return SimpleNamespace(samples=[sample])

    loads = [Load(prompt_token_ids=[20], num_output_tokens=5, seed=1)]
    asyncio.run(through_service(PlayedSide(), delivery)(loads))
    asyncio.run(through_client(PlayedSide(), delivery)(loads))
    assert asked == [delivery, delivery]


def test_a_request_that_comes_back_short_spoils_the_measurement():
    class ShortService:
        async def generate(self, request):
            yield OutputDelta(sample_index=0, token_ids=[1] * (request.max_tokens - 1))

    load = Load(prompt_token_ids=[20], num_output_tokens=5, seed=1)
    with pytest.raises(InternalError) as caught:
        asyncio.run(through_service(ShortService(), Delivery.FINAL)([load]))
    assert caught.value.limits == {"num_tokens": "4", "num_tokens_expected": "5"}


def test_nothing_is_left_behind(launch):
    before = set(threading.enumerate())

    async def scenario(service):
        return {thread for thread in threading.enumerate() if thread.name == "step"} - before

    started = run(launch, scenario)
    assert len(started) == 1
    assert not started & set(threading.enumerate())
