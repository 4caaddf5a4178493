"""Trying again, and going on where a broken stream stopped; the same for both clients.

    attempt 1:  header  a b c ✗            ask:  prompt, seed?
    attempt 2:          d e f ends         ask:  prompt, seed of the header, resume [a b c]

One sample can be resumed: its tokens and its seed are all that the system needs to rebuild it.
"""

from collections.abc import Callable
from dataclasses import replace

from pageframe.client.types import Delta, Event, Finished, GenerationRequest, Started
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.core.limits import LIMITS

_DELAY_S = 0.1
_DELAY_MAX_S = 2.0


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
        self._token_ids = list(request.resume_token_ids)
        self._num_finished = 0

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended."""
        return self._num_finished >= max(1, self._request.num_outputs)

    def request(self) -> GenerationRequest:
        """What to ask next."""
        if self._num_broken == 0:
            return self._request
        name = self._started.request_id if self._started else self._request.request_id
        return replace(
            self._request,
            seed=self._started.seed if self._started else self._request.seed,
            resume_token_ids=self._token_ids,
            # The scheduler may not know yet that the broken stream's request is dead.
            request_id=_numbered(name, self._num_broken) if name else "",
        )

    def accept(self, event: Event) -> bool:
        """Take an event; whether the caller shall see it."""
        self._failing_since_s = None
        self._delay_s = _DELAY_S
        if isinstance(event, Delta):
            self._token_ids += event.token_ids
        elif isinstance(event, Finished):
            self._num_finished += 1
        elif self._started is None:
            self._started = event
        else:
            return False
        return True

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
        has_progress = len(self._token_ids) > len(self._request.resume_token_ids)
        request = self._request
        is_single = request.num_samples == 1 and not request.is_ranked
        can_resume = is_single or not (has_progress or self._num_finished)
        return isinstance(error, UnavailableError) and can_resume


def _numbered(name: str, number: int) -> str:
    """Another name for the same request, no longer than names may be."""
    end = f"~{number}"
    num_bytes = LIMITS.request_id_bytes_max - len(end)
    return name.encode()[:num_bytes].decode(errors="ignore") + end
