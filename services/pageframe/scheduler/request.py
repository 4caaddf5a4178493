"""A living request, and what is refused before it lives."""

from dataclasses import dataclass, field

from pageframe.core.beams import BeamParams
from pageframe.core.errors import DeadlineError, InvalidRequestError, OutOfRangeError
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import check_token_id
from pageframe.core.step import FinishReason
from pageframe.core.units import ceil_div
from pageframe.scheduler.delivery import Outbox
from pageframe.scheduler.sequence import Sequence


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One submission and its sampled sequences.

    Attributes:
        serial: Order of submission.
        submission: As it came.
        gateway_id: From which gateway.
        outbox: Where its events leave.
        sequences: By sample index, the ended ones too.
        siblings: Samples that wait for sample 0 to compute the prompt for them.
        num_living: Sequences that have not ended.
        num_waiting: Sequences in the backlog.
        has_prompt_logprobs: Whether they were sent.
        has_expired: Whether its deadline has come.
        is_rated: Whether its tokens were taken from its tenant's rate.
    """

    serial: int
    submission: Submission
    gateway_id: int
    outbox: Outbox
    sequences: list[Sequence] = field(default_factory=list)
    siblings: list[Sequence] = field(default_factory=list)
    num_living: int = 0
    num_waiting: int = 0
    has_prompt_logprobs: bool = False
    has_expired: bool = False
    is_rated: bool = False

    @property
    def may_fork(self) -> bool:
        """Whether sample 0 may still compute the prompt for the others: it has no output yet.

        Samples that are resumed differ from their first token on and do not fork.
        """
        parent = self.sequences[0]
        return not (parent.output or self.submission.resume_token_ids) and parent.is_living

    @property
    def is_over(self) -> bool:
        """Whether all its sequences have ended."""
        return self.num_living == 0

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for tokens of one of its sequences."""
        return any(sequence.is_living for sequence in self.sequences)


def check_submission(submission: Submission, facts: ReplicaFacts, *, now_ns: int) -> None:
    """Refuse what is malformed for the model that is served, or too late.

    Raises:
        InvalidRequestError: malformed.
        DeadlineError: DEADLINE_PASSED.
    """
    submission.sampling.validate(facts.vocab_size)
    _check_samples(submission)
    if submission.beams is not None:
        _check_search(submission, submission.beams, facts)
    _check_name("session_id", submission.session_id, LIMITS.session_id_bytes_max)
    _check_name("prefix_handle", submission.prefix_handle, LIMITS.prefix_handle_bytes_max)
    if not submission.prompt_token_ids:
        raise InvalidRequestError("PROMPT_EMPTY", "the prompt has no tokens", num_prompt_tokens=0)
    _check_token_ids("prompt_token_ids", submission.prompt_token_ids, facts.vocab_size)
    for token_ids in submission.resume_token_ids:
        _check_resume(submission, token_ids, facts.vocab_size)
    if 0 < submission.deadline_ns <= now_ns:
        raise deadline_passed(submission, now_ns)


def check_fits(submission: Submission, facts: ReplicaFacts) -> None:
    """Refuse a request that no state of this replica could ever serve.

    Raises:
        OutOfRangeError: CONTEXT_TOO_LONG or EXCEEDS_POOL.
    """
    num_prompt_tokens = len(submission.prompt_token_ids)
    max_tokens = submission.sampling.max_tokens
    if num_prompt_tokens + max_tokens > facts.max_model_len:
        raise OutOfRangeError(
            "CONTEXT_TOO_LONG",
            f"{num_prompt_tokens} prompt tokens and {max_tokens} output tokens exceed the "
            f"{facts.max_model_len} tokens of one sequence",
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            max_model_len=facts.max_model_len,
        )
    num_blocks = num_blocks_needed(submission, facts)
    if num_blocks > facts.num_blocks:
        raise OutOfRangeError(
            "EXCEEDS_POOL",
            f"{num_prompt_tokens} prompt tokens and {max_tokens} output tokens need {num_blocks} "
            f"blocks of {facts.block_size} tokens; the pool has {facts.num_blocks}",
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            num_blocks_needed=num_blocks,
            num_blocks=facts.num_blocks,
            block_size_tokens=facts.block_size,
        )


def num_blocks_needed(submission: Submission, facts: ReplicaFacts) -> int:
    """Most blocks that one sample holds at a time if it goes on to its last token.

    That token is sampled but never computed, so it needs no slot. The beams of a search may come to
    share no more than the full blocks of their prompt; nothing is counted as given back by them.
    """
    num_prompt_tokens = len(submission.prompt_token_ids)
    num_tokens = num_prompt_tokens + submission.sampling.max_tokens - 1
    if submission.beams is None:
        return facts.num_blocks_peak(num_tokens, facts.max_step_tokens)
    num_blocks = ceil_div(num_tokens, facts.block_size)
    num_shared = num_prompt_tokens // facts.block_size
    num_blocks = num_shared + submission.beams.num_beams * (num_blocks - num_shared)
    return num_blocks * facts.num_kv_groups


