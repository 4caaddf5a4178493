"""``POST /v1/completions``: what is asked, and how the reply says it."""

import dataclasses
from collections.abc import Sequence
from typing import TypeGuard

from pageframe.core.errors import InvalidRequestError
from pageframe.core.limits import LIMITS
from pageframe.core.step import TokenLogprobs
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http.errors import ErrorForm
from pageframe.gateway.http.exchange import Exchange
from pageframe.gateway.http.fields import Fields, malformed, unimplemented
from pageframe.gateway.http.generation_fields import Origin, Stream, read_generation, read_stream
from pageframe.gateway.http.logprobs import CompletionLogprobs, TokenTexts
from pageframe.gateway.http.pieces import Choices, Piece
from pageframe.gateway.http.reply import Reply
from pageframe.gateway.request import GenerateInput

ERROR_FORM = ErrorForm(
    "prompt",
    {
        "num_logprobs": "logprobs",
        "num_prompt_logprobs": "logprobs",
        "json_schema": "response_format",
    },
)
# OpenAI's own default; chats have none.
_MAX_TOKENS_DEFAULT = 16
_REQUEST_ID_LENGTH_MAX = 120


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAsk:
    """What a body asks for.

    Attributes:
        inputs: One generation for each prompt.
        stream: Whether and how the reply comes in pieces.
        echoes: Begin each output with its prompt.
        is_echo_only: End it there as well. A token is computed behind it all the same, since a
            prompt's log-probabilities come with an output, and is not told.
    """

    inputs: list[GenerateInput]
    stream: Stream
    echoes: bool
    is_echo_only: bool

    @property
    def tells_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self.inputs[0].sampling.num_logprobs >= 0


def read_completion(body: dict[str, object], origin: Origin) -> CompletionAsk:
    """What a body asks for.

    Raises:
        InvalidRequestError: malformed or unknown fields.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE.
    """
    fields = Fields(body)
    stream = read_stream(fields)
    request = read_generation(fields, origin, is_stream=stream.is_on)
    fields.refuse("suffix", "text cannot be filled in", allowed=("",))
    echoes = fields.flag("echo")
    num_logprobs = fields.whole("logprobs")
    num_logprobs = -1 if num_logprobs is None else num_logprobs
    max_tokens = fields.whole("max_tokens")
    is_echo_only = echoes and max_tokens == 0
    max_tokens = 1 if is_echo_only else max_tokens
    best_of = fields.whole("best_of")
    prompts = _read_prompts(fields.take("prompt"))
    fields.end()
    ask = CompletionAsk(
        inputs=[
            dataclasses.replace(
                request,
                text=prompt if isinstance(prompt, str) else None,
                token_ids=None if isinstance(prompt, str) else prompt,
                request_id=_request_id(request.request_id, index, len(prompts)),
                best_of=best_of,
                max_tokens=_MAX_TOKENS_DEFAULT if max_tokens is None else max_tokens,
                sampling=dataclasses.replace(
                    request.sampling,
                    num_logprobs=num_logprobs,
                    num_prompt_logprobs=num_logprobs if echoes else -1,
                ),
            )
            for index, prompt in enumerate(prompts)
        ],
        stream=stream,
        echoes=echoes,
        is_echo_only=is_echo_only,
    )
    _check_stream(ask)
    return ask


async def send_completion(
    exchange: Exchange, ask: CompletionAsk, service: GenerationService
) -> None:
    """Generate and send the reply.

    Raises:
        PageframeError: refused, failed, cancelled or too late.
    """
    inputs = ask.inputs
    first = inputs[0]
    facts = service.facts_of(first.model)
    codec = await service.codec(first.model)
    texts = TokenTexts(codec, skip_special_tokens=first.skip_special_tokens)
    echoes: list[Echo] = []
    if ask.echoes:
        echoes = [await _echo(request, service) for request in inputs]
        pairs = zip(inputs, echoes, strict=True)
        inputs = [
            dataclasses.replace(request, text=None, token_ids=echo.token_ids)
            for request, echo in pairs
        ]
    form = CompletionForm(
        texts,
        echoes,
        num_samples=first.num_samples,
        tells_logprobs=ask.tells_logprobs,
        is_echo_only=ask.is_echo_only,
    )
    choices = Choices(len(inputs), first.num_samples)
    await Reply(exchange, form, choices, ask.stream, facts).send(service, inputs)


