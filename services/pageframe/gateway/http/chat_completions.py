"""``POST /v1/chat/completions``: what is asked, and how the reply says it."""

import dataclasses

from pageframe.core.errors import InvalidRequestError
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http.errors import ErrorForm
from pageframe.gateway.http.exchange import Exchange
from pageframe.gateway.http.fields import Fields
from pageframe.gateway.http.generation_fields import Origin, Stream, read_generation, read_stream
from pageframe.gateway.http.logprobs import TokenTexts, chat_logprobs
from pageframe.gateway.http.messages import read_messages
from pageframe.gateway.http.pieces import Choices, Piece
from pageframe.gateway.http.reply import Reply
from pageframe.gateway.http.tool_calls import (
    CallPart,
    HeldCallParser,
    ToolCall,
    ToolCallParser,
    join_calls,
)
from pageframe.gateway.http.tools import ToolUse, read_tool_use
from pageframe.gateway.request import GenerateInput

ERROR_FORM = ErrorForm(
    "messages", {"num_logprobs": "top_logprobs", "json_schema": "response_format"}
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatAsk:
    """What a body asks for.

    Attributes:
        request: The generation.
        stream: Whether and how the reply comes in pieces.
        tool_use: Which tools there are, and what holds their calls.
    """

    request: GenerateInput
    stream: Stream
    tool_use: ToolUse


def read_chat(body: dict[str, object], origin: Origin) -> ChatAsk:
    """What a body asks for.

    Raises:
        InvalidRequestError: malformed or unknown fields.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE.
    """
    fields = Fields(body)
    stream = read_stream(fields)
    request = read_generation(fields, origin, is_stream=stream.is_on)
    fields.refuse("modalities", "only text is", allowed=(["text"],))
    fields.refuse("audio", "there is no sound")
    fields.refuse("functions", "it was replaced by tools", allowed=([],))
    fields.refuse("function_call", "it was replaced by tool_choice", allowed=("none",))
    fields.refuse("reasoning_effort", "models served here do not take it", allowed=("none",))
    fields.refuse("verbosity", "models served here do not take it")
    fields.refuse("web_search_options", "there is no search")
    num_logprobs = _read_num_logprobs(fields)
    max_tokens = fields.whole("max_tokens")
    max_completion_tokens = fields.whole("max_completion_tokens")
    tool_use = read_tool_use(fields)
    if tool_use.tools and request.sampling.grammar is not None:
        raise InvalidRequestError(
            "GRAMMAR_WITH_FIELD",
            f"{len(tool_use.tools)} tools are given; an output that has to be of one form cannot "
            "call them: leave them out or let tool_choice be none",
            field="tools",
        )
    messages = read_messages(fields)
    fields.end()
    request = dataclasses.replace(
        request,
        messages=messages,
        tools=tool_use.tools,
        stop=(*request.stop, *tool_use.stop),
        max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
        sampling=dataclasses.replace(
            request.sampling,
            num_logprobs=num_logprobs,
            grammar=tool_use.grammar or request.sampling.grammar,
        ),
    )
    return ChatAsk(request=request, stream=stream, tool_use=tool_use)


async def send_chat(exchange: Exchange, ask: ChatAsk, service: GenerationService) -> None:
    """Generate and send the reply.

    Raises:
        PageframeError: refused, failed, cancelled or too late.
    """
    request, tool_use = ask.request, ask.tool_use
    facts = service.facts_of(request.model)
    await tool_use.check(service)
    codec = await service.codec(request.model)
    texts = TokenTexts(codec, skip_special_tokens=request.skip_special_tokens)
    form = ChatForm(texts, tells_logprobs=request.sampling.num_logprobs >= 0)
    make_parser = ToolCallParser if tool_use.grammar is None else HeldCallParser
    choices = Choices(1, request.num_samples, make_parser=make_parser if tool_use.tools else None)
    await Reply(exchange, form, choices, ask.stream, facts).send(service, [request])


class ChatForm:
    """How chat completions say a piece.

    Args:
        texts: Of single tokens.
        tells_logprobs: Whether log-probabilities were asked for.
    """

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, *, tells_logprobs: bool) -> None:
        self._texts = texts
        self._tells_logprobs = tells_logprobs
        self._num_calls: dict[int, int] = {}

    def whole(self, piece: Piece) -> dict[str, object]:
        """A choice, complete."""
        message: dict[str, object] = {
            "role": "assistant",
            "content": piece.text or (None if piece.tool_calls else ""),
            "refusal": None,
        }
        if piece.tool_calls:
            message["tool_calls"] = [_call(call) for call in join_calls(piece.tool_calls)]
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def pieces(self, piece: Piece) -> list[dict[str, object]]:
        """The choice's part in each event: who speaks, text, calls, the end."""
        deltas: list[dict[str, object]] = []
        if piece.index not in self._num_calls:
            self._num_calls[piece.index] = 0
            deltas.append({"role": "assistant", "content": "", "refusal": None})
        logprobs_at = -1
        if piece.text or (piece.logprobs and self._tells_logprobs):
            logprobs_at = len(deltas)
            deltas.append({"content": piece.text})
        deltas += [
            {"tool_calls": [self._call_delta(piece.index, part)]} for part in piece.tool_calls
        ]
        if piece.finish_reason:
            deltas.append({})
        return [
            {
                "index": piece.index,
                "delta": delta,
                "logprobs": self._logprobs(piece) if place == logprobs_at else None,
                "finish_reason": piece.finish_reason or None if delta == {} else None,
            }
            for place, delta in enumerate(deltas)
        ]

    def _call_delta(self, index: int, part: CallPart) -> dict[str, object]:
        """A call's beginning names it; what follows says only which of the choice's it is."""
        if isinstance(part, ToolCall):
            self._num_calls[index] += 1
        said = _call(part) if isinstance(part, ToolCall) else {"function": {"arguments": part.text}}
        return {"index": self._num_calls[index] - 1, **said}

    def _logprobs(self, piece: Piece) -> dict[str, object] | None:
        return chat_logprobs(piece.logprobs, self._texts) if self._tells_logprobs else None


def _call(call: ToolCall) -> dict[str, object]:
    return {
        "id": call.call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _read_num_logprobs(fields: Fields) -> int:
    """-1 for none, else how many of the best tokens are told beside the chosen one."""
    is_told = fields.flag("logprobs")
    num_top = fields.whole("top_logprobs")
    if num_top and not is_told:
        raise InvalidRequestError(
            "TOP_LOGPROBS_WITHOUT_LOGPROBS",
            "top_logprobs goes with logprobs = true only",
            field="top_logprobs",
        )
    return (num_top or 0) if is_told else -1
