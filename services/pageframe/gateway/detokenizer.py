"""Tokens to text, a few at a time.

A token is not a piece of text: a character may span several tokens, and what a token adds can
depend on the one before it. A detokeniser gives out text only when no later token can change it:

    tokens    a  a  a  a | b  b            a: text given out      b: held back
    text      "Grüß Gott" | <E2 82         the first bytes of "€"

The deltas put together equal the decoding of all tokens at once, and they do not depend on how
tokens were grouped into calls.
"""

import codecs
import copy
import json
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_REPLACEMENT_CHARACTER = "\ufffd"
# A character has at most four bytes, so the fifth token behind it cannot belong to it any more.
_NUM_UNSETTLED_TOKENS_MAX = 4
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """A stream of tokens to text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that has become certain."""
        ...

    def flush(self) -> str:
        """Return the rest; incomplete characters become U+FFFD. Nothing may be fed afterwards."""
        ...

    def fork(self) -> "Detokenizer":
        """An independent copy in the same state."""
        ...


class Vocabulary:
    """What detokenisers know of a tokeniser's tokens; made once and shared."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the vocabulary and the kind of decoder of ``tokenizer``."""
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        num_ids = max(vocabulary.values(), default=-1) + 1
        self._tokens: list[str | None] = [None] * num_ids
        for token, token_id in vocabulary.items():
            self._tokens[token_id] = token
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        self._is_byte_level = _decoder_type(tokenizer) == "ByteLevel"
        self._bytes_of_token = (
            [_byte_level_bytes(token or "") for token in self._tokens]
            if self._is_byte_level
            else []
        )
        self._bytes_without_special = list(self._bytes_of_token)
        if self._is_byte_level:
            for token_id in self._special_ids:
                self._bytes_without_special[token_id] = b""

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A fresh detokeniser of the kind that this tokeniser needs."""
        if self._is_byte_level:
            return ByteLevelDetokenizer(
                self._bytes_without_special if skip_special_tokens else self._bytes_of_token
            )
        silent_ids = self._special_ids if skip_special_tokens else set[int]()
        return WindowDetokenizer(self._tokenizer, self._tokens, silent_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun; nothing for an id without a token."""
        token = self._tokens[token_id] if token_id < len(self._tokens) else None
        if token is None:
            return b""
        if self._is_byte_level:
            return self._bytes_of_token[token_id]
        if _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        # Said twice: the first time it may look different, since a text begins with it.
        once = self._tokenizer.decode([token_id], skip_special_tokens=False)
        twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(once) :].encode("utf-8")


class SilentDetokenizer:
    """For replicas without a tokeniser: tokens have no text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return nothing."""
        return ""

    def flush(self) -> str:
        """Return nothing."""
        return ""

    def fork(self) -> "SilentDetokenizer":
        """Itself; it has no state."""
        return self


class ByteLevelDetokenizer:
    """For byte-level tokenisers: each token is bytes, and the text is those bytes as UTF-8."""

    def __init__(self, bytes_of_token: Sequence[bytes]) -> None:
        """``bytes_of_token[token_id]``; ids past its end are silent."""
        self._bytes_of_token = bytes_of_token
        self._held = b""  # the beginning of a character

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that has become certain."""
        table = self._bytes_of_token
        try:
            # Mostly one: all else would cost more than what it does.
            if len(token_ids) == 1:
                data = table[token_ids[0]]
            else:
                data = b"".join([table[token_id] for token_id in token_ids])
        except IndexError:
            # A model may have more rows of logits than its tokeniser has tokens.
            known = [token_id for token_id in token_ids if token_id < len(table)]
            data = b"".join([table[token_id] for token_id in known])
        return self._decode(self._held + data, is_end=False)

    def flush(self) -> str:
        """Return the rest; an incomplete character becomes U+FFFD."""
        return self._decode(self._held, is_end=True)

    def fork(self) -> "ByteLevelDetokenizer":
        """An independent copy in the same state."""
        other = ByteLevelDetokenizer(self._bytes_of_token)
        other._held = self._held
        return other

    def _decode(self, data: bytes, *, is_end: bool) -> str:
        text, num_decoded = codecs.utf_8_decode(data, "replace", is_end)
        self._held = data[num_decoded:]
        return text


class WindowDetokenizer:
    """For all other tokenisers: decode a short window, and give out what it has beyond before.

    ``window[:num_settled]`` is what was given out last, and is decoded again only because a token
    may look different at the very beginning of a text. Byte tokens (``<0xE2>``) are held back until
    their run ends, since one invalid byte turns the whole run into U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: Sequence[str | None],
        silent_ids: set[int],
    ) -> None:
        """``tokens[token_id]`` is None where there is no token; ``silent_ids`` give no text."""
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._silent_ids = silent_ids
        self._window: list[int] = []
        self._num_settled = 0
        self._num_given = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that has become certain."""
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """Return the rest."""
        return self._give(self._decode(self._window))

    def fork(self) -> "WindowDetokenizer":
        """An independent copy in the same state."""
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def _feed_one(self, token_id: int) -> str:
        known = token_id < len(self._tokens) and self._tokens[token_id] is not None
        if not known or token_id in self._silent_ids:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(self._tokens[token_id] or ""):
            return ""
        text = self._decode(self._window)
        num_unsettled = len(self._window) - self._num_settled
        if text.endswith(_REPLACEMENT_CHARACTER) and num_unsettled <= _NUM_UNSETTLED_TOKENS_MAX:
            return ""
        return self._give(text)

    def _give(self, text: str) -> str:
        """Give out what ``text``, the window's, has beyond the settled part; move the window."""
        delta = text[self._num_given :]
        # One token is enough to make the next one not the first.
        del self._window[:-1]
        self._num_settled = len(self._window)
        self._num_given = len(self._decode(self._window))
        return delta

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _decoder_type(tokenizer: Tokenizer) -> str | None:
    """What ``tokenizer.json`` calls the decoder; None without one."""
    if tokenizer.decoder is None:
        return None
    # Its pickled form is its JSON; that of the whole tokeniser would take a tenth of a second.
    decoder: dict[str, str] = json.loads(tokenizer.decoder.__getstate__())
    return decoder["type"]


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_LATIN_OF_CHARACTER).encode("latin-1")
    except UnicodeEncodeError:
        # Added tokens are plain text.
        return token.encode("utf-8")


def _latin_of_character() -> dict[int, int]:
    """The printable alphabet of byte-level tokenisers (Radford et al. 2019, GPT-2), reversed.

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 onwards. Latin-1
    characters that stand for no byte become one that is not in Latin-1.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {0x100 + index: byte for index, byte in enumerate(others)}
    return table | dict.fromkeys(others, ord(_REPLACEMENT_CHARACTER))


_LATIN_OF_CHARACTER = _latin_of_character()
