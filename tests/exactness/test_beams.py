"""Beam searches of the whole system, against Hugging Face ``generate``: outputs and scores."""

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exactness import tiny_models
from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.clock import SystemClock
from pageframe.core.request import Completion, Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.core.trace import NullTraceSink
from pageframe.core.units import ceil_div
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.loader import load_runner
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions

FAMILIES = ("llama", "gpt2", "qwen2")
PROMPT_LENGTHS = (7, 1, 33, 16)
MAX_LEN = 128
STOPPING = {
    EarlyStopping.HEURISTIC: False,
    EarlyStopping.ALWAYS: True,
    EarlyStopping.NEVER: "never",
}
# How often HF's own outputs are made to end early: a token that stands there ends an output.
ENDING_PLACES = ((), (2,), (1, 4))


@dataclass(frozen=True)
class Case:
    """One search; ``ending`` are places in HF's best output whose tokens end outputs."""

    params: BeamParams
    prompt: int
    ending: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=12))


def _case(number: int, num_beams: int, num_return: int, length_penalty: float, **changes) -> Case:
    return Case(
        BeamParams(
            num_beams=num_beams,
            num_return=num_return,
            length_penalty=length_penalty,
            early_stopping=list(EarlyStopping)[number % 3],
        ),
        prompt=number % len(PROMPT_LENGTHS),
        ending=ENDING_PLACES[number % len(ENDING_PLACES)],
        sampling=replace(SamplingParams(max_tokens=12), **changes),
    )


CASES = [
    _case(0, 2, 1, 1.0),
    _case(1, 4, 4, 1.0),
    _case(2, 3, 2, 2.0),
    _case(3, 8, 3, 0.0),
    _case(4, 4, 2, -1.0),
    _case(5, 5, 5, 0.6),
    _case(7, 4, 4, 1.0, repetition_penalty=1.4),
    _case(8, 4, 2, 1.0, logit_bias={5: 3.0, 17: -4.0, 40: 2.5}),
    _case(10, 3, 3, 1.0, min_tokens=5),
    _case(11, 4, 4, 1.0, min_tokens=3, repetition_penalty=0.8, max_tokens=20),
    _case(13, 16, 16, 1.0, max_tokens=1),
    _case(14, 2, 2, 1.0, max_tokens=30),
]


@dataclass(frozen=True)
class Answer:
    """What HF says: outputs best first, their scores, and which tokens ended them."""

    outputs: list[list[int]]
    scores: list[float]
    ending: tuple[int, ...]


@pytest.fixture(scope="session")
def answers_of(tmp_path_factory):
    """The folder of a family, its prompts, and HF's answers to all cases."""

    @cache
    def get(name: str) -> tuple[Path, list[list[int]], list[Answer]]:
        folder = tiny_models.build(name, tmp_path_factory.mktemp(f"beams-{name}"))
        prompts = tiny_models.prompts(PROMPT_LENGTHS, seed=3)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        answers = []
        for case in CASES:
            prompt = prompts[case.prompt]
            free = _generate(model, prompt, case, ())
            best = free.outputs[0]
            ending = tuple({best[place] for place in case.ending if place < len(best)})
            answers.append(_generate(model, prompt, case, ending) if ending else free)
        return folder, prompts, answers

    return get


def _generate(model, prompt: list[int], case: Case, ending: tuple[int, ...]) -> Answer:
    sampling, params = case.sampling, case.params
    model.generation_config.eos_token_id = None
    bias = {(token_id,): bias for token_id, bias in sampling.logit_bias.items()}
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            num_beams=params.num_beams,
            num_return_sequences=params.num_return,
            length_penalty=params.length_penalty,
            early_stopping=STOPPING[params.early_stopping],
            max_new_tokens=sampling.max_tokens,
            min_new_tokens=sampling.min_tokens or None,
            repetition_penalty=sampling.repetition_penalty,
            sequence_bias=bias or None,
            eos_token_id=list(ending) or None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    outputs = [_until(row[len(prompt) :].tolist(), ending) for row in generated.sequences]
    return Answer(outputs, generated.sequences_scores.tolist(), ending)


def _until(token_ids: list[int], ending: tuple[int, ...]) -> list[int]:
    """HF fills what is behind the end with padding."""
    for place, token_id in enumerate(token_ids):
        if token_id in ending:
            return token_ids[: place + 1]
    return token_ids


def _submission(handle: int, prompt: list[int], case: Case, answer: Answer) -> Submission:
    return Submission(
        handle=handle,
        request_id=f"search-{handle}",
        prompt_token_ids=prompt,
        sampling=replace(case.sampling, stop_token_ids=answer.ending, ignore_eos=True),
        num_samples=case.params.num_return,
        beams=case.params,
        delivery=Delivery.FINAL,
    )


