"""A vocabulary of fourteen tokens, written out, as grammars see it."""

from llguidance import LLTokenizer, TokenizerWrapper

from pageframe.core.grammar import Grammar, GrammarForm

TOKENS = [
    b"<end>", b"a", b"b", b"ab", b"1", b"2", b"12", b"{", b"}", b'"', b":", b",", b" ", b"<stop>",
]  # fmt: skip
END, A, B, AB, ONE, TWO, TWELVE, OPEN, CLOSE, QUOTE, COLON, COMMA, SPACE, STOP = range(len(TOKENS))
VOCAB_SIZE = len(TOKENS)


class _Tokens:
    eos_token_id = END
    bos_token_id = None
    special_token_ids = (END, STOP)
    tokens = TOKENS

    def __call__(self, text):
        """The longest token first; what is in no token is left out."""
        token_ids = []
        while text:
            longest = max(
                (token for token in TOKENS if text.startswith(token)), key=len, default=None
            )
            if longest is not None:
                token_ids.append(TOKENS.index(longest))
            text = text[len(longest or b"1") :]
        return token_ids


def vocabulary():
    return LLTokenizer(TokenizerWrapper(_Tokens()), n_vocab=VOCAB_SIZE, eos_token=[END])


def regex(text):
    return Grammar(GrammarForm.REGEX, text)


def schema(text):
    return Grammar(GrammarForm.JSON_SCHEMA, text)
