"""Sharing, swapping, cutting, moving and resizing change no token, on real keys and values.

Greedy tokens equal Hugging Face's, sampled ones those of the same sequence alone, and every
log-probability is Hugging Face's. The seed stands in the name of a failed test.
"""

from collections import Counter

import pytest

from exactness import tiny_models
from exactness.questions import MAX_NEW_TOKENS, Exam
from exactness.shared_run import World, run

BLOCK_SIZES = (1, 4, 16, 128)
IN_PLAY = {
    *("SHARE", "COPY_ON_WRITE", "INDEX", "EVICT", "DEMOTE", "PROMOTE", "PIN", "UNPIN"),
    *("MOVE", "RESIZE", "because FORK", "because SESSION"),
}
RECOVERIES = {"because PREEMPTED", "SWAP_OUT", "SWAP_IN", "because TAIL"}
ALL = [
    (name, runner)
    for name in tiny_models.NAMES
    for runner in ("native", "transformers")
    if runner == "transformers" or name in tiny_models.NATIVE
]


def _check_exam(exam: Exam) -> None:
    """Rounding may decide a few tokens, not the test."""
    num_certain = [question.answer.num_certain for question in exam.questions]
    assert num_certain.count(MAX_NEW_TOKENS) >= len(num_certain) - 2, num_certain


@pytest.mark.parametrize(
    ("name", "runner", "block_sizes"),
    [
        # Grouped heads, one head for all, each its own.
        ("llama31", "native", BLOCK_SIZES),
        ("qwen3", "native", (1, 16)),
        ("gpt2", "transformers", (4, 16)),
        # A window in all layers, and in some of them: two or three groups of layers.
        ("mistral", "native", BLOCK_SIZES),
        ("mixtral", "transformers", (4, 16)),
        ("qwen2", "native", BLOCK_SIZES),
        ("gemma2", "transformers", (4, 16)),
        ("gemma3", "transformers", (1, 16)),
    ],
)
def test_tokens_are_the_same_with_everything_in_play(exam_of, name, runner, block_sizes):
    exam = exam_of(name)
    _check_exam(exam)
    seen: Counter[str] = Counter()
    num_compared: Counter[str] = Counter()
    for seed, block_size in enumerate(block_sizes):
        world = World(
            runner=runner,
            block_size=block_size,
            num_host_tokens=512,
            has_lookahead=bool(seed % 2),
            seed=seed,
        )
        outcome = run(exam, world)
        seen += outcome.seen
        num_compared += outcome.num_compared
        assert outcome.num_whole > 16
    has_window = name in ("mistral", "mixtral", *tiny_models.MIXED)
    assert seen.keys() >= IN_PLAY
    # Short windows leave so much room that hardly anybody has to give way.
    assert has_window or seen.keys() >= RECOVERIES
    assert ("because WINDOW" in seen) == has_window
    assert min(num_compared[kind] for kind in ("Hugging Face", "alone", "child alone")) > 10


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 102))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("name", "runner"), ALL)
def test_tokens_are_the_same_with_everything_in_play_at_length(
    exam_of, name, runner, block_size, seed
):
    world = World(
        runner=runner,
        block_size=block_size,
        num_host_tokens=(0, 200, 512, 4096)[(BLOCK_SIZES.index(block_size) + 2 * seed) % 4],
        has_lookahead=bool(seed % 2),
        seed=seed,
    )
    outcome = run(exam_of(name), world)
    assert outcome.num_whole > 12
    assert outcome.seen.keys() >= {"SHARE", "EVICT"}
    assert sum(outcome.num_compared.values()) > 200
