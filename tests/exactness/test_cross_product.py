"""The same tokens, however a run is cut up: pools, chunks, block sizes, look-ahead."""

import itertools

import pytest

from exactness import tiny_models
from exactness.serving import Shape, serve
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.loader import load_runner

MAX_NEW_TOKENS = 14
BLOCK_SIZES = (1, 16, 64)
CHUNKS = (1, 7, 64)
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)

CUTS = list(itertools.product(BLOCK_SIZES, CHUNKS, (False, True)))


def _cut_id(cut: tuple[int, int, bool]) -> str:
    block_size, chunk, lookahead = cut
    return f"block{block_size}-chunk{chunk}-{'ahead' if lookahead else 'in-turn'}"


def _check(tiny_model, name: str, shape: Shape, order=range(8)) -> int:
    folder, prompts, answers = tiny_model(name)
    prompts, answers = [prompts[i] for i in order], [answers[i] for i in order]
    runner = load_runner(str(folder), dtype="float32", device="cpu", runner="auto")
    served = serve(runner, prompts, GREEDY, shape)
    runner.close()
    for index, (answer, token_ids) in enumerate(zip(answers, served.token_ids, strict=True)):
        certain = answer.num_certain
        assert len(token_ids) == MAX_NEW_TOKENS, f"prompt {index}"
        assert token_ids[:certain] == answer.token_ids[:certain], f"prompt {index}"
    # Rounding may decide a few tokens, not the test.
    assert sum(answer.num_certain == MAX_NEW_TOKENS for answer in answers) >= len(answers) - 1
    return served.num_preemptions


@pytest.mark.parametrize("cut", CUTS, ids=_cut_id)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_tokens_equal_hugging_face_in_a_roomy_pool(tiny_model, name, cut):
    block_size, chunk, lookahead = cut
    shape = Shape(
        num_blocks=-(-1024 // block_size),
        block_size=block_size,
        prefill_chunk_tokens=chunk,
        lookahead=lookahead,
    )
    assert _check(tiny_model, name, shape) == 0


@pytest.mark.parametrize("cut", CUTS, ids=_cut_id)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_tokens_equal_hugging_face_when_every_request_loses_its_blocks(tiny_model, name, cut):
    # The pool holds little more than the longest request, which preempts; and the executor is lost
    # in the middle of every request's decode, which takes the blocks of the oldest one as well.
    block_size, chunk, lookahead = cut
    longest = max(map(len, tiny_model(name)[1])) + MAX_NEW_TOKENS
    shape = Shape(
        num_blocks=-(-longest // block_size),
        block_size=block_size,
        prefill_chunk_tokens=chunk,
        lookahead=lookahead,
        loses_each_request=True,
    )
    _check(tiny_model, name, shape)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("lookahead", [False, True])
def test_a_small_pool_preempts_and_changes_no_token(tiny_model, block_size, lookahead):
    longest = max(map(len, tiny_model("llama")[1])) + MAX_NEW_TOKENS
    shape = Shape(
        num_blocks=-(-longest // block_size),
        block_size=block_size,
        prefill_chunk_tokens=64,
        lookahead=lookahead,
    )
    # Long prompts first leave the decodes of the others no room to grow.
    assert _check(tiny_model, "llama", shape, order=(5, 2, 0, 1, 3, 4, 6, 7)) > 0
