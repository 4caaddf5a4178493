"""Speculative decoding: tokens equal Hugging Face's, and those that we sample without drafts.

Drafts are guessed from the answers themselves, three of ten wrong, so that some of each length are
kept; once also by the n-grams of prompts that repeat themselves.
"""

import pytest

from exactness.questions import MAX_NEW_TOKENS, NUM_TOKENS_MAX
from exactness.serving import Served, Shape, serve
from pageframe.core.plan import Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.core.units import ceil_div
from pageframe.executor.model.loader import load_runner
from unit.executor.played_drafter import KnowingDrafter

GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
# Everything that depends on the tokens before, beside chance.
EDITED = SamplingParams(
    temperature=1.0,
    seed=77,
    max_tokens=MAX_NEW_TOKENS,
    min_tokens=5,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    num_logprobs=3,
    top_k=40,
    stop_token_ids=(3, 4),
)


def _serve(exam, sampling, *, runner="auto", texts=(), drafts=4, num_samples=1, **shape) -> Served:
    loaded = load_runner(str(exam.folder), runner=runner, device="cpu", dtype="float32")
    block_size = shape["block_size"]
    num_blocks = ceil_div(NUM_TOKENS_MAX * 5 // 4, block_size) + 1
    served = serve(
        loaded,
        [question.prompt for question in exam.questions] * 2,
        sampling,
        Shape(
            num_blocks=num_blocks,
            prefill_chunk_tokens=64,
            num_host_slots=2 * num_blocks,
            num_draft_tokens=drafts,
            num_samples=num_samples,
            **shape,
        ),
        KnowingDrafter(texts),
    )
    loaded.close()
    return served


@pytest.mark.parametrize(
    ("name", "runner"),
    [("llama31", "native"), ("llama31", "transformers"), ("gpt2", "transformers")],
)
def test_greedy_tokens_equal_hugging_face(exam_of, name, runner):
    exam = exam_of(name)
    texts = [(question.prompt, question.answer.token_ids) for question in exam.questions]
    num_preemptions = 0
    for block_size, lookahead, recovery in (
        (1, True, Recovery.RECOMPUTE),
        (4, False, Recovery.TAIL),
        (16, True, Recovery.SWAP),
    ):
        served = _serve(
            exam,
            GREEDY,
            runner=runner,
            texts=texts,
            block_size=block_size,
            lookahead=lookahead,
            recovery=recovery,
        )
        for question, token_ids in zip(exam.questions * 2, served.token_ids, strict=True):
            certain = question.answer.num_certain
            assert len(token_ids) == MAX_NEW_TOKENS
            assert token_ids[:certain] == question.answer.token_ids[:certain]
        assert served.num_accepted > len(exam.questions)
        num_preemptions += served.num_preemptions
    assert num_preemptions > 0


@pytest.mark.parametrize(
    ("name", "runner"),
    [("llama31", "native"), ("gpt2", "transformers"), ("gemma3", "transformers")],
)
def test_sampled_tokens_are_those_without_drafts(exam_of, name, runner):
    exam = exam_of(name)
    shape = {"block_size": 16, "lookahead": True, "runner": runner}
    plain = _serve(exam, EDITED, drafts=0, num_samples=2, **shape)
    assert plain.num_accepted == 0
    prompts = [question.prompt for question in exam.questions] * 2
    texts = [
        (prompt, output)
        for prompt, samples in zip(prompts, plain.samples, strict=True)
        for output in samples
    ]
    drafted = _serve(exam, EDITED, texts=texts, num_samples=2, **shape)
    assert drafted.samples == plain.samples
    assert drafted.num_accepted > len(prompts)
    # Some ended with a stop token, and none too early.
    lengths = {len(output) for samples in plain.samples for output in samples}
    assert min(lengths) >= EDITED.min_tokens
    for handle, entries in plain.logprobs.items():
        others = drafted.logprobs[handle]
        assert [entry.token_id for entry in others] == plain.token_ids[handle]
        assert [entry.top_token_ids for entry in others] == [e.top_token_ids for e in entries]
        assert [entry.logprob for entry in others] == pytest.approx(
            [entry.logprob for entry in entries], abs=2e-4
        )


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_n_grams_guess_what_repeats_itself(exam_of, runner):
    exam = exam_of("llama31")
    # Of tokens that are this far ahead of all others the model makes a text that often repeats.
    sampling = SamplingParams(
        temperature=0.0, max_tokens=120, ignore_eos=True, logit_bias={5: 60.0, 6: 60.0, 9: 60.0}
    )
    prompts = [question.prompt[:40] for question in exam.questions[:3]]
    outcomes = []
    for drafts in (0, 4):
        loaded = load_runner(str(exam.folder), runner=runner, device="cpu", dtype="float32")
        shape = Shape(
            num_blocks=60,
            block_size=16,
            prefill_chunk_tokens=64,
            lookahead=True,
            num_draft_tokens=drafts,
        )
        outcomes.append(serve(loaded, prompts, sampling, shape))
        loaded.close()
    plain, drafted = outcomes
    assert drafted.token_ids == plain.token_ids
    # How many depends on what a token costs on this machine; at first it is tried.
    assert drafted.num_accepted > 0
