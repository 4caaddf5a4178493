"""One beam search alone: literal steps, and the dense algorithm of Hugging Face beside it."""

from itertools import count

import numpy as np
import pytest

from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.step import Candidates, FinishReason
from pageframe.scheduler.beams import BeamGroup, num_candidates

ROOT = 1
END = 9


def group(num_beams: int, *, max_tokens: int = 5, ending=(END,), **fields) -> BeamGroup:
    return BeamGroup(
        BeamParams(num_beams=num_beams, **fields),
        root_id=ROOT,
        ending_token_ids=frozenset(ending),
        max_tokens=max_tokens,
    )


def some(*pairs: tuple[int, float]) -> Candidates:
    return Candidates(
        token_ids=[token for token, _ in pairs], logprobs=[logprob for _, logprob in pairs]
    )


def test_the_root_branches_into_beams_that_have_ids_of_their_own():
    search = group(2)
    branches = search.advance({ROOT: some((5, -0.5), (6, -1.0), (7, -2.0))}, count(10))
    assert branches == [(ROOT, 10, 5), (ROOT, 11, 6)]
    assert search.beam_ids == [10, 11]


def test_the_best_of_all_beams_go_on_and_the_first_of_a_parent_in_its_place():
    search = group(2)
    search.advance({ROOT: some((5, -0.5), (6, -1.0))}, count(10))
    branches = search.advance(
        {10: some((1, -0.1), (2, -0.4), (3, -5.0)), 11: some((4, -0.5), (1, -3.0))}, count(12)
    )
    # -0.6 and -0.9 of beam 10, against -1.5 of beam 11: that one ends.
    assert branches == [(10, 10, 1), (10, 12, 2)]
    assert search.beam_ids == [10, 12]


def test_equals_go_on_in_the_order_of_their_beams():
    search = group(2)
    search.advance({ROOT: some((5, -1.0), (6, -1.0))}, count(10))
    branches = search.advance({10: some((1, -1.0)), 11: some((2, -1.0))}, count(12))
    assert branches == [(10, 10, 1), (11, 11, 2)]


def test_a_token_that_ends_makes_a_hypothesis_and_another_goes_on():
    search = group(2)
    branches = search.advance({ROOT: some((END, -0.2), (5, -1.0), (6, -3.0))}, count(10))
    assert [branch.token_id for branch in branches] == [5, 6]
    (hypothesis,) = search.hypotheses
    assert (hypothesis.token_ids, hypothesis.score) == ([END], -0.2)
    assert hypothesis.finish_reason is FinishReason.STOP


def test_one_that_ends_behind_the_first_num_beams_is_none():
    search = group(2)
    search.advance({ROOT: some((5, -0.1), (6, -0.2), (END, -0.3))}, count(10))
    assert search.hypotheses == []


def test_at_the_last_token_the_best_are_hypotheses_and_it_is_done():
    search = group(2, max_tokens=2)
    search.advance({ROOT: some((5, -0.5), (6, -1.0))}, count(10))
    branches = search.advance({10: some((1, -0.1), (2, -2.0)), 11: some((END, -0.2))}, count(12))
    assert (branches, search.is_done, search.beam_ids) == ([], True, [])
    found = [(it.token_ids, it.score, it.finish_reason) for it in search.hypotheses]
    assert found == [
        ([5, 1], pytest.approx(-0.3), FinishReason.LENGTH),
        ([6, END], pytest.approx(-0.6), FinishReason.STOP),
    ]


@pytest.mark.parametrize(
    ("early_stopping", "is_done"),
    [(EarlyStopping.ALWAYS, True), (EarlyStopping.HEURISTIC, True), (EarlyStopping.NEVER, False)],
)
def test_when_it_is_over_is_the_callers_choice(early_stopping, is_done):
    search = group(1 + 1, max_tokens=50, early_stopping=early_stopping)
    best = some((END, -0.1), (5, -1.0), (6, -1.1))
    search.advance({ROOT: best}, count(10))
    # Another ends, and the best beam is worse than both; only a much longer one could catch up.
    search.advance({10: some((END, -0.1), (1, -0.2)), 11: some((1, -0.3))}, count(12))
    assert search.is_done is is_done


