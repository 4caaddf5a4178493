"""Where a request's tokens wait while its writer is busy with the ones before.

The scheduler's events arrive for many requests in one message, far more often than one Python
process can write to that many callers. So an event only appends to lists and tells the writer once
that there is something; the writer takes everything that has gathered. A slow caller gets larger
pieces, not a longer queue.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pageframe.core.errors import PageframeError
from pageframe.core.request import Completion, RateLevels
from pageframe.core.step import TokenLogprobs


@dataclass(slots=True)
class Pending:
    """What has gathered for one sample since it was last taken.

    ``logprobs`` is parallel to ``token_ids``, or empty where not asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    completion: Completion | None = None


class Mailbox:
    """Tokens and completions of one request. For one reader, on one event loop.

    Attributes:
        prompt_logprobs: Figures of the prompt that wait to be taken.
        lost_ns: When its scheduler was lost, the last time if often; 0 for never.
        replica: Which replica it is with; empty where there is no choice.
        num_moves: How often it went from one replica to another.
    """

    def __init__(self) -> None:
        self.lost_ns = 0
        self.replica = ""
        self.num_moves = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._rates: RateLevels = {}
        self._pending: dict[int, Pending] = {}
        self._error: PageframeError | None = None
        self._filled = asyncio.Event()
        self._on_filled: Callable[[], None] = self._filled.set

    def when_filled(self, on_filled: Callable[[], None]) -> None:
        """Be told by a call, instead of by ``wait``, that there is something to take.

        Once for all that gathers until it is taken; at once where something is there already.
        """
        self._on_filled = on_filled
        if self._pending or self._error is not None:
            on_filled()

    @property
    def error(self) -> PageframeError | None:
        """Why the whole request ended, if it did."""
        return self._error

    def put_tokens(
        self, sample_index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Add tokens of one sample."""
        pending = self._of(sample_index)
        pending.token_ids += token_ids
        pending.logprobs += logprobs

    def put_prompt_logprobs(self, logprobs: list[TokenLogprobs]) -> None:
        """Add figures of the prompt; they go out with the next tokens of sample 0."""
        self.prompt_logprobs = logprobs

    def put_rates(self, levels: RateLevels) -> None:
        """Tell what is left of the tenant's rates; it goes out ahead of the next output."""
        self._rates = levels

    def take_rates(self) -> RateLevels:
        """What was told of rates since it was last taken; mostly nothing."""
        levels, self._rates = self._rates, {}
        return levels

    def put_completion(self, completion: Completion) -> None:
        """End one sample, behind its tokens."""
        self._of(completion.sample_index).completion = completion

    def fail(self, error: PageframeError) -> None:
        """End the whole request; the first error stays. Tokens that wait are dropped."""
        if self._error is None:
            self._error = error
            self._on_filled()

    async def wait(self) -> None:
        """Wait until there is something to take."""
        while not self._pending and self._error is None:
            self._filled.clear()
            await self._filled.wait()

    def take(self) -> dict[int, Pending]:
        """Take all that has gathered, by sample index.

        Raises:
            PageframeError: the request has failed.
        """
        if self._error is not None:
            raise self._error
        pending, self._pending = self._pending, {}
        return pending

    def _of(self, sample_index: int) -> Pending:
        pending = self._pending.get(sample_index)
        if pending is None:
            if not self._pending:
                self._on_filled()
            pending = self._pending[sample_index] = Pending()
        return pending
