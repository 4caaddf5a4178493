"""The output of one sample: tokens in; text, tokens and perhaps a stop string out.

Everything given out is a pure function of the tokens fed so far, not of how they were grouped.
Therefore a broken stream can be resumed: feed the tokens that the caller has, drop what comes out,
and what comes out next is what the caller lacks.
"""

from collections.abc import Sequence

from pageframe.gateway.detokenizer import Detokenizer
from pageframe.gateway.stop_strings import StopAutomaton, StopMatcher


class SampleStream:
    """Detokeniser and stop strings of one sample.

    Attributes:
        num_tokens: Tokens of the output so far.
    """

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
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(automaton, include_stop=include_stop)
        self._watches = not automaton.is_empty
        self._num_unwatched = min_tokens

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self._matcher.match is not None

    @property
    def stop(self) -> str:
        """The stop string that ended the output, or empty."""
        match = self._matcher.match
        return "" if match is None else match.stop

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Take tokens, any number at a time. Must not be called after the output was stopped.

        Returns:
            Text that has become certain, perhaps none; and how many of the tokens belong to the
            output: all of them, unless a stop string ended it, then those up to the token that
            completed the string.
        """
        assert not self.is_stopped, "tokens fed after the output was stopped"
        if not self._watches:
            num_tokens = len(token_ids)
            self.num_tokens += num_tokens
            return self._detokenizer.feed(token_ids), num_tokens
        num_unwatched = min(len(token_ids), max(0, self._num_unwatched - self.num_tokens))
        text = self._detokenizer.feed(token_ids[:num_unwatched])
        self.num_tokens += num_unwatched
        watched, num_watched = self._feed_watched(token_ids[num_unwatched:])
        return text + watched, num_unwatched + num_watched

    def finish(self) -> str:
        """End the output; return the rest of the text, which may still complete a stop string."""
        if self.is_stopped:
            return ""
        rest = self._detokenizer.flush()
        text = self._matcher.feed(rest) if self.num_tokens > self._num_unwatched else rest
        return text + self._matcher.flush()

    def _feed_watched(self, token_ids: Sequence[int]) -> tuple[str, int]:
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
        self.num_tokens += num_tokens
        return text, num_tokens
