"""One beam search: candidates in, branches and ended hypotheses out. Knows no sequence and no plan.

    beams        a      b      c             each reports its best tokens, best first
    candidates  a.x a.y b.u c.v ...          ranked over all beams by log-probability
                 │   │   ✝   │               a token that ends an output makes a hypothesis of it
    beams        a   d       c               the best others go on: `a` in place, and as `d`

The algorithm is that of Hugging Face ``generate`` (``GenerationMixin._beam_search``), down to its
rules for the end. It ranks ``(1 + number of ending tokens) * num_beams`` candidates; here they are
ranked lazily, until enough go on: what comes behind can change nothing. Of one beam at most
``num_beams`` tokens go on and each ending token ends one, so ``num_candidates`` of each suffice.
"""

import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.step import Candidates, FinishReason


class _Output(NamedTuple):
    """The tokens of a beam, as a list that shares what its beams have in common."""

    before: "_Output | None"
    token_id: int


class _Beam(NamedTuple):
    """A hypothesis that goes on. ``logprob`` is the sum over its tokens."""

    beam_id: int
    logprob: float
    output: _Output | None


class _Continuation(NamedTuple):
    """One more token for one beam, with the log-probability of the whole."""

    logprob: float
    beam: _Beam
    token_id: int

    @property
    def output(self) -> _Output:
        return _Output(self.beam.output, self.token_id)


class Branch(NamedTuple):
    """``child_id`` goes on from ``parent_id`` with ``token_id``; they may be the same."""

    parent_id: int
    child_id: int
    token_id: int


class Hypothesis(NamedTuple):
    """An output that has ended.

    Attributes:
        score: Sum of log-probabilities, by length to the power of the penalty.
        output: Its tokens, see ``tokens_of``.
        finish_reason: STOP or LENGTH.
    """

    score: float
    output: _Output
    finish_reason: FinishReason

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, in order. O(tokens)."""
        token_ids: list[int] = []
        output: _Output | None = self.output
        while output is not None:
            token_ids.append(output.token_id)
            output = output.before
        return token_ids[::-1]

    def computed_nodes(self) -> Iterator[object]:
        """One object for each of its tokens but the last; hypotheses share those in common.

        The last token of an output is never computed.
        """
        output = self.output.before
        while output is not None:
            yield output
            output = output.before


def num_candidates(params: BeamParams, ending_token_ids: frozenset[int], vocab_size: int) -> int:
    """How many candidates of each beam decide a step."""
    return min(params.num_beams + len(ending_token_ids), vocab_size)


class BeamGroup:
    """The beams of one search.

    All beams are equally long. Before the first step there is one, the prompt alone.

    Args:
        params: What is searched.
        root_id: Who computes the prompt; it is no beam itself and never goes on.
        ending_token_ids: Tokens that end an output.
        max_tokens: Every output ends after this many.

    Attributes:
        is_done: Whether the search is over.
        num_tokens: Tokens of each beam behind the prompt.
    """

    def __init__(
        self,
        params: BeamParams,
        *,
        root_id: int,
        ending_token_ids: frozenset[int],
        max_tokens: int,
    ) -> None:
        self.is_done = False
        self.num_tokens = 0
        self._params = params
        self._root_id = root_id
        self._ending_token_ids = ending_token_ids
        self._max_tokens = max_tokens
        # One beam follows the best token to its end: there is nothing to wait for.
        is_greedy = params.num_beams == 1
        self._early_stopping = EarlyStopping.ALWAYS if is_greedy else params.early_stopping
        self._beams = [_Beam(root_id, 0.0, None)]
        self._hypotheses: list[Hypothesis] = []

    @property
    def beam_ids(self) -> list[int]:
        """Who goes on, best first."""
        return [beam.beam_id for beam in self._beams]

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The best outputs that have ended, best first, at most ``num_beams``."""
        return self._hypotheses

    def advance(self, candidates: Mapping[int, Candidates], new_ids: Iterator[int]) -> list[Branch]:
        """Take one step.

        Args:
            candidates: Of each beam, best first.
            new_ids: An id for each child that does not go on in its parent's place.

        Returns:
            How the search goes on; empty when it is done. Who is no child any more has ended.
        """
        assert not self.is_done, "the search is over"
        num_beams = self._params.num_beams
        self.num_tokens += 1
        is_last = self.num_tokens >= self._max_tokens
        going_on: list[_Continuation] = []
        ended: list[tuple[_Continuation, FinishReason]] = []
        for rank, best in enumerate(self._ranked(candidates)):
            is_ending = best.token_id in self._ending_token_ids
            if rank < num_beams and (is_ending or is_last):
                ended.append((best, FinishReason.STOP if is_ending else FinishReason.LENGTH))
            if not (is_ending or is_last):
                going_on.append(best)
            if len(going_on) == num_beams or (is_last and rank + 1 >= num_beams):
                break
        self._keep_best(ended)
        self.is_done = not going_on or self._is_over(going_on[0].logprob)
        branches = [] if self.is_done else self._branch(going_on, new_ids)
        if self.is_done:
            self._beams = []
        return branches

    def _ranked(self, candidates: Mapping[int, Candidates]) -> Iterator[_Continuation]:
        """Continuations of all beams, best first; equals in the order of their beams.

        Made as they are asked for: of num_beams ** 2 candidates about num_beams are.
        """
        each = (_continuations(beam, candidates[beam.beam_id]) for beam in self._beams)
        return heapq.merge(*each, key=lambda continuation: -continuation.logprob)

    def _keep_best(self, ended: list[tuple[_Continuation, FinishReason]]) -> None:
        length = self.num_tokens**self._params.length_penalty
        new = [Hypothesis(best.logprob / length, best.output, reason) for best, reason in ended]
        merged = sorted(self._hypotheses + new, key=lambda hypothesis: -hypothesis.score)
        self._hypotheses = merged[: self._params.num_beams]

    def _is_over(self, best_logprob: float) -> bool:
        """Whether enough hypotheses have ended, and beams are not expected to become better."""
        if len(self._hypotheses) < self._params.num_beams:
            return False
        if self._early_stopping is EarlyStopping.ALWAYS:
            return True
        penalty = self._params.length_penalty
        may_grow = self._early_stopping is EarlyStopping.NEVER and penalty > 0
        length = self._max_tokens if may_grow else self.num_tokens
        return best_logprob / float(length**penalty) <= self._hypotheses[-1].score

    def _branch(self, going_on: list[_Continuation], new_ids: Iterator[int]) -> list[Branch]:
        branches = []
        beams = []
        taken = {self._root_id}
        for best in going_on:
            parent_id = best.beam.beam_id
            child_id = next(new_ids) if parent_id in taken else parent_id
            taken.add(parent_id)
            branches.append(Branch(parent_id, child_id, best.token_id))
            beams.append(_Beam(child_id, best.logprob, best.output))
        self._beams = beams
        return branches


def _continuations(beam: _Beam, candidates: Candidates) -> Iterator[_Continuation]:
    for token_id, logprob in zip(candidates.token_ids, candidates.logprobs, strict=True):
        yield _Continuation(beam.logprob + logprob, beam, token_id)
