"""Trying again, and going on where a broken stream stopped; the same for both clients.

    attempt 1:  header  a b c ✗            ask:  prompt, seed?
    attempt 2:          d e f ends         ask:  prompt, seed of the header, resume [a b c]

The tokens of all samples and their seed are all that the system needs to rebuild them. A sample
that had ended is sent along, so that the others keep their places; it ends again, unheard. Outputs
that are ranked start over: none is known before all are.
"""

from collections.abc import Callable
from dataclasses import replace

from pageframe.client.types import Event, Finished, GenerationRequest, Started
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.core.limits import LIMITS

_DELAY_S = 0.1
# While nobody is there an attempt costs nothing: the channel looks for a server at its own pace.
_DELAY_MAX_S = 0.5


class Attempts:
    """One generation over as many streams as it takes."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        retry_for_s: float,
        now_s: Callable[[], float],
    ) -> None:
        """Begin; ``retry_for_s`` bounds the time without any progress."""
        self._request = request
        self._retry_for_s = retry_for_s
        self._now_s = now_s
        self._failing_since_s: float | None = None
        self._delay_s = _DELAY_S
        self._num_broken = 0
        self._started: Started | None = None
        self._token_ids = _resumed_by(request)
        self._finished: set[int] = set()
        self._whole: set[int] = set()
        self._has_prompt_logprobs = False

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended."""
        return len(self._finished) >= max(1, self._request.num_outputs)

    def request(self) -> GenerationRequest:
        """What to ask next."""
        if self._num_broken == 0:
            return self._request
        name = self._started.request_id if self._started else self._request.request_id
        return replace(
            self._request,
            seed=self._started.seed if self._started else self._request.seed,
            resume_token_ids=(),
            resume_outputs=self._token_ids if self._has_output else (),
            # The scheduler may not know yet that the broken stream's request is dead.
            request_id=_numbered(name, self._num_broken) if name else "",
        )

    def accept(self, event: Event) -> Event | None:
        """Take an event; what the caller shall see of it: nothing that it has seen before."""
        self._failing_since_s = None
        self._delay_s = _DELAY_S
        if isinstance(event, Started):
            is_first = self._started is None
            self._started = self._started or event
            return event if is_first else None
        if event.sample_index in self._finished:
            return None
        if isinstance(event, Finished):
            self._finished.add(event.sample_index)
            return event
        if not event.token_ids:
            # The rest of the text, which the end makes certain. The end itself may have been lost.
            if event.sample_index in self._whole:
                return None
            self._whole.add(event.sample_index)
        self._token_ids[event.sample_index] += event.token_ids
        if event.prompt_logprobs and self._has_prompt_logprobs:
            event = replace(event, prompt_logprobs=[])
        self._has_prompt_logprobs |= bool(event.prompt_logprobs)
        return event

    def delay_after(self, error: PageframeError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            PageframeError: ``error`` itself, when another attempt makes no sense.
        """
        if not self._may_retry(error):
            raise error
        now_s = self._now_s()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        delay_s = self._delay_s
        if now_s + delay_s - self._failing_since_s > self._retry_for_s:
            raise error
        self._delay_s = min(2 * self._delay_s, _DELAY_MAX_S)
        self._num_broken += 1
        return delay_s

    def _may_retry(self, error: PageframeError) -> bool:
        can_resume = not self._request.is_ranked or not (self._has_output or self._finished)
        return isinstance(error, UnavailableError) and can_resume

    @property
    def _has_output(self) -> bool:
        return any(self._token_ids)


def _resumed_by(request: GenerationRequest) -> list[list[int]]:
    """Tokens that the caller has, by sample."""
    outputs = [list(token_ids) for token_ids in request.resume_outputs]
    if request.resume_token_ids:
        outputs = [list(request.resume_token_ids)]
    return outputs + [[] for _ in range(request.num_outputs - len(outputs))]


def _numbered(name: str, number: int) -> str:
    """Another name for the same request, no longer than names may be."""
    end = f"~{number}"
    num_bytes = LIMITS.request_id_bytes_max - len(end)
    return name.encode()[:num_bytes].decode(errors="ignore") + end