@dataclass
class Served:
    """Outputs and completions by handle and sample index."""

    outputs: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    completions: dict[tuple[int, int], Completion] = field(default_factory=dict)
    num_preemptions: int = 0


def serve(runner, submissions: list[Submission], *, num_blocks: int, **options) -> Served:
    """All at once; the pool is checked after every step, and nothing may stay behind."""
    clock = SystemClock()
    engine = StepEngine(
        runner,
        num_blocks=num_blocks,
        max_num_sequences=40,
        max_step_tokens=96,
        max_model_len=MAX_LEN,
        trace=NullTraceSink(),
        clock=clock,
        check_every_step=True,
        **options,
    )
    scheduler = Scheduler(
        engine.describe("test"),
        SchedulerOptions(token_budget=96, max_num_running=40, prefill_chunk_tokens=24),
        trace=NullTraceSink(),
        clock=clock,
    )
    for submission in submissions:
        scheduler.submit(submission, gateway_id=1)
    served, plans = Served(), deque()
    while not scheduler.is_idle:
        if cancels := scheduler.take_cancels():
            scheduler.on_result(engine.cancel(cancels), clock.now_ns())
        while (plan := scheduler.plan(clock.now_ns())) is not None:
            plans.append(plan)
        result = engine.step(plans.popleft())
        served.num_preemptions += len(result.preempted_ids)
        for _, events in scheduler.on_result(result, clock.now_ns()):
            start = 0
            for *key, num_tokens in zip(
                events.handles, events.sample_indices, events.num_tokens, strict=True
            ):
                output = served.outputs.setdefault(tuple(key), [])
                output += events.token_ids[start : start + num_tokens]
                start += num_tokens
            for completion in events.completions:
                served.completions[completion.handle, completion.sample_index] = completion
    engine.cancel(scheduler.take_cancels())
    assert engine.last_failure is None
    account = engine.account()
    assert account.free + account.cached == account.total, account
    return served


def check(served: Served, handle: int, answer: Answer) -> None:
    keys = [(handle, index) for index in range(len(answer.outputs))]
    assert [served.outputs[key] for key in keys] == answer.outputs
    scores = [served.completions[key].score for key in keys]
    assert scores == pytest.approx(answer.scores, rel=1e-4, abs=1e-4)
    for key, token_ids in zip(keys, answer.outputs, strict=True):
        has_stopped = token_ids[-1] in answer.ending
        expected = FinishReason.STOP if has_stopped else FinishReason.LENGTH
        assert served.completions[key].finish_reason is expected


def submissions_of(prompts: list[list[int]], answers: list[Answer]) -> list[Submission]:
    return [
        _submission(handle, prompts[case.prompt], case, answer)
        for handle, (case, answer) in enumerate(zip(CASES, answers, strict=True))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cases_end_in_every_way(family, answers_of):
    _, _, answers = answers_of(family)
    ends = {output[-1] in answer.ending for answer in answers for output in answer.outputs}
    assert ends == {True, False}
    lengths = {len(output) for answer in answers for output in answer.outputs}
    assert len(lengths) > 4


@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_scores_are_those_of_hugging_face(
    family, block_size, has_prefix_cache, answers_of
):
    folder, prompts, answers = answers_of(family)
    runner = load_runner(str(folder), device="cpu", dtype="float32")
    others = [
        Submission(
            handle=100 + number,
            request_id=f"other-{number}",
            prompt_token_ids=prompts[number],
            sampling=SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True),
        )
        for number in range(2)
    ]
    served = serve(
        runner,
        [*others, *submissions_of(prompts, answers)],
        num_blocks=ceil_div(4000, block_size) * runner.facts.num_kv_groups,
        block_size=block_size,
        has_prefix_cache=has_prefix_cache,
    )
    runner.close()
    for handle, answer in enumerate(answers):
        check(served, handle, answer)
    assert [len(served.outputs[100 + number, 0]) for number in range(2)] == [25, 25]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_they_are_the_same_where_searches_give_way(family, has_prefix_cache, answers_of):
    folder, prompts, answers = answers_of(family)
    runner = load_runner(str(folder), device="cpu", dtype="float32")
    served = serve(
        runner,
        submissions_of(prompts, answers),
        # What the widest takes alone, and not much more.
        num_blocks=32 * runner.facts.num_kv_groups,
        block_size=4,
        has_prefix_cache=has_prefix_cache,
    )
    runner.close()
    assert served.num_preemptions > 0
    for handle, answer in enumerate(answers):
        check(served, handle, answer)
