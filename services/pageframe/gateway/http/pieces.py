"""What a reply is made of: pieces of choices, whether it is sent in pieces or as a whole.

outputs of one generation for each prompt ─▶ pieces, numbered by choice ─▶ one event each
                                                                        └▶ added up: one reply
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.gateway.http.tool_calls import CallPart, Part, ToolCall, ToolCallParser
from pageframe.gateway.output import Header, Output, RatesLeft, SampleEnd

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(slots=True, kw_only=True)
class Piece:
    """New output of one choice.

    Attributes:
        index: Which choice.
        text: New text.
        tool_calls: New calls, and more of the last one's arguments.
        logprobs: Of the new tokens, where asked for.
        prompt_logprobs: Of the prompt, where asked for; in one piece of the first choice.
        finish_reason: With the last piece; empty before.
    """

    index: int
    text: str = ""
    tool_calls: list[CallPart] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, other: "Piece") -> None:
        """Put the next piece of the same choice behind this one."""
        self.text += other.text
        self.tool_calls += other.tool_calls
        self.logprobs += other.logprobs
        self.prompt_logprobs += other.prompt_logprobs
        self.finish_reason = self.finish_reason or other.finish_reason


@dataclass(slots=True)
class _PromptUsage:
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


class Usage:
    """Counts tokens over all prompts of a request; a prompt counts once whatever ``n`` is."""

    def __init__(self, num_prompts: int) -> None:
        self._of_prompt = [_PromptUsage() for _ in range(num_prompts)]

    def take(self, prompt_index: int, output: Output) -> None:
        """Count what an output tells."""
        usage = self._of_prompt[prompt_index]
        if isinstance(output, Header):
            usage.num_prompt_tokens = output.num_prompt_tokens
        elif isinstance(output, SampleEnd):
            completion = output.completion
            usage.num_output_tokens += completion.num_output_tokens
            # They were computed for the caller, too: best_of says so.
            usage.num_output_tokens += completion.num_unreturned_tokens
            usage.num_cached_tokens = max(usage.num_cached_tokens, completion.num_cached_tokens)

    def form(self) -> dict[str, object]:
        """In OpenAI's form."""
        num_prompt_tokens = sum(usage.num_prompt_tokens for usage in self._of_prompt)
        num_output_tokens = sum(usage.num_output_tokens for usage in self._of_prompt)
        num_cached_tokens = sum(usage.num_cached_tokens for usage in self._of_prompt)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }


class Choices:
    """Turns outputs into pieces; choice ``i * n + j`` is sample ``j`` of prompt ``i``.

    Args:
        num_prompts: How many generations there are.
        num_samples: How many outputs each has.
        make_parser: Of what reads calls out of an output's text; None where there are none.
    """

    def __init__(
        self,
        num_prompts: int,
        num_samples: int,
        *,
        make_parser: Callable[[], ToolCallParser] | None = None,
    ) -> None:
        self.usage = Usage(num_prompts)
        self._num_samples = num_samples
        num_choices = num_prompts * num_samples
        self._parsers = [make_parser() for _ in range(num_choices)] if make_parser else []
        self._num_calls = [0] * num_choices

    def piece(self, prompt_index: int, output: Output) -> Piece | None:
        """The piece that an output is; None if it says nothing of a choice."""
        self.usage.take(prompt_index, output)
        if isinstance(output, Header | RatesLeft):
            return None
        index = prompt_index * self._num_samples + output.sample_index
        if isinstance(output, SampleEnd):
            return self._end(index, output)
        piece = Piece(
            index=index,
            logprobs=list(output.logprobs),
            prompt_logprobs=list(output.prompt_logprobs),
        )
        if self._parsers:
            self._split(piece, self._parsers[index].feed(output.text))
        else:
            piece.text = output.text
        return piece

    def _end(self, index: int, end: SampleEnd) -> Piece:
        piece = Piece(index=index, finish_reason=_FINISH_REASONS[end.finish_reason])
        if self._parsers:
            self._split(piece, self._parsers[index].finish())
            if self._num_calls[index] and piece.finish_reason == "stop":
                piece.finish_reason = "tool_calls"
        return piece

    def _split(self, piece: Piece, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, str):
                piece.text += part
            else:
                piece.tool_calls.append(part)
                self._num_calls[piece.index] += isinstance(part, ToolCall)


async def gather(
    outputs: AsyncIterator[tuple[int, Output]], choices: Choices, num_choices: int
) -> list[Piece]:
    """Everything at once: one piece for each choice, in order."""
    whole = [Piece(index=index) for index in range(num_choices)]
    async for prompt_index, output in outputs:
        piece = choices.piece(prompt_index, output)
        if piece is not None:
            whole[piece.index].add(piece)
    return whole
