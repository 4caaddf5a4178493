"""A conversation: what was said, in which session, and what the last answer cost."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pageframe.client import (
    Delta,
    Finished,
    GenerationRequest,
    MemoryAccount,
    Message,
    PageframeClient,
    Started,
)
from pageframe.core.step import FinishReason


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer, as far as it has come.

    Attributes:
        text: What was said.
        trace_id: Of the request; empty when not traced.
        finish_reason: Why it ended; None while it has not, or when it was stopped by hand.
        account: What it cost, once it has ended.
        first_token_s: Seconds from asking to the first text; None before that.
        elapsed_s: Seconds from asking to its end.
    """

    text: str = ""
    trace_id: str = ""
    finish_reason: FinishReason | None = None
    account: MemoryAccount = field(default_factory=MemoryAccount)
    first_token_s: float | None = None
    elapsed_s: float = 0.0

    @property
    def num_tokens_per_second(self) -> float:
        """Tokens behind the first, by the time that they took; 0 where there is none."""
        following_s = self.elapsed_s - (self.first_token_s or 0.0)
        num_following = self.account.num_completion_tokens - 1
        return num_following / following_s if num_following > 0 and following_s > 0 else 0.0


class Talk:
    """One conversation with a server.

    All its turns carry one session id, so that the server keeps its blocks and each turn computes
    only what is new.

    Args:
        client: To the server.
        defaults: Sampling of every turn.
        system: System message; None for none.
        timeout_s: Seconds that a turn may take; None for no bound.

    Attributes:
        session_id: Its name at the server.
        last: The last answer; None before any.
        num_turns: Answers since it began.
    """

    def __init__(
        self,
        client: PageframeClient,
        defaults: GenerationRequest,
        *,
        system: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._client = client
        self._defaults = defaults
        self._system = system
        self._timeout_s = timeout_s
        self.reset()

    def reset(self) -> None:
        """Begin anew: nothing was said, and the session is another one."""
        self.session_id = f"chat-{uuid.uuid4().hex}"
        self.last: Answer | None = None
        self.num_turns = 0
        self._turns: list[Message] = []

    def set_system(self, system: str) -> None:
        """Another system message, which means another beginning of every prompt; empty for none."""
        self._system = system or None
        self.reset()

    def ask(self, text: str) -> Iterator[str]:
        """Say something; yields the answer as it comes.

        Closed in the midst of it, the answer counts as far as it came. When the server fails, the
        turn counts as not said.

        Raises:
            PageframeError: as the server says.
        """
        answer = Answer()
        question = Message("user", text)
        begin_s = time.monotonic()
        events = self._client.generate(self._request(question), timeout_s=self._timeout_s)
        try:
            for event in events:
                match event:
                    case Started():
                        answer.trace_id = event.trace_id
                    case Delta():
                        if answer.first_token_s is None:
                            answer.first_token_s = time.monotonic() - begin_s
                        answer.text += event.text
                        yield event.text
                    case Finished():
                        answer.finish_reason = event.finish_reason
                        answer.account = event.account
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(question, answer, begin_s)
            raise
        self._keep(question, answer, begin_s)

    def _keep(self, question: Message, answer: Answer, begin_s: float) -> None:
        answer.elapsed_s = time.monotonic() - begin_s
        self.last = answer
        self.num_turns += 1
        self._turns += [question, Message("assistant", answer.text)]

    def _request(self, question: Message) -> GenerationRequest:
        system = [] if self._system is None else [Message("system", self._system)]
        return replace(
            self._defaults,
            messages=[*system, *self._turns, question],
            session_id=self.session_id,
        )
