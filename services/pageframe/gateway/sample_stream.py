"""The output of one sample: tokens in; text, tokens and perhaps a stop string out.

Everything given out is a pure function of the tokens fed so far, not of how they were grouped.
Therefore a broken stream can be resumed: feed the tokens that the caller has, drop what comes out,
and what comes out next is what the caller lacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pageframe.gateway.detokenizer import Detokenizer
from pageframe.gateway.stop_strings import StopAutomaton, StopMatcher


@dataclass(frozen=True, slots=True)
class Delta:
    """New output.

    Attributes:
        text: Text that has become certain; may be empty.
        num_tokens: How many of the tokens fed belong to the output. All of them, unless a stop
            string ended it: then those up to the token that completed the string.
    """

    text: str
    num_tokens: int


class SampleStream:
    """Detokeniser and stop strings of one sample."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        automaton: StopAutomaton,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Begin an output.

        Args:
            detokenizer: Fresh, and not shared.
            automaton: The request's stop strings.
            include_stop: Leave the stop string in the text.
            min_tokens: Stop strings are looked for only behind this many tokens.
        """
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(automaton, include_stop=include_stop)
        self._watches = not automaton.is_empty
        self._num_unwatched = min_tokens
        self._num_tokens = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self._matcher.match is not None

    @property
    def stop(self) -> str:
        """The stop string that ended the output, or empty."""
        match = self._matcher.match
        return "" if match is None else match.stop

    @property
    def num_tokens(self) -> int:
        """Tokens of the output so far."""
        return self._num_tokens

    def feed(self, token_ids: Sequence[int]) -> Delta:
        """Take tokens, any number at a time. Must not be called after the output was stopped."""
        assert not self.is_stopped, "tokens fed after the output was stopped"
        if not self._watches:
            self._num_tokens += len(token_ids)
            return Delta(self._detokenizer.feed(token_ids), len(token_ids))
        num_unwatched = min(len(token_ids), max(0, self._num_unwatched - self._num_tokens))
        text = self._detokenizer.feed(token_ids[:num_unwatched])
        self._num_tokens += num_unwatched
        watched = self._feed_watched(token_ids[num_unwatched:])
        return Delta(text + watched.text, num_unwatched + watched.num_tokens)

    def finish(self) -> Delta:
        """End the output; return the rest of the text, which may still complete a stop string."""
        if self.is_stopped:
            return Delta("", 0)
        rest = self._detokenizer.flush()
        text = self._matcher.feed(rest) if self._num_tokens > self._num_unwatched else rest
        return Delta(text + self._matcher.flush(), 0)

    def _feed_watched(self, token_ids: Sequence[int]) -> Delta:
        before = self._detokenizer.fork()
        num_characters = self._matcher.num_characters
        text = self._matcher.feed(self._detokenizer.feed(token_ids))
        num_tokens = len(token_ids)
        match = self._matcher.match
        if match is not None:
            # Rare: feed again one by one to learn which token brought the end of the string.
            num_tokens = 0
            while num_characters < match.end:
                num_characters += len(before.feed(token_ids[num_tokens : num_tokens + 1]))
                num_tokens += 1
        self._num_tokens += num_tokens
        return Delta(text, num_tokens)
