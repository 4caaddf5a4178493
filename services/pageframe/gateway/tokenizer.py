"""Text to token ids and back, from a model's Hugging Face folder, without transformers.

``tokenizer.json`` holds the whole tokeniser; ``tokenizer_config.json`` adds the names of special
tokens, and sometimes special tokens themselves; the chat template is a file beside them or an entry
of the configuration. What transformers' ``AutoTokenizer`` makes of these files is the yardstick.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.gateway.chat import ChatMessage, ChatTemplate, Tool
from pageframe.gateway.detokenizer import Detokenizer, Vocabulary

_NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Text is counted piece by piece; a cut can add a few tokens that the whole text has not.
_PIECE_NUM_CHARACTERS = 64 * 1024
_NUM_TOKENS_PER_CUT = 16
# Fewer characters per token of room than this are encoded without counting first.
_NUM_CHARACTERS_PER_TOKEN = 8


class TextCodec:
    """Tokeniser, detokeniser and chat template of one model. Immutable and shared by requests."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
    ) -> None:
        """Wrap a ready tokeniser; ``load`` makes one from a folder."""
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, special_tokens)
        )

    @classmethod
    def load(cls, folder: Path) -> "TextCodec":
        """Read the tokeniser of a Hugging Face model folder.

        Raises:
            PreconditionError: reason TOKENIZER_MISSING, TOKENIZER_MALFORMED or
                CHAT_TEMPLATE_MALFORMED, naming the file.
        """
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config = _read_config(folder / "tokenizer_config.json")
        special_tokens = _named_special_tokens(config)
        _add_special_tokens(tokenizer, config)
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        return cls(tokenizer, special_tokens, _find_chat_template(folder, config))

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model begins a text with.

        Holds the interpreter for about 1 µs a byte; see ``encode_released``.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_released(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As ``encode``, but other threads run meanwhile; for long text."""
        encodings = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)

    def render_chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> str:
        """The prompt text of a chat; encode it without adding special tokens.

        Raises:
            InvalidRequestError: reason CHAT_TEMPLATE_MISSING, CHAT_TEMPLATE_REFUSED or
                TOOLS_UNSUPPORTED.
        """
        if self._chat_template is None:
            raise InvalidRequestError(
                "CHAT_TEMPLATE_MISSING",
                "this model has no chat template; send text or token ids",
            )
        return self._chat_template.render(messages, tools)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a chat, up to where the assistant begins to speak.

        The template writes all special tokens itself, so none are added.

        Raises:
            InvalidRequestError: reason CHAT_TEMPLATE_MISSING or CHAT_TEMPLATE_REFUSED.
        """
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def num_tokens_at_least(self, text: str, num_tokens_max: int) -> int:
        """A lower bound of the number of tokens of ``text``; exact work stops past the maximum.

        Encoding eight megabytes takes seconds, and saying that they are too long must not. Returns
        0 for text that is worth encoding, and more than ``num_tokens_max`` for text that is not.
        """
        if len(text) <= _NUM_CHARACTERS_PER_TOKEN * num_tokens_max:
            return 0
        num_tokens = 0
        for start in range(0, len(text), _PIECE_NUM_CHARACTERS):
            piece = text[start : start + _PIECE_NUM_CHARACTERS]
            encodings = self._tokenizer.encode_batch([piece], add_special_tokens=False)
            num_tokens += max(0, len(encodings[0].ids) - _NUM_TOKENS_PER_CUT)
            if num_tokens > num_tokens_max:
                return num_tokens
        return 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as bytes; they may be a part of a character."""
        return self._vocabulary.token_bytes(token_id)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh stream of tokens to text, equal to ``decode`` when put together."""
        return self._vocabulary.detokenizer(skip_special_tokens=skip_special_tokens)


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise PreconditionError("TOKENIZER_MISSING", f"{path} does not exist", path=path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise PreconditionError(
            "TOKENIZER_MALFORMED", f"{path} is no tokeniser: {error}", path=path
        ) from error
    # Both may be baked into the file, for training; a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PreconditionError(
            "TOKENIZER_MALFORMED", f"{path} is no JSON: {error}", path=path
        ) from error
    if not isinstance(config, dict):
        raise PreconditionError("TOKENIZER_MALFORMED", f"{path} holds no object", path=path)
    return config


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: _token_text(config.get(name)) for name in _NAMED_SPECIAL_TOKENS}
    return {name: text for name, text in tokens.items() if text is not None}


def _token_text(entry: object) -> str | None:
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else None


def _added_token(entry: object, *, special: bool) -> AddedToken | None:
    if not isinstance(entry, Mapping):
        return None if not isinstance(entry, str) else AddedToken(entry, special=special)
    text = _token_text(entry)
    if text is None:
        return None
    return AddedToken(
        text,
        single_word=bool(entry.get("single_word", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", False)),
        special=special or bool(entry.get("special", False)),
    )


def _add_special_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the configuration's special tokens that ``tokenizer.json`` lacks, in its order of ids."""
    numbered = config.get("added_tokens_decoder") or {}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [config.get(name) for name in _NAMED_SPECIAL_TOKENS]
    entries = [
        *(_added_token(numbered[key], special=False) for key in sorted(numbered, key=int)),
        *(_added_token(entry, special=True) for entry in named),
        *(
            _added_token(entry, special=True)
            for entry in (extra.values() if isinstance(extra, Mapping) else extra)
        ),
    ]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in entries:
        if token is None or token.content in known:
            continue
        known.add(token.content)
        if token.special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])


def _find_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Sequence):
        entry = {item["name"]: item["template"] for item in entry}
    if isinstance(entry, Mapping):
        template = entry.get("default")
        return template if isinstance(template, str) else None
    return None