def test_outputs_share_what_they_have_in_common():
    search = group(2, max_tokens=3)
    search.advance({ROOT: some((5, -0.1), (6, -9.0))}, count(10))
    search.advance({10: some((1, -0.1), (2, -0.2)), 11: some((1, -9.0))}, count(12))
    search.advance({10: some((3, -0.1)), 12: some((4, -0.1))}, count(14))
    assert [it.token_ids for it in search.hypotheses] == [[5, 1, 3], [5, 2, 4]]
    nodes = {id(node) for it in search.hypotheses for node in it.computed_nodes()}
    assert len(nodes) == 3


def dense(
    logprobs, params: BeamParams, ending: set[int], max_tokens: int
) -> list[tuple[list[int], float]]:
    """Beam search over arrays [num_beams * vocabulary], as Hugging Face writes it."""
    num_beams, num_ends = params.num_beams, len(ending)
    stopping = EarlyStopping.ALWAYS if num_beams == 1 else params.early_stopping
    running = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    for length in range(1, max_tokens + 1):
        totals = np.concatenate([score + logprobs(tokens) for tokens, score in running])
        vocabulary = len(totals) // len(running)
        best = np.argsort(-totals, kind="stable")[: max(2, 1 + num_ends) * num_beams]
        going_on = []
        for rank, place in enumerate(best.tolist()):
            tokens = [*running[place // vocabulary][0], place % vocabulary]
            if tokens[-1] in ending or length == max_tokens:
                if rank < num_beams:
                    finished.append((tokens, totals[place] / length**params.length_penalty))
            else:
                going_on.append((tokens, totals[place]))
        running = going_on[:num_beams]
        finished = sorted(finished, key=lambda pair: -pair[1])[:num_beams]
        if not running:
            break
        if len(finished) == num_beams:
            is_long = stopping is EarlyStopping.NEVER and params.length_penalty > 0
            hypothetical = max_tokens if is_long else length
            possible = running[0][1] / hypothetical**params.length_penalty
            if stopping is EarlyStopping.ALWAYS or possible <= finished[-1][1]:
                break
    return finished


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_dense_algorithm(seed):
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.integers(12, 40))
    num_beams = int(rng.integers(1, 7))
    params = BeamParams(
        num_beams=num_beams,
        length_penalty=float(rng.choice([0.0, 1.0, -1.0, 0.5, 2.0])),
        early_stopping=EarlyStopping(int(rng.integers(1, 4))),
    )
    ending = set(rng.choice(vocab_size, int(rng.integers(0, 5)), replace=False).tolist())
    max_tokens = int(rng.integers(1, 9))

    def logprobs(tokens: list[int]) -> np.ndarray:
        logits = np.random.default_rng([seed, *tokens]).normal(size=vocab_size) * 3
        return logits - np.log(np.exp(logits).sum())

    search = BeamGroup(
        params, root_id=ROOT, ending_token_ids=frozenset(ending), max_tokens=max_tokens
    )
    num_best, tokens = num_candidates(params, frozenset(ending), vocab_size), {ROOT: []}
    ids = count(100)
    while not search.is_done:
        candidates = {}
        for beam_id in search.beam_ids:
            told = logprobs(tokens[beam_id])
            best = np.argsort(-told, kind="stable")[:num_best]
            candidates[beam_id] = some(*((int(t), float(told[t])) for t in best))
        branches = search.advance(candidates, ids)
        tokens = {it.child_id: [*tokens[it.parent_id], it.token_id] for it in branches}
    expected = dense(logprobs, params, ending, max_tokens)
    assert [it.token_ids for it in search.hypotheses] == [outputs for outputs, _ in expected]
    assert [it.score for it in search.hypotheses] == pytest.approx([s for _, s in expected])
