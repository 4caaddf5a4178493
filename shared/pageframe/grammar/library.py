"""What llguidance makes of a grammar: one place that knows the library.

    Grammar ──as_library_text──▶ its own notation ──check───▶ fine, or refused with its words
                                                  ──compile─▶ matcher, over a model's vocabulary

llguidance (Moskal et al., https://github.com/guidance-ai/llguidance) walks a trie of the vocabulary
with derivatives of regular expressions and an Earley parser, so that nothing has to be computed
ahead for all states of a grammar. What it does for a token is bounded by fuel. What it does to read
a grammar is so only in part: one that somebody sends is read in a ``child`` first.
"""

import functools
import json
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.grammar import JSON_WHITESPACE, Grammar, GrammarForm

_MESSAGE_LENGTH_MAX = 500

_BOUNDS = LLParserLimits(
    # About 20 ms of reading expressions, and 64 KiB of schema fit in.
    initial_lexer_fuel=1_000_000,
    max_grammar_size=500_000,
    # About 14 ms and 1 ms for one token, as a choice among thousands of texts takes where they
    # begin; what takes more would hold up everybody's step for too long.
    step_lexer_fuel=200_000,
    step_max_items=20_000,
    # 1 to 2 kB each, in every sequence.
    max_lexer_states=32_768,
    # Its messages would hold the grammar and the output.
    verbose_errors=False,
)
_QUIET = 0


def check_grammar(grammar: Grammar) -> None:
    """Refuse what the library cannot follow; may take for ever, see ``child``.

    Raises:
        InvalidRequestError: GRAMMAR_INVALID, with the library's words.
    """
    error = LLMatcher.validate_grammar(_as_library_text(grammar), limits=_BOUNDS)
    if error and not error.startswith("WARNING"):
        raise _invalid(grammar, error)


def compile_grammar(grammar: Grammar, vocabulary: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an output, to be copied for each sequence.

    Takes up to a tenth of a second for most of 64 KiB, nearly all of it without the interpreter
    lock.

    Raises:
        InvalidRequestError: GRAMMAR_INVALID, with the library's words.
    """
    text = _as_library_text(grammar)
    matcher = LLMatcher(vocabulary, text, log_level=_QUIET, limits=_BOUNDS)
    if matcher.is_error():
        raise _invalid(grammar, matcher.get_error())
    return matcher


def failure_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on: GRAMMAR_TOO_COMPLEX, or else GRAMMAR_INVALID."""
    is_over_bound = "TooComplex" in matcher.stop_reason() or "too many" in matcher.get_error()
    return "GRAMMAR_TOO_COMPLEX" if is_over_bound else "GRAMMAR_INVALID"


@functools.lru_cache(maxsize=2)
def load_vocabulary(
    folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> LLTokenizer | None:
    """The bytes of every token of a model; None if its folder does not tell them.

    Takes half a second for 49,152 tokens, with the interpreter lock held; the last two are kept.

    Args:
        folder: Hugging Face folder with a ``tokenizer.json``.
        vocab_size: Number of token ids that logits have.
        eos_token_ids: Tokens with which an output may end.

    Raises:
        PreconditionError: TOKENIZER_INVALID; the file is no tokeniser that the library knows.
    """
    path = folder / "tokenizer.json"
    ends = [token_id for token_id in eos_token_ids if token_id < vocab_size]
    if not ends or not path.is_file():
        return None
    try:
        return LLTokenizer(path.read_text("utf-8"), n_vocab=vocab_size, eos_token=ends)
    except (ValueError, OSError) as error:
        raise PreconditionError(
            "TOKENIZER_INVALID", f"{path} cannot be used for grammars: {_in_one_line(str(error))}"
        ) from None


def _as_library_text(grammar: Grammar) -> str:
    if grammar.form is GrammarForm.REGEX:
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.form is GrammarForm.LARK:
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise _invalid(grammar, f"it is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _invalid(grammar, "a schema is a JSON object")
    try:
        return LLMatcher.grammar_from_json_schema(
            grammar.text, defaults={"whitespace_pattern": JSON_WHITESPACE}
        )
    except ValueError as error:
        raise _invalid(grammar, str(error)) from None


def _invalid(grammar: Grammar, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        "GRAMMAR_INVALID",
        f"{grammar.form.value} cannot be used: {_in_one_line(why)}",
        field=grammar.form.value,
    )


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:_MESSAGE_LENGTH_MAX]
