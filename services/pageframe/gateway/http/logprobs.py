"""Log-probabilities in OpenAI's two forms: one of completions, one of chat completions."""

from collections.abc import Sequence

from pageframe.core.step import TokenLogprobs
from pageframe.gateway.detokenizer import Detokenizer, SilentDetokenizer
from pageframe.gateway.tokenizer import TextCodec

# JSON has no infinity. This is OpenAI's own word for "never".
_LOGPROB_MIN = -9999.0


class TokenTexts:
    """Texts of single tokens; looked up once each."""

    def __init__(self, codec: TextCodec | None, *, skip_special_tokens: bool) -> None:
        """``codec`` is None for a replica without a tokeniser: then a token is its number."""
        self._codec = codec
        self._skip_special_tokens = skip_special_tokens
        self._bytes: dict[int, bytes] = {}

    def data(self, token_id: int) -> bytes:
        """The bytes of a token; they may be a part of a character."""
        found = self._bytes.get(token_id)
        if found is None:
            found = f"token_id:{token_id}".encode()
            if self._codec is not None:
                found = self._codec.token_bytes(token_id)
            self._bytes[token_id] = found
        return found

    def text(self, token_id: int) -> str:
        """A name for a token: its text, or its bytes where they are no text."""
        data = self.data(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def detokenizer(self) -> Detokenizer:
        """To find out where in its output a token stands."""
        if self._codec is None:
            return SilentDetokenizer()
        return self._codec.detokenizer(skip_special_tokens=self._skip_special_tokens)


def chat_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, object]:
    """Those of a chat completion, or of a piece of one."""
    content = [
        {
            **_chat_token(entry.token_id, entry.logprob, texts),
            "top_logprobs": [
                _chat_token(token_id, logprob, texts)
                for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            ],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Those of one completion, piece by piece: offsets go on where the last piece ended."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._detokenizer = texts.detokenizer()
        self._num_characters = 0

    def form(self, entries: Sequence[TokenLogprobs | int]) -> dict[str, object]:
        """The next tokens; a bare token id is one of which no log-probability is known."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            token_id = entry if isinstance(entry, int) else entry.token_id
            tokens.append(self._texts.text(token_id))
            offsets.append(self._num_characters)
            self._num_characters += len(self._detokenizer.feed([token_id]))
            logprobs.append(None if isinstance(entry, int) else _finite(entry.logprob))
            tops.append(None if isinstance(entry, int) else self._top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            # Two tokens may have one text; the better one has it.
            top.setdefault(self._texts.text(token_id), _finite(logprob))
        return top


def _chat_token(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, object]:
    data = texts.data(token_id)
    return {"token": texts.text(token_id), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(_LOGPROB_MIN, logprob)