@dataclasses.dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that its outputs begin with, as text and as tokens."""

    text: str
    token_ids: Sequence[int]


class CompletionForm:
    """How completions say a piece.

    Args:
        texts: Of single tokens.
        echoes: The prompts, where outputs begin with them; else empty.
        num_samples: Outputs of each prompt.
        tells_logprobs: Whether log-probabilities were asked for.
        is_echo_only: Whether outputs end where their prompts do.
    """

    id_prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def __init__(
        self,
        texts: TokenTexts,
        echoes: Sequence[Echo],
        *,
        num_samples: int,
        tells_logprobs: bool,
        is_echo_only: bool = False,
    ) -> None:
        self._texts = texts
        self._echoes = echoes
        self._num_samples = num_samples
        self._tells_logprobs = tells_logprobs
        self._is_echo_only = is_echo_only
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}

    def whole(self, piece: Piece) -> dict[str, object]:
        """A choice, complete."""
        text = "" if self._is_echo_only else piece.text
        entries: list[TokenLogprobs | int] = [] if self._is_echo_only else [*piece.logprobs]
        # The token behind an echo may be one that ends outputs; asked for were none.
        finish_reason = "length" if self._is_echo_only else piece.finish_reason
        if piece.index not in self._logprobs:
            self._logprobs[piece.index] = CompletionLogprobs(self._texts)
            text, entries = self._with_echo(piece, text, entries)
        logprobs = self._logprobs[piece.index].form(entries) if self._tells_logprobs else None
        return {
            "index": piece.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": (piece.finish_reason and finish_reason) or None,
        }

    def pieces(self, piece: Piece) -> list[dict[str, object]]:
        """The choice's part in the one event of a piece."""
        is_first = piece.index not in self._logprobs
        if not (is_first or piece.text or piece.logprobs or piece.finish_reason):
            return []
        return [self.whole(piece)]

    def _with_echo(
        self, piece: Piece, text: str, entries: list[TokenLogprobs | int]
    ) -> tuple[str, list[TokenLogprobs | int]]:
        """The beginning of a choice, with the prompt in front of it where that was asked for."""
        if not self._echoes:
            return text, entries
        prompt_index = piece.index // self._num_samples
        echo = self._echoes[prompt_index]
        # They come with the first choice of a prompt, and are those of all its choices.
        prompt_logprobs = piece.prompt_logprobs or self._prompt_logprobs.get(prompt_index, [])
        self._prompt_logprobs[prompt_index] = prompt_logprobs
        return echo.text + text, [echo.token_ids[0], *prompt_logprobs, *entries]


async def _echo(request: GenerateInput, service: GenerationService) -> Echo:
    if request.text is not None:
        return Echo(request.text, await service.tokenize(request.model, request.text, None))
    token_ids = list(request.token_ids or ())
    text = await service.detokenize(
        request.model, token_ids, skip_special_tokens=request.skip_special_tokens
    )
    return Echo(text, token_ids)


def _read_prompts(value: object) -> list[str | list[int]]:
    """One prompt or several: a text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    if _is_token_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        if value is None or value == []:
            raise InvalidRequestError("EMPTY_PROMPT", "there is no prompt", num_inputs=0)
        raise malformed("prompt", value, "a text, token ids, or a list of either")
    if len(value) > LIMITS.num_prompts_max:
        raise InvalidRequestError(
            "TOO_MANY_PROMPTS",
            f"there are {len(value)} prompts; at most {LIMITS.num_prompts_max} are allowed",
            field="prompt",
            num_prompts=len(value),
            num_prompts_max=LIMITS.num_prompts_max,
        )
    for index, entry in enumerate(value):
        if not isinstance(entry, str) and not _is_token_ids(entry):
            raise malformed(f"prompt[{index}]", entry, "a text or at least one token id in a list")
    return value


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_stream(ask: CompletionAsk) -> None:
    """Refuse what cannot come in pieces."""
    first = ask.inputs[0]
    if not ask.stream.is_on:
        return
    if first.best_of is not None and first.best_of > first.num_samples:
        raise InvalidRequestError(
            "BEST_OF_STREAMED",
            "the best outputs are known at the end only; leave out stream or best_of",
            field="best_of",
            best_of=first.best_of,
        )
    if ask.echoes and ask.tells_logprobs and first.num_samples > 1:
        raise unimplemented(
            "echo", "in a stream, log-probabilities of the prompt are told for n = 1 only"
        )


def _request_id(request_id: str, index: int, num_prompts: int) -> str:
    """Each prompt is a request of its own, and has a name of its own."""
    return request_id if num_prompts == 1 else f"{request_id[:_REQUEST_ID_LENGTH_MAX]}-{index}"
