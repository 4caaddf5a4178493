"""The scheduler's own plans over shared memory: samples that fork, and each way to give way."""

from collections import Counter

import pytest

from exactness.questions import MAX_NEW_TOKENS, NUM_TOKENS_MAX
from exactness.serving import Served, Shape, serve
from exactness.shared_run import Alone
from pageframe.core.plan import Announcement, Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.core.units import ceil_div
from pageframe.executor.model.loader import load_runner

NUM_SAMPLES = 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
SAMPLING = SamplingParams(temperature=1.0, seed=77, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
SEEN_OF = {
    Recovery.RECOMPUTE: {"because PREEMPTED"},
    Recovery.SWAP: {"SWAP_OUT", "SWAP_IN"},
    Recovery.TAIL: {"because TAIL"},
}


def _serve(exam, sampling: SamplingParams, *, num_samples: int, **shape) -> Served:
    runner = load_runner(str(exam.folder), device="cpu", dtype="float32")
    block_size = shape["block_size"]
    num_blocks = ceil_div(NUM_TOKENS_MAX * 5 // 4, block_size) + 1
    # Each twice, so that pressure lasts and the second finds what the first left behind.
    prompts = [question.prompt for question in exam.questions] * 2
    served = serve(
        runner,
        prompts,
        sampling,
        Shape(
            num_blocks=num_blocks,
            prefill_chunk_tokens=64,
            num_samples=num_samples,
            num_host_slots=2 * num_blocks,
            **shape,
        ),
    )
    runner.close()
    completions = [completion for samples in served.completions for completion in samples]
    assert {completion.finish_reason for completion in completions} == {FinishReason.LENGTH}
    return served


def _seen_in_greedy_run(exam, recovery: Recovery) -> Counter[str]:
    served = _serve(exam, GREEDY, num_samples=1, block_size=4, lookahead=False, recovery=recovery)
    for question, token_ids in zip(exam.questions * 2, served.token_ids, strict=True):
        certain = question.answer.num_certain
        assert len(token_ids) == MAX_NEW_TOKENS
        assert token_ids[:certain] == question.answer.token_ids[:certain]
    return served.seen


def _seen_in_sampled_run(exam, recovery: Recovery, alone: list[list[list[int]]]) -> Counter[str]:
    served = _serve(
        exam, SAMPLING, num_samples=NUM_SAMPLES, block_size=16, lookahead=True, recovery=recovery
    )
    assert served.samples == alone * 2
    return served.seen


@pytest.fixture(scope="module")
def alone(exam_of) -> list[list[list[int]]]:
    """What each sample of each question is when it has a pool to itself."""
    exam = exam_of("llama31")
    solo = Alone(exam, "native")
    answers = [
        [
            solo.answer(
                Announcement(
                    sequence_id=1,
                    token_ids=question.prompt,
                    num_prompt_tokens=len(question.prompt),
                    sampling=SAMPLING,
                    sample_index=sample_index,
                )
            )
            for sample_index in range(NUM_SAMPLES)
        ]
        for question in exam.questions
    ]
    solo.close()
    assert len({tuple(samples) for answer in answers for samples in answer}) > 30
    return answers


@pytest.mark.parametrize("recovery", Recovery, ids=lambda recovery: recovery.name)
def test_scheduled_requests_have_the_tokens_of_requests_alone(exam_of, alone, recovery):
    exam = exam_of("llama31")
    seen = _seen_in_greedy_run(exam, recovery) + _seen_in_sampled_run(exam, recovery, alone)
    wanted = SEEN_OF[recovery] | {"SHARE", "COPY_ON_WRITE", "because FORK", "EVICT", "PROMOTE"}
    assert seen.keys() >= wanted
