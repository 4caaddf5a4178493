"""A tokeniser for simulations: every token is one letter, so that stop strings have a meaning."""

from collections.abc import Sequence
from typing import cast

from pageframe.core.replica import ReplicaFacts
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.detokenizer import Detokenizer
from pageframe.gateway.tokenizer import TextCodec

_FIRST = ord("a")
_NUM_LETTERS = 26


def letters_of(token_ids: Sequence[int]) -> str:
    """The text of tokens."""
    return "".join(chr(_FIRST + token_id % _NUM_LETTERS) for token_id in token_ids)


class LetterDetokenizer:
    """Gives out each letter at once."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        return letters_of(token_ids)

    def flush(self) -> str:
        """Nothing is ever held back."""
        return ""

    def fork(self) -> "LetterDetokenizer":
        """It has no state."""
        return self


class LetterCodec:
    """The part of ``TextCodec`` that requests with token ids use."""

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A detokeniser."""
        return LetterDetokenizer()


class LetterCodecs(CodecStore):
    """Serves letters for every model."""

    async def find(self, facts: ReplicaFacts) -> TextCodec | None:
        """The codec."""
        return cast("TextCodec", LetterCodec())