def check_rows(submission: Submission, max_num_running: int) -> None:
    """Refuse a search with more beams than there are places to run.

    Raises:
        OutOfRangeError: TOO_MANY_BEAMS.
    """
    num_beams = submission.num_running
    if num_beams > max_num_running:
        raise OutOfRangeError(
            "TOO_MANY_BEAMS",
            f"{num_beams} beams run at once; this replica runs {max_num_running} sequences",
            num_beams=num_beams,
            max_num_running=max_num_running,
        )


def deadline_passed(submission: Submission, now_ns: int) -> DeadlineError:
    """The error of a request that is too late."""
    return DeadlineError(
        "DEADLINE_PASSED",
        f"the deadline passed {(now_ns - submission.deadline_ns) / 1e6:.1f} ms ago",
        deadline_ns=submission.deadline_ns,
        now_ns=now_ns,
    )


def finished_already(
    submission: Submission, facts: ReplicaFacts, output: list[int]
) -> FinishReason:
    """Why a resumed sample has nothing left to do; ``NONE`` if it has.

    The stream that carried its completion was lost after the one that carried its last token.
    """
    sampling = submission.sampling
    if len(output) >= sampling.max_tokens:
        return FinishReason.LENGTH
    if not output or len(output) < sampling.min_tokens:
        return FinishReason.NONE
    is_eos = output[-1] in facts.eos_token_ids and not sampling.ignore_eos
    return (
        FinishReason.STOP
        if is_eos or output[-1] in sampling.stop_token_ids
        else (FinishReason.NONE)
    )


def _check_samples(submission: Submission) -> None:
    num_samples = submission.num_samples
    if not 1 <= num_samples <= LIMITS.num_samples_max:
        raise InvalidRequestError(
            "NUM_SAMPLES_OUT_OF_RANGE",
            f"{num_samples} samples; it must lie in [1, {LIMITS.num_samples_max}]",
            num_samples=num_samples,
            num_samples_max=LIMITS.num_samples_max,
        )
    num_resumed = len(submission.resume_token_ids)
    if num_resumed not in (0, num_samples):
        raise InvalidRequestError(
            "RESUME_MISMATCH",
            f"output of {num_resumed} samples is given; the request has {num_samples}",
            num_resumed=num_resumed,
            num_samples=num_samples,
        )


def _check_search(submission: Submission, beams: BeamParams, facts: ReplicaFacts) -> None:
    beams.validate(submission.sampling)
    beams.check_vocabulary(submission.sampling, facts.vocab_size, facts.eos_token_ids)
    num_samples, num_resumed = (
        submission.num_samples,
        max(map(len, submission.resume_token_ids), default=0),
    )
    if num_samples != beams.num_return or submission.delivery is not Delivery.FINAL:
        raise InvalidRequestError(
            "BEAMS_MISMATCH",
            f"a search that returns {beams.num_return} outputs is asked for {num_samples} samples, "
            f"delivered {submission.delivery.name}",
            num_return=beams.num_return,
            num_samples=num_samples,
        )
    if num_resumed:
        raise InvalidRequestError(
            "RESUME_WITH_BEAMS",
            f"a beam search cannot go on from {num_resumed} tokens; it starts over by itself",
            num_resumed_tokens=num_resumed,
        )


def _check_name(field_name: str, name: str, num_bytes_max: int) -> None:
    num_bytes = len(name.encode())
    if num_bytes > num_bytes_max:
        raise InvalidRequestError(
            f"{field_name.upper()}_TOO_LONG",
            f"{field_name} has {num_bytes} bytes; at most {num_bytes_max} are allowed",
            num_bytes=num_bytes,
            num_bytes_max=num_bytes_max,
        )


def _check_resume(submission: Submission, token_ids: list[int], vocab_size: int) -> None:
    _check_token_ids("resume_token_ids", token_ids, vocab_size)
    max_tokens = submission.sampling.max_tokens
    if len(token_ids) > max_tokens:
        raise InvalidRequestError(
            "RESUME_TOO_LONG",
            f"{len(token_ids)} output tokens are given; max_tokens is {max_tokens}",
            num_resumed_tokens=len(token_ids),
            max_tokens=max_tokens,
        )


def _check_token_ids(name: str, token_ids: list[int], vocab_size: int) -> None:
    # Two scans in C; only a culprit is looked for in Python.
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        for token_id in token_ids:
            check_token_id(name, token_id, vocab_size)
