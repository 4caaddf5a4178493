"""The requests of a gateway that have not ended, and what the scheduler says of them.

Both links use it: the one over the wire, and the one to a scheduler of the same process.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pageframe.core.errors import CancelledError, DeadlineError, PageframeError
from pageframe.core.request import Completion, Submission, TokenEvents
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.gateway.mailbox import Mailbox
from pageframe.rpc.status import make_error

_HANDLE_MAX = 2**32 - 1

OnError = Callable[["Living", PageframeError], bool]
"""Told of a request that has failed; whether somebody else has taken it over."""


@dataclass(slots=True)
class Living:
    """A request that has not ended.

    ``token_ids[sample]`` is its output so far; ``open_samples`` have not ended; of those,
    ``ending_samples`` were taken back by us and only wait for their account. ``is_sent`` is whether
    it was on its way to a scheduler at least once.
    """

    submission: Submission
    mailbox: Mailbox
    token_ids: list[list[int]]
    open_samples: set[int]
    ending_samples: set[int] = field(default_factory=set)
    is_sent: bool = False

    @property
    def ended_samples(self) -> set[int]:
        """Samples that have ended while others go on."""
        return set(range(self.submission.num_samples)) - self.open_samples

    def resubmission(self) -> Submission:
        """The request as it stands, with the output so far."""
        token_ids = [list(ids) for ids in self.token_ids] if any(self.token_ids) else []
        if not self.is_sent and token_ids == self.submission.resume_token_ids:
            return self.submission
        return replace(self.submission, resume_token_ids=token_ids, is_resubmitted=self.is_sent)


def is_final(_living: Living, _error: PageframeError) -> bool:
    """No error is taken over."""
    return False


class LivingRequests:
    """Living requests by handle; sorts token events into their mailboxes.

    Args:
        on_error: Asked before a request ends with an error.
    """

    def __init__(self, on_error: OnError = is_final) -> None:
        self._on_error = on_error
        self._living: dict[int, Living] = {}
        self._handles = itertools.cycle(range(1, _HANDLE_MAX + 1))

    def __len__(self) -> int:
        return len(self._living)

    def __iter__(self) -> Iterator[Living]:
        return iter(list(self._living.values()))

    def add(self, submission: Submission, mailbox: Mailbox) -> int:
        """Take in a request; sets and returns its handle."""
        return self.adopt(
            Living(
                submission,
                mailbox,
                [list(ids) for ids in submission.resume_token_ids]
                or [[] for _ in range(submission.num_samples)],
                set(range(submission.num_samples)),
            )
        )

    def adopt(self, living: Living) -> int:
        """Take in a request that has run elsewhere; sets and returns its handle here."""
        handle = next(handle for handle in self._handles if handle not in self._living)
        living.submission.handle = handle
        self._living[handle] = living
        return handle

    def release(self, handle: int) -> Living | None:
        """Forget a request that goes on elsewhere; None when it has ended."""
        return self._living.pop(handle, None)

    def get(self, handle: int) -> Living | None:
        """The living request of a handle."""
        return self._living.get(handle)

    def take_back(self, handle: int, sample_index: int | None) -> bool:
        """Forget a request; or expect one of its samples to end, whose completion still comes.

        Returns:
            Whether there is anything to take back.
        """
        living = self._living.get(handle)
        if living is None:
            return False
        if sample_index is None:
            del self._living[handle]
        else:
            living.ending_samples.add(sample_index)
        return True

    def fail_all(self, error: PageframeError) -> None:
        """End all of them with an error."""
        living, self._living = self._living, {}
        for entry in living.values():
            entry.mailbox.fail(error)

    def settle_endings(self) -> None:
        """End samples that only wait for their account: nobody will send it any more."""
        for living in self:
            for sample_index in sorted(living.ending_samples):
                completion = Completion(
                    handle=living.submission.handle,
                    sample_index=sample_index,
                    finish_reason=FinishReason.CANCELLED,
                    num_prompt_tokens=len(living.submission.prompt_token_ids),
                )
                self._end_sample(living, completion)

    def take_events(self, events: TokenEvents) -> list[int]:
        """Sort events into mailboxes.

        Returns:
            Handles of requests that have failed while some of their samples still run.
        """
        for handle, levels in events.rates.items():
            living = self._living.get(handle)
            if living is not None:
                living.mailbox.put_rates(levels)
        start = 0
        for handle, sample_index, num_tokens in zip(
            events.handles, events.sample_indices, events.num_tokens, strict=True
        ):
            end = start + num_tokens
            living = self._living.get(handle)
            if living is not None and sample_index in living.open_samples:
                _take_tokens(living, sample_index, events, start, end)
            start = end
        for handle, logprobs in events.prompt_logprobs.items():
            living = self._living.get(handle)
            if living is not None:
                living.mailbox.put_prompt_logprobs(logprobs)
        return [entry.handle for entry in events.completions if self._take_completion(entry)]

    def _take_completion(self, completion: Completion) -> bool:
        """End a sample; whether its request has failed and has to be cancelled."""
        living = self._living.get(completion.handle)
        if living is None or completion.sample_index not in living.open_samples:
            return False
        is_ours = completion.sample_index in living.ending_samples
        error = None if is_ours else _error_of(completion)
        if error is None:
            self._end_sample(living, completion)
            return False
        if self._on_error(living, error):
            return False
        living.mailbox.fail(error)
        living.open_samples.discard(completion.sample_index)
        if not living.open_samples:
            del self._living[completion.handle]
        return bool(living.open_samples)

    def _end_sample(self, living: Living, completion: Completion) -> None:
        living.open_samples.discard(completion.sample_index)
        living.ending_samples.discard(completion.sample_index)
        if not living.open_samples:
            self._living.pop(living.submission.handle, None)
        living.mailbox.put_completion(completion)


def _take_tokens(
    living: Living, sample_index: int, events: TokenEvents, start: int, end: int
) -> None:
    token_ids = events.token_ids[start:end]
    living.token_ids[sample_index] += token_ids
    logprobs: Sequence[TokenLogprobs] = ()
    if events.logprobs:
        found = (events.logprobs.get(position) for position in range(start, end))
        logprobs = [entry for entry in found if entry is not None]
    living.mailbox.put_tokens(sample_index, token_ids, logprobs)


def _error_of(completion: Completion) -> PageframeError | None:
    """The error that a completion stands for; None when the sample ended well."""
    if completion.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        return None
    if completion.error_status:
        return make_error(
            completion.error_status,
            completion.error_reason,
            completion.error_message,
            completion.error_limits,
        )
    if completion.finish_reason is FinishReason.DEADLINE:
        return DeadlineError("DEADLINE_PASSED", "the deadline passed while the request ran")
    if completion.finish_reason is FinishReason.CANCELLED:
        return CancelledError("CANCELLED", "the scheduler took the request back")
    return make_error(
        "INTERNAL",
        completion.error_reason or "SEQUENCE_FAILED",
        completion.error_message or "the request failed",
        completion.error_limits,
    )
